"""The attention `aligngpt_decode` against transformers' eager attention: models, caches, masks, what it hands on."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor, attention, decoding
from aligngpt.batch import ends
from aligngpt.decoding import NAME, bounds, decode_attention, decode_mask
from aligngpt.processor import AlignGPTImageProcessor

WINDOW = 5
STEPS = 5  # of decoding, so the window of 5 is left, and the cache of the sliding layers is full
SLIDING = {"sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
LLMS = {
    "llama": {},  # grouped heads
    "gpt2": {},
    "phi": {},
    "gemma": {},
    "mistral": SLIDING,
    "gemma3_text": MIXED,
    "gemma2": {**MIXED, "attn_logit_softcapping": 0.5},
    "gpt_oss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
}
OPTIONS = {
    "max_new_tokens": 1 + STEPS,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}
NOT_BY_FLASH_DECODE = ("gemma2", "gpt_oss")


@pytest.fixture(scope="module")
def llm(make_llm):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_llm(kind, eos_token_id=None, **LLMS[kind])  # a random model must not stop at chance
            if kind == "gpt_oss":
                for layer in made[kind].model.layers:
                    torch.nn.init.normal_(layer.self_attn.sinks)
        return made[kind]

    return get


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of `flash_decode` from here on."""
    called = []
    ours = decoding.flash_decode

    def flash_decode(q, k, v, lengths, **options):
        called.append((q.shape, lengths, options))
        return ours(q, k, v, lengths, **options)

    monkeypatch.setattr(decoding, "flash_decode", flash_decode)
    return called


def prompts():
    """Three of 9, 8 and 5 tokens, the shorter ones padded on the left."""
    ids = torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :1] = 0
    mask[2, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model, name, inputs, **options):
    model.set_attn_implementation(name)
    return model.generate(**inputs, **(OPTIONS | options))


