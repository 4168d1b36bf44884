"""benchmarks.tune with a table that only looks like one: what it tries, drops and prefers."""

import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from aligngpt_kernels.cross_entropy import row_tile
from aligngpt_kernels.decode import decode_tile
from aligngpt_kernels.dispatch import A100, H100
from aligngpt_kernels.gemm import gemm_tile, weight_grad_tile
from torch import Tensor

from benchmarks import tune
from benchmarks.case import Case, simple

CPU = torch.device("cpu")


class Tile(NamedTuple):
    tenths: int  # of a millisecond
    wrong: bool = False
    kind: str = "plain"


def make(fields: dict) -> tuple[tune.Table, Case]:
    module = SimpleNamespace(tile=lambda size: Tile(3))

    def op(x: Tensor) -> list[Tensor]:
        tile = module.tile(len(x))
        if tile.kind == "too large":
            raise RuntimeError("out of resource: shared memory")
        time.sleep(tile.tenths / 1e4)
        return [x * (3 if tile.wrong else 2)]

    case = Case(
        name="doubling",
        make=lambda device: torch.randn(4),
        contenders={"ours": simple(op)},
        exact=lambda x: [2 * x.double()],
        plain=lambda x: [2 * x],
        bytes=1,
        flops=1,
    )
    return tune.Table(module, "tile", fields, lambda: [case]), case


def test_the_fastest_tile_that_is_right_wins():
    fields = {"tenths": [1, 2, 3, 4], "wrong": [True, False], "kind": ["plain", "too large"]}
    table, case = make(fields)
    candidates = table.candidates(Tile(3), A100, [4])
    assert len(candidates) == 15
    assert candidates == table.candidates(Tile(3), A100, [4])
    found = tune.tune(table, case, CPU, 60)
    (row_us, row), (best_us, best) = found.timed
    assert (found.tried, found.candidates) == (15, 15)
    assert (row, best) == (Tile(3), Tile(1))
    assert row_us > 250
    assert best_us < row_us
    assert table.module.tile(4) == Tile(3)  # as it was
    assert tune.written(best) == "Tile(1, False, plain)"


def test_without_time_there_is_no_answer():
    assert tune.tune(*make({"tenths": [1]}), CPU, 0) == ([], 0, 1)


def test_what_cannot_fit_is_not_tried():
    table, case = make({"tenths": [1, 2]})
    table = table._replace(fits=lambda tile, chip, size: tile.tenths * size < 8 and chip == A100)
    found = tune.tune(table, case, CPU, 60)
    assert (found.timed[1][1], found.candidates) == (Tile(1), 1)


@pytest.mark.parametrize("chip", [A100, H100], ids=["A100", "H100"])
def test_the_tables_rows_fit_and_few_candidates_are_left(chip):
    asked = [
        *(("projector", gemm_tile, (m, 4096, k, torch.bfloat16, "ieee", "gelu", chip), 1000)
          for m in (1, 16, 64, 576, 1152, 2304, 9216) for k in (1024, 4096)),
        ("weight_grad", weight_grad_tile, (torch.bfloat16, "ieee"), 100),
        *(("decode", decode_tile, (group, 128, 2, chip), 100) for group in (1, 4)),
        *(("loss", row_tile, (v,), 20) for v in (32000, 128256)),
    ]  # fmt: skip
    for name, function, args, most in asked:
        table, row = tune.tables()[name], function(*args)
        assert table.fits(row, chip, *args), (row, args)
        assert 5 < len(table.candidates(row, chip, args)) < most, args


def test_a_table_whose_own_row_fails_is_a_fault_of_the_kernels():
    table, case = make({"tenths": [1]})
    table.module.tile = lambda size: Tile(0, wrong=True)
    with pytest.raises(SystemExit, match=r"doubling: the table's own row .* is off by"):
        tune.tune(table, case, CPU, 60)


@pytest.mark.parametrize("name", tune.tables())
def test_the_tables_are_there_with_their_fields(name):
    table = tune.tables()[name]
    assert callable(getattr(table.module, table.function))
    assert len({case.name for case in table.cases()}) == len(table.cases())
    returned = getattr(table.module, table.function).__annotations__["return"]
    assert set(table.fields) - {""} <= set(getattr(returned, "_fields", ()))


@pytest.mark.parametrize("epilogue", ["bias", "gelu", "gelu, keep", "dgelu"])
def test_products_are_checked_against_what_the_kernel_computes(epilogue):
    """The yardstick agrees with Triton's interpreter on a small product."""
    case = tune.product_case(32, 64, 32, epilogue, torch.float32)
    inputs = case.make(CPU)
    got = case.contenders["ours"].prepare(inputs)()
    for ours, exact in zip(got, case.exact(inputs), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_weight_gradients_are_checked_against_what_the_kernel_computes():
    case = tune.weight_grad_case(32, 64, 32, torch.float32)
    inputs = case.make(CPU)
    got = case.contenders["ours"].prepare(inputs)()
    for ours, exact in zip(got, case.exact(inputs), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
