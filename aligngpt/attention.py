"""Causal attention over packed sequences, for transformers' attention interface under the name `aligngpt_varlen`.

A packed batch is one row of T tokens in which sequences lie end to end; `cu_seqlens` (N + 1,) int32 holds where each
begins, and T. A token attends to its own sequence up to itself. No mask of T × T is ever made: the name is registered
without a mask function, so transformers hands over none.

One of `BACKENDS` computes it, the first that `why_not` has nothing against, or the one that is named. The model asks
`layer_inputs` once a forward for what every layer is given: transformers' four names (`cu_seq_lens_q`, `cu_seq_lens_k`,
`max_length_q`, `max_length_k`), the back-end, and what that one needs besides, so that no layer waits for the device.

Refused: padding masks, dropout, sinks, capped scores, and a window shorter than the longest sequence; `why_not_packed`
says so of a model beforehand.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .batch import ends, sequences

logger = logging.getLogger(__name__)

NAME = "aligngpt_varlen"
BACKENDS = ("flash-attn", "torch-varlen", "xformers", "flex", "sdpa")  # in the order in which they are tried
_PACKAGES = {
    "flash-attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch-varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}
_FLEX_BLOCK = 128

# ------------------------------------------------------------------------------------------------ which back-end


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """None if `backend` can run on heads of this kind, forward and backward, else the reason as a sentence."""
    if backend not in BACKENDS:
        return f"there is none of that name: it may be {', '.join(BACKENDS)}"
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"its inputs are on {device.type}, and it runs on CUDA devices"
    if backend == "flex":
        return f"its heads have {head_size} entries, and it needs 16" if head_size < 16 else None
    module, name = _PACKAGES[backend]
    if _imported(module, name) is None:
        return f"{module} is not installed"
    half = dtype in (torch.float16, torch.bfloat16)
    if backend == "xformers":
        return (
            None
            if half or dtype == torch.float32
            else f"its inputs are {dtype}, and it takes none of more than 32 bits"
        )
    if not half:
        return f"its inputs are {dtype}, and it takes float16 and bfloat16"
    if head_size > 256 or head_size % 8:
        return f"its heads have {head_size} entries, and it takes multiples of 8 up to 256"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, head_size: int, backend: str | None = None) -> str:
    """The back-end that is named, or else the first that can run. Each choice is logged once.

    Raises:
        ValueError: the named one cannot run; the message says why.
    """
    reasons = {name: why_not(name, device, dtype, head_size) for name in ([backend] if backend else BACKENDS)}
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    if chosen is None:
        assert backend is not None
        raise ValueError(f"attention_backend is {backend!r}, which cannot run: {reasons[backend]}")
    if chosen == "torch-varlen":
        _takes_fewer_heads()  # found out here, since traced code cannot
    names: dict[str, list[str]] = {}  # by reason: one that several have is said once
    for name, reason in reasons.items():
        names.setdefault(reason or "", []).append(name)
    passed_over = "; ".join(f"not {', '.join(those)}: {reason}" for reason, those in names.items() if reason)
    logger.info("packed attention is computed by %s%s", chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def why_not_packed(text_config: PretrainedConfig, max_length: int) -> str | None:
    """None if an LLM of this config can take packed sequences of up to `max_length` tokens, else why it cannot."""
    kind = text_config.model_type
    model_class: Any = MODEL_MAPPING.get(type(text_config), None)
    if model_class is None or not model_class._can_set_attn_implementation():
        return f"{kind} models do not use transformers' attention interface"
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        return f"it caps attention scores at {text_config.attn_logit_softcapping}"
    if not model_class._supports_sdpa:
        return f"the attention of {kind} models is more than a softmax over scores"
    if not getattr(text_config, "is_causal", True) or getattr(text_config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    layers = set(getattr(text_config, "layer_types", None) or ["full_attention", "sliding_attention"])
    if other := layers - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(other))}"
    window = getattr(text_config, "sliding_window", None)
    if "sliding_attention" in layers and window is not None and window < max_length:
        return f"its attention reaches {window} tokens back, and sequences may have {max_length}"
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(text_config, name, 0.0):
            return f"its {name} is {getattr(text_config, name)}, and packed attention has no dropout"
    return None


_found: dict[str, Any] = {}  # not functools.cache: traced code looks through that and would import by itself


def _imported(module: str, name: str) -> Any:
    """A function of an optional module, None where the module is missing."""
    if name not in _found:
        try:
            _found[name] = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != module.partition(".")[0]:
                raise
            _found[name] = None
    return _found[name]


# ------------------------------------------------------------------------------------------------ the interface


def layer_inputs(
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    num_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    seq_lengths: Sequence[int] | None = None,  # `cu_seqlens` on the host; without it a back-end may wait for the device
    backend: str | None = None,
) -> dict[str, Any]:
    """What an LLM's forward is given for packed sequences, and hands on to `varlen_attention` in each layer."""
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
    backend = choose(device, dtype, head_size, backend)
    inputs: dict[str, Any] = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "attention_backend": backend,
    }
    if backend in ("xformers", "sdpa"):
        inputs["host_cu_seqlens"] = cu_seqlens.cpu() if seq_lengths is None else ends(seq_lengths)
    elif backend == "flex":
        inputs["block_mask"] = block_mask(cu_seqlens, num_tokens)
    return inputs


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,  # (N + 1,) int32
    max_length_q: int | None = None,
    attention_backend: str | None = None,
    host_cu_seqlens: Tensor | None = None,
    block_mask: BlockMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, (1, T, H, D), as transformers' attention interface wants it.

    Raises:
        ValueError: `cu_seq_lens_q` or `max_length_q` is missing, or the layer asks for what the module refuses.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            f"cu_seq_lens_q is {cu_seq_lens_q}, max_length_q {max_length_q}; {NAME} needs both: give the model "
            "cu_seqlens and max_seqlen, or set another attention (set_attn_implementation) for padded batches"
        )
    window = kwargs.get("sliding_window")
    for name, got, refused in (
        ("attention_mask", "given", attention_mask is not None),
        ("dropout", dropout, dropout > 0),
        ("sliding_window", window, window is not None and window < max_length_q),
        ("softcap", kwargs.get("softcap"), kwargs.get("softcap") is not None),
        ("s_aux", "given", kwargs.get("s_aux") is not None),
        ("is_causal", False, kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False),
        ("batch", query.shape[0], query.shape[0] != 1),
    ):
        if refused:
            raise ValueError(
                f"{name} is {got}; {NAME} computes plain causal attention of one row of packed sequences, "
                f"the longest of which has {max_length_q} tokens"
            )
    query, key = query.to(value.dtype), key.to(value.dtype)  # norms on queries and keys may have widened them
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_backend is None:
        kind: dict[str, Any] = {"device": query.device, "dtype": query.dtype, "head_size": query.shape[-1]}
        more = layer_inputs(cu_seq_lens_q, max_length_q, query.shape[2], **kind)
        attention_backend = more["attention_backend"]
        host_cu_seqlens, block_mask = more.get("host_cu_seqlens"), more.get("block_mask")

    if attention_backend == "sdpa":
        assert host_cu_seqlens is not None
        return _by_blocks(query, key, value, host_cu_seqlens, scale), None
    if attention_backend == "flex":
        return _flex(query, key, value, block_mask, scale), None
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if attention_backend == "xformers":
        return _xformers(query, key, value, host_cu_seqlens, scale), None
    flash = _flash_attn if attention_backend == "flash-attn" else _torch_varlen
    return flash(query[0], key[0], value[0], cu_seq_lens_q, max_length_q, scale)[None], None


