"""The LLM without its head, forward and forward + backward: packed by our attention against padded batches.

Samples are as long as those of LLaVA's data (lengths.py). Ours gets them in one row, as training does, with the
attention that `aligngpt.attention` chooses; each other back-end of it is a contender too. The others get the same
samples padded to the longest: eager, SDPA, the same compiled, and Llama's norms, MLP and rotation by Liger. What is
compared is the hidden state of every token and, backward, the gradient of the embeddings and of two weights, one of the
first layer and one of the last, all without padding. Exact, and plain, is the model on one sample after the other,
eager.

FLOPs are those of work.py for the tokens that there are, padding not counted, so the share of the ceiling
says what packing brings. Bytes are the weights once for each pass, embeddings, states and gradients. What each layer is
given of the samples' ends, and the mask of those that pad, is made in each call, as a model does it.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama import modeling_llama

from aligngpt import attention
from benchmarks import lengths, shapes
from benchmarks.case import Absent, Case, Contender
from benchmarks.liger import with_liger
from benchmarks.measure import Outputs, Run


class Shape(NamedTuple):
    width: int
    mlp: int
    layers: int
    heads: int
    scale: int  # by which lengths are divided
    tokens: int  # at most

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=64,  # no token is looked up
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=lengths.MAX_LENGTH,
        )

    def lengths(self) -> list[int]:
        """Of the samples, as many as the tokens hold."""
        reader = lengths.processor(1000, scale=self.scale, image_size=16, template="chat")
        samples = lengths.conversations(64, vocabulary=1000, scale=self.scale)
        of_samples = [len(reader.text(sample).input_ids) for sample in samples]
        return [
            one for one, end in zip(of_samples, itertools.accumulate(of_samples), strict=True) if end <= self.tokens
        ]


LLAMA_7B = Shape(shapes.WIDTH, 11008, 2, shapes.HEADS, scale=1, tokens=8192)
ON_CPU = Shape(256, 688, 2, 4, scale=4, tokens=1024)
SMALL = Shape(32, 64, 2, 2, scale=36, tokens=112)


class Llm(NamedTuple):
    model: LlamaModel
    rows: Tensor  # (T, D): the samples' embeddings end to end
    lengths: list[int]
    upstream: Tensor | None  # (T, D): gradient of the hidden states; None: forward alone

    @property
    def weights(self) -> list[Tensor]:
        """Those that train."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]


def make(device: torch.device, shape: Shape, dtype: torch.dtype, *, backward: bool, trained: bool) -> Llm:
    with torch.device(device):
        model = LlamaModel(shape.config()).to(dtype).train()
    model.requires_grad_(trained)
    model.embed_tokens.requires_grad_(False)
    of_samples = shape.lengths()
    rows = torch.randn(sum(of_samples), shape.width, device=device, dtype=dtype).requires_grad_(backward)
    return Llm(model, rows, of_samples, torch.randn_like(rows) if backward else None)


def results(llm: Llm, states: Tensor, upstream: Tensor | None) -> Outputs:
    """The hidden states, and the gradients of the embeddings and of all weights that train."""
    if upstream is None:
        return [states]
    return [states.detach(), *torch.autograd.grad(states, [llm.rows, *llm.weights], upstream)]


def few(llm: Llm, outputs: Outputs) -> Outputs:
    """What is compared of them: of a layer's weights, those of the first matrix and the last."""
    if llm.upstream is None:
        return outputs
    states, of_rows, *of_weights = outputs
    matrices = [gradient for gradient in of_weights if gradient.ndim == 2]
    return [states, of_rows, *matrices[:1], *matrices[-1:]]


def packed_run(llm: Llm, model: nn.Module, backend: str | None = None) -> Run:
    device, size = llm.rows.device, llm.model.config.hidden_size // llm.model.config.num_attention_heads
    if backend is not None:
        if reason := attention.why_not(backend, device, llm.rows.dtype, size):
            raise Absent(reason)
        if backend == attention.choose(device, llm.rows.dtype, size):
            raise Absent("it is the one that ours has here")
    ends = torch.tensor([0, *itertools.accumulate(llm.lengths)], dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in llm.lengths])[None].to(device)

    def run() -> Outputs:
        kwargs = attention.layer_inputs(
            ends,
            max(llm.lengths),
            len(llm.rows),
            device=device,
            dtype=llm.rows.dtype,
            head_size=size,
            seq_lengths=llm.lengths,
            backend=backend,
        )
        with attended(llm, model, attention.NAME):
            found = model(inputs_embeds=llm.rows[None], position_ids=places, use_cache=False, **kwargs)
            return results(llm, found.last_hidden_state[0], llm.upstream)

    return run


def padded_run(llm: Llm, model: nn.Module, kind: str) -> Run:
    padded = pad_sequence(list(llm.rows.detach().split(llm.lengths)), batch_first=True)
    longest = torch.arange(padded.shape[1], device=padded.device)
    there = longest < torch.tensor(llm.lengths, device=padded.device)[:, None]
    upstream = None
    if llm.upstream is not None:
        padded.requires_grad_()
        upstream = pad_sequence(list(llm.upstream.split(llm.lengths)), batch_first=True)
    mask, inputs = there.long(), llm._replace(rows=padded)

    def run() -> Outputs:
        with attended(llm, model, kind):
            found = model(inputs_embeds=padded, attention_mask=mask, use_cache=False)
            return results(inputs, found.last_hidden_state, upstream)

    return run