def agree(ours, eager):
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", LLMS)
def test_generates_as_eager_attention_does(llm, calls, kind, cache):
    model = llm(kind)
    ours = generated(model, NAME, prompts(), cache_implementation=cache)
    assert len(calls) == (0 if kind in NOT_BY_FLASH_DECODE else STEPS * model.config.num_hidden_layers)
    agree(ours, generated(model, "eager", prompts(), cache_implementation=cache))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_kernel_decodes_as_its_reference(llm, kernels, monkeypatch, kind):
    if kernels == "triton":
        from aligngpt_kernels import decode

        monkeypatch.setattr(decode, "flash_decode_reference", None)  # nothing else may run
    inputs = prompts()
    options = {"max_new_tokens": 3, "cache_implementation": "static"}
    agree(generated(llm(kind), NAME, inputs, **options), generated(llm(kind), "eager", inputs, **options))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_other_ways_of_decoding(llm, calls, options):
    """Beams reorder the cache; looked-up candidates are several queries a row, on a cache that holds keys."""
    inputs = prompts()
    if "num_beams" not in options:
        inputs = {
            "input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]),
            "attention_mask": torch.ones(1, 10).long(),
        }
    ours = generated(llm("mistral"), NAME, inputs, **options)
    assert calls
    assert torch.equal(ours.sequences, generated(llm("mistral"), "eager", inputs, **options).sequences)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_training_has_the_same_gradients(llm, kind):
    model = llm(kind)
    results = []
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        loss = torch.zeros(())
        for inputs in (prompts(), {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]])}):  # padded, and by `is_causal`
            first = (inputs["input_ids"] != 0).cumsum(1) <= 1  # what padding predicts is no attention's concern
            loss = loss + model(**inputs, labels=inputs["input_ids"].masked_fill(first, -100)).loss
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        results.append([loss, *(g for g in grads if g is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_decoding_step_has_a_gradient(llm):
    """As for one that tunes a prompt: the kernel has none, its reference has."""
    model = llm("llama")
    grads = []
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        inputs = prompts()
        past = model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        logits = model(input_ids=torch.tensor([[4], [5], [6]]), attention_mask=mask, past_key_values=past).logits
        weights = [model.model.layers[0].self_attn.k_proj.weight, model.model.layers[1].self_attn.q_proj.weight]
        grads.append(torch.autograd.grad(logits.square().sum(), weights))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_a_compiled_step_keeps_the_operator(make_llm, kernels):
    """One graph with mask and attention, for a static cache as it fills."""
    model = make_llm("llama", num_hidden_layers=1)
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    runs = []
    for name, step in (("eager", model.forward), (NAME, torch.compile(model.forward, fullgraph=True, backend=backend))):
        model.set_attn_implementation(name)
        inputs = prompts()
        cache = StaticCache(config=model.config, max_cache_len=12)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        with torch.no_grad():
            logits = [model(**inputs, past_key_values=cache).logits[:, -1:]]
            for number in range(2):
                ids, place = logits[-1].argmax(-1), mask[:, : 10 + number].sum(1, keepdim=True) - 1
                step_inputs = {"input_ids": ids, "position_ids": place, "attention_mask": mask}
                logits.append(step(**step_inputs, past_key_values=cache).logits)
        runs.append(torch.cat(logits[1:]))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    assert targets.count(torch.ops.aligngpt.flash_decode.default) == 1
    assert torch._assert_async in targets or torch.ops.aten._assert_async.msg in targets


# ---- masks -----------------------------------------------------------------------------------------------------------


def keys_seen(bounds_, num_keys):
    starts, ends_ = bounds_[:, 0, 0].unbind(-1)
    place = torch.arange(num_keys)
    return ((place >= starts[:, None]) & (place < ends_[:, None]))[:, None, None]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("kv_length", "kv_offset", "q_offset"),
    [(7, 0, 6), (10, 0, torch.tensor(6)), (10, 0, torch.tensor(0)), (4, 3, 6)],  # growing, static, empty, sliding
)
@pytest.mark.parametrize("columns", [None, 5, 7, 20])  # of the 2-D mask: none, shorter than the cache, as long, longer
def test_bounds_say_what_the_mask_says(window, kv_length, kv_offset, q_offset, columns):
    mask = None if columns is None else torch.ones(3, columns, dtype=torch.bool)
    if mask is not None:
        mask[1, :1] = mask[2, :4] = False
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    sizes = {"batch_size": 3, "q_length": 1, "kv_length": kv_length, "kv_offset": kv_offset, "q_offset": q_offset}
    more = {"mask_function": function, "attention_mask": mask, "device": torch.device("cpu")}
    ours = decode_mask(**sizes, **more, dtype=torch.float32, config=None)
    assert ours.shape == (3, 1, 1, 2)
    assert all(half.is_contiguous() for half in ours[:, 0, 0].unbind(1))
    assert torch.equal(keys_seen(ours, kv_length), sdpa_mask(**sizes, **more, allow_is_causal_skip=False))


def test_bounds_never_have_the_shape_of_a_mask():
    mask = decode_mask(batch_size=3, q_length=1, kv_length=2, q_offset=1, attention_mask=torch.ones(3, 2).bool())
    assert mask is None or mask.dtype == torch.bool


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.filterwarnings("ignore:A decoder-only architecture is being used")
def test_a_mask_with_holes_is_right(llm, calls, cache):
    """Padding on the right of prompts, and a hole in the middle of one."""
    inputs = prompts()
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    inputs["attention_mask"][0, 7:] = inputs["attention_mask"][1, 3:5] = 0
    agree(*(generated(llm("mistral"), name, inputs, cache_implementation=cache) for name in (NAME, "eager")))
    assert len(calls) < 2 * STEPS  # once the window is past the holes, there are none


def test_traced_code_refuses_holes():
    mask = torch.tensor([[1, 1, 0, 1]], dtype=torch.bool)
    torch._dynamo.reset()
    step = torch.compile(lambda m: decode_mask(1, 1, 4, q_offset=3, attention_mask=m), fullgraph=True, backend="eager")
    assert step(torch.ones_like(mask)).tolist() == [[[[0, 4]]]]
    with pytest.raises(RuntimeError, match="attention_mask has zeros between its ones; aligngpt_decode needs all"):
        step(mask)
    assert len(decoding._HOLES) < 255
    assert not set(decoding._HOLES) & set("\"'\\")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_4d_mask_of_the_callers_own_is_used(llm, calls, kind, dtype):
    model, prompt, logits = llm(kind), torch.arange(3, 30).view(3, 9), []
    seen = torch.rand(3, 1, 1, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., -1] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        past = model(prompt, use_cache=True).past_key_values
        mask = seen if dtype == torch.bool and name == NAME else additive
        if kind == "gemma2":
            mask = {"full_attention": mask, "sliding_attention": mask[..., -WINDOW:]}
        logits.append(model(torch.tensor([[4], [5], [6]]), attention_mask=mask, past_key_values=past).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert not calls


# ---- the function itself ---------------------------------------------------------------------------------------------

STARTS, ENDS = torch.tensor([0, 2, 6]), torch.tensor([12, 3, 11])  # all keys, one, and some of the middle


def heads(num_queries=1):
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(3, n, length, 16, generator=rng) for n, length in ((4, num_queries), (2, 12), (2, 12))]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernels", ["reference", "triton"], indirect=True)
def test_bounds_of_the_callers_own(kernels, window):
    """Each row at a place of its own in a cache whose rest holds NaN; a layer's window is cut here."""
    query, key, value = heads()
    seen = keys_seen(bounds(STARTS, ENDS), 12)
    for cache in (key, value):
        cache.masked_fill_(~seen.mT, torch.nan)
    out, weights = decode_attention(
        SimpleNamespace(), query, key, value, bounds(STARTS, ENDS), scaling=0.3, sliding_window=window
    )
    assert weights is None
    assert out.shape == (3, 1, 4, 16)
    for row, (start, end) in enumerate(zip(STARTS.tolist(), ENDS.tolist(), strict=True)):
        first = start if window is None else max(start, end - window)
        q = query[row].double().view(2, 2, 16)  # (kv head, queries that share it, D)
        k, v = (t[row, :, first:end].double() for t in (key, value))
        exact = ((q @ k.mT * 0.3).softmax(-1) @ v).view(4, 16)
        torch.testing.assert_close(out[row, 0].double(), exact, rtol=1e-5, atol=1e-5)


def test_what_flash_decode_does_not_compute_gets_a_mask(calls):
    module, tensors = torch.nn.Module(), heads()
    module.num_key_value_groups = 2
    mask, seen = bounds(STARTS, ENDS), keys_seen(bounds(STARTS, ENDS), 12)
    torch.manual_seed(5)
    ours = decode_attention(module, *tensors, mask, dropout=0.5)[0]
    torch.manual_seed(5)
    assert torch.equal(ours, sdpa_attention_forward(module, *tensors, seen, dropout=0.5)[0])
    narrow = (*tensors[:2], tensors[2][..., :8])  # values of another size than keys
    assert torch.equal(decode_attention(module, *narrow, mask)[0], sdpa_attention_forward(module, *narrow, seen)[0])
    biased = decode_attention(module, *tensors, mask, position_bias=torch.zeros(3, 4, 1, 12))[0]
    torch.testing.assert_close(biased, sdpa_attention_forward(module, *tensors, seen)[0])
    packed = {"cu_seq_lens_q": torch.tensor([0, 1, 2, 3]), "max_length_q": 1}
    paged = decode_attention(module, *tensors, seen, **packed, cache=object())[0]  # whose keys come with others' cache
    assert torch.equal(paged, sdpa_attention_forward(module, *tensors, seen)[0])
    assert not calls


def test_autocast_decides_the_type_but_not_that_of_sums():
    """A rotation leaves queries and keys in float32, values are bfloat16."""
    query, key, value = heads()
    value = value.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_attention(SimpleNamespace(), query, key, value, bounds(STARTS, ENDS))[0]
    half = [t.bfloat16().float() for t in (query, key, value)]
    exact = decode_attention(SimpleNamespace(), *half, bounds(STARTS, ENDS))[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=2**-9)  # a rounding of the weights, one of the sum


def test_what_it_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="attention_mask holds bounds, and each row has 2 queries; aligngpt_decode"):
        decode_attention(SimpleNamespace(), *heads(2), bounds(STARTS, ENDS))
    with pytest.raises(ValueError, match="Module caps its scores or has sinks; aligngpt_decode needs a function"):
        decode_attention(torch.nn.Module(), *heads(), bounds(STARTS, ENDS), softcap=30.0)


# ---- AlignGPT --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_llm, make_tower):
    return AlignGPTForConditionalGeneration.from_parts(make_llm("llama", eos_token_id=None), make_tower("clip"))


@pytest.mark.parametrize("cache", [None, "static"])
def test_an_aligngpt_model_answers_by_it(model, tokenizer, calls, cache):
    processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)
    images = [Image.new("RGB", (60, 40), colour) for colour in ("red", "navy")]
    inputs = processor(images, ["What? <image>\nThis is the first.", "<image>"], padding_side="left")
    eager = generated(model, "eager", inputs, cache_implementation=cache)
    assert not calls
    agree(generated(model, NAME, inputs, cache_implementation=cache), eager)  # the tower's attention too
    assert len(calls) == 2 * STEPS
    model.set_attn_implementation("sdpa")
    model.model.language_model.set_attn_implementation(NAME)
    agree(model.generate(**inputs, **OPTIONS, cache_implementation=cache), eager)
    assert len(calls) == 4 * STEPS


