"""A miniature CLIP: `python -m demo.vision OUT`, an ordinary CLIPModel folder of 0.75 million weights.

It learns what a CLIP learns, which caption belongs to which picture, from scenes drawn anew at every step with their
true captions. Four things are special, since it has a minute and a half instead of weeks:

- a patch is a cell of the scene (24 pixels), so a picture has 9 patches;
- the patch embedding starts as a whitening of such patches: principal components of equal variance, rotated at random.
  From the usual start the small, dark differences that tell shapes apart take ten times as long;
- positions start large, about as large as what is in a patch, or the tower forgets where a thing is;
- each picture also sees one false caption of its own, with one or more facts replaced (half of them: one shape).
"""

import dataclasses
import math
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from aligngpt.data.scenes import CELL, PIXELS, SHAPES, Scene, caption, corrupt, draw_scene, render, write_json
from demo.miniature import SCENE_WORDS, Optimizers, made_whole, read_arguments, run, word_tokenizer

WIDTH, TEXT_WIDTH, LAYERS, TEXT_LAYERS = 128, 64, 2, 2
MAX_WORDS = 20  # three objects take 17, BOS and EOS
BATCH = 96


def build(tokenizer: PreTrainedTokenizerFast, random: Random) -> CLIPModel:
    """A fresh model; `random` draws the scenes that the patch embedding's start is computed from."""
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": PIXELS,
        "patch_size": CELL,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.normal_(std=1.0)
        model.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
        model.text_model.embeddings.token_embedding.weight.normal_(std=0.5)
        model.vision_model.embeddings.patch_embedding.weight.copy_(whitening(random))
        model.logit_scale.fill_(math.log(1 / 0.07))
    return model


def whitening(random: Random, *, num_scenes: int = 1500) -> Tensor:
    """(WIDTH, 3, CELL, CELL): the leading principal components of patches, of like variance, rotated at random."""
    scenes = [draw_scene(random) for _ in range(num_scenes)]
    pictures = pixels([render(scene, random) for scene in scenes])
    patches = F.unfold(pictures, CELL, stride=CELL).transpose(1, 2).flatten(0, 1)  # (scenes · 9, 3 · CELL · CELL)
    patches = patches - patches.mean(0)
    variances, components = torch.linalg.eigh(patches.T @ patches / patches.shape[0])  # in rising order
    variances, components = variances.flip(0)[:WIDTH], components.flip(1)[:, :WIDTH]
    scaled = 1.2 * (components / (variances + variances[20] / 10).sqrt()).T
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    return (rotation @ scaled).view(WIDTH, 3, CELL, CELL)


def pixels(pictures: list[Image.Image]) -> Tensor:
    """(pictures, 3, 72, 72), normalised as `aligngpt.image.preprocess` does for pictures of the right size."""
    values = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    normal = (values - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(0, 3, 1, 2)))


def false_scene(scene: Scene, random: Random) -> Scene:
    """What a false caption claims: half of the time one shape is another, else one or more facts are."""
    if random.random() < 0.5:
        changed = random.randrange(len(scene))
        shape = random.choice([shape for shape in SHAPES if shape != scene[changed].shape])
        return tuple(dataclasses.replace(t, shape=shape) if n == changed else t for n, t in enumerate(scene))
    while (claimed := corrupt(scene, random.choice((0.1, 0.2, 0.4)), random)) == scene:
        pass
    return claimed


def losses(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[Tensor]:
    """CLIP's two cross-entropies of a new batch, for ever: a picture's caption among all captions, true and false, and
    a caption's picture among all pictures."""
    target = torch.arange(BATCH)
    while True:
        scenes = [draw_scene(random) for _ in range(BATCH)]
        pictures = pixels([render(scene, random) for scene in scenes])
        captions = [caption(scene) for scene in scenes] + [caption(false_scene(scene, random)) for scene in scenes]
        text = tokenizer(captions, padding=True, return_tensors="pt")
        image_embeds = F.normalize(model.get_image_features(pictures).pooler_output, dim=-1)
        text_embeds = model.get_text_features(text["input_ids"], attention_mask=text["attention_mask"]).pooler_output
        text_embeds = F.normalize(text_embeds, dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T
        yield F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)


def main() -> None:
    args = read_arguments("demo.vision", __doc__)
    random = Random(f"vision {args.seed}")
    tokenizer = word_tokenizer(["and", *SCENE_WORDS])
    model = build(tokenizer, random)
    optimizers = Optimizers(model, matrix_lr=0.008, lr=2e-3, betas=(0.9, 0.98))
    with made_whole(args.out) as folder:
        run(losses(model, tokenizer, random), optimizers, args.steps, folder)
        model.save_pretrained(folder)
        tokenizer.model_max_length = MAX_WORDS
        tokenizer.save_pretrained(folder)
        # What `aligngpt.image.preprocess` needs to know; the rest is CLIP's default.
        normalisation = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
        sizes = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
        kind = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        write_json(folder / "preprocessor_config.json", kind | sizes | normalisation)


if __name__ == "__main__":
    main()
