"""`aligngpt chat MODEL`: questions about pictures, one with `--prompt`, or a conversation without it.

    aligngpt chat runs/stage-2/model --image cat.jpg --prompt "What is the cat doing?"      the answer alone, for pipes
    aligngpt chat runs/stage-2/model                                                        /help lists the commands

`Chat` is the conversation without a terminal: it holds history, pictures and level, and its `answer` yields the answer
in pieces while it is generated. Each question is prefilled whole, since the alignment row depends on all of the prompt.

A model whose template is "plain" (after stage 1) captions: it takes pictures and no words, knows no history, ends at
the first newline, and gets the best level unless told otherwise, because its gate is not trained yet.

Refused with a `ValueError`, before anything is generated: a folder that brings code (`auto_map`), a picture that does
not open, `<image>` in a question, a level the model does not have, a prompt as long as the model's window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .image import open_image
from .text import IMAGE_MARK

if TYPE_CHECKING:
    from PIL import Image

    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BAR = 40  # characters of a weight of 1


class Chat:
    """A conversation with a model.

    Args:
        max_new_tokens: longest answer, in tokens; what is left of the model's window may be less.
        temperature: 0 takes the likeliest token, more samples among those that make up `top_p` of the probability.

    Attributes:
        history: messages so far, as `AlignGPTProcessor.apply_chat_template` takes them.
        pictures: what the next question will show.
        level: the alignment level fixed for all questions with a picture; None: the gate mixes.
        captions: whether the model's template is "plain".
    """

    def __init__(
        self,
        model: AlignGPTForConditionalGeneration,
        processor: AlignGPTProcessor,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        for name, value, good, needs in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, 0 <= temperature < float("inf"), "a number of at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "a share above 0 and up to 1"),
        ):
            if not good:
                raise ValueError(f"{name} is {value}; it needs to be {needs}")
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.captions = processor.template == "plain"
        self.level: int | None = None
        if self.captions and model.config.align_mode != "none":
            self.level = model.config.num_align_levels - 1
        self.history: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self._asked: Mapping[str, Any] = {}  # the last question, as the model read it

    def show(self, path: str | os.PathLike[str]) -> Image.Image:
        """Add a picture to the next question; of a captioning model, replace what was there once it was captioned."""
        picture = _open(path)
        if self.captions and self._asked:
            self.pictures, self._asked = [], {}
        self.pictures.append(picture)
        return picture

    def fix_level(self, level: int | None) -> None:
        """Use row `level` of the alignment table instead of the gate's mix; None goes back to the gate."""
        config = self.model.config
        if level is not None and config.align_mode == "none":
            raise ValueError(f"level is {level}; this model has align_mode 'none' and no alignment token")
        if level is not None and not 0 <= level < config.num_align_levels:
            raise ValueError(f"level is {level}; this model has levels 0 to {config.num_align_levels - 1}")
        self.level = level

    def reset(self) -> None:
        """Forget the conversation and its pictures; a fixed level stays."""
        self.history, self.pictures, self._asked = [], [], {}

    def answer(self, prompt: str) -> Generator[str, None, None]:
        """The answer to a question about the pictures and all that was said, in pieces as they come.

        Joined, they are the decoded answer without special tokens. An iterator that is closed early, and Ctrl-C, stop
        the model; what was said until then enters the history. After an error the conversation is as it was before.
        """
        question = self._question(prompt)
        inputs = self._inputs([question] if self.captions else [*self.history, question])
        self._asked = inputs
        said: list[str] = []
        try:
            with closing(self._stream(inputs)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
        except (KeyboardInterrupt, GeneratorExit):
            if said:
                self._remember(question, "".join(said))
            raise
        self._remember(question, "".join(said))

    def gate_weights(self) -> Tensor:  # (N - 1,) fp32
        """The gate's weights of the local levels for the last question; ValueError says why there are none."""
        mode = self.model.config.align_mode
        if mode in ("none", "global", "average"):
            raise ValueError(f"this model has align_mode {mode!r}, which asks no gate")
        if not self._asked:
            raise ValueError("no question was asked yet, so the gate has seen nothing")
        if "pixel_values" not in self._asked:
            raise ValueError("the last question had no picture, so it had no alignment token")
        if "align_levels" in self._asked:
            level = int(self._asked["align_levels"])
            raise ValueError(f"level {level} was fixed for the last question; /level off goes back to the gate")
        with torch.no_grad():
            _, weights = self.model.model.embed(**self._asked)
        assert weights is not None
        return weights[0].cpu()

    def _question(self, prompt: str) -> dict[str, Any]:
        if IMAGE_MARK in prompt:
            raise ValueError(f"the question holds {IMAGE_MARK}, which stands for a picture; give its file as an image")
        if not self.pictures and (self.captions or not prompt.strip()):
            raise ValueError("this model captions pictures; show it one" if self.captions else "the question is empty")
        if not self.pictures:
            return {"role": "user", "content": prompt}
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self.pictures]
        if not self.captions:
            content.append({"type": "text", "text": prompt})
        return {"role": "user", "content": content}

    def _inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = dict(self.processor.apply_chat_template(messages, tokenize=True))
        length = inputs["input_ids"].shape[1]
        if self._room(length) < 1:
            raise ValueError(
                f"the prompt has {length} tokens; the model reads {length + self._room(length)}, its answer included: "
                "ask something shorter or start anew"
            )
        if self.level is not None and "pixel_values" in inputs:
            inputs["align_levels"] = torch.tensor([self.level])
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _room(self, length: int) -> int:
        """Tokens that an answer may have after a prompt of `length`; not positive if the prompt is too long."""
        window = getattr(self.model.config.text_config, "max_position_embeddings", None)
        return self.max_new_tokens if window is None else min(self.max_new_tokens, window - length)

    def _stream(self, inputs: Mapping[str, Any]) -> Generator[str, None, None]:
        """Run `generate` in a thread; leaving the iterator stops it at its next token. Its errors are raised here."""
        streamer = _Streamer(self.processor)

        def work() -> None:
            ending: BaseException | None = None
            try:
                self.model.generate(
                    **inputs,
                    **self.sampling,
                    max_new_tokens=self._room(inputs["input_ids"].shape[1]),
                    num_beams=1,
                    streamer=streamer,
                )
            except _Stopped:
                pass
            except BaseException as error:  # whatever it is, the caller waits for it
                ending = error
            streamer.pieces.put(ending)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while isinstance(piece := streamer.pieces.get(), str):
                if self.captions and "\n" in piece:
                    if before := piece[: piece.index("\n")]:
                        yield before
                    return
                yield piece
            if piece is not None:
                raise piece
        finally:
            streamer.stopped = True
            thread.join()

    def _remember(self, question: dict[str, Any], answer: str) -> None:
        if self.captions:
            return
        # A mark in the model's own words would be taken for a picture in every later prompt.
        words = answer.strip().replace(IMAGE_MARK, IMAGE_MARK.strip("<>"))
        self.history += [question, {"role": "assistant", "content": words}]
        self.pictures = []


