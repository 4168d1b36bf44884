"""The demo's PNGs that no other command draws: losses, the gate's weights, pictures with answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligngpt.data.scenes import KINDS
from demo.evaluate import Asked, Speaker


def draw_losses(runs: dict[str, Path], path: Path) -> None:
    """The loss of each step of each run, smoothed over ten; a panel for each word before a colon in their names."""
    plt = _pyplot()
    groups = list(dict.fromkeys(name.split(":")[0] for name in runs))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3), layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        for name, folder in runs.items():
            if name.split(":")[0] != group:
                continue
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [json.loads(line)["loss"] for line in lines]
            smooth = [
                sum(losses[max(0, n - 9) : n + 1]) / len(losses[max(0, n - 9) : n + 1]) for n in range(len(losses))
            ]
            axis.plot(range(1, len(smooth) + 1), smooth, label=name.partition(":")[2].strip() or None)
        axis.set(title=group, xlabel="step", ylabel="loss" if group == groups[0] else "")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_gate(speaker: Speaker, asked: Sequence[Asked], path: Path) -> None:
    """Mean weight of each local level, by kind of question."""
    plt = _pyplot()
    rows = []
    for kind in KINDS:
        chosen = [question for question in asked if question.kind == kind][:100]
        weights = speaker.gate([question.picture for question in chosen], [question.prompt for question in chosen])
        rows.append(weights.mean(0).tolist())
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    image = axis.imshow(rows, cmap="viridis", vmin=0, aspect="auto")
    for y, row in enumerate(rows):
        for x, weight in enumerate(row):
            axis.text(x, y, f"{weight:.2f}", ha="center", va="center", color="white", fontsize=8)
    axis.set_xticks(range(len(rows[0])))
    axis.set_yticks(range(len(KINDS)), KINDS)
    axis.set(title="what the gate mixes", xlabel="local level", ylabel="kind of question")
    figure.colorbar(image, label="mean weight")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_answers(speaker: Speaker, captioner: Speaker, asked: Sequence[Asked], path: Path) -> None:
    """Eight pictures, each with a caption at the highest and the lowest level, and its questions with the answers."""
    plt = _pyplot()
    pictures = list(dict.fromkeys(question.picture for question in asked))[:8]
    top = captioner.model.config.num_align_levels - 1
    best, worst = (captioner.say(pictures, [""] * len(pictures), level=level) for level in (top, 0))
    figure, axes = plt.subplots(2, 4, figsize=(15, 10), layout="constrained")
    for axis, picture, caption, wrong in zip(axes.flat, pictures, best, worst, strict=True):
        own = [question for question in asked if question.picture == picture][:4]
        said = speaker.say([picture] * len(own), [question.prompt for question in own])
        axis.imshow(plt.imread(picture))
        axis.set_axis_off()
        lines = [f"level {top}: {_wrapped(caption)}", f"level 0: {_wrapped(wrong)}", ""]
        for question, answer in zip(own, said, strict=True):
            mark = "✓" if answer == question.answer else f"✗ ({question.answer})"
            lines.append(f"{question.prompt}?  {answer} {mark}")
        axis.set_title("\n".join(lines), loc="left", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # text may stand above the first row
    plt.close(figure)


def _wrapped(caption: str) -> str:
    return caption.replace(" and ", "\n       and ")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
