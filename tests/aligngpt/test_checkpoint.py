"""Folders in and out: the public layout, `.bin` shards, parts, and what is refused."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration
from aligngpt.checkpoint import check_names, stored_parts, stored_weights, write_weights


@pytest.fixture
def folder(tmp_path, public_folder):
    """A writable copy of the public folder, and its weights."""
    (tmp_path / "config.json").write_bytes((public_folder / "config.json").read_bytes())
    return tmp_path, load_file(public_folder / "model.safetensors")


def load(path, tower_config):
    return AlignGPTForConditionalGeneration.from_pretrained(path, vision_config=tower_config)


def test_bin_shards_read_as_safetensors_do(folder, public_folder, tower_config):
    path, weights = folder
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: weights[name] for name in part}, path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ours, theirs = load(path, tower_config).state_dict(), load(public_folder, tower_config).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ours["model.align_table"], weights["align_indicators.indicator_embs"])


def test_a_public_folder_has_its_own_config(public_folder, tower_config):
    config = load(public_folder, tower_config).config
    assert (config.gate_text, config.image_aspect_ratio, config.image_seq_length) == ("all", "pad", 16)
    assert config.text_config.rms_norm_eps == 1e-5
    with pytest.raises(ValueError, match="mm_vision_tower is 'clip', neither a local folder nor one of"):
        AlignGPTConfig.from_pretrained(public_folder)


def test_the_number_of_levels_comes_from_the_weights(folder, tower_config):
    path, weights = folder
    weights["align_indicators.indicator_embs"] = torch.randn(4, 64)
    for name in ("weight", "bias"):
        weights[f"gated_weight_layer.mlp.2.{name}"] = weights[f"gated_weight_layer.mlp.2.{name}"][:3].clone()
    save_file(weights, path / "model.safetensors")
    assert load(path, tower_config).config.num_align_levels == 4


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        ("align_indicators.indicator_embs", None, "1 missing: model.align_table"),
        ("mm_projector.0.bias", None, "1 missing: model.multi_modal_projector.linear_1.bias"),
        (None, "model.layers.9.mlp.up_proj.weight", "1 left over: model.language_model.layers.9.mlp.up_proj.weight"),
        (None, "lora.A", "unknown name: lora.A"),
    ],
)
def test_fault_53_every_key_is_accounted_for(folder, tower_config, lost, added, message):
    path, weights = folder
    weights.pop(lost, None)
    if added:
        weights[added] = torch.zeros(2)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(path, tower_config)


def test_fault_53_our_own_folder_must_be_whole_too(make_llm, make_tower, tmp_path):
    AlignGPTForConditionalGeneration.from_parts(make_llm(), make_tower()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.align_table"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: model\.align_table"):
        AlignGPTForConditionalGeneration.from_pretrained(tmp_path)


class Dropper:
    """Unpickling it writes a file: what a loader that unpickles would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_fault_51_a_pickle_is_not_run(folder, tower_config):
    """The public loaders unpickle whatever the folder holds."""
    path, _ = folder
    trace = path / "ran"
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Dropper(trace)}))
    with pytest.raises(ValueError, match="is not a whole file of plain tensors"):
        load(path, tower_config)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {"lm_head.weight": torch.zeros(2), "step": 3},
        torch.zeros(2),
        {"step": torch.eye(2).to_sparse()},
        {"step": torch.zeros(2, device="meta")},
    ],
)
def test_a_bin_file_of_more_than_named_tensors_is_none(folder, content):
    path, _ = folder
    torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is not a whole file of plain tensors: it holds (list|Tensor|step)"):
        stored_weights(path)


def test_fault_53_a_public_folder_of_other_sizes_is_refused(folder, tower_config):
    path, weights = folder
    save_file(weights | {"lm_head.weight": torch.zeros(321, 64)}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 of another shape: lm_head.weight is \(321, 64\), the config says \(320, 64\)"
    ):
        load(path, tower_config)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_mapped_anew_gives_the_same(folder, monkeypatch, kind):
    """After so many bytes a file is opened again, so that the pages that were read are given back."""
    path, weights = folder
    save_file(weights, path / kind) if kind.endswith("safetensors") else torch.save(weights, path / kind)
    opened = []

    def counted(read):
        return lambda *args, **kwargs: (opened.append(args), read(*args, **kwargs))[1]

    monkeypatch.setattr("aligngpt.checkpoint.safe_open", counted(safe_open))
    monkeypatch.setattr(torch, "load", counted(torch.load))
    monkeypatch.setattr("aligngpt.checkpoint._MAPPED_BYTES", 100_000)
    stored = stored_weights(path)
    for name, tensor in stored.items():
        theirs = weights[tensor.name]
        assert torch.equal(tensor.read(), theirs), name
        assert torch.equal(tensor.read(1, 2), theirs[1:2])
    assert len(opened) > 3


