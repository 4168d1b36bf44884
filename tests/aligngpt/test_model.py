"""The model against the oracle, against a naive restatement of the paper's maths, and on every backbone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import injection_plan
from torch.utils._python_dispatch import TorchDispatchMode

from aligngpt import AlignGPTForConditionalGeneration
from aligngpt.attention import NAME
from aligngpt.batch import Example, collate, ends
from aligngpt.checkpoint import PUBLIC_NAMES, renamed
from aligngpt.text import TokenIds, Tokenized
from training import sharding
from training.config import ShardingConfig

BACKBONES = [
    ("llama", "clip"),
    ("qwen2", "siglip"),  # no BOS of its own, tied embeddings below
    ("gemma", "clip"),  # scales embeddings inside the module, ties them
    ("mistral", "siglip"),
    ("phi", "clip"),  # a head with a bias
    ("gpt2", "clip"),  # other names for everything, positions of its own, a tied head
]
TOLERANCE = 1e-5  # relative to the largest entry


def close(ours: torch.Tensor, theirs: object, tolerance: float = TOLERANCE) -> None:
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().clamp(min=1e-8)
    error = ((ours - theirs).abs().max() / scale).item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def oracle_model(public_folder, tower_config):
    return AlignGPTForConditionalGeneration.from_pretrained(public_folder, vision_config=tower_config)


@pytest.fixture
def build(make_llm, make_tower):
    def make(llm: str = "llama", tower: str = "clip", llm_fields: dict | None = None, **align):
        return AlignGPTForConditionalGeneration.from_parts(
            make_llm(llm, **(llm_fields or {})), make_tower(tower), **align
        )

    return make


def sample(
    model, prompt: int = 5, answer: int = 4, images: int = 1, *, level: int | None = None, seed: int = 0
) -> Example:
    """BOS, <align>, text with the images in its middle, answer."""
    config = model.config
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.text_config.vocab_size, (prompt + answer,), generator=rng).tolist()
    image = [config.image_token_id] * (config.image_seq_length * images)
    head = [1] + ([config.align_token_id] if images and config.align_mode != "none" else [])
    ids = head + words[: prompt // 2] + image + words[prompt // 2 :]
    labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
    gate = [0] + [int(token < config.text_config.vocab_size) for token in ids[1 : len(ids) - answer]] + [0] * answer
    size = config.vision_config.image_size
    pixels = torch.randn(images, 3, size, size, generator=rng)
    text = Tokenized(torch.tensor(ids), torch.tensor(labels), torch.tensor(gate, dtype=torch.bool), images)
    return Example(f"sample-{seed}", text, pixels, level)


def batch_of(model, *examples: Example, packed: bool = False):
    config = model.config
    ids = TokenIds(config.image_token_id, config.align_token_id, 0)
    size = config.vision_config.image_size
    return collate(examples, token_ids=ids, rows_per_image=config.image_seq_length, image_size=size, packed=packed)


def use_packed_attention(model, name: str = NAME):
    model.model.language_model.set_attn_implementation(name)
    return model


def naive_embeds(model, example: Example) -> torch.Tensor:
    """One sample's input to the LLM, piece by piece. (L, D)"""
    inner, config = model.model, model.config
    ids = example.text.input_ids
    embedding = model.get_input_embeddings()
    is_text = ids < config.text_config.vocab_size
    out = torch.empty(len(ids), config.text_config.hidden_size)
    out[is_text] = embedding(ids[is_text])
    if example.pixel_values.shape[0] == 0:
        return out
    states = inner.vision_tower(example.pixel_values, output_hidden_states=True).hidden_states[-2]
    features = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
    image_rows = inner.multi_modal_projector(features)
    out[ids == config.image_token_id] = image_rows.flatten(0, 1)
    table = inner.align_table
    if config.align_mode == "none":
        return out
    if example.level is not None:
        row = table[example.level]
    else:
        text = embedding(ids[example.text.gate_mask])
        mean = text.sum(0) / (len(text) + 1e-8)
        dots = (image_rows @ mean).mean(0)
        gate = inner.align_gate
        alpha = gate.linear_2(F.gelu(gate.linear_1(dots))).softmax(-1)
        row = {
            "adaptive": alpha @ table[:-1] + table[-1],
            "local": alpha @ table[:-1],
            "global": table[-1],
            "average": table[:-1].mean(0) + table[-1],
        }[config.align_mode]
    out[ids == config.align_token_id] = row
    return out


