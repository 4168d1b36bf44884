"""`aligngpt chat MODEL`: questions about pictures, one with `--prompt`, a conversation without it, a page with `--web`.

    aligngpt chat runs/stage-2/model --image cat.jpg --prompt "What is the cat doing?"      the answer alone, for pipes
    aligngpt chat runs/stage-2/model                                                        /help lists the commands
    aligngpt chat runs/stage-2/model --web                                                  `aligngpt.web` in a browser

`Chat` is the conversation without a terminal: it holds history, pictures and level, and its `answer` yields the answer
in pieces while an `Engine` generates it. Each question is prefilled whole, since the alignment row depends on all of
the prompt. Any number of conversations may share an engine that serves.

A model whose template is "plain" (after stage 1) captions: it takes pictures and no words, knows no history, ends at
the first newline, and gets the best level unless told otherwise, because its gate is not trained yet.

Refused with a `ValueError`, before anything is generated: a folder that brings code (`auto_map`), an LLM that the
engine cannot run, a picture that does not open, `<image>` in a question, a level the model does not have, a prompt as
long as the engine's rows, a question while another is being answered.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import threading
import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .generate import Answer, Engine, Request
from .image import open_image
from .loading import DTYPES, find_device, load_model
from .profiling import Profile, check_folder
from .sampling import Sampling
from .stages import ENGINE_STEP
from .text import IMAGE_MARK

WEB_ROWS = 4  # answers at a time on the page
PROFILED_STEPS = 32  # of the engine
_WARM_UP_TOKENS = 8
_BAR = 40  # characters of a weight of 1


class Chat:
    """A conversation with a model.

    Args:
        engine: what answers; its `start` is only needed where conversations share it.
        max_new_tokens: longest answer, in tokens; what is left of the engine's row may be less.
        temperature: 0 takes the likeliest token, more samples among those that make up `top_p` of the probability.
        seed: of the samples of this conversation; None: another one each time.

    Attributes:
        history: messages so far, as `AlignGPTProcessor.apply_chat_template` takes them.
        pictures: what the next question will show.
        level: the alignment level fixed for all questions with a picture; None: the gate mixes.
        captions: whether the model's template is "plain".
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it needs to be at least 1")
        self.engine = engine
        self.model = engine.model
        self.processor = engine.processor
        self.captions = self.processor.template == "plain"
        stop = ("\n",) if self.captions else ()
        self.sampling = Sampling(max_new_tokens, temperature, top_p, stop=stop)
        self.level: int | None = None
        if self.captions and self.model.config.align_mode != "none":
            self.level = self.model.config.num_align_levels - 1
        self.history: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self._random = random.Random(seed)
        self._answer: Answer | None = None  # to the last question
        self._before: tuple[list[dict[str, Any]], list[Image.Image], str] | None = None  # it, and what it came upon
        self._answering = threading.Lock()

    def show(self, path: str | os.PathLike[str]) -> Image.Image:
        """Add a picture to the next question; of a captioning model, replace what was there once it was captioned."""
        picture = _open(path)
        if self.captions and self._answer:
            self.reset()
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
        """Forget the conversation and its pictures, and what is being answered; a fixed level stays."""
        self.stop()
        self.history, self.pictures, self._answer, self._before = [], [], None, None

    @property
    def is_answering(self) -> bool:
        return self._answering.locked()

    def stop(self) -> None:
        """End the answer that is being given, from another thread; what was said until then enters the history."""
        answer = self._answer
        if answer is not None:
            answer.cancel()

    def answer(self, prompt: str) -> Generator[str, None, None]:
        """The answer to a question about the pictures and all that was said, in pieces as they come.

        Joined, they are the decoded answer without special tokens. An iterator that is closed early, and Ctrl-C, stop
        the model; what was said until then enters the history. After an error the conversation is as it was before.
        """
        with self._alone():
            yield from self._say(prompt)

    def again(self) -> Generator[str, None, None]:
        """The last question answered anew, at the level that is fixed now, in place of the last answer."""
        with self._alone():
            if self._before is None:
                raise ValueError("no question was asked yet, so there is none to answer again")
            now = self.history, self.pictures
            self.history, self.pictures, prompt = self._before
            try:
                yield from self._say(prompt)
            except Exception:
                self.history, self.pictures = now
                raise

    @contextlib.contextmanager
    def _alone(self) -> Generator[None, None, None]:
        if not self._answering.acquire(blocking=False):
            raise ValueError("a question of this conversation is being answered; stop that, or wait for its end")
        try:
            yield
        finally:
            self._answering.release()

    def _say(self, prompt: str) -> Generator[str, None, None]:
        question = self._question(prompt)
        messages = [question] if self.captions else [*self.history, question]
        inputs = self.processor.apply_chat_template(messages, tokenize=True)
        level = self.level if "pixel_values" in inputs else None
        sampling = replace(self.sampling, seed=self._random.getrandbits(63))
        answer = self.engine.submit(Request(inputs, sampling, level))
        self._answer = answer
        self._before = (list(self.history), list(self.pictures), prompt)
        said: list[str] = []
        try:
            for piece in answer:
                said.append(piece)
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            answer.cancel()
            if said:
                self._remember(answer, question, "".join(said))
            raise
        if said or answer.finish_reason != "cancelled":
            self._remember(answer, question, "".join(said))

    def gate_weights(self) -> Tensor:  # (N - 1,) fp32
        """The gate's weights of the local levels for the last question; ValueError says why there are none."""
        mode = self.model.config.align_mode
        if mode in ("none", "global", "average"):
            raise ValueError(f"this model has align_mode {mode!r}, which asks no gate")
        request = self._asked().request
        if request.level is not None:
            raise ValueError(f"level {request.level} was fixed for the last question; /level off goes back to the gate")
        assert self._answer is not None
        assert self._answer.align_weights is not None
        return self._answer.align_weights.cpu()

    def alignment(self) -> tuple[Tensor, Tensor]:  # (M, P), (N - 1,) fp32
        """Dots of each picture's rows with the last question, and the gate's weights, whether they were used or not."""
        inputs = self._asked().request.inputs
        names = ("input_ids", "gate_mask", "pixel_values")
        seen = {name: inputs[name].to(self.model.device) for name in names}
        dots, weights = self.model.model.alignment(**seen)
        return dots.cpu(), weights[0].cpu()

    def _asked(self) -> Answer:
        """To the last question, which had a picture."""
        if self._answer is None:
            raise ValueError("no question was asked yet, so the gate has seen nothing")
        if "pixel_values" not in self._answer.request.inputs:
            raise ValueError("the last question had no picture, so it had no alignment token")
        return self._answer

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

    def _remember(self, answer: Answer, question: dict[str, Any], said: str) -> None:
        if self.captions or answer is not self._answer:  # the conversation was forgotten meanwhile
            return
        # A mark in the model's own words would be taken for a picture in every later prompt.
        words = said.strip().replace(IMAGE_MARK, IMAGE_MARK.strip("<>"))
        self.history = [*self.history, question, {"role": "assistant", "content": words}]
        self.pictures = []