AttentionInterface.register(NAME, varlen_attention)


# ------------------------------------------------------------------------------------------------ the back-ends


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    """By the package flash-attn. (T, H, D)"""
    attend = _imported(*_PACKAGES["flash-attn"])
    deterministic = torch.are_deterministic_algorithms_enabled()  # torch's own varlen attention asks by itself
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "deterministic": deterministic}
    return attend(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    """By the flash attention in torch. (T, H, D)"""
    attend = _imported(*_PACKAGES["torch-varlen"])
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if _takes_fewer_heads():
        options["enable_gqa"] = True
    else:
        key, value = (_repeat_heads(t, query.shape[1], dim=1) for t in (key, value))
    return attend(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


def _takes_fewer_heads() -> bool:
    """Whether torch's `varlen_attn` knows grouped heads, as since 2.12."""
    if "fewer heads" not in _found:
        _found["fewer heads"] = "enable_gqa" in inspect.signature(_imported(*_PACKAGES["torch-varlen"])).parameters
    return _found["fewer heads"]


@torch.compiler.disable
def _xformers(query: Tensor, key: Tensor, value: Tensor, host_cu_seqlens: Tensor, scale: float) -> Tensor:
    """By xformers. Its mask is made from lengths on the host, so it stays outside compiled code. (1, T, H, D)"""
    attend = _imported(*_PACKAGES["xformers"])
    mask = _imported("xformers.ops.fmha.attn_bias", "BlockDiagonalCausalMask")
    key, value = (_repeat_heads(t, query.shape[2], dim=2) for t in (key, value))
    bias = mask.from_seqlens(host_cu_seqlens.diff().tolist(), device=query.device)
    return attend(query, key, value, attn_bias=bias, scale=scale)


def _repeat_heads(tensor: Tensor, num_heads: int, *, dim: int) -> Tensor:
    return tensor.repeat_interleave(num_heads // tensor.shape[dim], dim=dim)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, scale: float) -> Tensor:
    """By FlexAttention. (1, H, T, D) -> (1, T, H, D)"""
    traced = torch.compiler.is_compiling() or query.device.type == "cpu"
    attend: Any = flex_attention if traced else _compiled_flex()
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(cu_seqlens: Tensor, num_tokens: int) -> BlockMask:
    """FlexAttention's mask. Which blocks it visits is computed from where sequences begin, without a T × T tensor."""
    sequence = sequences(cu_seqlens, num_tokens)
    num_blocks = -(-num_tokens // _FLEX_BLOCK)
    block = torch.arange(num_blocks, device=sequence.device)
    first = sequence[block * _FLEX_BLOCK]
    last = sequence[((block + 1) * _FLEX_BLOCK - 1).clamp(max=num_tokens - 1)]
    visited = (block[None, :] <= block[:, None]) & (last[None, :] >= first[:, None])  # (query block, key block)

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (sequence[q] == sequence[k])

    return BlockMask.from_kv_blocks(
        visited.sum(1, dtype=torch.int32)[None, None],
        visited.int().argsort(dim=1, descending=True, stable=True).int()[None, None],
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_tokens, num_tokens),
    )


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """By a loop of `scaled_dot_product_attention` over the sequences; `cu_seqlens` is on the host. (1, T, H, D)

    Traced it is one operator: a traced loop would be compiled anew for each batch.
    """
    if torch.compiler.is_compiling():
        return _by_blocks_operator(query, key, value, cu_seqlens, scale)
    return _loop(query, key, value, cu_seqlens, scale)


def _loop(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    blocks = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous()


@torch.library.custom_op("aligngpt::attention_by_blocks", mutates_args=())
def _by_blocks_operator(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return _loop(query, key, value, cu_seqlens, scale)


@_by_blocks_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    _, num_heads, num_tokens, _ = query.shape
    return query.new_empty(1, num_tokens, num_heads, value.shape[-1])


@torch.library.custom_op("aligngpt::attention_by_blocks_backward", mutates_args=())
def _by_blocks_backward(
    grad: Tensor,  # (1, T, H, D)
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_kv, T, D)
    value: Tensor,  # (1, H_kv, T, D)
    cu_seqlens: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of query, key and value. Autograd does not work inside an operator, so the maths stands here."""
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    kv_heads = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    for start, end in torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1).tolist():
        # (kv head, queries that share it, tokens, D)
        q, g = (t[0, :, start:end].unflatten(0, (kv_heads, -1)).to(dtype) for t in (query, grad.transpose(1, 2)))
        k, v = (t[0, :, None, start:end].to(dtype) for t in (key, value))
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu_(1)
        weights = (q @ k.mT * scale).masked_fill_(later, -torch.inf).softmax(-1)
        by_weight = g @ v.mT
        by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True)) * scale
        parts = (by_score @ k).flatten(0, 1), (by_score.mT @ q).sum(1), (weights.mT @ g).sum(1)
        for whole, part in zip(grads, parts, strict=True):
            whole[0, :, start:end] = part
    return grads


@_by_blocks_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_by_blocks_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_by_blocks_operator.register_autograd(_backward, setup_context=_keep)
