"""The generation engine: many questions answered at once, each as if it were alone.

    prompts, packed end to end ── tower, projector, gate, inject ── LLM ── cache rows, first tokens      (prefill)
    one token of every row ── LLM, attention by flash_decode ── next tokens, chosen on the device        (a step)

A request gets a row of a static cache (`cache.py`) and keeps it until its answer ends; the row then goes to the next
request while the other rows go on (continuous batching). Its alignment row is computed once, in prefill, from the whole
prompt. What a request is answered does not depend on its neighbours (`sampling.py`).

The host never waits for the step that it has just begun. On a GPU it looks at a step's tokens while the next step
runs, and a step is one CUDA graph of compiled code, one for each power of two of rows.

    engine = Engine(model, processor)
    answer = engine.ask([{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, …]}])
    for piece in answer: …                                    text as it comes; `answer.text` when it has ended
    for answer in engine.run(requests): …                     any number of them, in their order

Whoever waits for an `Answer` runs the engine; `start()` lets a thread run it instead, so that many threads may ask.

The model's own `generate` knows beams and all of transformers' settings; of a generation config the engine reads the
end tokens and `suppress_tokens`. It refuses LLMs whose layers keep something other than keys and values.
"""

import functools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from aligngpt_kernels import injection_plan
from aligngpt_kernels.dispatch import to_device
from torch import Tensor

from . import attention, decoding
from .batch import ends, positions
from .cache import SlotCache
from .model import AlignGPTForConditionalGeneration, _head_size
from .processor import AlignGPTProcessor
from .sampling import Kind, Sampler, Sampling
from .stages import ENGINE_STEP, stage
from .streaming import TextStream

logger = logging.getLogger(__name__)

LONGEST = 4096  # tokens of a row of the cache, unless more are asked for
_COMPILATIONS = 1024  # of steps in a process
_GRAIN = 64  # keys by which the part of the cache that a CPU reads grows


