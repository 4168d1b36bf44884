"""`python -m benchmarks.tune OP --seconds N`: candidates for the rows of a tile table, timed on this GPU.

For each shape the table's own row is timed beside candidates that differ from it in some fields, eight at a time in
turns, in an order drawn at random, until the shape's share of the seconds, equal for all that are left, is over.
Candidates that could not fit a multiprocessor's shared memory or registers, or would leave most of it idle, are not
tried; one that gives a wrong answer or that the compiler refuses drops out. Printed is the best row of each shape,
ready for the table, how much faster it was, and how many of the candidates there was time for; a row that wins by less
than its quartiles is no winner.

The kernels know nothing of this: a launcher asks its module's table function for a tile, and here that function is
replaced for the length of a call.
"""

import argparse
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from aligngpt_kernels.dispatch import Chip, chip
from torch import Tensor

from benchmarks import bench_decode, bench_loss, need_gpu
from benchmarks.case import Case, Contender, run_case, simple
from benchmarks.measure import Outputs, Run
from benchmarks.shapes import FEATURES, HEADS, KV_HEADS_GQA, LOSS_ROWS, SUPERVISED, VOCABULARY, VOCABULARY_LLAMA3, WIDTH

AT_A_TIME = 8
REGISTERS, OWN_REGISTERS = 65536, 40  # of a multiprocessor; of a thread for all but its sums


class Table(NamedTuple):
    """A tile table: a function of a kernels' module, and what to try instead of its answer."""

    module: Any
    function: str
    fields: Mapping[str, Sequence[Any]]  # of the tile; with "" of a table whose answer is one number
    cases: Callable[[], list[Case]]
    fits: Callable[..., bool] = lambda tile, chip, *args: True  # whether to try a tile where the table got `args`

    @contextmanager
    def giving(self, tile: Any) -> Iterator[None]:
        with mock.patch.object(self.module, self.function, return_value=tile):
            yield

    def row(self, run: Run) -> tuple[Any, tuple[Any, ...]]:
        """What the table says in a call of `run`, and what it was asked."""
        table, said = getattr(self.module, self.function), []

        def listen(*args: Any) -> Any:
            said.append((table(*args), args))
            return said[-1][0]

        with mock.patch.object(self.module, self.function, side_effect=listen):
            run()
        return said[0]

    def candidates(self, row: Any, chip: Chip, args: Sequence[Any]) -> list[Any]:
        """The combinations of the fields that fit, without the row itself, in the same order in every run."""
        if "" in self.fields:
            found = list(self.fields[""])
        else:
            names = list(self.fields)
            found = [
                row._replace(**dict(zip(names, values, strict=True)))
                for values in itertools.product(*self.fields.values())
            ]
        random.Random(0).shuffle(found)
        return [tile for tile in found if tile != row and self.fits(tile, chip, *args)]


def with_tile(table: Table, tile: Any, contender: Contender) -> Contender:
    def prepare(inputs: Any) -> Run:
        run = contender.prepare(inputs)

        def call() -> Outputs:
            with table.giving(tile):
                return run()

        return call

    return contender._replace(prepare=prepare)


class Tuned(NamedTuple):
    timed: list[tuple[float, Any]]  # (microseconds, tile) of the table's row, then of the best, from their last round
    tried: int
    candidates: int


def tune(table: Table, case: Case, device: torch.device, seconds: float) -> Tuned:
    deadline = time.monotonic() + seconds
    ours = case.contenders["ours"]
    row, args = table.row(ours.prepare(case.make(device)))
    candidates = table.candidates(row, chip(device), args)
    best, left, times = row, candidates, {}
    while left and time.monotonic() < deadline:
        tiles = [*dict.fromkeys([row, best, *left[:AT_A_TIME]])]
        left = left[AT_A_TIME:]
        names = {f"ours {number}": tile for number, tile in enumerate(tiles)}
        contenders = {name: with_tile(table, tile, ours) for name, tile in names.items()}
        alone = dataclasses.replace(case, contenders=contenders, host=False, memory=False)
        results = run_case(alone, device, seconds=0.5)
        times = {names[name]: found["us"] for name, found in results.items() if "us" in found}
        if row not in times:
            raise SystemExit(f"{case.name}: the table's own row {row} gives {results['ours 0']}")
        best = min(times, key=lambda tile: times[tile])
    timed = [(times[tile], tile) for tile in (row, best) if times]
    return Tuned(timed, len(candidates) - len(left), len(candidates))