def test_packed_batches_run_under_either_name(model, monkeypatch):
    """The same numbers, and no mask of T × T is made for them."""
    lengths = (5, 1, 9)
    inputs = {
        "input_ids": torch.randint(3, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(1)),
        "labels": torch.randint(3, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(2)),
        "cu_seqlens": ends(lengths),
        "max_seqlen": max(lengths),
    }
    llm, losses = model.model.language_model, []
    monkeypatch.setattr(decoding, "sdpa_mask", None)
    for name in (attention.NAME, NAME):
        llm.set_attn_implementation(name)
        losses.append(model(**inputs).loss)
    assert torch.equal(*losses)
    llm.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention is 'sdpa'; it needs 'aligngpt_varlen' or 'aligngpt_decode'"):
        model(**inputs)


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(llm, calls):
    model = llm("llama").cuda()
    try:
        inputs = {name: tensor.cuda() for name, tensor in prompts().items()}
        agree(*(generated(model, name, inputs, cache_implementation="static") for name in (NAME, "eager")))
        model.set_attn_implementation(NAME)
        cache = StaticCache(config=model.config, max_cache_len=12)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        with torch.no_grad():
            ids = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
            place = mask[:, :10].sum(1, keepdim=True) - 1
            torch.cuda.synchronize()
            calls.clear()
            torch.cuda.set_sync_debug_mode("error")
            model(input_ids=ids, position_ids=place, attention_mask=mask, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.cpu()
    assert len(calls) == 2