@dataclass(frozen=True)
class Request:
    """One prompt, as the processor returns it for one conversation, and how it is to be answered.

    `inputs` holds input_ids (1, L), and gate_mask, attention_mask (1, L) and pixel_values (M, 3, size, size) where
    there are any. `level` fixes the alignment level; None: the gate mixes the levels.
    """

    inputs: Mapping[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    level: int | None = None


class Answer:
    """What is being answered to a request. Iterating yields its text as it comes, and runs the engine if nobody does.

    Attributes:
        tokens: so far, the end token included.
        finish_reason: None while it goes on; then "end": the model ended it, "stop": a stop string did, "length": it is
            as long as was allowed or fits the cache, "cancelled", or "error", which whoever waits gets raised.
        num_prompt_tokens: image rows and the alignment token included.
    """

    def __init__(self, engine: "Engine", request: Request, prompt: "_Prompt"):
        self.request = request
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.num_prompt_tokens = prompt.ids.shape[0]
        self._engine, self._prompt = engine, prompt
        self._limit = min(request.sampling.max_new_tokens, engine.max_length - self.num_prompt_tokens)
        self._stream = TextStream(engine.processor, request.sampling.stop)
        self._pieces: SimpleQueue[str | None] = SimpleQueue()  # None: it has ended
        self._num_computed = 0  # tokens, those on their way included
        self._weights: Tensor | None = None
        self._cancelled = False
        self._tell: Callable[[], None] = lambda: None
        self._error: BaseException | None = None

    @property
    def text(self) -> str:
        """So far, without special tokens and stop strings."""
        return self._stream.text

    @property
    def align_weights(self) -> Tensor | None:  # (N - 1,) fp32
        """The gate's weights of the local levels; None before the first token and where no gate ran."""
        return self._weights if self.tokens else None

    def cancel(self) -> None:
        """End it at its next token; of any thread."""
        self._cancelled = True
        self._engine._wake()

    def watch(self, tell: Callable[[], None]) -> None:
        """Have `tell` called whenever there is more text or it has ended, by the thread that runs the engine; once now.

        It must neither wait nor raise; `finish_reason` and `text`, read in this order, say what there is.
        """
        self._tell = tell
        tell()

    def wait(self) -> "Answer":
        """Until it has ended. Raises what went wrong."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[str]:
        while (piece := self._next_piece()) is not None:
            if piece:
                yield piece
            else:
                self._engine.step()
        self._pieces.put(None)  # for whoever asks again
        if self._error is not None:
            raise self._error

    def _next_piece(self) -> str | None:
        """Empty: there is none yet, and nobody runs the engine."""
        try:
            return self._pieces.get(block=self._engine.is_serving)
        except Empty:
            return ""

    def _take(self, token: int, end_tokens: frozenset[int]) -> None:
        if not self.tokens and self._weights is not None:  # they came with this token
            self._weights = self._weights.clone()  # out of pinned memory
        self.tokens.append(token)
        if piece := self._stream.add(token):
            self._pieces.put(piece)
            self._tell()
        if token in end_tokens:
            self._end("end")
        elif self._stream.stopped:
            self._end("stop")
        elif len(self.tokens) == self._limit:
            self._end("length")

    def _end(self, reason: str, error: BaseException | None = None) -> None:
        if self.finish_reason is not None:
            return
        if error is None and (piece := self._stream.end()):
            self._pieces.put(piece)
        self.finish_reason, self._error = "stop" if self._stream.stopped else reason, error
        self._pieces.put(None)
        self._tell()


class _Prompt(NamedTuple):
    """A checked prompt, on the host."""

    ids: Tensor  # (L,)
    gate_mask: Tensor  # (L,)
    pixel_values: Tensor | None  # (M, 3, size, size), None without a picture


class _Row(NamedTuple):
    """A row of the cache and whom it belongs to."""

    number: int
    answer: Answer


class _Chosen(NamedTuple):
    """Tokens of a prefill or a step, on their way to the host."""

    tokens: Tensor  # on the host
    rows: list[_Row]
    places: Sequence[int]  # of each row's token among them
    arrived: torch.cuda.Event | None


class Engine:
    """Answers requests with a model, which it leaves with the attention `aligngpt_decode`.

    Args:
        max_batch_size: rows of the cache, which is how many requests are answered at a time.
        max_length: tokens of a row, prompt and answer together. None: the model's window, 4096 at most.
        max_prefill_tokens: of prompts that are read at once, if more than one.
        compile: whether steps are compiled, and on a GPU captured in CUDA graphs. None: on a GPU, unless the model
            is spread over devices.
        step_rows: numbers of rows that a step may have; fewer answers leave some of them empty. Each is compiled by
            itself. None: the powers of two; all rows, and no other number, where throughput alone counts.

    Raises:
        ValueError: the LLM keeps something other than keys and values, or an argument that means nothing.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: AlignGPTForConditionalGeneration,
        processor: AlignGPTProcessor,
        *,
        max_batch_size: int = 8,
        max_length: int | None = None,
        max_prefill_tokens: int = 8192,
        compile: bool | None = None,
        step_rows: Sequence[int] | None = None,
    ):
        if hasattr(model, "get_base_model"):  # adapters stay in its layers
            if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
                raise ValueError(
                    "the model has an adapter of peft's that learns a prompt; the engine needs one of layers"
                )
            model = model.get_base_model()
        text_config = model.config.text_config
        window = window_of(text_config)
        max_length = min(window, LONGEST) if max_length is None else max_length
        for name, value, good, needs in (
            ("max_batch_size", max_batch_size, max_batch_size >= 1, "at least 1"),
            ("max_length", max_length, 2 <= max_length <= window, f"2 to {window}, the model's window"),
            ("max_prefill_tokens", max_prefill_tokens, max_prefill_tokens >= 1, "at least 1"),
            (
                "step_rows",
                step_rows,
                all(1 <= count <= max_batch_size for count in step_rows or []),
                f"numbers from 1 to {max_batch_size}, max_batch_size",
            ),
            ("model.training", model.training, not model.training, "False: call model.eval()"),
        ):
            if not good:
                raise ValueError(f"{name} is {value}; it needs to be {needs}")
        if reason := why_not(model):
            raise ValueError(f"the engine can't answer with this LLM: {reason}; model.generate may")
        self.model, self.processor = model, processor
        self.max_batch_size, self.max_length, self.max_prefill_tokens = max_batch_size, max_length, max_prefill_tokens
        self.device = _device(model.get_input_embeddings())
        self._takes_packs = attention.why_not_packed(text_config, max_length) is None
        model.model.language_model.set_attn_implementation(decoding.NAME)
        settings = model.generation_config
        end = settings.eos_token_id
        self.end_tokens = frozenset([] if end is None else end if isinstance(end, list) else [end])
        self.cache = SlotCache(text_config.num_hidden_layers, max_batch_size, max_length)
        self._sampler = Sampler(
            max_batch_size, text_config.vocab_size, max_length, settings.suppress_tokens or [], self.device
        )
        powers = [1 << power for power in range(max_batch_size.bit_length())]
        self._step_rows = sorted({max_batch_size, *(powers if step_rows is None else step_rows)})
        self._row_numbers = torch.arange(max_batch_size, device=self.device)
        self._token = torch.zeros(max_batch_size, dtype=torch.long, device=self.device)  # the last one of each row
        self._length = torch.zeros(max_batch_size, dtype=torch.long, device=self.device)  # keys in the cache

        is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        compile = self.device.type == "cuda" and not is_spread if compile is None else compile
        self._is_compiled = compile
        step: Callable[[int, Kind], Tensor] = self._forward_step
        self._run_step = _compiled(step) if compile else step
        self._uses_graphs = compile and self.device.type == "cuda"
        self._graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

        self._waiting: deque[Answer] = deque()
        self._answers: list[Answer | None] = [None] * max_batch_size  # by row
        self._chosen: deque[_Chosen] = deque()
        self._lag = 1 if self.device.type == "cuda" else 0  # steps that run while the host looks at an earlier one
        self._lock = threading.RLock()  # held by whoever runs the engine
        self._changed = threading.Condition()  # something waits or was cancelled, or the thread is to end
        self._thread: threading.Thread | None = None
        self._is_closing = False

    # ------------------------------------------------------------------------------------------------ asking

    def ask(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None, *, level: int | None = None
    ) -> Answer:
        """The answer to a conversation, given as `AlignGPTProcessor.apply_chat_template` takes it."""
        inputs = self.processor.apply_chat_template(messages, tokenize=True)
        return self.submit(Request(inputs, sampling or Sampling(), level))

    def submit(self, request: Request) -> Answer:
        """Queue a request; of any thread.

        Raises:
            ValueError: its prompt is no single row, does not fit its pictures, the model or a row of the cache, or the
                model has no such level.
        """
        answer = Answer(self, request, self._checked(request))
        if answer._limit <= 0:
            answer._end("length")
            return answer
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The ended answers to any number of requests, in their order. Few are taken ahead of those that have ended."""
        asked: deque[Answer] = deque()
        try:
            for request in requests:
                asked.append(self.submit(request))
                if len(asked) >= 2 * self.max_batch_size:
                    yield asked.popleft().wait()
            while asked:
                yield asked.popleft().wait()
        finally:  # one is wrong, or nobody wants more
            for answer in asked:
                answer.cancel()

    def _checked(self, request: Request) -> _Prompt:
        config, inputs = self.model.config, request.inputs
        if request.level is not None and config.align_mode == "none":
            raise ValueError(f"level is {request.level}; this model has align_mode 'none' and no alignment token")
        if request.level is not None and not 0 <= request.level < config.num_align_levels:
            raise ValueError(f"level is {request.level}; this model has levels 0 to {config.num_align_levels - 1}")
        ids = inputs["input_ids"].cpu()
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; a request is one prompt, (1, L)")
        gate_mask = inputs.get("gate_mask")
        gate_mask = torch.arange(ids.shape[1])[None] > 0 if gate_mask is None else gate_mask.cpu().bool()
        kept = inputs.get("attention_mask")
        kept = torch.ones_like(gate_mask) if kept is None else kept.cpu().bool()
        for name, mask in (("gate_mask", gate_mask), ("attention_mask", kept)):
            if mask.shape != ids.shape:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}; input_ids has {tuple(ids.shape)}")
        ids, gate_mask = ids[kept], gate_mask[kept]

        pixels = inputs.get("pixel_values")
        size = config.vision_config.image_size
        if pixels is not None and pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values has shape {tuple(pixels.shape)}; it needs (images, 3, {size}, {size})")
        pixels = None if pixels is None or len(pixels) == 0 else pixels.cpu()
        self.model.model._plan(ids[None], 0 if pixels is None else len(pixels), None, None)  # checks what it counts
        room = self.max_length - len(ids)
        if len(ids) == 0 or room < min(request.sampling.max_new_tokens, 1):
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the model reads 1 to {self.max_length}, its answer included: ask "
                "something shorter or start anew"
            )
        return _Prompt(ids, gate_mask, pixels)

    # ------------------------------------------------------------------------------------------------ running

    @property
    def is_serving(self) -> bool:
        """Whether a thread of its own runs the engine."""
        return self._thread is not None

    def start(self) -> None:
        """Let a thread run the engine until `close`."""
        with self._changed:
            if self._thread is not None:
                raise ValueError("the engine has started already")
            self._is_closing = False
            self._thread = threading.Thread(target=self._serve, name="generation engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread. Answers that have not ended are cancelled."""
        with self._changed:
            thread = self._thread
            if thread is None:
                return
            self._is_closing = True
            self._changed.notify()
        thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _serve(self) -> None:
        is_busy = False
        try:
            while not self._is_closing:
                with self._changed:
                    while not (is_busy or self._waiting or self._is_closing):
                        self._changed.wait()
                is_busy = self.step()
        finally:  # whatever ended it, nobody waits for a thread that is not there
            with self._lock, self._changed:
                self._thread = None
                for answer in [*self._waiting, *filter(None, self._answers)]:
                    answer._end("cancelled")
                self._waiting.clear()
                self._forget()

    def step(self) -> bool:
        """Read waiting prompts where rows are free, then choose a token for each row. Returns whether work is left.

        What goes wrong is raised where the answers that it hits are waited for; others go on.
        """
        with self._lock, self._own_modes(), stage(ENGINE_STEP):
            try:
                self._drop_cancelled()
                self._read_waiting()
                has_stepped = self._choose_next()
                self._hand_out(keep=self._lag if has_stepped else 0)
            except BaseException as error:
                for answer in filter(None, self._answers):
                    answer._end("error", error)
                self._forget()
                if not isinstance(error, Exception):
                    raise
                logger.exception("a step of the generation engine failed")
            return bool(self._waiting or self._chosen or any(self._answers))

    @contextmanager
    def _own_modes(self) -> Iterator[None]:
        """The same for every step: each thread has a current device, whose stream events are recorded in, and modes of
        its own, and the cache lives longer than those."""
        kind = self.device.type
        device: AbstractContextManager[Any] = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        with device, torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            yield

    def _forget(self) -> None:
        self._answers = [None] * self.max_batch_size
        self._chosen.clear()

    def _free(self, number: int) -> None:
        self._answers[number] = None
        self._length[number] = 0  # where it runs along, it reads few keys

    def _drop_cancelled(self) -> None:
        for answer in list(self._waiting):
            if answer._cancelled:
                self._waiting.remove(answer)
                answer._end("cancelled")
        for number, begun in enumerate(self._answers):
            if begun is not None and begun._cancelled:
                begun._end("cancelled")
                self._free(number)

    # ------------------------------------------------------------------------------------------------ prefill

    def _read_waiting(self) -> None:
        """Give free rows to waiting requests and read their prompts, those with a level apart from the others."""
        packs: dict[bool, list[_Row]] = {}
        num_tokens = 0
        for number, taken in enumerate(self._answers):
            if taken is not None:
                continue
            if not self._waiting:
                break
            num_tokens += self._waiting[0].num_prompt_tokens
            if packs and num_tokens > self.max_prefill_tokens:
                break
            row = _Row(number, self._waiting.popleft())
            self._answers[number] = row.answer
            packs.setdefault(row.answer.request.level is not None, []).append(row)
        for pack in packs.values():
            for rows in [pack] if self._takes_packs else [[row] for row in pack]:
                with stage("prefill"):
                    self._try_to_read(rows)

    def _try_to_read(self, rows: list[_Row]) -> None:
        """Where prompts together fail, for want of memory or because of one of them, each is read by itself."""
        try:
            self._read(rows)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold memory, which the next try may want
            if len(rows) > 1:
                for row in rows:
                    self._try_to_read([row])
                return
            logger.exception("a prompt could not be read")
            rows[0].answer._end("error", error)
            self._answers[rows[0].number] = None

    def _read(self, rows: list[_Row]) -> None:
        """Read the prompts of some rows, and choose the first token of each."""
        model, move = self.model, functools.partial(to_device, device=self.device)
        prompts = [row.answer._prompt for row in rows]
        lengths = [len(prompt.ids) for prompt in prompts]
        ids, cu_seqlens = torch.cat([prompt.ids for prompt in prompts]), ends(lengths)
        special = {"image_token_id": model.config.image_token_id, "align_token_id": model.config.align_token_id}
        with_picture = [row.answer for row in rows if row.answer._prompt.pixel_values is not None]
        pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
        levels = [answer.request.level for answer in with_picture if answer.request.level is not None]
        embeds, weights = model.model.embed(
            move(ids[None]),
            move(torch.cat(pixels)) if pixels else None,
            align_levels=move(torch.tensor(levels)) if levels else None,
            gate_mask=move(torch.cat([prompt.gate_mask for prompt in prompts])[None]),
            plan=injection_plan(ids, cu_seqlens=cu_seqlens, **special).to(self.device),
            cu_seqlens=move(cu_seqlens),
        )
        layers: dict[str, Any] = {}
        if self._takes_packs:
            layers = attention.layer_inputs(
                move(cu_seqlens),
                max(lengths),
                len(ids),
                device=self.device,
                dtype=embeds.dtype,
                head_size=_head_size(model.config.text_config),
                seq_lengths=lengths,
            )
            layers["attention_mask"] = decoding.no_mask(self.device)
        numbers = torch.tensor([row.number for row in rows])
        place = positions(cu_seqlens, len(ids))
        self.cache.prefill(move(numbers.repeat_interleave(torch.tensor(lengths))), move(place))
        with stage("LLM forward"):
            hidden = model.model.language_model(
                inputs_embeds=embeds,
                position_ids=move(place[None]),
                past_key_values=self.cache,
                use_cache=True,
                **layers,
            ).last_hidden_state
        logits = model.lm_head(hidden[0, move(cu_seqlens[1:].long() - 1).to(hidden.device)])

        for row in rows:
            sampling, prompt = row.answer.request.sampling, row.answer._prompt
            visible = model._visible_ids(prompt.ids, None, model.generation_config)
            self._sampler.begin(row.number, sampling, visible, row.answer._limit)
        if weights is not None:
            for answer, row_weights in zip(with_picture, _to_host(weights), strict=True):
                answer._weights = row_weights
        numbers = move(numbers)
        with stage("sampling"):
            tokens = self._sampler.choose(logits, numbers, Kind.of([row.answer.request.sampling for row in rows]))
        self._token[numbers] = tokens
        self._length[numbers] = move(torch.tensor(lengths))
        self._send(tokens, rows, range(len(rows)))

    # ------------------------------------------------------------------------------------------------ steps

    def _choose_next(self) -> bool:
        """A token for each row that may have another. Returns whether there is such a row."""
        rows = [
            _Row(number, answer)
            for number, answer in enumerate(self._answers)
            if answer is not None and answer._num_computed < answer._limit
        ]
        if not rows:
            return False
        num_rows = next(count for count in self._step_rows if count > rows[-1].number)
        visible = self.max_length
        if not self._is_compiled and self.device.type == "cpu":  # what is not in use would be read, too
            longest = max(row.answer.num_prompt_tokens + row.answer._num_computed for row in rows)
            visible = min(-(-longest // _GRAIN) * _GRAIN, visible)
        self.cache.decode(self._row_numbers[:num_rows], self._length[:num_rows], visible)
        kind = Kind.of([row.answer.request.sampling for row in rows])
        with stage("decode step"):
            tokens = self._replay(num_rows, kind) if self._uses_graphs else self._run_step(num_rows, kind)
        self._send(tokens, rows, [row.number for row in rows])
        return True

    def _forward_step(self, num_rows: int, kind: Kind) -> Tensor:
        """The next token of the first `num_rows` rows (R,): no shape depends on what they hold. Rows without an answer
        run along."""
        place = self._length[:num_rows]
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self._token[:num_rows, None]),
            attention_mask=decoding.bounds(torch.zeros_like(place), place + 1),
            position_ids=place[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.model.lm_head(hidden[:, -1])
        with stage("sampling"):
            tokens = self._sampler.choose(logits, self._row_numbers[:num_rows], kind)
        self._token[:num_rows] = tokens
        self._length[:num_rows] = (place + 1).clamp(max=self.max_length - 1)
        return tokens

    def _replay(self, num_rows: int, kind: Kind) -> Tensor:
        """`_forward_step` by a CUDA graph, which is captured when it is first needed."""
        key = num_rows, kind
        if key not in self._graphs:
            state = [self._token, self._length, *self._sampler.state]
            before = [tensor.clone() for tensor in state]
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles; the keys that it writes are written anew before they are read
                    self._run_step(num_rows, kind)
                graph = torch.cuda.CUDAGraph()
                pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    tokens = self._run_step(num_rows, kind)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            self._graphs[key] = graph, tokens
        graph, tokens = self._graphs[key]
        graph.replay()
        return tokens

    def _send(self, tokens: Tensor, rows: list[_Row], places: Sequence[int]) -> None:
        """Start tokens on their way to the host."""
        tokens, arrived = _to_host(tokens), None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        for row in rows:
            row.answer._num_computed += 1
        self._chosen.append(_Chosen(tokens, rows, places, arrived))

    def _hand_out(self, keep: int) -> None:
        """Hand tokens to their answers, but for the `keep` latest steps; rows whose answer ends are free."""
        while len(self._chosen) > keep:
            chosen = self._chosen.popleft()
            if chosen.arrived is not None:
                chosen.arrived.synchronize()
            tokens = chosen.tokens.tolist()
            for row, place in zip(chosen.rows, chosen.places, strict=True):
                if row.answer.finish_reason is None:
                    try:
                        row.answer._take(tokens[place], self.end_tokens)
                    except Exception as error:  # of its tokenizer
                        logger.exception("a token could not be handed out")
                        row.answer._end("error", error)
                    if row.answer.finish_reason is not None:
                        self._free(row.number)


def _to_host(tensor: Tensor) -> Tensor:
    """A tensor on its way to the host: what is recorded next happens when it is there."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _compiled(step: Callable[[int, Kind], Tensor]) -> Callable[[int, Kind], Tensor]:
    """The step compiled for each number of rows and kind by itself: more often than Dynamo allows by default."""
    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    known: set[tuple[int, Kind]] = set()

    def run(num_rows: int, kind: Kind) -> Tensor:
        key = num_rows, kind
        if key in known:
            return compiled(num_rows, kind)
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS, accumulated_recompile_limit=_COMPILATIONS):
            tokens = compiled(num_rows, kind)
        known.add(key)
        return tokens

    return run


def window_of(text_config: Any) -> int:
    """Tokens of the longest row that is answered as if it were alone."""
    window = getattr(text_config, "max_position_embeddings", None) or LONGEST
    for settings in _ropes(text_config):
        if settings.get("rope_type") == "longrope":  # beyond, the frequencies of all rows follow the longest
            window = min(window, settings["original_max_position_embeddings"])
    return window


def _ropes(text_config: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings, which some LLMs have by kind of layer."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def _device(module: torch.nn.Module) -> torch.device:
    """Where a module runs: accelerate may keep its weight elsewhere."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return module.weight.device if device is None else torch.device(device)  # type: ignore[return-value]


def why_not(model: AlignGPTForConditionalGeneration) -> str | None:
    """None if an engine can answer with this model's LLM, else the reason as a sentence."""
    text_config = model.config.text_config
    kind = text_config.model_type
    if not type(model.model.language_model)._can_set_attn_implementation():
        return f"{kind} models do not use transformers' attention interface"
    layers = set(getattr(text_config, "layer_types", None) or [])
    if other := layers - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(other))}"
    if any(settings.get("rope_type") == "dynamic" for settings in _ropes(text_config)):
        return "its rope_type 'dynamic' turns every row by the length of the longest"
    return None