# ---- the oracle ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pt_batch", "ft_single_mid", "ft_single_first", "ft_text_only", "inf_prefill"])
def test_matches_the_public_implementation(oracle_model, load_case, name, kernels):
    case = load_case(name)
    arrays, inputs = case.arrays, dict(case.inputs)
    if "align_ids" in arrays:
        inputs["align_levels"] = torch.from_numpy(arrays["align_ids"])
    if "labels" not in arrays:
        del inputs["labels"]
    model = oracle_model.eval()
    attended = torch.from_numpy(arrays["out_attention_mask"]).bool()
    embeds, alpha = model.model.embed(**{k: v for k, v in inputs.items() if k != "labels"})
    close(embeds[attended], arrays["out_inputs_embeds"][attended.numpy()])
    if "out_gate_alpha" in arrays:
        close(alpha, arrays["out_gate_alpha"])
        close(embeds[:, 1], arrays["out_h_align"])
        seen = {k: v for k, v in inputs.items() if k not in ("labels", "align_levels")}
        for got, wanted in zip(model.model.alignment(**seen), ("out_gate_dots", "out_gate_alpha"), strict=True):
            close(got, arrays[wanted])
    out = model(**inputs)
    if "out_logits" in arrays:
        close(out.logits[attended], arrays["out_logits"][attended.numpy()])
    if "out_logits_last16" in arrays:
        close(out.logits[:, -16:], arrays["out_logits_last16"])
    if "out_loss" in arrays:
        close(out.loss, arrays["out_loss"])


@pytest.mark.parametrize("name", ["pt_batch", "ft_single_mid", "ft_single_first", "ft_text_only"])
def test_gradients_match_the_public_implementation(oracle_model, load_case, name, kernels):
    case = load_case(name)
    arrays, inputs = case.arrays, dict(case.inputs)
    if "align_ids" in arrays:
        inputs["align_levels"] = torch.from_numpy(arrays["align_ids"])
    model = oracle_model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    close(loss.detach(), arrays["out_loss"])
    parameters = dict(model.named_parameters())
    rename = lambda names: list(renamed({n: n for n in names}, PUBLIC_NAMES, name))  # noqa: E731
    full = [key for key in arrays if key.startswith("grad.")]
    for key, ours in zip(full, rename([key[5:] for key in full]), strict=True):
        close(parameters[ours].grad, arrays[key])
    for ours, norm in zip(rename(arrays["grad_norm_names"].tolist()), arrays["grad_norms"], strict=True):
        assert math.isclose(parameters[ours].grad.norm().item(), norm, rel_tol=TOLERANCE, abs_tol=1e-9), ours
    assert all(p.grad is None for p in model.model.vision_tower.parameters())


def test_every_level_matches_the_public_implementation(oracle_model, load_case, kernels):
    case = load_case("pt_all_levels")
    for level, (loss, logits) in enumerate(zip(case.arrays["out_losses"], case.arrays["out_last_logits"], strict=True)):
        out = oracle_model.eval()(**case.inputs, align_levels=torch.tensor([level]))
        assert math.isclose(out.loss.item(), loss, rel_tol=TOLERANCE)
        close(out.logits[0, -1], logits)


# ---- modes, backbones, batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adaptive", "local", "global", "average", "none"])
def test_align_mode_is_one_config_value(build, mode, kernels):
    model = build(align_mode=mode, num_align_levels=5)
    example = sample(model)
    batch = batch_of(model, example)
    out = model(**batch.model_inputs())
    logits = model.lm_head(
        model.model.language_model(inputs_embeds=naive_embeds(model, example)[None]).last_hidden_state
    )
    close(out.logits, logits)
    assert (out.align_weights is None) == (mode == "none")


