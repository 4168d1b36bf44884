"""The benchmarks of prefill, sampling, evaluation and pictures: everybody is right, who is not is named."""

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_evaluation, bench_generate, bench_images, bench_prefill, bench_sampling
from benchmarks.bench_generate import LEAST, MICRO, batch, contender, stages_case
from benchmarks.case import Case, Contender, check
from training.dali_pipeline import why_not_dali

CPU = torch.device("cpu")
FILES = (bench_prefill, bench_sampling, bench_evaluation, bench_images)
SMALL = [case for file in FILES for case in file.small_cases()]


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_all_contenders_are_right(case: Case):
    for name, found in checked(case, case.make(CPU)).items():
        assert "wrong" not in found, (name, found)


def checked(case: Case, inputs: Any) -> dict[str, dict[str, Any]]:
    """What is found of each contender, before anything is timed."""
    exact, plain = case.exact(inputs), case.plain(inputs)
    return {
        name: check(case, name, inputs, contender.prepare(inputs), plain, exact)
        for name, contender in case.contenders.items()
    }


def named(case: Case, **forged: Contender) -> dict[str, dict[str, Any]]:
    """What is found of contenders that are not right."""
    found = checked(dataclasses.replace(case, contenders=forged), case.make(CPU))
    assert all("wrong" in record for record in found.values()), found
    return found


def test_prefill_with_another_picture_or_a_padded_end_is_named():
    (case,) = bench_prefill.small_cases()

    def forged(asked, change: Callable[[dict[str, Tensor]], None]):
        @torch.no_grad()
        def answer(new: int) -> Tensor:
            inputs = batch(asked.prompts, asked.device)
            change(inputs)
            return asked.peer(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

        return answer

    def swap(inputs: dict[str, Tensor]) -> None:
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)

    def attend_to_padding(inputs: dict[str, Tensor]) -> None:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])

    named(case, swapped=contender(forged, change=swap), padded=contender(forged, change=attend_to_padding))


@pytest.mark.parametrize("peer", [bench_sampling.ours, bench_sampling.transformers])
def test_sampling_from_other_tokens_is_named(peer: Callable[..., Any]):
    """One token more or fewer is kept, at another temperature, or without the penalty."""
    finish = bench_sampling.with_kept if peer is bench_sampling.ours else bench_sampling.by_what_it_drew_from
    greedy, top_p, penalty = bench_sampling.small_cases()

    def changed(**how: Callable[[Any], Any]) -> Contender:
        return Contender(
            lambda asked: peer(asked._replace(**{name: change(getattr(asked, name)) for name, change in how.items()})),
            finish,
        )

    named(
        top_p,
        more=changed(top_p=lambda p: p + 0.01),
        fewer=changed(top_p=lambda p: p - 0.01),
        hotter=changed(logits=lambda logits: logits * 0.9),
        all_tokens=changed(top_p=lambda p: 0.9999),
    )
    named(penalty, forgotten=changed(kind=lambda kind: kind._replace(penalises=False)))
    named(greedy, of_another_row=changed(logits=lambda logits: logits.flip(0)))


def test_a_draw_of_what_is_not_kept_is_named():
    """Though what it was drawn from is right."""
    _, case, _ = bench_sampling.small_cases()

    def unlikeliest(asked):
        right = bench_sampling.transformers(asked)
        return lambda: [asked.logits.argmin(-1), right()[1]]

    found = named(case, unlikeliest=Contender(unlikeliest, bench_sampling.by_what_it_drew_from))
    assert "result 1" in found["unlikeliest"]["wrong"]


def test_answers_to_other_questions_are_named():
    (case,) = bench_evaluation.small_cases()

    def forged(field):
        right = bench_evaluation.one_at_a_time(field)

        def run():
            tokens, score = right()
            return [tokens.roll(1, 0), score]

        return run

    def scored_otherwise(field):
        right = bench_evaluation.one_at_a_time(field)
        return lambda: [right()[0], right()[1] + 1]

    found = named(case, forged=Contender(forged), scored_otherwise=Contender(scored_otherwise))
    assert "result 1" in found["scored_otherwise"]["wrong"]


