"""`aligngpt chat MODEL --web`: a page for the browser that shows what an answer was made of.

Left a picture and a conversation about it, right what happens in front of the LLM: the heat map of ⟨image row, text
mean⟩ over the picture, the weights that the gate makes of it, and a slider that fixes a level in the gate's place, so
that one sees the answer change. What a model does not have, the page does not show: no gate, no weights.

    page     a `gradio.Blocks`; each visitor has a `Chat` of his own, all of one engine
    mounted  the page on a FastAPI app, with its limits
    serve    the page, and whatever else the app serves, on a port until SIGINT or SIGTERM

A picture begins a conversation and stays with it. It is kept as the model sees it (`AlignGPTImageProcessor.read`, whose
own result it leaves as it is), so a visitor costs a few megabytes, whatever he uploads.

Nothing but the page's own files and uploads is readable, and no request leaves the machine: no telemetry, fonts and
scripts come from the installed package, text of model and visitor is shown as text. Refused in one sentence on the
page: uploads of more than `MAX_UPLOAD` bytes, what `open_image` refuses, addresses in place of uploads, and questions
beyond `MAX_WAITING`.
"""

import base64
import html
import io
import logging
import math
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from .chat import Chat

MAX_UPLOAD = 20 * 2**20  # bytes
MAX_WAITING = 32  # questions of all visitors
MAX_WORDS = 4000  # characters of a question
KEPT = 3600  # seconds that an uploaded file is kept
MAX_VISITORS = 1000  # whose conversations are kept
_GATE = -1  # the slider's place where no level is fixed
_Views = Generator[dict[Any, Any], None, None]  # what changes on the page


@dataclass
class _Turn:
    """A question and its answers, (what made the alignment row, text); the conversation goes on with the last."""

    question: str
    answers: list[tuple[str, str]] = field(default_factory=list)


