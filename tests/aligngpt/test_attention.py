"""Packed attention against masked attention in float64, under checkpointing and compilation; and what it refuses."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aligngpt import attention
from aligngpt.attention import BACKENDS, NAME, block_mask, layer_inputs, varlen_attention
from aligngpt.batch import ends, positions

LENGTHS = (5, 1, 130, 64, 1, 200, 3)  # one token, less than a block of FlexAttention, more, and none a multiple of it
SCALE = 0.3


def heads(num_heads=4, kv_heads=2, size=16, *, lengths=LENGTHS, dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(3)
    make = lambda n: torch.randn(1, n, sum(lengths), size, generator=rng)  # noqa: E731
    return [make(n).to(device, dtype).requires_grad_() for n in (num_heads, kv_heads, kv_heads)]


def masked(query, key, value, lengths=LENGTHS):
    """Softmax over a T × T matrix in which a token sees its own sequence up to itself. (1, T, H, D)"""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    place = torch.arange(sum(lengths), device=query.device)
    sees = (sequence[:, None] == sequence) & (place[:, None] >= place)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = (query @ key.mT * SCALE).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs_of(backend=None, lengths=LENGTHS, dtype=torch.float32, device="cpu", size=16):
    kind = {"device": torch.device(device), "dtype": dtype, "head_size": size}
    return layer_inputs(ends(lengths), max(lengths), sum(lengths), seq_lengths=lengths, backend=backend, **kind)


def packed(tensors, inputs):
    return varlen_attention(SimpleNamespace(), *tensors, None, scaling=SCALE, dropout=0.0, **inputs)[0]


def with_gradients(out, tensors):
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out, *torch.autograd.grad(out, tensors, grad)]


def agree(ours, theirs, tolerance):
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= tolerance, f"relative error {error:.1e}"


def exact(tensors):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return with_gradients(masked(*wide), wide)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_blocks_agree_with_float64(num_heads, kv_heads):
    tensors = heads(num_heads, kv_heads)
    agree(with_gradients(packed(tensors, inputs_of("sdpa")), tensors), exact(tensors), 1e-5)


def test_the_four_names_of_transformers_are_enough():
    tensors = heads()
    four = {name: value for name, value in inputs_of().items() if name[:3] in ("cu_", "max")}
    assert len(four) == 4
    assert torch.equal(packed(tensors, four), packed(tensors, inputs_of("sdpa")))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_tokens():
    tensors = heads()
    mask = block_mask(ends(LENGTHS), sum(LENGTHS))
    visited = mask.to_dense()[0, 0]
    assert visited.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]  # 404 tokens, 128 a block
    out = attention._flex(*(t.detach() for t in tensors), mask, SCALE)  # on a CPU it has no backward
    agree([out], exact(tensors)[:1], 1e-5)


def test_checkpointing_recomputes_the_same():
    tensors, inputs = heads(), inputs_of()
    kept = with_gradients(packed(tensors, inputs), tensors)
    again = with_gradients(checkpoint(lambda *t: packed(t, inputs), *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_operator_is_registered_in_full():
    tensors = heads(lengths=(3, 1, 4))
    torch.library.opcheck(attention._by_blocks_operator, (*tensors, ends((3, 1, 4)), SCALE))


def test_a_compiled_layer_takes_other_lengths_without_compiling_again(make_llm):
    """Traced by Dynamo and AOT autograd; that nothing depends on lengths does not need their C++."""
    llm = make_llm("llama", num_hidden_layers=1).model.train()
    llm.set_attn_implementation(NAME)

    def step(layer, lengths):
        hidden = torch.randn(1, sum(lengths), 64, generator=torch.Generator().manual_seed(sum(lengths)))
        hidden.requires_grad_()
        place = positions(ends(lengths), sum(lengths))[None]
        out = layer(hidden, position_embeddings=llm.rotary_emb(hidden, place), **inputs_of(lengths=lengths))
        return [out, *torch.autograd.grad(out.square().sum(), [hidden, *llm.layers[0].parameters()])]

    batches = [(3, 9, 5), (7, 2, 5, 2, 5)]  # no total is a head's size: Dynamo would take them for one number
    eager = [step(llm.layers[0], lengths) for lengths in batches]
    torch._dynamo.reset()
    compiled = torch.compile(llm.layers[0].forward, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        traced = [step(compiled, lengths) for lengths in batches]
    for ours, theirs in zip(traced, eager, strict=True):
        agree(ours, [t.double() for t in theirs], 1e-5)


def test_torchs_varlen_attention_is_one_operator_of_a_compiled_layer(monkeypatch):
    """Only traced, for want of a GPU. Which functions there are was found out before, when the back-end was chosen."""
    monkeypatch.setattr(attention, "why_not", lambda *args: None)
    monkeypatch.setattr(attention, "_found", {})
    attention.choose.cache_clear()
    tensors, inputs, graphs = heads(dtype=torch.bfloat16), inputs_of("torch-varlen", dtype=torch.bfloat16), []
    attention.choose.cache_clear()

    def traced(graph, _):
        graphs.append(graph)
        return lambda *args: [tensors[0].transpose(1, 2)]

    module = torch.nn.Identity()
    layer = lambda *t: varlen_attention(module, *t, None, scaling=SCALE, **inputs)[0]  # noqa: E731
    torch._dynamo.reset()
    torch.compile(layer, dynamic=True, fullgraph=True, backend=traced)(*tensors)
    operators = [node.target for node in graphs[0].graph.nodes if "varlen" in str(node.target)]
    assert operators == [torch.ops.torch_attn._varlen_attn]


# ---- choice --------------------------------------------------------------------------------------------------------


def test_the_choice_is_named_once(caplog):
    caplog.set_level(logging.INFO, attention.__name__)
    attention.choose.cache_clear()
    assert [inputs_of()["attention_backend"] for _ in range(2)] == ["sdpa", "sdpa"]
    (record,) = caplog.records
    assert (
        "computed by sdpa (not flash-attn, torch-varlen, xformers, flex: its inputs are on cpu, " in record.getMessage()
    )


def test_a_named_back_end_that_cannot_run_says_why():
    for name in BACKENDS[:-1]:
        with pytest.raises(ValueError, match=f"attention_backend is '{name}', which cannot run: its inputs are on cpu"):
            inputs_of(name)
    with pytest.raises(ValueError, match="there is none of that name"):
        inputs_of("flash")
    gpu = torch.device("cuda")
    assert "takes float16 and bfloat16" in attention.why_not("torch-varlen", gpu, torch.float32, 64)
    assert "multiples of 8 up to 256" in attention.why_not("torch-varlen", gpu, torch.bfloat16, 12)
    assert attention.why_not("flex", gpu, torch.float32, 64) is None


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_lengths_are_needed():
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is None, max_length_q None; aligngpt_varlen needs both"):
        packed(heads(), {})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("sliding_window", 199), ("softcap", 50.0), ("s_aux", torch.zeros(4)), ("is_causal", False), ("dropout", 0.1)],
)
def test_what_changes_the_scores_is_refused(argument, value):
    tensors, inputs = heads(), inputs_of()
    with pytest.raises(ValueError, match=f"{argument} is "):
        varlen_attention(SimpleNamespace(), *tensors, None, **(inputs | {argument: value}))
    varlen_attention(SimpleNamespace(), *tensors, None, **inputs, sliding_window=200)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("llama", {}, None),
        ("gemma", {}, None),
        ("phi", {}, None),
        ("qwen2", {"sliding_window": 64}, None),  # not used
        ("mistral", {"sliding_window": 100}, None),
        ("mistral", {"sliding_window": 99}, "reaches 99 tokens back, and sequences may have 100"),
        ("gemma2", {"sliding_window": 4096}, "caps attention scores at 50"),
        ("gpt2", {}, "attn_pdrop is 0.1"),
        ("gpt_oss", {}, "more than a softmax"),
        ("bloom", {}, "do not use transformers' attention interface"),
        ("llama4_text", {}, "layers of chunked_attention"),
    ],
)
def test_which_llms_take_packed_sequences(kind, fields, reason):
    from transformers import AutoConfig

    said = attention.why_not_packed(AutoConfig.for_model(kind, **fields), 100)
    assert said is None if reason is None else reason in said


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [64, 80])
def test_back_ends_agree_on_a_gpu(backend, dtype, size):
    if reason := attention.why_not(backend, torch.device("cuda"), dtype, size):
        pytest.skip(reason)
    tensors = heads(size=size, dtype=dtype, device="cuda")
    inputs = inputs_of(backend, dtype=dtype, device="cuda", size=size)
    out = packed(tensors, inputs)
    if dtype == torch.float32:
        agree(with_gradients(out, tensors), exact(tensors), 1e-5)
        return
    # bfloat16 itself rounds to 2^-9 of the largest entry: at most twice plain PyTorch's error, and 1e-3 on average.
    plain = with_gradients(masked(*tensors), tensors)
    for got, theirs, want in zip(with_gradients(out, tensors), plain, exact(tensors), strict=True):
        scale = want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-3 * scale
        assert (got - want).abs().mean() <= 1e-3 * scale


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_asks_flash_attn_for_a_fixed_order(monkeypatch, deterministic):
    """torch's own varlen attention looks at the switch by itself."""
    asked = {}

    def flash_attn_varlen_func(query, *_, **options):
        asked.update(options)
        return query

    monkeypatch.setattr(attention, "_imported", lambda *_: flash_attn_varlen_func)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        attention._flash_attn(*torch.ones(3, 2, 1, 8), ends([2]), 2, 0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == {"softmax_scale": 0.5, "causal": True, "deterministic": deterministic}