def test_a_level_wins_over_the_mode(build):
    model = build(align_mode="average")
    levels = [model(**batch_of(model, sample(model, level=level)).model_inputs()).logits for level in (0, 7)]
    example = sample(model, level=7)
    embeds = naive_embeds(model, example)[None]
    close(levels[1], model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state))
    assert not torch.allclose(*levels)


@pytest.mark.parametrize(("llm", "tower"), BACKBONES)
def test_every_backbone_trains_saves_and_answers(build, tmp_path, llm, tower):
    fields = {"tie_word_embeddings": llm in ("qwen2", "gemma", "gpt2")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = build(llm, tower, fields | (no_dropout if llm == "gpt2" else {}))
    examples = [sample(model, images=n, seed=n) for n in (1, 0, 2)]
    batch = batch_of(model, *examples)
    out = model(**batch.model_inputs())
    nll, count = torch.zeros(()), 0
    for row, example in enumerate(examples):
        hidden = model.model.language_model(inputs_embeds=naive_embeds(model, example)[None]).last_hidden_state
        logits = model.lm_head(hidden)[0]
        close(out.logits[row, : len(logits)], logits)
        nll = nll + F.cross_entropy(logits[:-1], example.text.labels[1:], reduction="sum")
        count += int((example.text.labels[1:] != -100).sum())
    close(out.loss, nll / count)

    trained = model.train()(**batch.model_inputs())
    assert trained.logits is None
    close(trained.loss.detach(), nll.detach() / count)
    trained.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, f"no gradient: {without}"

    model.eval().save_pretrained(tmp_path)
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    close(again(**batch.model_inputs()).logits, out.logits.detach(), 1e-6)  # memory-mapped weights, other GEMM paths

    prompt = batch_of(model, sample(model, answer=0))
    tokens = again.generate(
        input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, max_new_tokens=3, do_sample=False
    )
    assert tokens.shape[1] == prompt.input_ids.shape[1] + 3
    assert tokens.max() < model.config.text_config.vocab_size


def test_samples_keep_order_and_content_in_a_mixed_batch(build):
    """The public code puts image samples first and cuts a text-only row at the longest image row."""
    model = build()
    examples = [
        sample(model, 30, 20, images=0, seed=1),
        sample(model, 4, 2, seed=2),
        sample(model, 3, 3, images=0, seed=3),
    ]
    together = model(**batch_of(model, *examples).model_inputs()).logits
    for row, example in enumerate(examples):
        alone = model(**batch_of(model, example).model_inputs()).logits[0]
        close(together[row, : len(alone)], alone)


def test_left_padding_changes_nothing(build):
    """The public code puts the alignment token after the first padding token."""
    model = build()
    example = sample(model)
    inputs = batch_of(model, example).model_inputs()
    right = model(**inputs).logits
    pad = 3
    left = model(
        input_ids=F.pad(inputs["input_ids"], (pad, 0)),
        attention_mask=F.pad(inputs["attention_mask"], (pad, 0)),
        gate_mask=F.pad(inputs["gate_mask"], (pad, 0)),
        position_ids=F.pad(torch.arange(right.shape[1]), (pad, 0))[None],
        pixel_values=inputs["pixel_values"],
    ).logits
    close(left[:, pad:], right)


def test_without_a_gate_mask_all_attended_text_but_the_first_token_enters(build):
    model = build()
    inputs = batch_of(model, sample(model)).model_inputs()
    mask = inputs["input_ids"] < model.config.text_config.vocab_size
    mask[:, 0] = False
    given = model(**(inputs | {"gate_mask": mask})).align_weights
    close(model(**(inputs | {"gate_mask": None})).align_weights, given)
    padded = {name: F.pad(inputs[name], (2, 3)) for name in ("input_ids", "attention_mask")}
    close(model(**padded, pixel_values=inputs["pixel_values"]).align_weights, given)


def test_several_images_of_a_sample_share_one_alignment_token(build, kernels):
    """The public gate crashes on them. The mean of equal images' dots is the image's dots."""
    model = build()
    one, two = sample(model, images=1), sample(model, images=2)
    twice = Example("twice", two.text, one.pixel_values.repeat(2, 1, 1, 1))
    weights = [model(**batch_of(model, example).model_inputs()).align_weights for example in (one, twice)]
    close(weights[1], weights[0])


def test_what_the_gate_sees_is_told_by_image(build, kernels):
    """Dots of one image, of two that share a text, and of none, against the definition in float64; the LLM sleeps."""
    model = build()
    examples = [sample(model, seed=1), sample(model, seed=2, images=2), sample(model, seed=3, images=0)]
    inputs = batch_of(model, *examples).model_inputs()
    seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "gate_mask", "pixel_values")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.language_model, "forward", None)
        dots, weights = model.model.alignment(**seen)
    close(weights, model(**inputs).align_weights)

    words = model.get_input_embeddings().weight.double()
    rows = model.model.multi_modal_projector.double()(model.model.image_features(inputs["pixel_values"]).double())
    means = [words[example.text.input_ids[example.text.gate_mask]].mean(0) for example in examples]
    close(dots, torch.einsum("mpd,md->mp", rows, torch.stack([means[0], means[1], means[1]])).float())
    model.config.align_mode = "none"
    with pytest.raises(ValueError, match="align_mode is 'none'"):
        model.model.alignment(**seen)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_gate_takes_its_rows_from_the_tower(build, tower):
    """The public gate is tied to 576 patches in its source."""
    model = build(tower=tower)
    assert model.model.align_gate.linear_1.in_features == {"clip": 16, "siglip": 4}[tower]