def test_an_index_may_promise_too_much(folder):
    path, weights = folder
    save_file(weights, path / "one.safetensors")
    weight_map = dict.fromkeys(["lm_head.weight", "model.norm.bias"], "one.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stored = stored_weights(path)
    with pytest.raises(ValueError, match=r"one\.safetensors lacks model\.norm\.bias, which its index puts there"):
        _ = stored["model.language_model.norm.bias"].shape


def test_an_index_may_leave_out_what_its_files_hold(folder):
    """It is a weight all the same, and an unknown one is listed."""
    path, weights = folder
    stranger = {"stranger.weight": torch.zeros(2)}
    save_file(weights | stranger, path / "one.safetensors")
    save_file({"lm_head.weight": torch.zeros(320, 64)}, path / "two.safetensors")
    weight_map = {"model.norm.weight": "one.safetensors", "lm_head.weight": "two.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"1 weights with an unknown name: stranger\.weight$"):
        stored_weights(path)
    save_file(weights, path / "one.safetensors")
    stored = stored_weights(path)
    assert "model.align_table" in stored
    assert not stored["lm_head.weight"].read().any()  # of two, the one that the index means


@pytest.mark.parametrize("weight_map", [["lm_head.weight"], {"lm_head.weight": 1}, None, "one.safetensors"])
def test_an_index_that_is_none_is_named(folder, weight_map):
    path, _ = folder
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json is no index of weights: .*; it needs a weight_map$"):
        stored_weights(path)


@pytest.mark.parametrize(("dtype", "name"), [(torch.uint8, "U8"), (torch.int64, "I64")])
def test_a_type_that_is_none_of_ours_is_named(folder, dtype, name):
    path, weights = folder
    save_file(weights | {"lm_head.weight": torch.zeros(320, 64, dtype=dtype)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"holds lm_head\.weight as {name}; it needs to be one of F64, F32"):
        _ = stored_weights(path)["lm_head.weight"].dtype


def test_an_index_cannot_point_elsewhere(folder):
    path, _ = folder
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}})
    )
    with pytest.raises(ValueError, match="points outside its folder"):
        stored_weights(path)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder: it has no config"):
        stored_weights(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        stored_weights(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; it needs to be a JSON object"):
        stored_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        stored_weights(tmp_path)


@pytest.mark.parametrize("kind", ["phi", "gpt2", "gpt_neox"])
def test_parts_give_every_weight_but_the_fresh_ones(make_llm, make_tower, tmp_path, kind):
    llm, tower = make_llm(kind), make_tower("siglip")
    llm.save_pretrained(tmp_path / "llm")
    tower.save_pretrained(tmp_path / "tower")
    stored = stored_parts(tmp_path / "llm", tmp_path / "tower")
    model = AlignGPTForConditionalGeneration.from_parts(tmp_path / "llm", tmp_path / "tower")
    weights = model.state_dict()
    fresh = {name for name in weights if "align" in name or "projector" in name}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    check_names(stored, weights.keys() - fresh, source="parts", tied=tied)
    assert all(torch.equal(stored[name].read(), weights[name]) for name in weights.keys() - fresh - tied)


def test_a_slice_is_what_the_whole_tensor_holds_there(public_folder, folder):
    path, weights = folder
    torch.save(weights, path / "pytorch_model.bin")
    for source in (public_folder, path):
        tensor = stored_weights(source)["lm_head.weight"]
        assert (tensor.shape, tensor.dtype) == ((320, 64), torch.float32)
        assert torch.equal(tensor.read(100, 103), weights["lm_head.weight"][100:103])
        assert tensor.read(320, 320).shape == (0, 64)


def test_shards_stay_under_their_size_and_join_again(tmp_path, make_llm, make_tower):
    model = AlignGPTForConditionalGeneration.from_parts(make_llm(), make_tower())
    limit = 100_000
    entries = [(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in model.state_dict().items()]
    write_weights(tmp_path, entries, max_shard_bytes=limit)
    model.config.save_pretrained(tmp_path)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    largest = max(t.nbytes for t in model.state_dict().values())
    assert all(shard.stat().st_size <= max(limit, largest) + 10_000 for shard in shards)
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_written_anew_is_read_anew(folder):
    path, weights = folder
    for value in (1.0, 2.0):
        save_file(weights | {"lm_head.weight": torch.full((320, 64), value)}, path / "model.safetensors")
        assert stored_weights(path)["lm_head.weight"].read(0, 1).unique().item() == value


def test_a_damaged_or_foreign_folder_is_named(folder, make_llm, tmp_path_factory):
    path, weights = folder
    save_file(weights, path / "model.safetensors")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole file"):
        stored_weights(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        stored_weights(path)
    llm = tmp_path_factory.mktemp("llm")
    make_llm().save_pretrained(llm)
    with pytest.raises(ValueError, match="holds a model of type 'llama'; wanted an AlignGPT folder"):
        AlignGPTForConditionalGeneration.from_pretrained(llm)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        AlignGPTForConditionalGeneration.from_pretrained(path / "nowhere")


def test_a_legacy_bin_file_is_read(folder, tower_config):
    path, weights = folder
    torch.save(weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(path, tower_config).state_dict()["lm_head.weight"], weights["lm_head.weight"])


def test_a_public_folder_takes_config_values_and_a_type(public_folder, tower_config):
    model = AlignGPTForConditionalGeneration.from_pretrained(
        public_folder, vision_config=tower_config, align_mode="local", torch_dtype=torch.bfloat16
    )
    assert (model.config.align_mode, model.dtype) == ("local", torch.bfloat16)
    with pytest.raises(ValueError, match="align_mode is 'lokal'"):
        AlignGPTForConditionalGeneration.from_pretrained(public_folder, vision_config=tower_config, align_mode="lokal")