class _Visit:
    """What a visitor has on his page."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.path: str | None = None  # of the uploaded picture
        self.picture: Image.Image | None = None  # as the model sees it
        self.begin_anew()

    def begin_anew(self) -> None:
        """A new conversation about the same picture."""
        self.chat.reset()
        self.chat.pictures = [] if self.picture is None else [self.picture]
        self.turns: list[_Turn] = []
        self.heat: str | None = None  # the two plots, once there is something to draw
        self.bars: str | None = None

    def look_at(self, path: str | None) -> None:
        """A new conversation about another picture; nothing happens if it is the one that is there. ImageError."""
        if path == self.path:
            return
        self.path, self.picture = None, None
        self.begin_anew()
        if path is not None:
            pixels = self.chat.processor.image_processor.read(path, "the picture")
            self.path, self.picture = path, Image.fromarray(pixels.permute(1, 2, 0).numpy())
            self.begin_anew()

    def made_by(self) -> str:
        """What makes the alignment row of the next answer, in a word; nothing where there is none."""
        mode = self.chat.model.config.align_mode
        if mode == "none" or self.picture is None:
            return ""
        if self.chat.level is not None:
            return f"level {self.chat.level}"
        return mode if mode in ("average", "global") else "gate"

    def compare(self) -> None:
        """Draw what the gate sees in the last question."""
        if _has_gate(self.chat) and self.picture is not None:
            dots, weights = self.chat.alignment()
            self.heat = heat_map(self.picture, dots[0])
            self.bars = bars(weights, _adds_global(self.chat), fixed=self.chat.level)


def _has_gate(chat: Chat) -> bool:
    """Whether there is something to see: words that meet a picture, and a gate that was trained."""
    return chat.model.config.align_mode in ("adaptive", "local") and not chat.captions


def _adds_global(chat: Chat) -> bool:
    return chat.model.config.align_mode == "adaptive"


# ---------------------------------------------------------------------------------------------------- the page


def page(begin: Callable[[], Chat], name: str = "AlignGPT") -> gr.Blocks:
    """The page. `begin` makes a visitor's conversation, of an engine that serves; `name` is the model's."""
    first = begin()
    config = first.model.config
    has_gate, has_levels = _has_gate(first), config.align_mode != "none"
    lowest, last = (0 if first.captions else _GATE), config.num_align_levels - 1
    verb = "Caption" if first.captions else "Answer"

    with gr.Blocks(title=f"AlignGPT · {name}", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        state = gr.State(None, delete_callback=lambda visit: visit and visit.chat.stop())
        gr.HTML(_heading(first, name))
        with gr.Row():
            with gr.Column(min_width=360):
                picture = gr.Image(
                    label="Picture",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    height=236,
                    buttons=[],
                    elem_id="picture",
                )
                talk = gr.HTML(conversation([]), elem_id="talk")
                words = gr.Textbox(
                    placeholder="Ask something about the picture, and press Enter",
                    show_label=False,
                    container=False,
                    max_lines=4,
                    max_length=MAX_WORDS,
                    visible=not first.captions,
                    elem_id="words",
                )
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Caption it" if first.captions else "Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                    anew = gr.Button("New conversation", elem_id="anew")
            with gr.Column(min_width=360, visible=has_levels):
                with gr.Column(visible=has_gate, elem_classes="card"):
                    heat = gr.HTML(_heat_card(None), elem_id="heat")
                with gr.Column(visible=has_gate, elem_classes="card"):
                    weights = gr.HTML(_bars_card(first, None), elem_id="weights")
                with gr.Column(elem_classes="card"):
                    gr.HTML(_level_help(last, first.captions))
                    level = gr.Slider(
                        lowest,
                        last,
                        _GATE if first.level is None else first.level,
                        step=1,
                        label="Level",
                        show_label=False,
                        container=False,
                        elem_id="level",
                    )
                    ticks = gr.HTML(_ticks(level.value, lowest, last), elem_id="ticks")
                    again = gr.Button(
                        f"{verb} again at this level",
                        interactive=False,
                        elem_id="again",
                    )

        def view(visit: _Visit, answering: bool) -> dict[Any, Any]:
            return {
                state: visit,
                talk: conversation(visit.turns, answering),
                heat: _heat_card(visit.heat),
                weights: _bars_card(visit.chat, visit.bars),
                ask: gr.update(visible=not answering),
                stop: gr.update(visible=answering),
                again: gr.update(interactive=bool(visit.turns) and not answering),
            }

        def fix_level(visit: _Visit, slider: float) -> None:
            if has_levels:
                visit.chat.fix_level(None if slider == _GATE else int(slider))

        def say(visit: _Visit, turn: _Turn, pieces: Generator[str, None, None]) -> _Views:
            """Show an answer while it comes; the conversation on the page is always the one that there is now."""
            yield view(visit, answering=True)
            text = ""
            try:
                with closing(pieces):
                    for piece in pieces:
                        begins, text = not text, text + piece
                        if begins:
                            turn.answers.append((visit.made_by(), text))
                            visit.compare()
                        turn.answers[-1] = (turn.answers[-1][0], text)
                        yield view(visit, answering=True) if begins else {talk: conversation(visit.turns, True)}
                if not text:
                    turn.answers.append((visit.made_by(), text))
            finally:
                visit.turns = [other for other in visit.turns if other is not turn or turn.answers]

        def on_picture(visit: _Visit | None, path: str | None) -> _Views:
            visit = visit or _Visit(begin())
            with _refusing():
                visit.look_at(path)
            yield view(visit, answering=False)

        def on_ask(visit: _Visit | None, path: str | None, typed: str | None, slider: float) -> _Views:
            visit = visit or _Visit(begin())
            box = question = (typed or "").encode("utf-8", "replace").decode()  # half a surrogate pair can't be sent
            with _refusing():
                visit.look_at(path)
                fix_level(visit, slider)
                if len(question) > MAX_WORDS:
                    raise ValueError(f"the question has {len(question)} characters; at most {MAX_WORDS} are read")
                turn = _Turn(question.strip())
                visit.turns.append(turn)
                yield {words: ""}
                yield from say(visit, turn, visit.chat.answer(question))
                box = ""
            # Of what is refused, the words come back; else those stay that were typed meanwhile.
            yield view(visit, visit.chat.is_answering) | ({words: box} if box else {})

        def on_again(visit: _Visit | None, slider: float) -> _Views:
            visit = visit or _Visit(begin())
            with _refusing():
                fix_level(visit, slider)
                yield from say(visit, visit.turns[-1] if visit.turns else _Turn(""), visit.chat.again())
            yield view(visit, visit.chat.is_answering)

        def on_stop(visit: _Visit | None) -> None:
            if visit:
                visit.chat.stop()

        def on_anew(visit: _Visit | None) -> dict[Any, Any]:
            visit = visit or _Visit(begin())
            visit.begin_anew()
            return view(visit, answering=False)

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        answers = quiet | {"concurrency_limit": first.engine.max_batch_size, "concurrency_id": "answers"}
        shown = [state, talk, heat, weights, words, ask, stop, again]
        picture.change(on_picture, [state, picture], shown, **quiet)
        gr.on([ask.click, words.submit], on_ask, [state, picture, words, level], shown, **answers)
        again.click(on_again, [state, level], shown, **answers)
        stop.click(on_stop, state, None, queue=False, **quiet)
        anew.click(on_anew, state, shown, queue=False, **quiet)
        level.change(lambda value: _ticks(value, lowest, last), level, ticks, queue=False, **quiet)

    # gradio would fetch an address, open whatever file a request names (it looks whether one was uploaded only in pages
    # that it serves itself), and hand it to any decoder of PIL. Here only the path of an upload is wanted.
    picture.async_move_resource_to_block_cache = _as_it_is  # type: ignore
    picture.preprocess = lambda payload: _uploaded(payload, picture.GRADIO_CACHE)  # type: ignore
    blocks.queue(max_size=MAX_WAITING, api_open=False)
    blocks.state_session_capacity = MAX_VISITORS
    return blocks


async def _as_it_is(path: Any) -> Any:
    return path


def _uploaded(payload: Any, folder: str) -> str | None:
    if payload is None:
        return None
    try:
        path = os.path.realpath(payload.path or "")
    except ValueError:  # no name of a file
        path = ""
    if not Path(path).is_relative_to(os.path.realpath(folder)):
        raise gr.Error("The picture has to be uploaded; no other file or address is read.", print_exception=False)
    return path


@contextmanager
def _refusing() -> Iterator[None]:
    """Say on the page what is wrong with its input, in one sentence."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        gr.Warning(html.escape(str(error)))