def test_a_text_only_batch_reaches_every_trained_weight(build, kernels):
    model = build().train()
    model.model.vision_tower.requires_grad_(False)
    model(**batch_of(model, sample(model, images=0)).model_inputs()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if "align" in name or "projector" in name:
                assert parameter.grad.abs().max() == 0, name


def test_a_batch_without_supervision_has_loss_zero_and_gradients_zero(build, kernels):
    model = build().train()
    inputs = batch_of(model, sample(model)).model_inputs() | {"rows": None}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


def test_num_items_in_batch_divides_the_sum(build):
    model = build()
    inputs = batch_of(model, sample(model, answer=4)).model_inputs()
    close(model(**inputs, num_items_in_batch=16).loss * 4, model(**inputs).loss.detach())


@pytest.mark.parametrize("is_of_parts", [True, False])
def test_fresh_weights_follow_the_public_initialisation(build, is_of_parts, uninitialized_is_nan):
    """From parts, and as transformers makes a model of a config alone."""
    model = build("llama", "clip", {"hidden_size": 256})
    inner = (model if is_of_parts else AlignGPTForConditionalGeneration(copy.deepcopy(model.config))).model
    for linear in (inner.multi_modal_projector.linear_2, inner.align_gate.linear_2):
        bound = 1 / math.sqrt(linear.in_features)
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert 0 < linear.bias.abs().max() <= bound
    bound = math.sqrt(6 / (8 + 256))
    assert 0.95 * bound < inner.align_table.abs().max() <= bound
    assert abs(inner.align_table.std().item() - bound / math.sqrt(3)) < 0.05 * bound


@pytest.fixture
def uninitialized_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what `torch.empty` gives
    yield
    torch.use_deterministic_algorithms(before)


class NoSync(TorchDispatchMode):
    """Refuses what makes a host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_building_the_sequence_never_syncs(build, kernels):
    """The public code loops over samples in Python and syncs several times in each."""
    model = build()
    batch = batch_of(model, sample(model, images=2), sample(model, images=0))
    plan, ids = batch.plan, batch.input_ids
    with NoSync():
        model.model.embed(ids, batch.pixel_values, gate_mask=batch.gate_mask, plan=plan)


def test_a_wrapped_weight_takes_the_modules_path(build):
    """A hook, as adapters and device maps set, must be honoured: the module is called."""
    model = build("gemma")
    inputs = batch_of(model, sample(model)).model_inputs()
    plain = model(**inputs)
    seen = set()
    gate = model.model.align_gate
    wrapped = [model.get_input_embeddings(), model.lm_head, model.model.multi_modal_projector.linear_1]
    for module in (*wrapped, gate.linear_1, gate.linear_2):
        module.register_forward_hook(lambda module, *_: seen.add(module))
    hooked = model(**inputs)
    close(hooked.align_weights, plain.align_weights.detach())
    assert len(seen) == 5
    close(hooked.logits, plain.logits.detach())
    close(hooked.loss, plain.loss.detach())


def test_a_bound_on_the_samples_changes_no_logits(build):
    """On a GPU nothing is counted: one sample of two images and a text-only row are planned as two samples."""
    model = build()
    batch = batch_of(model, sample(model, images=2), sample(model, images=0))
    config, inputs = model.config, batch.model_inputs()
    sizes = {"num_image_rows": 2 * config.image_seq_length, "num_samples": 2}
    bounded = injection_plan(
        batch.input_ids, image_token_id=config.image_token_id, align_token_id=config.align_token_id, **sizes
    )
    close(model(**(inputs | {"plan": bounded})).logits, model(**inputs).logits.detach())


def test_gemmas_scale_is_rounded_as_its_module_rounds_it(make_llm, make_tower):
    llm = make_llm("gemma", hidden_size=80, intermediate_size=96).bfloat16()  # sqrt(80) is no bfloat16
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower())
    ids = torch.arange(3, 40)[None]
    embeds, _ = model.train().model.embed(ids)
    assert torch.equal(embeds, model.get_input_embeddings()(ids))


def test_parts_of_two_types_become_one_and_stay_bit_exact(make_llm, make_tower, tmp_path):
    """As Vicuna (fp16) and CLIP (fp32) are; and with sampling values that Vicuna's generation config holds."""
    llm = make_llm().bfloat16()
    llm.generation_config.temperature = 0.9
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower())
    model.save_pretrained(tmp_path)
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in model.state_dict().items())


