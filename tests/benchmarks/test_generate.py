"""The benchmark of answering, on a model of a few thousand weights: everybody is right, who is not is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_generate, requirements
from benchmarks.bench_generate import LEAST, MICRO, contender, images_case, ours, shortfall
from benchmarks.case import ROOM, run_case
from benchmarks.measure import Ceilings
from benchmarks.results import Results
from benchmarks.run import run_cases

CPU = torch.device("cpu")


def test_all_contenders_choose_what_a_whole_pass_would(tmp_path: Path, monkeypatch):
    """And a results file has what is recorded of them."""
    cases = [dataclasses.replace(case, rounds=2, memory=False) for case in bench_generate.small_cases()]
    results = Results(tmp_path, "a CPU", "sm_90")
    assert run_cases(cases, results, CPU, Ceilings(1e9, 1e9), float("inf"), seconds=0) == 0
    content = json.loads(results.path.read_text())
    for name, record in content["cases"].items():
        assert "failed" not in record, (name, record)
        for contender_name, found in record["contenders"].items():
            assert {"new_tokens", "answers_per_second"} < found.keys() or "absent" in found, (contender_name, found)
            assert ("ms_per_token" in found) == (found.get("new_tokens", 1) > 1)
    _, images, texts, first, stages = content["cases"].values()
    assert sum("us" in found for found in images["contenders"].values()) == 4
    assert "us" in texts["contenders"]["continuous batching"]
    assert {name for name, found in first["contenders"].items() if found["new_tokens"] == 1} == {"ours", "generate"}
    assert first["items"] == 1
    assert stages["contenders"]["ours"]["whole_us"] > 0
    summary = requirements.summary(content)
    lines = {line.split("  ")[0]: line for line in summary.splitlines()}
    assert "unmeasured" not in lines["answering at 7B, one: tokens/s after the first"]
    assert "unmeasured" not in lines["answering at 7B, 48 with an image: images/s"]
    assert "ms to the first tokens" in summary


@pytest.mark.parametrize("wrong", ["another token", "another request", "a token too few"])
def test_wrong_answers_are_named(wrong: str):
    def forged(asked, **options):
        right = ours(asked, **options)

        def answer(new):
            tokens = right(new)
            if wrong == "another token":
                tokens[1, -1] = (tokens[1, -1] + 1) % MICRO.vocabulary
            return tokens.flip(0) if wrong == "another request" else tokens[:, :-1] if "few" in wrong else tokens

        return answer

    case = images_case(LEAST._replace(requests=3), 2)
    case = dataclasses.replace(
        case, contenders={"forged": contender(forged, rows=3), "ours": contender(ours, rows=3)}, absent={}
    )
    found = run_case(case, CPU, seconds=0)
    assert "wrong" in found["forged"], found
    assert "us" in found["ours"]


def test_16_bits_are_judged_by_32():
    """Rounding moves the choices of a bfloat16 model within what is allowed, and other weights do not."""
    asked = bench_generate.make(CPU, LEAST._replace(dtype=torch.bfloat16, new=12))
    exact = bench_generate.in_wider_dtype(asked.peer)
    prompt, answer = asked.prompts[0], torch.arange(12)
    wide = bench_generate.logits_of(exact, prompt, answer)
    assert wide.dtype == torch.float32
    copied = bench_generate.twin(asked.peer).float()
    torch.testing.assert_close(wide, bench_generate.logits_of(copied, prompt, answer))
    assert all(weight.dtype == torch.bfloat16 for weight in exact.model.language_model.parameters()), "given back"
    (lacking,) = shortfall(asked, [ours(asked, 1)(12)])
    assert 0 < asked.error < 0.2
    assert lacking.max() <= 4 * asked.error
    (lacking,) = shortfall(asked, [torch.arange(12)[None]])
    assert lacking.max() > 8 * 2 * asked.error


def test_cases_of_a_gpu_are_those_of_the_requirement():
    one, images, static, texts, first, stages = bench_generate.cases()
    a_token = 2 * 2 * 32 * 4096  # bytes of its keys and values
    assert one.bytes == pytest.approx(128 * 13.2e9 + 127 * (704 + 64) * a_token, rel=0.01)
    tower, patches = 24 * 12 * 1024**2, 576
    assert one.flops == pytest.approx(2 * (831 * 6.48e9 + 128 * 32000 * 4096 + patches * tower), rel=0.01)
    assert first.bytes == pytest.approx(13.2e9 + 0.58e9 + 0.37e9, rel=0.01), "weights of LLM and tower, the cache"
    for case, said in (
        (one, "1 x 704"),
        (images, "48 x 704"),
        (static, "1 x 704"),
        (texts, "48 x 704"),
        (first, "1 x 704"),
        (stages, "8 x 704"),
    ):
        assert said in case.name
        assert case.input_bytes * ROOM < 78e9, "an H100 holds it"
