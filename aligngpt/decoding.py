"""`flash_decode` for any transformers model, under the name `aligngpt_decode` of its attention interface.

    import aligngpt
    model.set_attn_implementation("aligngpt_decode")

A decoding step has one query a row, which sees an unbroken run of keys of its cache: `starts[b] <= j < ends[b]`. The
name's mask function finds that run in whatever mask transformers would make (padding, a window, a static cache that is
not full yet), and hands over its two ends instead; the attention then reads no key that is outside. Neither waits for
the device. Bounds may also be made by the caller (`bounds`) and given to the model as its attention mask.

Packed sequences, known by `cu_seq_lens_q` and `max_length_q`, go to `attention.varlen_attention`. All else runs as
transformers would run it: by its SDPA attention with its mask, or by the eager function of the model's own file where
scores are capped or have sinks. That goes for prompts, training, dropout, paged caches, position biases and 4-D masks
of the caller's own.

A row whose visible keys have holes (a mask with zeros between ones; prompts padded on the right) has no such run. Its
mask is then handed over as it is, for transformers' attention. On a GPU, and in traced code, that cannot be decided
without waiting, so there it is an assertion on the device: never a wrong number.
"""

import sys
from typing import Any

import torch
from aligngpt_kernels import flash_decode
from aligngpt_kernels.decode import MAX_HEAD_DIM
from aligngpt_kernels.dispatch import as_autocast
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import varlen_attention

NAME = "aligngpt_decode"
_HOLES = (  # no quotes, since the compiler pastes it into C++, and under 255 characters, since the GPU copies it
    f"attention_mask has zeros between its ones; {NAME} needs all zeros before the ones here: pad prompts on the left, "
    "or set the attention to sdpa"
)

# ------------------------------------------------------------------------------------------------ masks


def bounds(starts: Tensor, ends: Tensor) -> Tensor:
    """Which keys each row's query sees, `starts[b] <= j < ends[b]`, as an attention mask (B, 1, 1, 2) int32.

    It is 4-D because transformers leaves such masks as they are. Each half is contiguous, as the kernel reads it.
    """
    return torch.stack((starts, ends)).int().T[:, None, None]


def no_mask(device: torch.device) -> Tensor:
    """Bounds that nothing reads, for packed sequences: given these, transformers makes no mask of T × T."""
    return torch.zeros(1, 1, 1, 2, dtype=torch.int32, device=device)


def decode_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """transformers' mask function of the name: `bounds` where there is one query a row, else what SDPA takes.

    Two keys or fewer keep their mask, so that bounds never have the shape of one: a model that does arithmetic with its
    mask fails instead of computing something else.
    """
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    if q_length != 1 or kv_length <= 2:
        return sdpa_mask(**(kwargs | sizes))
    mask = sdpa_mask(**(kwargs | sizes | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))
    assert mask is not None
    sees = mask[:, 0, 0]  # (B, K)
    places = torch.arange(1, kv_length + 1, device=sees.device, dtype=torch.int32)
    ends = (sees * places).amax(1)
    starts = ends - sees.sum(1, dtype=torch.int32)
    unbroken = (sees.int().argmax(1) == starts).all()
    if sees.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(unbroken, _HOLES)
    elif not unbroken:
        return mask
    return bounds(starts, ends)


AttentionMaskInterface.register(NAME, decode_mask)


def _holds_bounds(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1:] == (1, 1, 2)


# ------------------------------------------------------------------------------------------------ attention


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, Hq, Q, Dh)
    key: Tensor,  # (B, Hkv, K, Dh)
    value: Tensor,  # (B, Hkv, K, Dh)
    attention_mask: Tensor | None,  # bounds (B, 1, 1, 2) int32, or a mask as transformers' SDPA attention takes it
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # sinks
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention (B, Q, Hq, Dh), as transformers' attention interface wants it.

    Raises:
        ValueError: bounds are given for more than one query a row; the module's file has no eager attention for its
            caps or sinks; or what `varlen_attention` refuses of packed sequences.
    """
    options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    plain = softcap is None and s_aux is None and kwargs.get("position_bias") is None and kwargs.get("cache") is None
    packed = kwargs.get("cu_seq_lens_q") is not None and kwargs.get("max_length_q") is not None
    if packed and kwargs.get("cache") is None:  # with a paged one, keys are yet to be fetched
        return varlen_attention(module, query, key, value, None, **options, softcap=softcap, s_aux=s_aux, **kwargs)
    if _holds_bounds(attention_mask):
        assert attention_mask is not None
        if query.shape[2] != 1:
            raise ValueError(
                f"attention_mask holds bounds, and each row has {query.shape[2]} queries; {NAME} needs 1: "
                "give more of them a mask of zeros and ones"
            )
        starts, ends = attention_mask[:, 0, 0].unbind(1)
        if sliding_window is not None:
            starts = torch.maximum(starts, ends - sliding_window)
        fits = key.shape == value.shape and query.shape[3] <= MAX_HEAD_DIM
        if plain and fits and not dropout:
            query, key, value = as_autocast(query, key, value)
            with torch.autocast(query.device.type, enabled=False):  # the op's sums are in float32
                out = flash_decode(query, key, value, ends, starts=starts, scale=scaling)
            return out.transpose(1, 2), None
        place = torch.arange(key.shape[2], device=key.device)
        attention_mask = ((place >= starts[:, None]) & (place < ends[:, None]))[:, None, None]
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    return _eager(module, query, key, value, attention_mask, **options, softcap=softcap, s_aux=s_aux, **kwargs), None


AttentionInterface.register(NAME, decode_attention)


def _eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """By the eager function of the module's own file, which alone knows what its caps and sinks do."""
    kind = type(module)
    attend = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
    if attend is None:
        raise ValueError(
            f"{kind.__name__} caps its scores or has sinks; {NAME} needs a function eager_attention_forward in "
            f"{kind.__module__} for them"
        )
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and num_queries > 1:  # what SDPA's `is_causal` means
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril_()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zeros, torch.finfo(query.dtype).min)
    return attend(module, query, key, value, mask, **kwargs)[0]