def _open(path: str | os.PathLike[str]) -> Image.Image:
    return open_image(os.path.expanduser(path))  # pathlib's raises where a user is unknown


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
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer together (default: the model's window, 4096 at most)",
    )
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, … (default: a GPU if any)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help=f"after an unrecorded answer, write a trace and a summary of the first {PROFILED_STEPS} engine steps; "
        "answers wait for some seconds meanwhile",
    )
    parser.add_argument("--web", action="store_true", help="serve a page for the browser until Ctrl-C")
    parser.add_argument("--host", default="127.0.0.1", help="of the page (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default 7860; 0 takes any free one)")


def run(args: argparse.Namespace) -> int:
    """`aligngpt chat`: answers on standard output, remarks on standard error."""
    if args.web and (args.prompt is not None or args.image):
        raise ValueError("--web is given beside --prompt or --image; questions and pictures go into the page")
    if args.web:
        from . import serving, web  # before the model is read: what they need may be missing
    if args.profile is not None:
        check_folder("--profile", args.profile)
    device = find_device(args.device)
    pictures = [_open(path) for path in args.image]  # a bad one is found before the model is read
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    model, processor = load_model(args.model, args.dtype)
    engine = Engine(model.to(device), processor, max_batch_size=WEB_ROWS if args.web else 1, max_length=args.max_length)

    def begin() -> Chat:
        chat = Chat(engine, **options)
        if args.level is not None:
            chat.fix_level(args.level)
        return chat

    chat = begin()
    chat.pictures += pictures
    if args.web:
        name = "/".join(Path(args.model).resolve().parts[-2:])
        app = serving.app(engine, name, hosts=[args.host])
        with _profiled(args.profile, begin()):
            return web.serve(begin, app, name=name, host=args.host, port=args.port)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what an encoding lacks, typed or answered, ends no conversation

    if args.prompt is None:
        print(f"{_nature(chat)} /image PATH shows a picture, /help lists the commands, Ctrl-D ends.", file=sys.stderr)
        with _profiled(args.profile, begin()):
            converse(chat)
        return 0
    if chat.captions and args.prompt.strip():
        print("aligngpt chat: this model only captions; the words of --prompt are not used", file=sys.stderr)
    try:
        with _profiled(args.profile, begin(), args.prompt, pictures):
            _print(chat.answer(args.prompt))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _profiled(
    folder: str | None, chat: Chat, prompt: str | None = None, pictures: Sequence[Image.Image] = ()
) -> contextlib.AbstractContextManager[Any]:
    """Records the engine's steps into `folder`, if any, once `chat` has had an answer: the first one takes longer.

    Without a prompt that is a short one about a grey picture.
    """
    if folder is None:
        return contextlib.nullcontext()
    if prompt is None:
        size = chat.processor.image_processor.size
        pictures = [Image.new("RGB", (size, size), "grey")]
        prompt = "What is this?"
        chat.sampling = replace(chat.sampling, max_new_tokens=min(_WARM_UP_TOKENS, chat.sampling.max_new_tokens))
    chat.pictures += pictures
    print("aligngpt chat: answering once before what is profiled", file=sys.stderr)
    for _ in chat.answer(prompt):
        pass

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    return Profile(folder, chat.engine.device, unit=ENGINE_STEP, record=PROFILED_STEPS, say=say)


def _nature(chat: Chat) -> str:
    model = f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}"
    if not chat.captions:
        return f"AlignGPT, {model}."
    level = "" if chat.level is None else f", here at level {chat.level}"
    return f"AlignGPT after stage 1, {model}; an empty line captions the picture{level}."
