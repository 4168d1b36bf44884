"""The judge of steps: what it skips, what it calls a spike, and that going on from its state changes nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt.config import AlignGPTConfig
from aligngpt.model import AlignGPTForConditionalGeneration
from training.config import GuardConfig
from training.guard import HORIZON, WARM_UP, Guard

NORMAL = np.random.default_rng(0).normal(2.0, 0.1, 400).tolist()  # losses


class Pair:
    """The world as one of two processes sees it: the other one's samples are called as its own with a dash."""

    def __init__(self, rank: int = 0):
        self.rank, self.size = rank, 2

    def gather(self, ids: list[str]) -> list[list[str]]:
        others = [f"{name}'" for name in ids]
        return [ids, others] if self.rank == 0 else [others, ids]


def guard_in(folder: Path, *, rank: int = 0, first_step: int = 0, state: Any = None, **config: Any) -> Guard:
    world: Any = Pair(rank)
    return Guard(GuardConfig(**config), folder, world, first_step=first_step, state=state)


def judged(guard: Guard, losses: list[float], *, first: int = 1, norm: float = 1.0) -> list[bool]:
    return [
        guard.check(step, loss, norm, supervised_tokens=9, ids=[f"a{step}", f"b{step}"])
        for step, loss in enumerate(losses, first)
    ]


def lines_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_fault_37_38_what_is_not_finite_is_skipped_and_too_much_of_it_ends_the_run(
    tmp_path: Path, loss: float, norm: float
) -> None:
    guards = [guard_in(tmp_path, rank=rank, max_skipped=3) for rank in (0, 1)]
    for guard in guards:
        assert judged(guard, NORMAL[:30]) == [True] * 30
        before = guard.state()
        assert judged(guard, [loss, loss], first=31, norm=norm) == [False, False]
        assert judged(guard, NORMAL[30:31], first=33) == [True]
        assert judged(guard, [loss, loss], first=34, norm=norm) == [False, False]  # counted anew
        with pytest.raises(FloatingPointError) as stop:
            judged(guard, [loss], first=36, norm=norm)
        phrases = (f"step {step} (loss {loss:g}, gradient norm {norm:g})" for step in (34, 35, 36))
        assert ", ".join(phrases) in str(stop.value)
        assert "--guard.max-skipped is 3" in str(stop.value)
        after = guard.state()
        assert (after["skipped"], after["spikes"], after["losses"]) == (5, 0, before["losses"] + 1)
        assert 1.5 < after["mean"] < 2.5
        assert after["variance"] < 0.1
    lines = lines_in(tmp_path)  # of rank 0 alone
    assert [(line["step"], line["skipped"]) for line in lines] == [(step, True) for step in (31, 32, 34, 35, 36)]
    assert lines[0]["loss"] == (loss if math.isfinite(loss) else None)
    assert lines[0]["grad_norm"] == (norm if math.isfinite(norm) else None)
    assert lines[0]["ids"] == ["a31", "b31", "a31'", "b31'"]


def test_fault_39_a_spike_is_counted_and_its_samples_are_written_down(tmp_path: Path) -> None:
    guard = guard_in(tmp_path, spike=6.0)
    assert judged(guard, [100.0, *NORMAL[: WARM_UP - 2]]) == [True] * (WARM_UP - 1)  # too early to tell
    assert not lines_in(tmp_path)

    guard = guard_in(tmp_path, spike=6.0)
    judged(guard, NORMAL[:HORIZON])
    mean, std = np.mean(NORMAL[:HORIZON]), np.std(NORMAL[:HORIZON])
    assert guard.state()["mean"] == pytest.approx(mean, rel=1e-12)
    assert guard.state()["variance"] == pytest.approx(std**2, rel=1e-12)
    step = HORIZON + 1
    assert judged(guard, [mean + 5.9 * std], first=step) == [True]
    judged(guard, NORMAL[HORIZON : 2 * HORIZON], first=step + 1)
    assert not lines_in(tmp_path)

    # One wild loss does not hide the next ones.
    step += HORIZON + 1
    mean, std = guard.state()["mean"], guard.state()["variance"] ** 0.5
    judged(guard, [1e6, *NORMAL[200:205], mean + 9 * std, mean - 50 * std], first=step)
    lines = lines_in(tmp_path)
    assert [line["step"] for line in lines] == [step, step + 6]
    assert guard.state()["spikes"] == 2
    assert lines[0] == {
        "step": step,
        "loss": 1e6,
        "grad_norm": 1.0,
        "mean": mean,
        "std": std,
        "skipped": False,
        "ids": [f"a{step}", f"b{step}", f"a{step}'", f"b{step}'"],
    }


def test_fault_39_a_lasting_change_of_level_is_no_spike_for_long(tmp_path: Path) -> None:
    guard = guard_in(tmp_path)
    judged(guard, NORMAL[:200])
    judged(guard, [loss + 3 for loss in NORMAL[200:]], first=201)
    steps = [line["step"] for line in lines_in(tmp_path)]
    assert 201 in steps
    assert max(steps) <= 212


def test_a_guard_that_goes_on_judges_like_one_that_never_stopped(tmp_path: Path) -> None:
    """From every step, through JSON; the steps after it have been written down already and are taken again."""
    losses = NORMAL[:40]
    for position, loss in {22: 9.0, 25: math.nan, 26: math.inf, 30: 8.0, 33: math.nan}.items():
        losses[position] = loss
    whole = tmp_path / "whole"
    whole.mkdir()
    guard = guard_in(whole)
    states = [json.dumps(guard.state())]
    decisions = []
    for step, loss in enumerate(losses, 1):
        decisions += judged(guard, [loss], first=step)
        states.append(json.dumps(guard.state()))
    written = (whole / "spikes.jsonl").read_bytes()
    assert len(lines_in(whole)) == 5
    for first_step, state in enumerate(states):
        again = guard_in(whole, first_step=first_step, state=json.loads(state))
        assert judged(again, losses[first_step:], first=first_step + 1) == decisions[first_step:]
        assert json.dumps(again.state()) == states[-1]
        assert (whole / "spikes.jsonl").read_bytes() == written


def test_fault_36_a_step_without_supervised_tokens_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    """Neither is NaN, and the 0 is no loss to compare others with."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    llm = LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14)
    model = AlignGPTForConditionalGeneration(AlignGPTConfig.from_parts(llm, vision)).train()
    ids = torch.arange(3, 15).reshape(2, 6)
    labels = torch.full_like(ids, -100)
    loss = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), num_items_in_batch=1).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert loss.item() == norm.item() == 0
    assert all(
        torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters() if parameter.grad is not None
    )

    guard = guard_in(tmp_path)
    judged(guard, NORMAL[:50])
    before = guard.state()
    assert guard.check(51, loss.item(), norm.item(), supervised_tokens=0, ids=[])
    assert guard.state() == before
    assert not lines_in(tmp_path)