# ---------------------------------------------------------------------------------------------------- its parts


def conversation(turns: Sequence[_Turn], answering: bool = False) -> str:
    """Questions and answers as HTML; while one is answered, a cursor stands where text will come."""
    if not turns:
        return '<div class="talk"><div><p class="empty">The conversation will stand here.</p></div></div>'
    parts = []
    for turn in turns:
        question = f'<p class="question">{html.escape(turn.question)}</p>' if turn.question else ""
        answers = []
        for made_by, text in turn.answers:
            label = f"<small>{made_by}</small>" if made_by else ""
            answers.append(f'<div class="answer">{label}<p>{html.escape(text) or "(no words)"}</p></div>')
        parts.append(question + "".join(answers))
    cursor = '<p class="cursor" role="status" aria-label="answering"></p>' if answering else ""
    return f'<div class="talk" aria-live="polite"><div>{"".join(parts)}{cursor}</div></div>'


def heat_map(picture: Image.Image, dots: Tensor) -> str:  # (P,)
    """HTML of the picture under a square for each image row: dark where its dot is small, glowing where it is large."""
    side = math.isqrt(len(dots))
    if side * side != len(dots):
        return f'<p class="empty">The {len(dots)} rows of a picture form no square, so there is no map of them.</p>'
    low, high = dots.min().item(), dots.max().item()
    squares = []
    for number, dot in enumerate(dots.tolist()):
        row, column = divmod(number, side)
        color = _heat_color((dot - low) / (high - low) if high > low else 0.5)
        squares.append(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill="{color}"><title>{dot:.3g}</title></rect>'
        )
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    scale = ", ".join(_heat_color(step / 8) for step in range(9))
    return (
        f'<figure class="heat"><div><img alt="the picture as the model sees it" src="data:image/png;base64,{source}">'
        f'<svg viewBox="0 0 {side} {side}" shape-rendering="crispEdges">{"".join(squares)}</svg></div>'
        f'<figcaption><span>{high:.3g}</span><i style="background-image: linear-gradient(to top, {scale})"></i>'
        f"<span>{low:.3g}</span></figcaption></figure>"
    )


def _heat_color(share: float) -> str:  # 0 the smallest, 1 the largest
    if share < 0.5:
        return f"rgb(30 41 59 / {0.65 * (1 - 2 * share):.2f})"
    return f"rgb(249 115 22 / {0.65 * (2 * share - 1):.2f})"


def bars(weights: Tensor, adds_global: bool, fixed: int | None) -> str:  # (N - 1,)
    """HTML of the gate's weights over the levels, faint where a level was fixed and they were not used."""
    columns = [
        f'<li class="{"fixed" if level == fixed else ""}"><b>{weight:.2f}</b>'
        f'<div><i style="height: {weight:.1%}"></i></div><span>{level}</span></li>'
        for level, weight in enumerate(weights.tolist())
    ]
    last = len(columns)
    if adds_global:
        columns.append(
            f'<li class="whole {"fixed" if fixed == last else ""}"><b>whole</b><div><i style="height: 100%"></i></div>'
            f"<span>{last}</span></li>"
        )
    note = "" if fixed is None else f"<p>Level {fixed} was fixed for this answer; the gate would have mixed these.</p>"
    said = ", ".join(f"level {level}: {weight:.2f}" for level, weight in enumerate(weights.tolist()))
    faint = "" if fixed is None else " unused"
    return f'<div class="bars{faint}"><ol role="img" aria-label="{said}">{"".join(columns)}</ol>{note}</div>'