def test_evaluation_in_16_bits_is_judged_by_logits():
    """And says how many answers are the peer's. Files are gone when nobody has them any more."""
    case = bench_evaluation.case(MICRO, torch.bfloat16, questions=6, rows=3, rounds=2)
    field = case.make(CPU)

    def forged(field):
        right = bench_evaluation.one_at_a_time(field)
        return lambda: [right()[0].roll(1, 0), right()[1]]

    contender = case.contenders["ours"]
    found = checked(
        dataclasses.replace(case, contenders={**case.contenders, "forged": contender._replace(prepare=forged)}), field
    )
    assert "wrong" in found.pop("forged")
    assert not any("wrong" in record for record in found.values()), found
    details = contender.details(contender.prepare(field), field, 1.0)
    assert details["syncs"] > 0
    assert details["questions"] == 6
    assert details["equal_answers"] >= 3
    root = field.root
    assert root.is_dir()
    del field
    gc.collect()
    assert not root.exists()


def test_other_pixels_and_lost_pictures_are_named():
    (case,) = bench_images.small_cases()
    exactly, nearly = (partial(bench_images.apart, to_the_bit=bit) for bit in (True, False))

    def forged(files, change: Callable[[list[Tensor]], list[Tensor]]):
        right = bench_images.read_by(bench_images.by_peer, files)
        return lambda: change([out.clone() for out in right()])

    def off(outputs: list[Tensor], by: float) -> list[Tensor]:
        outputs[0][1, 2, 3, 4] += by
        return outputs

    def lost(outputs: list[Tensor]) -> list[Tensor]:
        return [*outputs[:2], outputs[2] - 1]

    def all_off(outputs: list[Tensor]) -> list[Tensor]:
        return [outputs[0] + 1 / 255 / 0.26, *outputs[1:]]

    named(
        case,
        a_little=Contender(partial(forged, change=partial(off, by=1e-6)), exactly),
        ours_far=Contender(partial(forged, change=partial(off, by=5 / 255 / 0.26)), nearly),
        ours_everywhere=Contender(partial(forged, change=all_off), nearly),
        ours_lost=Contender(partial(forged, change=lost), nearly),
        swapped=Contender(partial(forged, change=lambda outputs: [outputs[1], outputs[0], outputs[2]]), exactly),
    )


@pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))
def test_dali_leads_where_it_is():
    (case,) = bench_images.small_cases()
    assert next(iter(case.contenders)) == bench_images.BY_DALI


def test_stages_of_an_answer_add_up():
    case = stages_case(LEAST._replace(requests=2))
    asked, ours = case.make(CPU), case.contenders["ours"]
    found = ours.details(ours.prepare(asked), asked, 1.0)
    assert found["peak_bytes"] > found["kept_bytes"] > bench_generate.cache_bytes(LEAST._replace(requests=2))
    names = [row["stage"] for row in found["stages"]]
    assert names == list(bench_generate.stage_work(LEAST, 1))
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["sampling"]["items"] == 2 * LEAST.new
    assert rows["decode step"]["items"] == 2 * (LEAST.new - 1)
    assert rows["vision tower"]["items"] == 2
    assert {"engine step"} < found["rest"].keys()
    parts = sum(row["us"] for row in found["stages"]) + sum(found["rest"].values())
    assert 0.4 < parts / found["whole_us"] < 2.5


def test_work_of_a_7b_prompt():
    """2 FLOPs a weight and token, and the tower's 576 patches of CLIP ViT-L/14: about 0.35 TFLOP a picture."""
    work = bench_generate.LARGE
    parts = bench_generate.stage_work(work, 1)
    assert parts["vision tower"].flops == pytest.approx(2 * 577 * 302.6e6, rel=0.005)
    assert parts["LLM forward"].flops == pytest.approx(2 * 6.476e9 * 704, rel=0.03)
    assert parts["decode step"].bytes / 127 == pytest.approx(13.2e9 + 768 * 2 * 32 * 4096 * 2, rel=0.01)
    assert bench_generate.prefill_work(work).flops == pytest.approx(9.6e12, rel=0.03)