def test_autocast_trains(build, kernels):
    model = build().train()
    inputs = batch_of(model, sample(model)).model_inputs()
    exact = model(**inputs).loss.item()
    # Triton's interpreter refuses bfloat16.
    with torch.autocast("cpu", torch.float16 if kernels == "triton" else torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=2e-2)
    assert model.model.align_gate.linear_1.weight.grad.abs().max() > 0


# ---- packed --------------------------------------------------------------------------------------------------------


def mixed(model, *, levelled: bool = False) -> list[Example]:
    """Text alone, one image, one token, two images."""
    samples = [sample(model, 7, 4, n, level=3 + n if levelled and n else None, seed=n) for n in (0, 1, 2)]
    token = Tokenized(torch.tensor([5]), torch.tensor([5]), torch.tensor([False]), 0)  # its label predicts nothing
    return [*samples[:2], Example("one token", token, samples[0].pixel_values, None), samples[2]]


@pytest.mark.parametrize(
    ("llm", "levelled"), [("llama", False), ("llama", True), ("gemma", False), ("phi", False), ("gpt2", False)]
)
def test_packed_and_padded_give_the_same_loss_and_gradients(build, llm, levelled):
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = build(llm, "clip", no_dropout if llm == "gpt2" else {}).train()
    examples = mixed(model, levelled=levelled)

    def step(packed):
        model.zero_grad()
        batch = batch_of(model, *examples, packed=packed)
        out = model(**batch.model_inputs())
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return batch, out, gradients

    padded_batch, padded, theirs = step(False)
    use_packed_attention(model)
    batch, packed, ours = step(True)
    assert batch.num_tokens == padded_batch.num_tokens == batch.input_ids.shape[1]
    close(packed.loss, padded.loss.detach())
    close(packed.token_loss, padded.token_loss)
    close(packed.token_loss.sum() / batch.num_supervised, packed.loss.detach())
    if levelled:
        assert packed.align_weights is None
    else:
        close(packed.align_weights, padded.align_weights.detach())
    for name, gradient in theirs.items():
        close(ours[name], gradient)


