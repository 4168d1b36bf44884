"""The parity page: its numbers are those of the back-ends, and the committed one has the rows that the script makes."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from aligngpt.processor import AlignGPTImageProcessor
from benchmarks.parity import ASPECTS, BACKENDS, KINDS, PAGE, write_page
from training.dali_pipeline import DaliPixels, why_not_dali

needs_dali = pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))


def table(page: Path) -> dict[tuple[str, str], list[str]]:
    """Cells of each image and aspect."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["image", "aspect", *BACKENDS]
    return {(kind, aspect): rest for kind, aspect, *rest in cells[1:]}


def difference(kind: str, aspect: str, size: int) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Largest and mean difference in 1/255, and both tensors."""
    processor = AlignGPTImageProcessor(size, image_aspect_ratio=aspect)
    ours = DaliPixels(processor, torch.device("cpu")).pixels([KINDS[kind]()])
    theirs = processor.pixels([KINDS[kind]()])
    levels = [
        (pixels * torch.tensor(processor.image_std)[:, None, None] + torch.tensor(processor.image_mean)[:, None, None])
        .mul(255)
        .round()
        for pixels in (ours, theirs)
    ]
    apart = (levels[0] - levels[1]).abs()
    return apart.max().item(), apart.double().mean().item(), ours, theirs


@needs_dali
def test_numbers_are_those_of_the_backends(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=3,
        image_size=56,
        patch_size=14,
    )
    torch.manual_seed(0)
    tower = CLIPVisionModel(config).eval()
    tower.save_pretrained(tmp_path / "tower")
    chosen = {kind: KINDS[kind] for kind in ("17 × 13, PNG", "CMYK, JPEG", "EXIF orientation 6, JPEG")}
    write_page(tmp_path / "parity.md", chosen, str(tmp_path / "tower"))
    found = table(tmp_path / "parity.md")
    assert set(found) == {(kind, aspect) for kind in chosen for aspect in ASPECTS}
    assert found["CMYK, JPEG", "pad"][0] == "PIL"
    assert "`tower`" in (tmp_path / "parity.md").read_text(encoding="utf-8")

    for kind in ("17 × 13, PNG", "EXIF orientation 6, JPEG"):
        for aspect in ASPECTS:
            most, mean, ours, theirs = difference(kind, aspect, 56)
            with torch.no_grad():
                drawn, expected = (
                    tower(pixels, output_hidden_states=True).hidden_states[1 + 1][0, 1:].double()
                    for pixels in (ours, theirs)
                )
            drift = ((drawn - expected) ** 2).sum().sqrt() / (expected**2).sum().sqrt()
            cells = [float(number) for number in found[kind, aspect][0].split(" · ")]
            assert cells[0] == most
            assert cells[1] == pytest.approx(mean, abs=1e-4)
            assert cells[2] == pytest.approx(drift.item(), rel=0.1, abs=1e-9)


@needs_dali
def test_the_committed_page_has_the_rows_that_the_script_makes() -> None:
    found = table(PAGE)
    assert set(found) == {(kind, aspect) for kind in KINDS for aspect in ASPECTS}
    for aspect in ASPECTS:
        most, mean, _, _ = difference("17 × 13, PNG", aspect, 336)
        assert found["17 × 13, PNG", aspect][0].startswith(f"{most:.0f} · {mean:.4f} · ")
    assert "`python -m benchmarks.parity` writes this page" in PAGE.read_text(encoding="utf-8")