def _open(path: str | os.PathLike[str]) -> Image.Image:
    return open_image(os.path.expanduser(path))  # pathlib's raises where a user is unknown


class _Stopped(Exception):
    """Raised inside `generate` when nobody listens any more."""


class _Streamer(BaseStreamer):
    """Receives tokens from `generate` and puts text into `pieces`.

    All tokens are decoded anew each time, so that blanks are those of the whole answer. Text is held back while it ends
    inside a character: bytes of one that is not complete (U+FFFD), and SentencePiece's byte tokens, which the tokenizer
    decodes as a run.
    """

    def __init__(self, processor: AlignGPTProcessor):
        self.pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self.stopped = False
        self._processor = processor
        self._is_prompt = True
        self._tokens: list[int] = []
        self._sent = 0  # characters

    def put(self, value: Tensor) -> None:  # (1, L) the prompt, then (1,) each token
        if self.stopped:
            raise _Stopped
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        last = str(self._processor.tokenizer.convert_ids_to_tokens(self._tokens[-1]))
        if not (last.startswith("<0x") and last.endswith(">")):
            self._send(self._text().rstrip("\ufffd"))

    def end(self) -> None:
        self._send(self._text())

    def _text(self) -> str:
        return self._processor.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.pieces.put(text[self._sent :])
            self._sent = len(text)


# ---- the terminal --------------------------------------------------------------------------------------------------


class _Command(NamedTuple):
    usage: str
    help: str
    run: Callable[[Chat, str], str]  # what to print


def _image(chat: Chat, path: str) -> str:
    if not path:
        raise ValueError("/image needs a path: /image PATH")
    width, height = chat.show(path.strip("'\"")).size
    when = "an empty line captions" if chat.captions else "the next question shows"
    return f"{width}×{height} pixels; {when} {len(chat.pictures)} picture{'s' * (len(chat.pictures) > 1)}"


def _level(chat: Chat, word: str) -> str:
    if word in ("", "off"):
        chat.fix_level(None)
        return "the gate mixes the levels"
    try:
        level = int(word)
    except ValueError as error:
        raise ValueError(f"/level got {word!r}; it needs a whole number, or off") from error
    chat.fix_level(level)
    return f"level {chat.level} is fixed"


