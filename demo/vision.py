"""A miniature CLIP: `python -m demo.vision OUT`, an ordinary CLIPModel folder of 0.75 million weights.

It learns what a CLIP learns, which caption belongs to which picture, from scenes drawn anew at every step with their
true captions. Four things are special, since it has a minute and a half instead of weeks:

- a patch is a cell of the scene (24 pixels), so a picture has 9 patches;
- the patch embedding starts as a whitening of such patches: principal components of equal variance, rotated at random.
  From the usual start the small, dark differences that tell shapes apart take ten times as long;
- positions start large, about as large as what is in a patch, or the tower forgets where a thing is;
- each picture also sees one false caption of its own, with one or more facts replaced (half of them: one shape).

`--pixels 224 --patch 16 --width 384 --layers 6` is a tower for a GPU, which is used where there is one. A patch is then
a part of a thing, which the layers have to put together. `--pairs` adds other pictures with captions, half of each
batch. Refused: patches that do not fill the picture, and patches of fewer values than the width, of which the whitening
cannot be made.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from aligngpt.batch import load_in_order
from aligngpt.data.llava_json import image_path, read_llava_json
from aligngpt.data.scenes import CELL, PIXELS, SHAPES, Scene, caption, corrupt, draw_scene, render, write_json
from aligngpt.image import normalised, open_image, squared
from demo.miniature import SCENE_WORDS, Optimizers, arguments, device, made_whole, run, word_tokenizer

WIDTH, LAYERS, TEXT_LAYERS = 128, 2, 2
MAX_WORDS = 20  # three objects take 17, BOS and EOS
BATCH = 96
WHITENED = 60_000  # patches, at most, that the whitening is computed from
HEAD_WIDTH = 32
WORKERS = 8  # processes that draw batches for a GPU, which one alone would keep waiting


def build(
    tokenizer: PreTrainedTokenizerFast,
    random: Random,
    *,
    pixels: int = PIXELS,
    patch: int = CELL,
    width: int = WIDTH,
    layers: int = LAYERS,
) -> CLIPModel:
    """A fresh model; `random` draws the scenes that the patch embedding's start is computed from."""
    text = {
        "hidden_size": width // 2,
        "intermediate_size": 2 * width,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": width // HEAD_WIDTH,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": pixels,
        "patch_size": patch,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.normal_(std=1.0)
        model.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
        model.text_model.embeddings.token_embedding.weight.normal_(std=0.5)
        model.vision_model.embeddings.patch_embedding.weight.copy_(
            whitening(random, pixels=pixels, patch=patch, width=width)
        )
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


def whitening(random: Random, *, pixels: int = PIXELS, patch: int = CELL, width: int = WIDTH) -> Tensor:
    """(width, 3, patch, patch): the leading principal components of patches, of like variance, rotated at random."""
    scenes = [draw_scene(random) for _ in range(min(1500, WHITENED * patch**2 // pixels**2))]
    pictures = normalised(drawn(scenes, random, pixels=pixels), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    patches = F.unfold(pictures, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # (all of them, 3 · patch · patch)
    patches = patches - patches.mean(0)
    variances, components = torch.linalg.eigh(patches.T @ patches / patches.shape[0])  # in rising order
    variances, components = variances.flip(0)[:width], components.flip(1)[:, :width]
    scaled = 1.2 * (components / (variances + variances[20] / 10).sqrt()).T
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    return (rotation @ scaled).view(width, 3, patch, patch)


def drawn(scenes: Sequence[Scene], random: Random, *, pixels: int = PIXELS) -> Tensor:
    """(scenes, 3, pixels, pixels), uint8."""
    pictures = np.stack([np.asarray(render(scene, random, pixels=pixels)) for scene in scenes])
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())


def false_scene(scene: Scene, random: Random) -> Scene:
    """What a false caption claims: half of the time one shape is another, else one or more facts are."""
    if random.random() < 0.5:
        changed = random.randrange(len(scene))
        shape = random.choice([shape for shape in SHAPES if shape != scene[changed].shape])
        return tuple(dataclasses.replace(t, shape=shape) if n == changed else t for n, t in enumerate(scene))
    while (claimed := corrupt(scene, random.choice((0.1, 0.2, 0.4)), random)) == scene:
        pass
    return claimed


Batch = tuple[Tensor, Tensor, Tensor]  # pictures, uint8; ids and attention mask of captions, first the true ones


Pair = tuple[Tensor, str]  # picture, uint8, and its caption


class Batches(Dataset[Batch]):
    """New batches by step: all from one `Random`, in order, or each from its own where several processes draw them.

    pairs: shown beside scenes, half of a batch, each with the caption of one that is not in the batch as a false one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        random: Random,
        *,
        pixels: int = PIXELS,
        seed: int = 0,
        pairs: Sequence[Pair] = (),
    ):
        self.tokenizer, self.random, self.pixels, self.seed, self.pairs = tokenizer, random, pixels, seed, pairs

    def __getitem__(self, step: int) -> Batch:
        random = self.random if get_worker_info() is None else Random(f"vision {self.seed} {step}")
        pairs = random.sample(self.pairs, BATCH) if self.pairs else []
        shown, others = pairs[: BATCH // 2], pairs[BATCH // 2 :]
        scenes = [draw_scene(random) for _ in range(BATCH - len(shown))]
        pictures = torch.cat((drawn(scenes, random, pixels=self.pixels), *(picture[None] for picture, _ in shown)))
        true = [caption(scene) for scene in scenes] + [text for _, text in shown]
        false = [caption(false_scene(scene, random)) for scene in scenes] + [text for _, text in others]
        text = self.tokenizer([*true, *false], padding=True, return_tensors="pt")
        return pictures, text["input_ids"], text["attention_mask"]


def read_pairs(file: Path, pixels: int) -> list[Pair]:
    """The pairs of a LLaVA JSON file, whose paths are relative to its folder; of captions the words that are read."""
    pairs = []
    for sample in read_llava_json(file):
        picture = open_image(image_path(file.parent, sample.images[0]))
        words = re.findall(r"\w+", sample.turns[-1].text.lower())[: MAX_WORDS - 2]
        pairs.append((squared(picture, size=pixels, mean=OPENAI_CLIP_MEAN, aspect="square"), " ".join(words)))
    return pairs


def losses(model: CLIPModel, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """CLIP's two cross-entropies of each batch: a picture's caption among all captions, true and false, and a caption's
    picture among all pictures."""
    target = torch.arange(BATCH, device=model.device)
    for batch in batches:
        pictures, ids, mask = (part.to(model.device) for part in batch)
        pictures = normalised(pictures, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        image_embeds = F.normalize(model.get_image_features(pictures).pooler_output, dim=-1)
        text_embeds = F.normalize(model.get_text_features(ids, attention_mask=mask).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T
        yield F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)


def main() -> None:
    parser = arguments("demo.vision", __doc__, width=WIDTH, layers=LAYERS)
    parser.add_argument("--pixels", type=int, default=PIXELS, help=f"side of a picture; default: {PIXELS}")
    parser.add_argument("--patch", type=int, default=CELL, help=f"side of a patch, in pixels; default: {CELL}")
    parser.add_argument("--pairs", type=Path, help="LLaVA JSON of pictures and captions to learn beside scenes")
    args = parser.parse_args()
    if args.pixels % args.patch:
        parser.error(f"--patch is {args.patch}; it needs to divide --pixels, {args.pixels}")
    if 3 * args.patch**2 < args.width:
        parser.error(f"--patch is {args.patch}, {3 * args.patch**2} values; it needs as many as --width, {args.width}")
    torch.manual_seed(args.seed)
    random = Random(f"vision {args.seed}")
    pairs = read_pairs(args.pairs, args.pixels) if args.pairs else []
    tokenizer = word_tokenizer(["and", *SCENE_WORDS, *(word for _, text in pairs for word in text.split())])
    size = {"pixels": args.pixels, "patch": args.patch, "width": args.width, "layers": args.layers}
    model = build(tokenizer, random, **size).to(device())
    optimizers = Optimizers(model, matrix_lr=0.008, lr=2e-3, betas=(0.9, 0.98))
    batches = load_in_order(
        Batches(tokenizer, random, pixels=args.pixels, seed=args.seed, pairs=pairs),
        range(args.steps),
        workers=WORKERS if model.device.type == "cuda" else 0,
    )
    with made_whole(args.out) as folder:
        run(losses(model, batches), optimizers, args.steps, folder)
        model.save_pretrained(folder)
        tokenizer.model_max_length = MAX_WORDS
        tokenizer.save_pretrained(folder)
        # What `aligngpt.image.preprocess` needs to know; the rest is CLIP's default.
        normalisation = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
        sizes = {"size": {"shortest_edge": args.pixels}, "crop_size": {"height": args.pixels, "width": args.pixels}}
        kind = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        write_json(folder / "preprocessor_config.json", kind | sizes | normalisation)


if __name__ == "__main__":
    main()
