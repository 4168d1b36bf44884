"""A miniature LLM: `python -m demo.language OUT`, an ordinary LlamaForCausalLM folder of half a million weights.

A real LLM comes knowing how to describe and to answer, how far to trust a text whose author says how sure he is, and it
reads image rows that a projector puts near word embeddings. This one gets the same from documents of words alone. Two
things about them are special:

- **Scenes in words.** A document begins with nine rows, one a cell, each the sum of the embeddings of the words that
  describe the cell: "top left" and, if a thing is there, its size, color and shape. This is what the projector will
  have to make of a picture; noise is added, since it never will exactly. For a tower with more patches, `--grid 14` for
  14 × 14, there is a row a patch: its cell's place, and what the cell's thing is if it covers the middle of the patch.
  The projector sees patches one by one, so that is what it can make. The price: what was said once is said in a dozen
  rows, and sequences are three times as long.
- **Sureness.** In three of five documents, or the share that `--sureness` names, one word after BOS, from "wrong" to
  "exact", says at what rate the caption's facts are true. That is the place where the alignment token will stand; which
  level is which word, stage 1 has to find out.

After the rows come blocks that see the rows and themselves but not each other: a caption, corrupted fact by fact like
those of stage 1 though less often, and questions with answers. A GPU is used where there is one.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aligngpt.data.scenes import COLUMNS, KINDS, NUMBERS, ROWS, Scene, ask, caption, corrupt, draw_scene
from demo.miniature import CHAT_TEMPLATE, SCENE_WORDS, Optimizers, arguments, device, made_whole, run, word_tokenizer

WIDTH, LAYERS, GRID = 128, 3, 3
HEAD_WIDTH = 32
BATCH = 64
QUESTIONS = 8  # blocks of a document beside its caption
NOISE = 1.0  # of the rows, in standard deviations of the word embeddings
SHARE_SURE = 0.6  # of documents that say how sure their author is
SURENESS = ("wrong", "doubtful", "partly", "mostly", "exact")
QUESTION_WORDS = ["what", "size", "color", "shape", "is", "at", "the", "where", "how", "many", "objects"]
QUESTION_WORDS += ["there", "a", "yes", "no"]
WORDS = ["and", *SCENE_WORDS, *NUMBERS, *QUESTION_WORDS, *SURENESS]
ROW_WORDS = 5  # at most
REACH = {"small": 0.25, "large": 0.375}  # of a thing from its cell's middle, in cells


@dataclass
class Document:
    """A document as token ids: `rows` the words of each row, then the blocks, end to end."""

    sureness: int | None
    rows: list[list[int]]
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # the id that is learned, -100 elsewhere; not shifted
    block: list[int] = field(default_factory=list)  # 1, 2, …
    place: list[int] = field(default_factory=list)  # within the block

    def add(self, prompt: list[int], answer: list[int]) -> None:
        number = self.block[-1] + 1 if self.block else 1
        self.ids += prompt + answer
        self.labels += [-100] * len(prompt) + answer
        self.block += [number] * (len(prompt) + len(answer))
        self.place += range(len(prompt) + len(answer))


def document(
    tokenizer: PreTrainedTokenizerFast, random: Random, *, grid: int = GRID, share_sure: float = SHARE_SURE
) -> Document:
    """A scene, a caption corrupted at a random rate, and questions."""

    def ids(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split(" "))

    scene = draw_scene(random)
    corruption = random.random() ** 2
    sure = SURENESS[min(int((1 - corruption) * len(SURENESS)), len(SURENESS) - 1)]
    says_so = random.random() < share_sure
    result = Document(ids(sure)[0] if says_so else None, [ids(words) for words in row_words(scene, grid)])
    result.add([], ids(caption(corrupt(scene, corruption, random)) + " \n"))
    while result.block[-1] < 1 + QUESTIONS:
        question = ask(scene, random.choice(KINDS), random)
        if question is not None:
            result.add(ids(f"\n {question.text} :"), ids(f"{question.answer} {tokenizer.eos_token}"))
    return result


def row_words(scene: Scene, grid: int) -> list[str]:
    """What the row of each of grid × grid patches is the sum of."""
    things = {(thing.row, thing.column): thing for thing in scene}
    middles = [(patch + 0.5) * 3 / grid for patch in range(grid)]  # in cells
    words = []
    for y, x in itertools.product(middles, middles):
        row, column = ROWS[int(y)], COLUMNS[int(x)]
        words.append(f"{row} {column}")
        thing, dy, dx = things.get((row, column)), abs(y % 1 - 0.5), abs(x % 1 - 0.5)
        # A patch that holds the middle of the cell counts as covered, however large it is.
        if thing and (max(dy, dx) <= 1.5 / grid or math.hypot(dy, dx) <= REACH[thing.size]):
            words[-1] += f" {thing.size} {thing.color} {thing.shape}"
    return words


def losses(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    random: Random,
    *,
    grid: int = GRID,
    share_sure: float = SHARE_SURE,
) -> Iterator[Tensor]:
    """The cross-entropy of captions and answers of a new batch of documents, for ever."""
    while True:
        documents = [document(tokenizer, random, grid=grid, share_sure=share_sure) for _ in range(BATCH)]
        yield document_loss(model, documents)


def document_loss(model: LlamaForCausalLM, documents: list[Document]) -> Tensor:
    """Mean over captions' and answers' tokens. All documents have as many rows."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    device, pad, bos = model.device, model.config.pad_token_id, model.config.bos_token_id
    num_rows = len(documents[0].rows)
    prefix = 2 + num_rows  # BOS, the sureness or a place left free, the rows

    def padded(name: str, value: int) -> Tensor:  # (documents, L), L the longest document's blocks
        ids = pad_sequence([torch.tensor(getattr(d, name)) for d in documents], batch_first=True, padding_value=value)
        return ids.to(device)

    ids, labels, block, place = padded("ids", pad), padded("labels", -100), padded("block", -1), padded("place", 0)
    says_so = torch.tensor([d.sureness is not None for d in documents], device=device)
    start = torch.tensor([[bos, pad if d.sureness is None else d.sureness] for d in documents], device=device)
    words = torch.tensor([[row + [pad] * (ROW_WORDS - len(row)) for row in d.rows] for d in documents], device=device)
    rows = (embedding(words) * (words != pad)[..., None]).sum(2)  # (documents, num_rows, width)
    rows = rows + NOISE * embedding.weight.detach().std() * torch.randn_like(rows)
    inputs = torch.cat((embedding(start), rows, embedding(ids)), dim=1)

    # Prefix tokens are of block 0; a place left free is of none, and takes no position.
    prefix_block = torch.zeros(len(documents), prefix, dtype=torch.int64, device=device)
    prefix_block[~says_so, 1] = -1
    in_block = torch.cat((prefix_block, block), dim=1)
    shift = says_so.long()[:, None]
    row_place = torch.arange(1, 1 + num_rows, device=device) + shift
    positions = torch.cat((torch.zeros_like(shift), shift, row_place, place + num_rows + 1 + shift), dim=1)

    hidden = model.model(
        inputs_embeds=inputs, attention_mask=_sees(in_block, inputs.dtype), position_ids=positions, use_cache=False
    ).last_hidden_state
    document_number, token = (labels != -100).nonzero(as_tuple=True)
    # A block's first token is predicted by the last row, the others by the token before them.
    first = place[document_number, token] == 0
    before = torch.where(first, prefix - 1, prefix + token - 1)
    return F.cross_entropy(model.lm_head(hidden[document_number, before]), labels[document_number, token])


