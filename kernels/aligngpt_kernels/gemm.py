"""Matrix products whose epilogues do the work around them: what the kernels of several ops share.

    weight_grad(grad, x)       gradᵀ x and Σ grad, the gradients of a linear layer's weight and bias
    gemm(a, b, epilogue)       a bᵀ + bias, its GELU, the gradient before a GELU, or rows written to their places

Operands are two-dimensional and of one dtype, float16, bfloat16 or float32. Products add up in float32; of float32
operands they are exact unless `torch.set_float32_matmul_precision` allows tf32. No atomics touch a sum: the same
arguments give the same bits.

On chips with tensor descriptors (sm_90 and later) operands move through them, which costs no address registers and
fills ragged edges with zeros; a descriptor needs rows that start at multiples of 16 bytes, other operands and other
chips take pointers and masks.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import Chip, chip, launch_options, tl, triton

GROUP = 8  # tiles of one operand that neighbouring programs walk through, so that L2 holds both operands' tiles


@triton.jit
def tile_of(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, in an order of GROUP rows at a time."""
    in_group = GROUP * tiles_n
    first = i_tile // in_group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + i_tile % in_group % rows, i_tile % in_group // rows


@triton.jit
def load_tile(
    source, i_row, i_column, num_rows, num_columns, stride, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of a matrix, zeros outside it; `source` is a descriptor or a pointer, `stride` that of the rows."""
    if TMA:
        b_tile = source.load([i_row, i_column])
    else:
        o_r = i_row + tl.arange(0, ROWS)
        o_c = i_column + tl.arange(0, COLUMNS)
        mask = (o_r < num_rows)[:, None] & (o_c < num_columns)[None, :]
        b_tile = tl.load(source + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=mask, other=0)
    return b_tile


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a `tl.dot`; PyTorch's own switches, old or new, opt float32 in to tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows_first(matrix: Tensor) -> Tensor:
    """`matrix`, copied unless its columns are adjacent and its rows do not overlap."""
    adjacent = matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if adjacent and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def takes_descriptors(chip: Chip, *matrices: Tensor) -> bool:
    """Whether tensor descriptors can address all of `matrices`."""
    return chip.has_tma and all(
        m.numel() > 0 and (m.data_ptr() | m.stride(0) * m.element_size()) % 16 == 0 and m.stride(1) == 1
        for m in matrices
    )


def operand(matrix: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """What a kernel gets for `matrix`: a descriptor of blocks, or the tensor itself."""
    if not tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


@triton.jit
def add_product(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a b_b."""
    if b_a.dtype == tl.float32 and PRECISION == "ieee":
        # A thread adds these products one after another. A sum of its own for each step along K, then added to those
        # before, rounds K / 16 + 16 times instead of K; with the last argument the compiler leaves it so.
        b_sum += tl.dot(b_a, b_b, input_precision=PRECISION, max_num_imprecise_acc=b_a.shape[1])
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    return b_sum


class WeightGradTile(NamedTuple):
    """One program's share of gradᵀ x, and how many rows of both it reads at once."""

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int


def weight_grad_tile(dtype: torch.dtype, precision: str) -> WeightGradTile:
    """Tiles by what the compiler reports: on sm_90, 90 registers and 96 KB, so two programs share a multiprocessor.

    One waits for its first tiles or writes its last while the other multiplies. AlignGPT-7B's W2 is then 3.9 waves of
    programs on 132 multiprocessors and W1 is 0.97 of one.
    """
    if dtype == torch.float32 and precision == "ieee":
        return WeightGradTile(64, 64, 16, num_warps=4, num_stages=3)
    if dtype == torch.float32:
        return WeightGradTile(128, 128, 32, num_warps=8, num_stages=3)
    return WeightGradTile(128, 128, 64, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_grad_kernel(
    grad,  # (M, N)
    x,  # (M, K)
    p_grad,  # grad once more, always as a pointer
    p_out,  # (N, K)
    p_bias,  # (N,)
    num_rows,
    num_n,
    num_k,
    stride_grad,
    stride_x,
    stride_out,
    WITH_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # The first programs add up the bias gradient, a strip of columns each, beside the others' products. Adding up the
    # products' own tiles would read grad once less, but the compiler reuses a tile's buffer too early (Triton 3.9,
    # sm_90) when the tile goes both into registers and into an asynchronous dot.
    STRIP: tl.constexpr = BLOCK_N // 2
    num_strips = tl.cdiv(num_n, STRIP) if WITH_BIAS else 0
    i_tile = tl.program_id(0) - num_strips
    if i_tile < 0:
        o_strip = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
        # (2 * BLOCK_M, STRIP)
        b_sums = tl.zeros((2 * BLOCK_M, STRIP), tl.float32)
        for i_row in range(0, num_rows, 2 * BLOCK_M):
            o_m = i_row + tl.arange(0, 2 * BLOCK_M)
            m_strip = (o_m < num_rows)[:, None] & (o_strip < num_n)[None, :]
            b_sums += tl.load(p_grad + o_m.to(tl.int64)[:, None] * stride_grad + o_strip[None, :], m_strip, other=0)
        tl.store(p_bias + o_strip, tl.sum(b_sums, 0).to(p_bias.dtype.element_ty), mask=o_strip < num_n)
    else:
        i_n, i_k = tile_of(i_tile, tl.cdiv(num_n, BLOCK_N), tl.cdiv(num_k, BLOCK_K), GROUP)
        b_out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for i_m in range(0, num_rows, BLOCK_M):
            # (BLOCK_M, BLOCK_N)
            b_grad = load_tile(grad, i_m, i_n * BLOCK_N, num_rows, num_n, stride_grad, TMA, BLOCK_M, BLOCK_N)
            # (BLOCK_M, BLOCK_K)
            b_x = load_tile(x, i_m, i_k * BLOCK_K, num_rows, num_k, stride_x, TMA, BLOCK_M, BLOCK_K)
            b_out = add_product(tl.trans(b_grad), b_x, b_out, PRECISION)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_out = (o_n < num_n)[:, None] & (o_k < num_k)[None, :]
        p_tile = p_out + o_n.to(tl.int64)[:, None] * stride_out + o_k[None, :]
        if ACCUMULATE:
            b_out += tl.load(p_tile, mask=m_out, other=0)
        tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_out)


def weight_grad(
    grad: Tensor,  # (M, N)
    x: Tensor,  # (M, K)
    *,
    with_bias: bool,
    into: Tensor | None = None,  # (N, K) float32: the product is added to it, and it is returned
) -> tuple[Tensor, Tensor]:  # (N, K), (N,) or empty
    """gradᵀ x and the sum of grad's rows, in grad's dtype (float32 with `into`); zeros where there are no rows.

    Launches one kernel. Reads grad K / block_k times and x N / block_n times, mostly from L2.
    """
    (num_rows, num_n), num_k = grad.shape, x.shape[1]
    out = grad.new_empty(num_n, num_k) if into is None else into
    bias = out.new_empty(num_n if with_bias else 0)
    if num_rows == 0:
        return out if into is not None else out.zero_(), bias.zero_()
    if num_n == 0 or num_k == 0:
        return out, grad.sum(0).to(bias.dtype) if with_bias else bias
    grad, x, precision = rows_first(grad), rows_first(x), dot_precision(grad.dtype)
    tile = weight_grad_tile(grad.dtype, precision)
    tma = takes_descriptors(chip(grad.device), grad, x)
    num_strips = triton.cdiv(num_n, tile.block_n // 2) if with_bias else 0
    num_tiles = triton.cdiv(num_n, tile.block_n) * triton.cdiv(num_k, tile.block_k)
    _weight_grad_kernel[(num_strips + num_tiles,)](
        operand(grad, (tile.block_m, tile.block_n), tma),
        operand(x, (tile.block_m, tile.block_k), tma),
        grad,
        out,
        bias,
        num_rows,
        num_n,
        num_k,
        grad.stride(0),
        x.stride(0),
        out.stride(0),
        WITH_BIAS=with_bias,
        ACCUMULATE=into is not None,
        TMA=tma,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=GROUP,
        **launch_options(tile.num_warps, tile.num_stages),
    )
    return out, bias


class GemmTile(NamedTuple):
    """One program's share of a product, and how programs share multiprocessors."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    subtiles: int  # parts of a tile that the epilogue takes one after another, 1 or 4
    resident: int  # programs that fit on a multiprocessor at once
    split_k: int = 1  # programs that share a tile, each a part of K

    def most_registers(self, chip: Chip) -> int | None:
        """What a thread may use, None for the compiler's own choice.

        On sm_90 what lets `resident` programs in; the compiler would take a few more. On the others 255, but for the
        large shared tile: left alone, the compiler spills two registers of the smaller ones to reach a rounder number.
        """
        if chip.capability // 10 == 9:
            return min(255, 65536 // (32 * self.num_warps * self.resident) // 8 * 8)
        return 255 if self.num_warps == 4 or self.resident == 1 else None


_IEEE = [GemmTile(64, 32, 16, 4, 3, 1, 4), GemmTile(16, 64, 16, 4, 2, 1, 4)]
_TF32 = [GemmTile(128, 128, 32, 8, 3, 4, 1), GemmTile(64, 128, 32, 4, 3, 4, 2), GemmTile(64, 64, 32, 4, 3, 4, 3)]
_SMALL = [GemmTile(64, 64, 64, 4, 4, 4, 3), GemmTile(32, 64, 128, 4, 3, 1, 4), GemmTile(16, 64, 128, 4, 3, 1, 3)]
_SM90 = [GemmTile(128, 128, 64, 8, 3, 4, 2), GemmTile(64, 128, 64, 4, 4, 4, 2), *_SMALL]
_SM80 = [GemmTile(128, 128, 32, 8, 4, 4, 1), GemmTile(64, 128, 32, 4, 4, 4, 2)]
_SM80 += [GemmTile(64, 64, 64, 4, 3, 4, 3), GemmTile(32, 64, 64, 4, 4, 1, 4), GemmTile(16, 64, 64, 4, 4, 1, 4)]


def gemm_tiles(dtype: torch.dtype, precision: str, chip: Chip) -> list[GemmTile]:
    """The tiles there are, none of which spills a register."""
    if dtype == torch.float32:
        return _IEEE if precision == "ieee" else _TF32
    return _SM90 if chip.has_tma else _SM80


def splits(tile: GemmTile, k: int, chip: Chip) -> list[int]:
    """How many programs may share a tile, each with four steps along K or more.

    On sm_100 only of the small tiles: the compiler spills while a large one's parts are added up.
    """
    if chip.capability >= 100 and tile.block_m * tile.block_n > 64 * 64:
        return [1]
    return [split for split in (1, 2, 4, 8, 16) if split == 1 or k >= split * 4 * tile.block_k]


@functools.lru_cache(maxsize=1024)
def gemm_tile(m: int, n: int, k: int, dtype: torch.dtype, precision: str, epilogue: str, chip: Chip) -> GemmTile:
    """The tile, and the split of K, that an estimate of the clock cycles likes best.

    The estimate counts rounds of programs over the multiprocessors, so a tile that leaves most of the last round empty
    loses to a smaller one. Its rates are a chip's published ones, not measurements.
    """
    per_clock = {80: 1024, 90: 2048}.get(chip.capability // 10 * 10, 4096)  # multiplications of a multiprocessor
    if dtype == torch.float32:
        per_clock = 128 if precision == "ieee" else per_clock // 2
    for_element = 0.2 if "gelu" in epilogue else 0.05  # cycles of the epilogue: some 25 operations by 128 lanes
    element_bytes, latency = dtype.itemsize, 1500
    l2_bytes = 64 if chip.has_tma else 40  # a clock and multiprocessor

    def cycles(tile: GemmTile) -> float:
        area = tile.block_m * tile.block_n
        programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) * tile.split_k
        rounds = triton.cdiv(programs, chip.multiprocessors)
        k_share = triton.cdiv(k, tile.split_k)
        multiply = area * k_share / (per_clock if tile.block_m >= 64 else per_clock / 2)
        read = (tile.block_m + tile.block_n) * k_share * element_bytes / l2_bytes
        exposed = triton.cdiv(rounds, tile.resident) * (area * for_element + latency)
        parts = rounds * area * 4 * 2 / l2_bytes + latency if tile.split_k > 1 else 0
        return rounds * max(multiply, read) + exposed + parts

    return min(
        (
            tile._replace(split_k=split)
            for tile in gemm_tiles(dtype, precision, chip)
            for split in splits(tile, k, chip)
        ),
        key=cycles,
    )


@triton.jit
def gelu_cdf(x):
    """Φ(x) of the exact GELU, x Φ(x)."""
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def _epilogue(
    b_acc,  # (ROWS, COLUMNS)
    i_m,  # its first row and column
    i_n,
    pointers,
    sizes,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What happens to a finished part of a tile, by the table of `gemm`."""
    p_bias, p_out, p_pre, p_act, p_sums, p_place, p_owner, p_mean = pointers
    num_rows, num_n, num_places, rows_per_owner = sizes
    o_m = i_m + tl.arange(0, ROWS)
    o_n = i_n + tl.arange(0, COLUMNS)
    m_n = o_n < num_n
    mask = (o_m < num_rows)[:, None] & m_n[None, :]
    at = o_m.to(tl.int64)[:, None] * num_n + o_n[None, :]
    dtype: tl.constexpr = p_out.dtype.element_ty
    if EPILOGUE != "dgelu":
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu, keep" or EPILOGUE == "gelu":
        if EPILOGUE == "gelu, keep":
            tl.store(p_pre + at, b_acc.to(dtype), mask=mask)
        b_acc = b_acc * gelu_cdf(b_acc)
    if EPILOGUE == "dgelu":
        # (ROWS, COLUMNS)
        b_pre = tl.load(p_pre + at, mask=mask, other=0).to(tl.float32)
        b_cdf = gelu_cdf(b_pre)
        tl.store(p_act + at, (b_pre * b_cdf).to(dtype), mask=mask)
        b_acc *= b_cdf + b_pre * tl.exp(-0.5 * b_pre * b_pre) * 0.3989422804014327
        tl.store(p_sums + (i_m // ROWS).to(tl.int64) * num_n + o_n, tl.sum(b_acc, 0), mask=m_n)
    if EPILOGUE == "place":
        # (ROWS,)
        m_place = o_m < num_places
        b_place = tl.load(p_place + o_m, mask=m_place, other=-1).to(tl.int64)
        b_owner = tl.load(p_owner + o_m // rows_per_owner, mask=m_place, other=-1).to(tl.int64)
        b_row = b_acc.to(dtype)
        tl.store(p_out + b_place[:, None] * num_n + o_n[None, :], b_row, mask=(b_place >= 0)[:, None] & m_n[None, :])
        # (ROWS, COLUMNS); most rows of a tile have one owner, whose mean then comes out of L1
        p_means = p_mean + b_owner[:, None] * num_n + o_n[None, :]
        b_mean = tl.load(p_means, mask=(b_owner >= 0)[:, None] & m_n[None, :], other=0).to(tl.float32)
        p_dots = p_sums + o_m.to(tl.int64) * tl.cdiv(num_n, COLUMNS) + i_n // COLUMNS
        tl.store(p_dots, tl.sum(b_row.to(tl.float32) * b_mean, 1), mask=o_m < tl.where(i_n < num_n, num_rows, 0))
    else:
        tl.store(p_out + at, b_acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _gemm_kernel(
    a,  # (M, K)
    b,  # (N, K), or (K, N) with B_IS_KN
    p_bias,  # (N,)
    p_out,  # (M, N); with "place" (T, N)
    p_pre,  # (M, N)
    p_act,  # (M, N)
    p_sums,  # (row tiles, N) or (M, column parts), float32
    p_place,  # (num_places,)
    p_owner,  # (num_places / rows_per_owner,)
    p_mean,  # (owners, N)
    p_parts,  # (tiles, SPLIT_K, BLOCK_M, BLOCK_N) float32
    p_arrived,  # (tiles,) int32, zeros
    num_rows,
    num_n,
    num_k,
    stride_a,
    stride_b,
    num_places,
    rows_per_owner,
    EPILOGUE: tl.constexpr,
    B_IS_KN: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    k_share = tl.cdiv(tl.cdiv(num_k, BLOCK_K), SPLIT_K) * BLOCK_K
    for i_unit in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0), flatten=FLATTEN):
        i_tile = i_unit // SPLIT_K
        i_tile_m, i_tile_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        i_m, i_n = i_tile_m * BLOCK_M, i_tile_n * BLOCK_N
        first_k = i_unit % SPLIT_K * k_share
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(first_k, tl.minimum(first_k + k_share, num_k), BLOCK_K):
            # (BLOCK_M, BLOCK_K)
            b_a = load_tile(a, i_m, i_k, num_rows, num_k, stride_a, TMA, BLOCK_M, BLOCK_K)
            if B_IS_KN:
                # (BLOCK_K, BLOCK_N)
                b_b = load_tile(b, i_k, i_n, num_k, num_n, stride_b, TMA, BLOCK_K, BLOCK_N)
            else:
                # (BLOCK_N, BLOCK_K)
                b_b = tl.trans(load_tile(b, i_n, i_k, num_n, num_k, stride_b, TMA, BLOCK_N, BLOCK_K))
            b_acc = add_product(b_a, b_b, b_acc, PRECISION)
        pointers = (p_bias, p_out, p_pre, p_act, p_sums, p_place, p_owner, p_mean)
        sizes = (num_rows, num_n, num_places, rows_per_owner)
        COLUMNS: tl.constexpr = BLOCK_N // SUBTILES
        if SPLIT_K > 1:
            o_row = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
            p_tile = p_parts + i_tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
            p_part = p_tile + i_unit % SPLIT_K * (BLOCK_M * BLOCK_N)
            tl.store(p_part + o_row + tl.arange(0, BLOCK_N)[None, :], b_acc)
            tl.debug_barrier()  # all threads have written before one says so
            arrived = tl.atomic_add(p_arrived + i_tile, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == SPLIT_K - 1:
                # The last to arrive adds all parts up, in the order of K whoever it is.
                for i_c in range(0, BLOCK_N, COLUMNS):
                    p_columns = p_tile + o_row + i_c + tl.arange(0, COLUMNS)[None, :]
                    # (BLOCK_M, COLUMNS)
                    b_sum = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
                    for i_part in range(SPLIT_K):
                        b_sum += tl.load(p_columns + i_part * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
                    _epilogue(b_sum, i_m, i_n + i_c, pointers, sizes, EPILOGUE, BLOCK_M, COLUMNS)
        elif SUBTILES == 1:
            _epilogue(b_acc, i_m, i_n, pointers, sizes, EPILOGUE, BLOCK_M, BLOCK_N)
        else:
            # A quarter of the columns at a time: the epilogue's registers and its way through shared memory shrink.
            b_halves = tl.split(tl.permute(tl.reshape(b_acc, (BLOCK_M, 2, 2 * COLUMNS)), (0, 2, 1)))
            for i_half in tl.static_range(2):
                b_quarters = tl.split(tl.permute(tl.reshape(b_halves[i_half], (BLOCK_M, 2, COLUMNS)), (0, 2, 1)))
                for i_quarter in tl.static_range(2):
                    i_c = i_n + (2 * i_half + i_quarter) * COLUMNS
                    _epilogue(b_quarters[i_quarter], i_m, i_c, pointers, sizes, EPILOGUE, BLOCK_M, COLUMNS)


def gemm(
    a: Tensor,  # (M, K)
    b: Tensor,  # (N, K), nn.Linear layout; with "dgelu" (K, N)
    epilogue: str,
    *,
    bias: Tensor | None = None,  # (N,)
    pre: Tensor | None = None,  # (M, N) contiguous
    out: Tensor | None = None,  # (T, N) contiguous
    place: Tensor | None = None,  # (places,) int32
    owner: Tensor | None = None,  # (images,) int
    rows_per_owner: int = 1,
    mean: Tensor | None = None,  # (owners, N)
) -> list[Tensor]:
    """A product and what its epilogue makes of it, in one kernel. With u = a bᵀ + bias:

    | epilogue     | gives                                                                                        |
    |--------------|----------------------------------------------------------------------------------------------|
    | "bias"       | u                                                                                            |
    | "gelu"       | gelu(u)                                                                                      |
    | "gelu, keep" | gelu(u), u                                                                                   |
    | "dgelu"      | dpre = (a b) * gelu'(pre), gelu(pre), and dpre's column sums by parts of the rows, float32   |
    | "place"      | ⟨u[r], mean[owner[r // rows_per_owner]]⟩ (M, parts of the columns), float32; writes row r of |
    |              | u to out[place[r]]; a row whose owner is -1 has dot 0, one whose place is -1 is not written  |

    Sums over parts are the caller's to add up, in whatever fixed order.
    """
    num_rows, num_k = a.shape
    b_is_kn = epilogue == "dgelu"
    num_n = b.shape[1 if b_is_kn else 0]
    precision, here = dot_precision(a.dtype), chip(a.device)
    step = 16 if num_rows <= 1152 else 128  # a choice for every M would be made anew in every ragged batch
    rounded = triton.cdiv(num_rows, step) * step
    tile = gemm_tile(rounded, num_n, num_k, a.dtype, precision, epilogue, here)
    tiles_m, tiles_n = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_n, tile.block_n)
    columns = tile.block_n // tile.subtiles
    results = []
    if epilogue != "place":
        results += [a.new_empty(num_rows, num_n) for _ in range(1 + (epilogue in ("gelu, keep", "dgelu")))]
    if epilogue == "dgelu":
        results.append(a.new_empty(tiles_m, num_n, dtype=torch.float32))
    if epilogue == "place":
        results.append(a.new_empty(num_rows, triton.cdiv(num_n, columns), dtype=torch.float32))
    if num_rows == 0 or num_n == 0:
        return results
    a, b = rows_first(a), rows_first(b)
    tma = takes_descriptors(here, a, b)
    programs = tiles_m * tiles_n * tile.split_k
    parts = arrived = unused = results[0]
    if tile.split_k > 1:
        parts = a.new_empty(programs * tile.block_m * tile.block_n, dtype=torch.float32)
        arrived = a.new_zeros(tiles_m * tiles_n, dtype=torch.int32)
    # Persistent where the next tile's copies can run under this tile's epilogue.
    persistent = tma and tile.split_k == 1 and not (a.dtype == torch.float32 and precision == "ieee")
    grid = min(programs, here.multiprocessors * tile.resident) if persistent else programs
    _gemm_kernel[(grid,)](
        operand(a, (tile.block_m, tile.block_k), tma),
        operand(b, (tile.block_k, tile.block_n) if b_is_kn else (tile.block_n, tile.block_k), tma),
        unused if bias is None else bias.contiguous(),
        results[0] if out is None else out,
        results[1] if epilogue == "gelu, keep" else unused if pre is None else pre,
        results[1] if epilogue == "dgelu" else unused,
        results[-1],
        unused if place is None else place.contiguous(),
        unused if owner is None else owner.contiguous(),
        unused if mean is None else mean.contiguous(),
        parts,
        arrived,
        num_rows,
        num_n,
        num_k,
        a.stride(0),
        b.stride(0),
        0 if place is None else min(place.shape[0], num_rows),
        rows_per_owner,
        EPILOGUE=epilogue,
        B_IS_KN=b_is_kn,
        TMA=tma,
        FLATTEN=persistent,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        SUBTILES=tile.subtiles,
        GROUP=GROUP,
        maxnreg=tile.most_registers(here),
        **launch_options(tile.num_warps, tile.num_stages),
    )
    return results