@pytest.mark.parametrize("name", ["pt_batch", "ft_single_mid", "ft_text_only"])
def test_packed_matches_the_public_implementation(public_folder, tower_config, load_case, name):
    case = load_case(name)
    arrays, inputs = case.arrays, dict(case.inputs)
    model = AlignGPTForConditionalGeneration.from_pretrained(public_folder, vision_config=tower_config)
    kept = inputs["attention_mask"].bool()
    lengths = kept.sum(1).tolist()
    packed = {field: inputs[field][kept][None] for field in ("input_ids", "labels")}
    if "align_ids" in arrays:
        packed["align_levels"] = torch.from_numpy(arrays["align_ids"])
    out = use_packed_attention(model)(
        **packed, pixel_values=inputs.get("pixel_values"), cu_seqlens=ends(lengths), max_seqlen=max(lengths)
    )
    close(out.loss, arrays["out_loss"])
    if "out_gate_alpha" in arrays:
        close(out.align_weights, arrays["out_gate_alpha"])


def test_packed_sequences_do_not_see_each_other(build):
    model = use_packed_attention(build()).train()
    before = mixed(model)
    after = [*before[:1], sample(model, 7, 4, seed=9), *before[2:]]
    losses = []
    for examples in (before, after):
        batch = batch_of(model, *examples, packed=True)
        start, end = batch.cu_seqlens[1:3].tolist()
        changed = (batch.rows >= start) & (batch.rows < end)
        losses.append((model(**batch.model_inputs()).token_loss, changed))
    (old, changed), (new, _) = losses
    assert changed.sum() == 4
    assert torch.equal(old[~changed], new[~changed])
    assert (old[changed] != new[changed]).all()


def test_an_empty_bin_reaches_every_trained_weight(build):
    model = use_packed_attention(build()).train()
    batch = batch_of(model, packed=True)
    assert (batch.ids, batch.num_tokens, batch.num_supervised) == ([], 0, 0)
    out = model(**batch.model_inputs(), num_items_in_batch=3)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.token_loss.shape == (0,)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() == 0, name


def test_what_the_collator_made_can_be_made_here(build):
    """Plan, gate mask and positions are derived from `cu_seqlens`, and a label across a border counts for nothing."""
    model = use_packed_attention(build())
    given = batch_of(model, *mixed(model), packed=True).model_inputs()
    text = given["input_ids"] < model.config.text_config.vocab_size
    mask = text & (given["position_ids"] > 0)
    labels = torch.where(text, given["input_ids"], -100)
    want = model(**(given | {"gate_mask": mask, "rows": None}))
    bare = {name: given[name] for name in ("input_ids", "pixel_values", "cu_seqlens", "max_seqlen")}
    got = model(**bare, labels=given["labels"])
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.token_loss, want.token_loss)
    borders = model(**bare, labels=labels).token_loss[given["cu_seqlens"][1:] - 1]
    assert (borders == 0).all()


def test_a_packed_forward_never_syncs(build):
    model = use_packed_attention(build()).train()
    inputs = batch_of(model, *mixed(model), packed=True).model_inputs()
    with NoSync():
        model(**inputs)


def test_packed_lengths_pass_through_sharded_and_recomputed_layers(build):
    model = use_packed_attention(build()).train()
    inputs = batch_of(model, *mixed(model), packed=True).model_inputs()
    plain = model(**inputs)
    plain.loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with sharding.world() as world:
        config = ShardingConfig(activation_checkpointing="full")
        sharding.shard(model, world.mesh, config, compute_dtype=torch.float32)
        sharding.prepare_layers(model, config)
        out = model(**inputs)
        out.loss.backward()
        close(out.token_loss, plain.token_loss)
        got = dict(model.named_parameters())
        for name, gradient in want.items():
            close(got[name].grad.full_tensor(), gradient)


def test_packed_attention_is_the_llms_alone_and_is_not_saved(build, tmp_path):
    model = build()
    tower = model.model.vision_tower.config._attn_implementation
    use_packed_attention(model)
    assert model.model.vision_tower.config._attn_implementation == tower != NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    prompt = batch_of(model, sample(model, answer=0))
    ask = {"input_ids": prompt.input_ids, "pixel_values": prompt.pixel_values, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="aligngpt_varlen needs both"):
        model.generate(**ask)
    assert torch.equal(use_packed_attention(model, tower).generate(**ask), again.generate(**ask))


