"""Conversations to token ids, labels and the gate mask.

    turns --render--> parts --tokenize--> input_ids, labels, gate_mask          each (L,)

`render` writes a conversation as a list of `Part`s: pieces of the prompt ("text"), pieces the model learns to say
("answer") and image marks ("image"). `tokenize` joins the parts between two images into one string, runs the tokenizer
over it once, and asks the tokenizer which characters each token came from. A token belongs to the part that holds its
last character. Labels and gate mask are that membership, so nothing is ever tokenised twice and counted.

    sequence:  [BOS] [<align>] text … P × <image> … text, answer …
    <align>    once, right after BOS (first where the tokenizer adds no BOS), only if the sample has an image
    labels     the token's own id in "answer" parts, -100 elsewhere (not shifted)
    gate_mask  True for text tokens except BOS; with gate_text="prompt" also without "answer" parts

Two decisions keep masks right for every tokenizer. The text on each side of an image is a string of its own, as in the
public LLaVA code (for Llama's SentencePiece the "\\n" after an image becomes "▁", "<0x0A>"). And words that come from
the data (`Part.literal`) never turn into control tokens: "</s>" typed by a user is four characters. For that the
tokenizer is copied once, with its special tokens switched off; the control tokens a template writes travel through the
copy under private names. The price is a second copy of the vocabulary in memory, a few tens of MB for the largest ones.

Refused with a `ValueError` naming the sample: roles out of order, a chat template that drops or rewrites a turn, a cut
inside the first image, a token whose place in the text is unknown.
Sources: LLaVA's `conversation.py` and `train.py` (templates, where the image mark goes); the recorded cases in
`tests/data/oracle/tokenized.json`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from tokenizers import AddedToken, Tokenizer, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]
IMAGE_MARK = "<image>"
IGNORE_INDEX = -100
TEMPLATES = ("plain", "v1", "llama_2", "chat")
GATE_TEXTS = ("prompt", "all")

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

# Unicode noncharacters: never for interchange, so they frame our private names. Text that holds one is refused.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_WORD = f"{_OPEN}image{_CLOSE}"  # an image mark that is a word like any other


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `text` of a user turn may hold `<image>` marks, one per image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the rendered conversation.

    kind: "text" (prompt), "answer" (the assistant's words and what closes them: supervised), "image" (one mark).
    literal: the words come from the data, so special tokens spelled in them stay ordinary characters.
    """

    text: str
    kind: Literal["text", "answer", "image"]
    literal: bool = False


class TokenIds(NamedTuple):
    """Ids of the tokens the model treats by itself; `image` and `align` may lie outside the LLM's vocabulary."""

    image: int
    align: int
    pad: int


@dataclass(frozen=True, slots=True, eq=False)
class Tokenized:
    """One sample as the model reads it."""

    input_ids: torch.Tensor  # (L,) int64
    labels: torch.Tensor  # (L,) int64, -100 = no loss; not shifted
    gate_mask: torch.Tensor  # (L,) bool
    num_images: int  # in input_ids: those behind a cut are left out

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss once labels are shifted by one (nothing predicts the first token)."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


# ---- templates: turns -> parts -------------------------------------------------------------------------------------