def _ticks(value: float, lowest: int, last: int) -> str:
    names = ["gate" if place == _GATE else str(place) for place in range(lowest, last + 1)]
    marks = [
        f'<span class="{"here" if place == value else ""}">{name}</span>'
        for place, name in enumerate(names, start=lowest)
    ]
    return f'<div class="ticks" aria-hidden="true">{"".join(marks)}</div>'


def _heading(chat: Chat, name: str) -> str:
    if chat.model.config.align_mode == "none":
        about = "A model that answers questions about pictures. This one has no alignment token."
    elif chat.captions:
        about = (
            "Before the picture, this model reads one extra token, which tells it how well the picture and the caption "
            "to come belong together. Choose that token, and see what it does to the caption."
        )
    else:
        about = (
            "Before your words and your picture, this model reads one extra token, which tells it how well the two "
            "belong together. Here you see how that token comes about, and what it does to the answer."
        )
    return f'<header class="heading"><h1>AlignGPT <small>{html.escape(name)}</small></h1><p>{about}</p></header>'


_NOTHING_YET = '<p class="empty">Ask something about a picture.</p>'


def _heat_card(plot: str | None) -> str:
    return f"""<div class="beside"><div><h2>1 · Where words and picture meet</h2>
<p>The picture as the model sees it, in patches. Each one is compared with the mean of your words. The warmer a patch,
the larger their product; the darker, the smaller. It is the model's own measure, and need not be yours.</p></div>
{plot or _NOTHING_YET}</div>"""


def _bars_card(chat: Chat, plot: str | None) -> str:
    last = chat.model.config.num_align_levels - 1
    rest = f" Level {last} is always added whole." if _adds_global(chat) else ""
    return f"""<h2>2 · Which levels the gate mixes</h2>
<p>In training the model met {last + 1} levels of agreement between picture and text, from 0 (hardly any) to {last} (the
best). From the map above a small network, the gate, mixes them into the extra token.{rest}</p>
{plot or _NOTHING_YET}"""


def _level_help(last: int, captions: bool) -> str:
    if captions:
        return f"""<h2>How well should picture and caption agree?</h2>
<p>This model learned to caption from pairs that agree badly (level 0) up to very well (level {last}). Choose a level
and see how the caption changes.</p>"""
    return """<h2>3 · What if it were another level?</h2>
<p>Put one level in the place of the gate's mix, and ask the same again.</p>"""


_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important;
  --quiet: color-mix(in srgb, var(--body-text-color) 70%, transparent); }
.heading h1 { font-size: 1.6rem; font-weight: 700; margin: 0; letter-spacing: -0.01em; }
.heading h1 small { font-size: 0.95rem; font-weight: 400; color: var(--quiet); margin-left: 6px; }
.heading p { max-width: 60rem; margin: 2px 0 0; color: var(--quiet); }
.card { border: 1px solid var(--border-color-primary) !important; border-radius: 12px !important;
  padding: 14px 18px !important; background: var(--background-fill-primary); gap: 10px !important; }
.card .html-container, #talk .html-container { padding: 0 !important; }
.card h2 { font-size: 1rem; font-weight: 700; margin: 0 0 3px; }
.card p { font-size: 0.83rem; line-height: 1.45; margin: 0; color: var(--quiet); }
.card .beside { display: flex; gap: 18px; justify-content: space-between; align-items: flex-start; }
.empty { color: var(--quiet); text-align: center; padding: 26px 8px; }
footer { display: none !important; }

#picture img { width: 100%; height: 100%; object-fit: contain; }
#talk { height: 304px; border: 1px solid var(--border-color-primary); border-radius: 12px; }
.talk { height: 302px; overflow-y: auto; display: flex; flex-direction: column-reverse; }  /* at its end */
.talk > div { margin-bottom: auto !important; padding: 14px 18px; }
.talk p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; line-height: 1.5; }
.talk .empty { padding-top: 112px; }
.talk .question { width: fit-content; max-width: 85%; margin: 10px 0 10px auto; padding: 7px 13px;
  border-radius: 14px 14px 3px 14px; background: color-mix(in srgb, var(--color-accent) 15%, transparent); }
