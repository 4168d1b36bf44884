"""A miniature LLM: `python -m demo.language OUT`, an ordinary LlamaForCausalLM folder of half a million weights.

A real LLM comes knowing how to describe and to answer, how far to trust a text whose author says how sure he is, and it
reads image rows that a projector puts near word embeddings. This one gets the same from documents of words alone. Two
things about them are special:

- **Scenes in words.** A document begins with nine rows, one a cell, each the sum of the embeddings of the words that
  describe the cell: "top left" and, if a thing is there, its size, color and shape. This is what the projector will
  have to make of a picture; noise is added, since it never will exactly.
- **Sureness.** In three of five documents one word after BOS, from "wrong" to "exact", says at what rate the caption's
  facts are true. That is the place where the alignment token will stand; which level is which word, stage 1 has to
  find out.

After the rows come blocks that see the rows and themselves but not each other: a caption, corrupted fact by fact like
those of stage 1 though less often, and questions with answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aligngpt.data.scenes import COLUMNS, KINDS, NUMBERS, ROWS, Scene, ask, caption, corrupt, draw_scene
from demo.miniature import CHAT_TEMPLATE, SCENE_WORDS, Optimizers, made_whole, read_arguments, run, word_tokenizer

WIDTH, LAYERS = 128, 3
BATCH = 64
QUESTIONS = 8  # blocks of a document beside its caption
NOISE = 1.0  # of the rows, in standard deviations of the word embeddings
SURENESS = ("wrong", "doubtful", "partly", "mostly", "exact")
QUESTION_WORDS = ["what", "size", "color", "shape", "is", "at", "the", "where", "how", "many", "objects"]
QUESTION_WORDS += ["there", "a", "yes", "no"]
WORDS = ["and", *SCENE_WORDS, *NUMBERS, *QUESTION_WORDS, *SURENESS]
CELLS, CELL_WORDS = 9, 5
PREFIX = 2 + CELLS  # BOS, the sureness or a place left free, the rows


@dataclass
class Document:
    """A document as token ids: `cells` the words of each row, then the blocks, end to end."""

    sureness: int | None
    cells: list[list[int]]
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


def document(tokenizer: PreTrainedTokenizerFast, random: Random) -> Document:
    """A scene, a caption corrupted at a random rate, and questions."""

    def ids(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split(" "))

    scene = draw_scene(random)
    corruption = random.random() ** 2
    sure = SURENESS[min(int((1 - corruption) * len(SURENESS)), len(SURENESS) - 1)]
    says_so = random.random() < 0.6
    result = Document(ids(sure)[0] if says_so else None, [ids(words) for words in cell_words(scene)])
    result.add([], ids(caption(corrupt(scene, corruption, random)) + " \n"))
    while result.block[-1] < 1 + QUESTIONS:
        question = ask(scene, random.choice(KINDS), random)
        if question is not None:
            result.add(ids(f"\n {question.text} :"), ids(f"{question.answer} {tokenizer.eos_token}"))
    return result


def cell_words(scene: Scene) -> list[str]:
    """What each cell's row is the sum of."""
    cells = [f"{row} {column}" for row in ROWS for column in COLUMNS]
    for thing in scene:
        cells[ROWS.index(thing.row) * 3 + COLUMNS.index(thing.column)] += f" {thing.size} {thing.color} {thing.shape}"
    return cells


def losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[Tensor]:
    """The cross-entropy of captions and answers of a new batch of documents, for ever."""
    while True:
        yield document_loss(model, [document(tokenizer, random) for _ in range(BATCH)])


def document_loss(model: LlamaForCausalLM, documents: list[Document]) -> Tensor:
    """Mean over captions' and answers' tokens."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    pad, bos = model.config.pad_token_id, model.config.bos_token_id

    def padded(name: str, value: int) -> Tensor:  # (documents, L), L the longest document's blocks
        return pad_sequence([torch.tensor(getattr(d, name)) for d in documents], batch_first=True, padding_value=value)

    ids, labels, block, place = padded("ids", pad), padded("labels", -100), padded("block", -1), padded("place", 0)
    says_so = torch.tensor([d.sureness is not None for d in documents])
    start = torch.tensor([[bos, pad if d.sureness is None else d.sureness] for d in documents])
    words = torch.tensor([[cell + [pad] * (CELL_WORDS - len(cell)) for cell in d.cells] for d in documents])
    rows = (embedding(words) * (words != pad)[..., None]).sum(2)  # (documents, CELLS, WIDTH)
    rows = rows + NOISE * embedding.weight.detach().std() * torch.randn_like(rows)
    inputs = torch.cat((embedding(start), rows, embedding(ids)), dim=1)

    # Prefix tokens are of block 0; a place left free is of none, and takes no position.
    prefix_block = torch.zeros(len(documents), PREFIX, dtype=torch.int64)
    prefix_block[~says_so, 1] = -1
    in_block = torch.cat((prefix_block, block), dim=1)
    shift = says_so.long()[:, None]
    prefix_place = torch.cat((torch.zeros_like(shift), shift, torch.arange(1, 1 + CELLS) + shift), dim=1)
    positions = torch.cat((prefix_place, place + CELLS + 1 + shift), dim=1)

    hidden = model.model(
        inputs_embeds=inputs, attention_mask=_sees(in_block, inputs.dtype), position_ids=positions, use_cache=False
    ).last_hidden_state
    document_number, token = (labels != -100).nonzero(as_tuple=True)
    # A block's first token is predicted by the last row, the others by the token before them.
    first = place[document_number, token] == 0
    before = torch.where(first, PREFIX - 1, PREFIX + token - 1)
    return F.cross_entropy(model.lm_head(hidden[document_number, before]), labels[document_number, token])


def _sees(block: Tensor, dtype: torch.dtype) -> Tensor:
    """(documents, 1, L, L) additive mask: earlier tokens of the prefix and of one's own block, and oneself."""
    length = block.shape[1]
    query, key = block[:, :, None], block[:, None, :]
    sees = ((key == 0) | ((key == query) & (key > 0))) & torch.ones(length, length, dtype=torch.bool).tril()
    sees |= torch.eye(length, dtype=torch.bool)
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
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
    args = read_arguments("demo.language", __doc__)
    tokenizer = word_tokenizer(WORDS, chat_template=CHAT_TEMPLATE)
    model = build(tokenizer)
    optimizers = Optimizers(model, matrix_lr=0.02, lr=2e-3, betas=(0.9, 0.95))
    with made_whole(args.out) as folder:
        run(losses(model, tokenizer, Random(f"language {args.seed}")), optimizers, args.steps, folder)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