def render(
    turns: Sequence[Turn],
    template: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    add_generation_prompt: bool = False,
    has_images: bool = True,
    name: str = "sample",
) -> list[Part]:
    """Write a conversation in a template.

    turns: an optional system turn, then user and assistant in alternation.
    template: "plain" (image marks, then the caption and a newline; the words of the user turn are thrown away), "v1"
        (Vicuna), "llama_2", or "chat" (the tokenizer's own chat template). In v1 and llama_2 the marks of a user turn
        move to its front, each followed by a newline; in chat they stay where they are.
    tokenizer: gives the end-of-sequence text of v1 and llama_2 ("</s>" without one) and the template of "chat".
    add_generation_prompt: end where the assistant begins to speak; the last turn must then be the user's.
    has_images: False for a sample without pictures. In it, and in what is not the user's turn, `<image>` is a word like
        any other.
    name: what errors call the sample.

    Joined, the parts of a training sample begin with the parts of its generation prompt (for "chat" if its template
    keeps that promise). ValueError: unknown template, roles out of order, a chat template that is missing, refuses the
    roles, drops or rewrites a turn, or closes an answer with no special token.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}; it must be one of {', '.join(TEMPLATES)}")
    _check_turns(turns, template, add_generation_prompt, name)
    words = [
        turn if has_images and turn.role == "user" else Turn(turn.role, turn.text.replace(IMAGE_MARK, _WORD))
        for turn in turns
    ]
    parts = _render(words, template, tokenizer, add_generation_prompt, name)
    return [replace(part, text=part.text.replace(_WORD, IMAGE_MARK)) for part in parts]


def _render(
    turns: Sequence[Turn],
    template: str,
    tokenizer: PreTrainedTokenizerBase | None,
    add_generation_prompt: bool,
    name: str,
) -> list[Part]:
    if template == "plain":
        return _render_plain(turns, add_generation_prompt)
    if template == "chat":
        return _render_chat(turns, tokenizer, add_generation_prompt, name)
    eos, bos = "</s>", "<s>"
    if tokenizer is not None:
        if tokenizer.eos_token is None:
            raise ValueError(f"tokenizer has no eos_token; template {template!r} closes every answer with one")
        eos = str(tokenizer.eos_token)
        bos = str(tokenizer.bos_token) if _encoder(tokenizer).bos_id is not None else ""
    if template == "v1":
        return _render_v1(turns, eos, add_generation_prompt)
    return _render_llama_2(turns, eos, bos)


def _check_turns(turns: Sequence[Turn], template: str, add_generation_prompt: bool, name: str) -> None:
    for number, turn in enumerate(turns):
        if turn.role not in ("system", "user", "assistant"):
            raise ValueError(f"{name}: turn {number} has role {turn.role!r}; it must be system, user or assistant")
        for mark in (_OPEN, _CLOSE):
            if mark in turn.text:
                raise ValueError(f"{name}: turn {number} holds U+{ord(mark):04X}, a noncharacter; remove it")
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
    if not spoken or spoken != wanted:
        raise ValueError(
            f"{name}: the roles are {roles}; they must be an optional system, then user and assistant in turn"
        )
    if add_generation_prompt and spoken[-1] != "user":
        raise ValueError(f"{name}: the last turn is the {spoken[-1]}'s; a generation prompt needs the user's")
    if template == "plain" and roles != (["user"] if add_generation_prompt else ["user", "assistant"]):
        needs = "one user turn" if add_generation_prompt else "one user and one assistant turn"
        raise ValueError(f"{name}: the roles are {roles}; template 'plain' takes {needs}")


def _words(text: str, kind: Literal["text", "answer"]) -> list[Part]:
    """Words of the data, cut at the image marks."""
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append(Part(IMAGE_MARK, "image"))
        if piece:
            parts.append(Part(piece, kind, literal=True))
    return parts


def _images_first(text: str) -> str:
    marks = text.count(IMAGE_MARK)
    if not marks:
        return text
    return ((IMAGE_MARK + "\n") * marks + text.replace(IMAGE_MARK, "").strip()).strip()


def _split_system(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (None, turns)


def _render_plain(turns: Sequence[Turn], add_generation_prompt: bool) -> list[Part]:
    parts = [Part(IMAGE_MARK, "image")] * turns[0].text.count(IMAGE_MARK)
    if not add_generation_prompt:
        parts += [*_words(turns[1].text, "answer"), Part("\n", "answer")]
    return parts


def _render_v1(turns: Sequence[Turn], eos: str, add_generation_prompt: bool) -> list[Part]:
    system, turns = _split_system(turns)
    parts = [Part(V1_SYSTEM + " ", "text")] if system is None else []
    if system:
        parts += [*_words(system, "text"), Part(" ", "text")]
    for turn in turns:
        if turn.role == "user":
            parts += [Part("USER: ", "text"), *_words(_images_first(turn.text), "text"), Part(" ", "text")]
        else:
            parts += [Part("ASSISTANT:", "text"), Part(" ", "answer")]
            parts += [*_words(turn.text, "answer"), Part(eos, "answer")]
    if add_generation_prompt:
        parts.append(Part("ASSISTANT:", "text"))
    return parts


def _render_llama_2(turns: Sequence[Turn], eos: str, bos: str) -> list[Part]:
    system, turns = _split_system(turns)
    parts: list[Part] = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            parts += [Part(" ", "answer"), *_words(turn.text, "answer"), Part(" ", "answer"), Part(eos, "answer")]
            continue
        parts.append(Part("[INST] " if number == 0 else bos + "[INST] ", "text"))
        if number == 0 and system != "":
            words = [Part(LLAMA_2_SYSTEM, "text")] if system is None else _words(system, "text")
            parts += [Part("<<SYS>>\n", "text"), *words, Part("\n<</SYS>>\n\n", "text")]
        parts += [*_words(_images_first(turn.text), "text"), Part(" [/INST]", "text")]
    return parts


def _render_chat(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase | None, add_generation_prompt: bool, name: str
) -> list[Part]:
    """Parts of the tokenizer's own chat template.

    The template is rendered once with the words and once with a private name in place of each turn's words. The second
    shows what the template itself writes; walking the first along it locates each turn, also where the words look like
    a header ("user") and where the template trims them.
    """
    if tokenizer is None or not tokenizer.chat_template:
        got = "no tokenizer was given" if tokenizer is None else "this tokenizer has none"
        raise ValueError(f"template 'chat' is the tokenizer's chat_template, but {got}; take v1, llama_2 or plain")

    def apply(contents: list[str]) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, contents, strict=True)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    from jinja2 import TemplateError  # transformers itself needs it for chat templates only

    try:
        text = apply([turn.text for turn in turns])
        frame = apply([f"{_OPEN}{number}{_CLOSE}" for number in range(len(turns))])
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(f"{name}: the tokenizer's chat template refuses the roles {roles}: {error}") from error
    pieces = re.split(f"{_OPEN}(\\d+){_CLOSE}", frame)
    written, order = pieces[0::2], pieces[1::2]
    if order != [str(number) for number in range(len(turns))]:
        raise ValueError(
            f"{name}: the tokenizer's chat template writes turns {', '.join(order) or 'none'} of {len(turns)}; "
            f"it must write each once and in order (a template without a system role drops the system turn)"
        )
    contents: list[str] = []
    place = len(written[0])
    for turn, after in zip(turns, written[1:], strict=True):
        forms = (turn.text, turn.text.strip(), turn.text.rstrip(), turn.text.lstrip())
        found = next((form for form in forms if text.startswith(form + after, place)), None)
        if found is None:
            break
        contents.append(found)
        place += len(found) + len(after)
    if len(contents) < len(turns) or place != len(text) or not text.startswith(written[0]):
        raise ValueError(
            f"{name}: the tokenizer's chat template rewrites the words of turn {min(len(contents), len(turns) - 1)}; "
            f"its place in the text is unknown, so no mask can be made"
        )

    parts = [Part(written[0], "text")]
    for number, (turn, content, after) in enumerate(zip(turns, contents, written[1:], strict=True)):
        if turn.role != "assistant":
            parts += [*_words(content, "text"), Part(after, "text")]
            continue
        end_of_turn = _encoder(tokenizer).control.search(after)
        if end_of_turn is None:
            raise ValueError(
                f"the tokenizer's chat template closes an answer with {after!r}; it needs a special token there, "
                f"or the model never learns to stop"
            )
        # What is left after the end-of-turn token is the next turn's header, but for the blank between them.
        stop = len(after) if number == len(turns) - 1 else end_of_turn.end()
        stop += len(after[stop:]) - len(after[stop:].lstrip())
        parts += [*_words(content, "answer"), Part(after[:stop], "answer"), Part(after[stop:], "text")]
    return [part for part in parts if part.text]


# ---- tokens --------------------------------------------------------------------------------------------------------


def tokenize(
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    token_ids: TokenIds,
    *,
    rows_per_image: int,
    align: bool,
    gate_text: Literal["prompt", "all"] = "prompt",
    max_length: int | None = None,
    num_images: int | None = None,
    name: str = "sample",
) -> Tokenized:
    """Ids, labels and gate mask of rendered parts.

    rows_per_image: P, how many `<image>` ids stand for one picture.
    align: put one `<align>` after BOS if there is an image (False for align_mode "none").
    gate_text: "prompt" leaves the answers out of gate_mask, "all" keeps them (bit-parity with the public weights).
    max_length: tokens kept, counted after images are expanded. What is longer is cut at the end; a cut that would fall
        inside an image is made in front of it, and that image and those after it are left out.
    num_images: how many pictures the sample has; checked against the marks when given.

    ValueError naming the sample: marks and pictures differ in number, the cut would leave no image of some, a token's
    place in the text is unknown, words of the data would become a control token.
    """
    if gate_text not in GATE_TEXTS:
        raise ValueError(f"gate_text is {gate_text!r}; it must be one of {', '.join(GATE_TEXTS)}")
    if rows_per_image < 1:
        raise ValueError(f"rows_per_image is {rows_per_image}; an image has at least one row")
    marks = sum(part.kind == "image" for part in parts)
    if num_images is not None and marks != num_images:
        raise ValueError(f"{name}: the text has {marks} {IMAGE_MARK} marks; the sample has {num_images} images")

    encoder = _encoder(tokenizer)
    bos, parts = _take_bos(parts, tokenizer, encoder)
    ids: list[int] = list(bos)
    answer: list[bool] = [False] * len(ids)
    gate: list[bool] = [False] * len(ids)
    if align and marks:
        ids.append(token_ids.align)
        answer.append(False)
        gate.append(False)
    image_ends: list[int] = []
    for run in _between_images(parts):
        if run is None:
            ids += [token_ids.image] * rows_per_image
            answer += [False] * rows_per_image
            gate += [False] * rows_per_image
            image_ends.append(len(ids))
            continue
        for token, part in encoder.encode(run, name):
            if token == token_ids.image or token == token_ids.align:
                raise ValueError(
                    f"{name}: token {token} stands in the text; it is reserved for {IMAGE_MARK} or <align> rows"
                )
            ids.append(token)
            answer.append(part.kind == "answer")
            gate.append(gate_text == "all" or part.kind == "text")
    if max_length is not None and len(ids) > max_length:
        if marks and max_length < image_ends[0]:
            raise ValueError(
                f"{name}: max_length {max_length} cuts the first image; its rows end at token {image_ends[0]}"
            )
        cut = next((end - rows_per_image for end in image_ends if end - rows_per_image < max_length < end), max_length)
        ids, answer, gate = ids[:cut], answer[:cut], gate[:cut]
        marks = sum(end <= cut for end in image_ends)
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(~torch.tensor(answer, dtype=torch.bool), IGNORE_INDEX)
    return Tokenized(input_ids, labels, torch.tensor(gate, dtype=torch.bool), marks)


def _take_bos(
    parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, encoder: _Encoder
) -> tuple[list[int], list[Part]]:
    """The BOS of the sequence, and the parts without it.

    BOS is there if the tokenizer adds it or a chat template spells it. A template that opens every turn with the token
    its tokenizer calls BOS (SmolLM2's "<|im_start|>") has no BOS: there the token is a header.
    """
    parts = list(parts)
    added = [] if encoder.bos_id is None else [encoder.bos_id]
    if not parts or parts[0].kind == "image" or parts[0].literal or tokenizer.bos_token is None:
        return added, parts
    first, spelled = parts[0], str(tokenizer.bos_token)
    if not first.text.startswith(spelled):
        return added, parts
    uses = sum(part.text.count(spelled) for part in parts if not part.literal)
    if not added and uses > 1:
        return [], parts
    rest = first.text[len(spelled) :]
    return [int(tokenizer.bos_token_id)], [Part(rest, first.kind), *parts[1:]] if rest else parts[1:]


def _between_images(parts: Sequence[Part]) -> list[list[Part] | None]:
    """Runs of text parts, with None for each image."""
    runs: list[list[Part] | None] = []
    for part in parts:
        if part.kind == "image":
            runs.append(None)
        elif part.text:
            if not runs or runs[-1] is None:
                runs.append([])
            runs[-1].append(part)  # type: ignore[union-attr]
    return runs


class _Encoder:
    """A copy of a fast tokenizer that tells data from template (see the module's docstring).

    control: matches the special tokens a template may write; bos_id: the id the tokenizer puts first, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__} without character offsets; "
                f"masks need a fast tokenizer (backed by the tokenizers library)"
            )
        self.size = len(tokenizer)
        with_specials, without = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
        adds_bos = tokenizer.bos_token_id is not None and with_specials[:1] == [tokenizer.bos_token_id] != without[:1]
        self.bos_id: int | None = int(tokenizer.bos_token_id) if adds_bos else None

        special: dict[int, AddedToken] = {
            id: token for id, token in tokenizer.added_tokens_decoder.items() if token.special and token.content
        }
        self.special_ids = frozenset(special) - {tokenizer.unk_token_id}
        contents = sorted((token.content for token in special.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        self._private = {token.content: f"{_OPEN}{id}{_CLOSE}" for id, token in special.items()}

        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = processors.Sequence([])  # no BOS, no trimmed offsets
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # special tokens are ordinary text; added ones still match
        self._backend.add_tokens(
            [
                AddedToken(
                    self._private[token.content],
                    normalized=False,
                    special=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for token in special.values()
            ]
        )
        self._control_ids = {
            self._backend.token_to_id(self._private[token.content]): id for id, token in special.items()
        }

    def encode(self, parts: Sequence[Part], name: str) -> list[tuple[int, Part]]:
        """The tokens of one string, each with the part that holds its last character."""
        starts: list[int] = []
        text = ""
        for part in parts:
            starts.append(len(text))
            text += part.text if part.literal else self.control.sub(lambda m: self._private[m[0]], part.text)
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # what the tokenizers library says to a lone surrogate
            raise ValueError(f"{name}: the text is not valid Unicode ({error}); it must encode as UTF-8") from error
        tokens: list[tuple[int, Part]] = []
        reached = 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # Characters between two tokens are those a normaliser merged into the one before, or dropped.
            if end < reached or end > len(text):
                raise ValueError(
                    f"{name}: the tokenizer places a token at {start} to {end} of {text[:60]!r}…, after {reached}"
                )
            reached = end
            control = self._control_ids.get(token)
            # A control token may have swallowed the blanks around it (rstrip); its own place is where its name stands.
            place = max(end - 1, 0) if control is None else text.index(_OPEN, start)
            part = parts[bisect_right(starts, place) - 1]
            if control is None and token in self.special_ids:
                raise ValueError(f"{name}: the words {text[start:end]!r} become control token {token}; remove them")
            tokens.append((token if control is None else control, part))
        return tokens


_encoders: WeakKeyDictionary[Any, _Encoder] = WeakKeyDictionary()


def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    known = _encoders.get(tokenizer)
    if known is None or known.size != len(tokenizer):  # tokens were added since
        known = _encoders[tokenizer] = _Encoder(tokenizer)
    return known