def _gate(chat: Chat, _: str) -> str:
    weights = chat.gate_weights().tolist()
    lines = [f"level {level}  {weight:.3f}  {'#' * round(weight * _BAR)}" for level, weight in enumerate(weights)]
    if chat.model.config.align_mode == "adaptive":
        lines.append(f"level {len(weights)} is the global one and added whole")
    return "\n".join(lines)


def _reset(chat: Chat, _: str) -> str:
    chat.reset()
    return "a new conversation"


def _help(chat: Chat, _: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    return "\n".join(f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values())


COMMANDS = {
    "/image": _Command("/image PATH", "show a picture with the next question; more than one may be given", _image),
    "/level": _Command("/level N", "fix the alignment level; /level or /level off goes back to the gate", _level),
    "/gate": _Command("/gate", "the gate's weights for the last question", _gate),
    "/reset": _Command("/reset", "forget the conversation and its pictures", _reset),
    "/help": _Command("/help", "this list", _help),
    "/quit": _Command("/quit", "end (also Ctrl-D); Ctrl-C stops an answer", lambda chat, _: ""),
}


def converse(chat: Chat) -> None:
    """Read questions and commands from standard input until it ends. What is wrong is said, and the talk goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name not in COMMANDS:
                    raise ValueError(f"{name} is no command; there are {', '.join(COMMANDS)}")
                print(COMMANDS[name].run(chat, rest.strip()))
            elif line or chat.captions:
                _print(chat.answer(line))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _print(pieces: Generator[str, None, None]) -> None:
    """An answer and a newline. A terminal gets no control characters: an answer must not steer it."""
    is_terminal = sys.stdout.isatty()
    with closing(pieces):
        for piece in pieces:
            print("".join(filter(_harmless, piece)) if is_terminal else piece, end="", flush=True)
    print()


def _harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) != "Cc"


# ---- the command ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt chat`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder")
    parser.add_argument("--image", action="append", default=[], metavar="X", help="a picture; may be given repeatedly")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and end; without: a conversation")
    parser.add_argument(
        "--level",
        type=int,
        metavar="N",
        help="fix the alignment level (default: the gate's mix; the best level where the model only captions)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: always the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of probability sampled from")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, … (default: a GPU if any)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")


def run(args: argparse.Namespace) -> int:
    """`aligngpt chat`: answers on standard output, remarks on standard error."""
    device = _device(args.device)
    pictures = [_open(path) for path in args.image]  # a bad one is found before the model is read
    chat = Chat(
        *_load(args.model, args.dtype),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    if args.level is not None:
        chat.fix_level(args.level)
    chat.pictures += pictures
    chat.model.to(device)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what an encoding lacks, typed or answered, ends no conversation

    if args.prompt is None:
        print(f"{_nature(chat)} /image PATH shows a picture, /help lists the commands, Ctrl-D ends.", file=sys.stderr)
        converse(chat)
        return 0
    if chat.captions and args.prompt.strip():
        print("aligngpt chat: this model only captions; the words of --prompt are not used", file=sys.stderr)
    try:
        _print(chat.answer(args.prompt))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _load(folder: str, dtype: str | None) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    from transformers.utils import logging

    from .checkpoint import read_config
    from .config import KNOWN_TOWERS, _tower_config, is_public
    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor

    if not Path(folder).is_dir():
        raise ValueError(f"MODEL is {folder!r}, which is no folder; it needs to be a folder that holds a model")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        file = Path(folder, name)
        if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file} has auto_map, which names code to run; AlignGPT runs none: remove the entry")
    if is_public(config := read_config(folder)):
        tower = config.get("mm_vision_tower")
        try:
            _tower_config(tower)
        except ValueError as error:  # its advice is for Python
            raise ValueError(
                f"{Path(folder, 'config.json')}: mm_vision_tower is {tower!r}; it needs to be "
                f"{' or '.join(KNOWN_TOWERS)}, or a local folder that holds the vision tower"
            ) from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor = AlignGPTProcessor.from_pretrained(folder)
    kwargs = {} if dtype is None else {"dtype": DTYPES[dtype]}
    return AlignGPTForConditionalGeneration.from_pretrained(folder, **kwargs).eval(), processor


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; it needs to be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name!r}; torch sees {torch.cuda.device_count()} GPUs here (aligngpt doctor says why)"
        )
    return device


def _nature(chat: Chat) -> str:
    model = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    if not chat.captions:
        return f"AlignGPT, {model}."
    level = "" if chat.level is None else f", here at level {chat.level}"
    return f"AlignGPT after stage 1, {model}; an empty line captions the picture{level}."