def test_what_does_not_go_with_packed_sequences_is_refused(build):
    model = build()
    inputs = batch_of(model, *mixed(model), packed=True).model_inputs()
    with pytest.raises(ValueError, match=r"LLM's attention is 'sdpa'; .*set_attn_implementation\('aligngpt_varlen'\)"):
        model(**inputs)
    use_packed_attention(model)
    lengths = inputs["seq_lengths"]
    for wrong, match in (
        ({"attention_mask": torch.ones_like(inputs["input_ids"])}, "attention_mask is given beside cu_seqlens"),
        ({"max_seqlen": None}, "max_seqlen is missing"),
        ({"max_seqlen": 3}, "none longer than max_seqlen 3"),
        ({"input_ids": inputs["input_ids"].repeat(2, 1)}, "2 rows are given beside cu_seqlens"),
        ({"seq_lengths": None, "cu_seqlens": ends(lengths[:-1])}, "they need to be 87 together"),
        ({"seq_lengths": None, "cu_seqlens": ends((*lengths, 0))}, "none empty"),
        ({"attention_backend": "flex"}, "attention_backend is 'flex', which cannot run"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**(inputs | wrong))


# ---- errors --------------------------------------------------------------------------------------------------------


def test_counts_that_do_not_match_are_refused(build):
    model = build()
    inputs = batch_of(model, sample(model)).model_inputs()
    inputs["plan"] = None
    with pytest.raises(ValueError, match="16 image tokens; pixel_values holds 2 images"):
        model(**(inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}))
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(**(inputs | {"pixel_values": None}))
    ids = inputs["input_ids"].clone()
    ids[0, 1] = 5
    with pytest.raises(ValueError, match="0 <align> tokens; with align_mode 'adaptive' it needs 1"):
        model(**(inputs | {"input_ids": ids}))
    levels = (torch.tensor([1, 2]), torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.5]))
    for wrong in levels:
        with pytest.raises(ValueError, match=r"align_levels is .*(1 samples have an image|levels are 0 to 7)"):
            model(**(inputs | {"align_levels": wrong}))
    ids = inputs["input_ids"].clone()
    ids[0, 2] = 400
    with pytest.raises(ValueError, match="input_ids holds token 400; the LLM's vocabulary is 0 to 319"):
        model(**(inputs | {"input_ids": ids}))


@pytest.mark.parametrize("stray", ["second", "text-only"])
def test_a_stray_alignment_token_is_refused(build, stray):
    model = build()
    text_only = sample(model, images=0)
    text_only.text.input_ids[3] = model.config.align_token_id
    twice = sample(model)
    twice.text.input_ids[-1] = model.config.align_token_id
    inputs = batch_of(model, twice if stray == "second" else text_only).model_inputs() | {"plan": None}
    with pytest.raises(ValueError, match=r"<align> tokens; with align_mode 'adaptive' it needs [01]"):
        model(**inputs)
    if stray == "text-only":
        with pytest.raises(ValueError, match="input_ids has align tokens; pixel_values is missing"):
            model(input_ids=inputs["input_ids"])


def test_an_image_of_another_size_is_refused(make_llm):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    with pytest.raises(ValueError, match="vision has model_type 'llama'"):
        AlignGPTForConditionalGeneration.from_parts(make_llm(), make_llm())
    model = AlignGPTForConditionalGeneration.from_parts(make_llm(), tower)
    inputs = batch_of(model, sample(model)).model_inputs()
    with pytest.raises(ValueError, match="size"):
        model(**(inputs | {"pixel_values": torch.zeros(1, 3, 56, 56)}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("align_mode", "mean"),
        ("align_mod", "local"),
        ("gate_text", "half"),
        ("num_align_levels", 1),
        ("image_aspect_ratio", "round"),
    ],
)
def test_a_wrong_config_value_is_named(build, field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        build(**{field: value})


def test_a_head_that_caps_its_logits_is_refused(make_llm, make_tower):
    llm = make_llm("gemma2")
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        AlignGPTForConditionalGeneration.from_parts(llm, make_tower())