.talk .answer { display: flex; gap: 10px; align-items: baseline; margin: 7px 12% 7px 0; }
.talk .answer small { flex: none; width: 4.9em; text-align: center; font-size: 0.72rem; padding: 1px 0;
  border-radius: 9px; color: var(--quiet); border: 1px solid var(--border-color-primary); }
.talk .cursor { width: 8px; height: 1.1em; border-radius: 2px; background: var(--color-accent);
  animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0.15; } }

.heat { display: flex; gap: 10px; flex: none; margin: 0; }
.heat div { position: relative; width: 196px; height: 196px; }
.heat img, .heat svg { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 8px; margin: 0; }
.heat figcaption { display: flex; flex-direction: column; width: 3em; font-size: 0.75rem;
  color: var(--quiet); font-variant-numeric: tabular-nums; }
.heat figcaption i { flex: 1; width: 12px; margin: 4px 0; border-radius: 4px; background-color: white; }

.bars { margin-top: 10px; }
.bars ol { display: flex; gap: 8px; height: 118px; margin: 0; padding: 0; list-style: none; }
.bars li { flex: 1; display: flex; flex-direction: column; align-items: center; margin: 0; font-size: 0.78rem;
  font-variant-numeric: tabular-nums; }
.bars b { font-weight: 400; color: var(--quiet); }
.bars div { flex: 1; width: 100%; display: flex; align-items: flex-end;
  border-bottom: 1px solid var(--border-color-primary); }
.bars i { width: 100%; border-radius: 5px 5px 0 0; background: var(--color-accent); min-height: 2px; }
.bars .whole i { background: repeating-linear-gradient(135deg, var(--color-accent) 0 4px, transparent 4px 9px);
  border: 1px solid var(--color-accent); border-bottom: 0; opacity: 0.6; }
.bars.unused i { opacity: 0.3; }
.bars .fixed span { font-weight: 700; color: var(--color-accent); }
.bars p { margin-top: 6px; }

#level { padding: 4px 0 0 !important; border: 0 !important; }
#level .head, #level input[type="number"], #level .min_value, #level .max_value { display: none; }
#level input[type="range"]::-webkit-slider-thumb { background: var(--color-accent); }
.ticks { display: flex; justify-content: space-between; font-size: 0.8rem; color: var(--quiet); }
.ticks span { width: 3em; text-align: center; margin: 0 -0.87em; }
.ticks .here { color: var(--color-accent); font-weight: 700; }
@media (max-width: 640px) { .card .beside { flex-direction: column; } }
"""


# ---------------------------------------------------------------------------------------------------- serving it


def mounted(app: FastAPI, begin: Callable[[], Chat], name: str = "AlignGPT") -> FastAPI:
    """`app` with the page at "/", beneath all that it serves already."""
    return gr.mount_gradio_app(
        app,
        page(begin, name),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="orange",
            neutral_hue="slate",
            font=[gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"],
        ),
        css=_CSS,
    )


def serve(
    begin: Callable[[], Chat],
    app: FastAPI | None = None,
    *,
    name: str = "AlignGPT",
    host: str = "127.0.0.1",
    port: int = 7860,
) -> int:
    """Serve the page, and what `app` serves, until SIGINT or SIGTERM; then 0, the exit status.

    `begin` makes a conversation; all are of one engine, which is started here. Uploads lie in a folder of their own,
    which goes when the page does.
    """
    engine = begin().engine
    with _listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="aligngpt-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # gradio reads it when a page is made
        app = mounted(app or FastAPI(docs_url=None, redoc_url=None, openapi_url=None), begin, name)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        engine.start()
        shown_host = f"[{host}]" if ":" in host else host
        print(f"{name} is at http://{shown_host}:{listener.getsockname()[1]}/ until Ctrl-C.", file=sys.stderr)
        try:
            with _ending_signals(), _quiet_end(server):
                server.run(sockets=[listener])
        finally:
            engine.close()
    return 0


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        is_gai = isinstance(error, socket.gaierror)  # its numbers are not the system's
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and not is_gai else str(error)
        raise ValueError(f"--host {host} --port {port} cannot be served on ({why}); name another port") from error


@contextmanager
def _ending_signals() -> Iterator[None]:
    """uvicorn ends at SIGINT and SIGTERM, and sends itself the signal again: that one must not end the process."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_end(server: uvicorn.Server) -> Iterator[None]:
    """When the server ends, pages that are still open are cut off, which uvicorn would report as errors."""
    log, going_on = logging.getLogger("uvicorn.error"), lambda record: not server.should_exit
    log.addFilter(going_on)
    try:
        yield
    finally:
        log.removeFilter(going_on)