def _sees(block: Tensor, dtype: torch.dtype) -> Tensor:
    """(documents, 1, L, L) additive mask: earlier tokens of the prefix and of one's own block, and oneself."""
    length = block.shape[1]
    query, key = block[:, :, None], block[:, None, :]
    sees = ((key == 0) | ((key == query) & (key > 0))) & torch.ones_like(query == key).tril()
    sees |= torch.eye(length, dtype=torch.bool, device=block.device)
    return torch.zeros(sees.shape, dtype=dtype, device=block.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def build(tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, layers: int = LAYERS) -> LlamaForCausalLM:
    """A fresh model."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_WIDTH,
            num_key_value_heads=width // HEAD_WIDTH,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.3)
    return model


def main() -> None:
    parser = arguments("demo.language", __doc__, width=WIDTH, layers=LAYERS)
    parser.add_argument("--grid", type=int, default=GRID, help=f"patches a side of a picture; default: {GRID}")
    parser.add_argument(
        "--sureness",
        type=float,
        default=SHARE_SURE,
        metavar="SHARE",
        help=f"of documents that say how sure their author is; 0: none; default: {SHARE_SURE}",
    )
    args = parser.parse_args()
    if args.grid < GRID:
        parser.error(f"--grid is {args.grid}; it needs {GRID}, a row for each cell, or more")
    if not 0 <= args.sureness <= 1:
        parser.error(f"--sureness is {args.sureness}; it needs a share, from 0 to 1")
    torch.manual_seed(args.seed)
    tokenizer = word_tokenizer(WORDS, chat_template=CHAT_TEMPLATE)
    model = build(tokenizer, width=args.width, layers=args.layers).to(device())
    optimizers = Optimizers(model, matrix_lr=0.02, lr=2e-3, betas=(0.9, 0.95))
    random = Random(f"language {args.seed}")
    of_documents = losses(model, tokenizer, random, grid=args.grid, share_sure=args.sureness)
    with made_whole(args.out) as folder:
        run(of_documents, optimizers, args.steps, folder)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