def unpadded(llm: Llm, outputs: Outputs) -> Outputs:
    """Of the padded states and gradients of embeddings, what belongs to a token."""
    there = [slice(0, length) for length in llm.lengths]
    count = 1 if llm.upstream is None else 2
    rows = [torch.cat([row[kept] for row, kept in zip(out, there, strict=True)]) for out in outputs[:count]]
    return few(llm, [*rows, *outputs[count:]])


@contextmanager
def attended(llm: Llm, model: nn.Module, kind: str) -> Iterator[None]:
    """The model with this attention; without a graph where nothing is differentiated."""
    config: Any = model.config
    config._attn_implementation = kind
    with torch.set_grad_enabled(llm.upstream is not None):
        yield


def own_copy(llm: Llm) -> tuple[Llm, LlamaModel]:
    """A copy of the model, which may be changed, and inputs whose weights are the copy's."""
    model = copy.deepcopy(llm.model)
    return llm._replace(model=model), model


def packed(backend: str | None = None) -> Contender:
    return Contender(lambda llm: packed_run(llm, llm.model, backend), few)


def packed_compiled(llm: Llm) -> Run:
    """Each layer compiled whole, as training does it (`--sharding.compile`)."""
    llm, model = own_copy(llm)
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    return packed_run(llm, model)


def padded(kind: str) -> Contender:
    return Contender(lambda llm: padded_run(llm, llm.model, kind), unpadded)


def padded_compiled(llm: Llm) -> Run:
    llm, model = own_copy(llm)
    model.forward = torch.compile(model.forward, dynamic=False)
    return padded_run(llm, model, "sdpa")


def liger(llm: Llm) -> Run:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    llm, model = own_copy(llm)

    def apply() -> None:
        apply_liger_kernel_to_llama(
            rope=True, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=model
        )

    return with_liger(apply, (modeling_llama,), padded_run(llm, model, "sdpa"))


def one_by_one(llm: Llm, dtype: torch.dtype) -> Outputs:
    """Each sample by itself, eager, in this dtype."""
    model = copy.deepcopy(llm.model).to(dtype)
    of_samples: list[Outputs] = []
    upstreams = [None] * len(llm.lengths) if llm.upstream is None else llm.upstream.to(dtype).split(llm.lengths)
    for rows, upstream in zip(llm.rows.detach().to(dtype).split(llm.lengths), upstreams, strict=True):
        one = llm._replace(model=model, rows=rows.clone().requires_grad_(upstream is not None))
        with attended(llm, model, "eager"):
            states = model(inputs_embeds=one.rows[None], use_cache=False).last_hidden_state[0]
            of_samples.append(few(llm, results(one, states, upstream)))
    parts = list(zip(*of_samples, strict=True))
    return [*(torch.cat(part) for part in parts[:2]), *(sum(part[1:], start=part[0]) for part in parts[2:])]


def case(shape: Shape, dtype: torch.dtype, *, backward: bool, trained: bool = True) -> Case:
    tokens = sum(shape.lengths())
    weights = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.mlp)
    passes = (2 + trained) if backward else 1
    what = f"forward + backward{'' if trained else ', frozen'}" if backward else "forward"
    return Case(
        name=f"LLM {what}, {shape.layers} layers, {tokens} tokens",
        make=lambda device: make(device, shape, dtype, backward=backward, trained=trained),
        contenders={
            "ours": packed(),
            "ours, torch.compile": Contender(packed_compiled, few, gpu_only=True),
            **{f"packed, {backend}": packed(backend) for backend in attention.BACKENDS},
            "padded, eager": padded("eager"),
            "padded, SDPA": padded("sdpa"),
            "padded, SDPA, torch.compile": Contender(padded_compiled, unpadded, gpu_only=True),
            "padded, SDPA, Liger": Contender(liger, unpadded, gpu_only=True),
        },
        exact=lambda llm: one_by_one(llm, torch.float64),
        plain=lambda llm: one_by_one(llm, llm.rows.dtype),
        bytes=dtype.itemsize * (passes * weights + (4 if backward else 2) * tokens * shape.width),
        flops=2 * passes * weights * tokens,
        stage="LLM forward + backward" if backward else "LLM forward",
        items=tokens,
        unit="tokens",
        group=f"LLM {what}",
        memory=True,
        host=True,
        one_copy=True,
        rounds=5,
        trains=True,
    )


def cases() -> list[Case]:
    dtype = torch.bfloat16
    frozen = case(LLAMA_7B, dtype, backward=True, trained=False)
    return [*(case(LLAMA_7B, dtype, backward=backward) for backward in (False, True)), frozen]


def cpu_cases() -> list[Case]:
    return [case(ON_CPU, torch.float32, backward=backward) for backward in (False, True)]


def small_cases() -> list[Case]:
    return [case(SMALL, torch.float32, backward=backward) for backward in (False, True)]


def test_llm(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