def written(tile: Any) -> str:
    """As a row of the table."""
    return f"{type(tile).__name__}({', '.join(map(str, tile))})" if isinstance(tile, tuple) else str(tile)


# ------------------------------------------------------------------------------------------------------ the tables


class Product(NamedTuple):
    a: Tensor  # (M, K)
    b: Tensor  # (N, K); for "dgelu" (K, N)
    bias: Tensor  # (N,)
    pre: Tensor  # (M, N)


def product_case(m: int, n: int, k: int, epilogue: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One product of the projector, whichever library would take it."""
    kn = epilogue == "dgelu"

    def make(device: torch.device) -> Product:
        draw = partial(torch.randn, device=device, dtype=dtype)
        return Product(draw(m, k), draw((k, n) if kn else (n, k)).mul_(k**-0.5), draw(n), draw(m, n))

    def ours(p: Product) -> Outputs:
        from aligngpt_kernels.gemm import gemm

        if kn:
            return gemm(p.a, p.b, epilogue, pre=p.pre)[:2]  # the column sums' parts depend on the tile
        return gemm(p.a, p.b, epilogue, bias=p.bias)

    def plain(p: Product) -> Outputs:
        if kn:
            return [torch.ops.aten.gelu_backward(p.a @ p.b, p.pre), F.gelu(p.pre)]
        out = F.linear(p.a, p.b, p.bias)
        return {"bias": [out], "gelu": [F.gelu(out)], "gelu, keep": [F.gelu(out), out]}[epilogue]

    return Case(
        name=f'product "{epilogue}" M={m} N={n} K={k}',
        make=make,
        contenders={"ours": simple(ours)},
        exact=lambda p: plain(Product(*(t.double() for t in p))),
        plain=plain,
        bytes=(m * k + n * k + m * n) * dtype.itemsize,
        flops=2 * m * n * k,
    )


def product_cases() -> list[Case]:
    shapes = [(m, epilogue) for m in (1, 16, 64, 576, 1152) for epilogue in ("gelu", "bias")]
    shapes += [(m, epilogue) for m in (2304, 4608, 9216) for epilogue in ("gelu", "gelu, keep")]
    shapes += [(m, "dgelu") for m in (1152, 9216)]
    return [product_case(m, WIDTH, FEATURES if "gelu" in e and e != "dgelu" else WIDTH, e) for m, e in shapes]


def weight_grad_case(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randn(m, n, device=device, dtype=dtype), torch.randn(m, k, device=device, dtype=dtype)

    def ours(pair: tuple[Tensor, Tensor]) -> Outputs:
        from aligngpt_kernels.gemm import weight_grad

        return weight_grad(*pair, with_bias=True)

    def plain(pair: tuple[Tensor, Tensor]) -> Outputs:
        return [pair[0].T @ pair[1], pair[0].sum(0)]

    return Case(
        name=f"weight gradient M={m} N={n} K={k}",
        make=make,
        contenders={"ours": simple(ours)},
        exact=lambda pair: plain((pair[0].double(), pair[1].double())),
        plain=plain,
        bytes=(m * n + m * k + n * k) * dtype.itemsize,
        flops=2 * m * n * k,
    )


def weight_grad_cases() -> list[Case]:
    supervised = round(LOSS_ROWS * SUPERVISED)
    shapes = [(m, WIDTH, k) for m in (1152, 9216) for k in (FEATURES, WIDTH)]
    return [weight_grad_case(*shape) for shape in [*shapes, (supervised, VOCABULARY, WIDTH)]]


def decode_cases() -> list[Case]:
    sizes = [(1, 704), (1, 8192), (16, 2048), (64, 2048), (16, 32768)]
    return [bench_decode.case(b, length, heads) for heads in (HEADS, KV_HEADS_GQA) for b, length in sizes]


def loss_cases() -> list[Case]:
    return [bench_loss.case(v, trained=trained) for v in (VOCABULARY, VOCABULARY_LLAMA3) for trained in (True, False)]


def resident(threads: int, sums: float, shared_bytes: int, chip: Chip) -> int:
    """How many programs fit on a multiprocessor, each thread with so many float32 sums."""
    if sums + OWN_REGISTERS > 255:
        return 0
    return int(min(chip.shared_bytes // shared_bytes, REGISTERS // (threads * (sums + OWN_REGISTERS))))


def gemm_fits(
    tile: Any, chip: Chip, m: int, n: int, k: int, dtype: torch.dtype, precision: str, epilogue: str, here: Chip
) -> bool:
    from aligngpt_kernels.gemm import splits

    threads, area = 32 * tile.num_warps, tile.block_m * tile.block_n
    # Asynchronous products need one buffer more, but not those of small tiles.
    shared = (tile.num_stages - 1) * (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
    tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
    return (
        tile.split_k in splits(tile, k, chip)
        and (tile.split_k == 1 or tiles < 4 * chip.multiprocessors)  # beyond, it only adds sums to write
        and tiles * tile.split_k >= chip.multiprocessors / 4
        and min(m, 256) <= 4 * tile.block_m  # smaller ones read b too often
        and tile.block_m <= max(16, 2 * m)
        and tile.num_stages * tile.block_k >= 128
        and area / threads >= 8
        and (tile.subtiles == 4) == (area > 32 * 64)
        and tile.resident <= resident(threads, area / threads, shared, chip) <= 2 * tile.resident
    )


def weight_grad_fits(tile: Any, chip: Chip, dtype: torch.dtype, precision: str) -> bool:
    threads = 32 * tile.num_warps
    shared = tile.num_stages * (tile.block_n + tile.block_k) * tile.block_m * dtype.itemsize
    return resident(threads, tile.block_n * tile.block_k / threads, shared, chip) >= 1


def decode_fits(tile: Any, chip: Chip, heads_per_kv: int, head_dim: int, element_bytes: int, here: Chip) -> bool:
    threads, programs = 32 * tile.num_warps, tile.programs_per_multiprocessor
    shared = (tile.num_stages - 1) * 2 * tile.block_n * tile.block_d * element_bytes
    block = tile.block_n * tile.block_d / threads  # numbers of keys, and as many of values, that a thread holds
    return (
        (not tile.dot or tile.block_n >= 16)
        and 8 <= block <= 64
        and threads * programs >= 256
        and programs <= resident(threads, tile.block_h * tile.block_d / threads + block, shared, chip)
    )


def row_fits(tile: Any, chip: Chip, vocabulary: int) -> bool:
    return 8 <= tile.block_v / (32 * tile.num_warps) <= 64


def tables() -> dict[str, Table]:
    gemm, decode, loss = (import_module(f"aligngpt_kernels.{name}") for name in ("gemm", "decode", "cross_entropy"))
    products = {
        "block_m": [16, 32, 64, 128, 256],
        "block_n": [64, 128, 256],
        "block_k": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
        "subtiles": [1, 4],
        "resident": [1, 2, 3],
        "split_k": [1, 2, 4, 8],
    }
    grads = {
        "block_n": [64, 128, 256],
        "block_k": [64, 128, 256],
        "block_m": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    }
    keys = {
        "block_n": [16, 32, 64, 128],
        "num_stages": [2, 3, 4],
        "num_warps": [2, 4, 8],
        "programs_per_multiprocessor": [1, 2, 3, 4, 6, 8],
    }
    rows = {"block_v": [1024, 2048, 4096, 8192, 16384], "num_warps": [2, 4, 8, 16]}
    return {
        "projector": Table(gemm, "gemm_tile", products, product_cases, gemm_fits),
        "weight_grad": Table(gemm, "weight_grad_tile", grads, weight_grad_cases, weight_grad_fits),
        "decode": Table(decode, "decode_tile", keys, decode_cases, decode_fits),
        "splits": Table(decode, "table_splits", {"": [1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 43, 64]}, decode_cases),
        "loss": Table(loss, "row_tile", rows, loss_cases, row_fits),
        "loss_chunk": Table(loss, "chunk_rows", {"": [256, 512, 1024, 1280, 2560]}, loss_cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=list(tables()))
    parser.add_argument("--seconds", type=float, default=450, help="for all shapes together")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    arguments = parser.parse_args()
    need_gpu.main("benchmarks.tune")
    table = tables()[arguments.op]
    cases = [case for case in table.cases() if arguments.only in case.name]
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {table.function}", flush=True)
    deadline = time.monotonic() + arguments.seconds
    for number, case in enumerate(cases):
        share = (deadline - time.monotonic()) / (len(cases) - number)
        found = tune(table, case, device, share)
        tried = f"{found.tried} of {found.candidates} candidates tried"
        if not found.timed:
            print(f"{case.name}: no time; {tried}", flush=True)
            continue
        (row_us, row), (best_us, best) = found.timed
        print(f"{case.name}: {written(best)}  {best_us:.1f} µs, the table's {written(row)} {row_us:.1f} µs", flush=True)
        print(f"  {tried}", flush=True)


if __name__ == "__main__":
    main()
