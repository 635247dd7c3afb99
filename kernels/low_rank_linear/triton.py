"""The wide products: ``x·Wᵀ + b + s·S·Bᵀ`` and ``Σ dY·W + mask ⊙ (dS·A)``.

One accumulator per tile: it starts from the low-rank term and the wide product is added to it, so
that no [M, N] intermediate exists. Up to three sites that share x (``COUNT``) are one launch.
Operands have a unit last stride, W alone may be strided both ways. ``*0 *1 *2`` belong to the three
sites; those beyond COUNT repeat the first and are never read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from peftfx.kernels.philox.triton import drop


@triton.jit
def pick(site, a, b, c, COUNT: tl.constexpr):
    """a, b or c for site 0, 1 or 2."""
    chosen = a
    if COUNT > 1:
        chosen = tl.where(site == 1, b, chosen)
    if COUNT > 2:
        chosen = tl.where(site == 2, c, chosen)
    return chosen


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b. PRECISION: ``ieee``, ``tf32``, or ``fp32``: operands are widened first.

    Products of 16-bit numbers are exact in fp32, so that ``fp32`` gives the same; Triton's
    interpreter needs it, for it has no bf16 products.
    """
    if PRECISION == "fp32":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M rows of tiles are walked together, for the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _site_of(tile_n, N0, N1, N2, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """The site that a column of tiles belongs to, and the column's number within it."""
    site = tl.full((), 0, tl.int32)
    if COUNT > 1:
        end = tl.cdiv(N0, BLOCK_N)
        site += (tile_n >= end).to(tl.int32)
        local = tl.where(tile_n >= end, tile_n - end, tile_n)
        if COUNT > 2:
            more = tl.cdiv(N1, BLOCK_N)
            site += (tile_n >= end + more).to(tl.int32)
            local = tl.where(tile_n >= end + more, tile_n - end - more, local)
        tile_n = local
    return site, tile_n


@triton.jit
def _add_wide(
    acc, left, right, left_step, right_step, depth,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + left [BM, depth] · right [depth, BN], given by pointers to first blocks."""
    along = tl.arange(0, BLOCK)
    for start in range(0, depth, BLOCK):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = along < depth - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        acc = dot(a, b.to(a.dtype), acc, PRECISION)
        left += left_step
        right += right_step
    return acc


@triton.jit
def _add_thin(
    acc, left, right, right_row, rank, scale,
    BLOCK_R: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + scale · left [BM, R] · right, which is B [N, R], or A [R, K] where BY_ROW.

    left: pointers [BM, 1] to rows; right: pointers to the N rows of B, or to the columns of A.
    """
    dtype = left.dtype.element_ty
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        s = tl.load(left + r[None, :], mask=r[None, :] < rank, other=0.0)  # [BM, BR]
        offset = r[:, None] * right_row if BY_ROW else r[:, None]
        b = tl.load(right + offset, mask=r[:, None] < rank, other=0.0)  # [BR, BN]
        s = (s.to(tl.float32) * scale).to(dtype)
        acc = dot(s, b.to(dtype), acc, PRECISION)
    return acc


@triton.jit
def _columns(N0, N1, N2, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """How many columns of tiles the sites have."""
    tiles = tl.cdiv(N0, BLOCK_N)
    if COUNT > 1:
        tiles += tl.cdiv(N1, BLOCK_N)
    if COUNT > 2:
        tiles += tl.cdiv(N2, BLOCK_N)
    return tiles


@triton.jit
def _low_rank_term(
    s, b, bias, scale, R, row, column, s_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale·S·Bᵀ + bias [BM, BN]: what a tile of the forward starts from."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factor = tl.load(scale).to(tl.float32)
    left, right = s + row[:, None] * s_row, b + column[None, :] * R
    acc = _add_thin(acc, left, right, 0, R, factor, BLOCK_R, False, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + column).to(tl.float32)[None, :]
    return acc


@triton.jit
def low_rank_linear_fwd_kernel(
    x, s, w0, w1, w2, b0, b1, b2, bias0, bias1, bias2, scale0, scale1, scale2, y0, y1, y2,
    M, K, N0, N1, N2, R0, R1, R2, x_row, s_row, w_n, w_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_W: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K]·Wᵀ + bias + scale·S·Bᵀ; without W, *x* is a y [M, N] that is added to."""
    tiles_n = _columns(N0, N1, N2, BLOCK_N, COUNT)
    tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    site, tile_n = _site_of(tile_n, N0, N1, N2, BLOCK_N, COUNT)
    N, R = pick(site, N0, N1, N2, COUNT), pick(site, R0, R1, R2, COUNT)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = (m % M).to(tl.int64), (n % N).to(tl.int64)  # wrapped: loads need no mask
    acc = _low_rank_term(
        s + pick(site, 0, R0, R0 + R1, COUNT), pick(site, b0, b1, b2, COUNT),
        pick(site, bias0, bias1, bias2, COUNT), pick(site, scale0, scale1, scale2, COUNT),
        R, row, column, s_row, BLOCK_M, BLOCK_N, BLOCK_R, HAS_BIAS, PRECISION,
    )  # fmt: skip
    if HAS_W:
        k = tl.arange(0, BLOCK_K)
        left = x + row[:, None] * x_row + k[None, :]
        right = pick(site, w0, w1, w2, COUNT) + column[None, :] * w_n + k[:, None] * w_k
        acc = _add_wide(acc, left, right, BLOCK_K, BLOCK_K * w_k, K, BLOCK_K, EVEN, PRECISION)
    else:
        acc += tl.load(x + row[:, None] * x_row + column[None, :]).to(tl.float32)
    y = pick(site, y0, y1, y2, COUNT) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y, acc.to(y0.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def low_rank_linear_dx_kernel(
    dy0, dy1, dy2, ds, w0, w1, w2, a, seed, dx,
    M, K, N0, N1, N2, R, dy_row0, dy_row1, dy_row2, ds_row, w_n, w_k, stream, p, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, COUNT: tl.constexpr, DROPS: tl.constexpr, HAS_W: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = Σ dY·W + mask ⊙ (dS·A) / (1 - p), dS [M, R] scaled already.

    BLOCK_N is the width of a tile of dx (along K), BLOCK_K the depth of a step (along N).
    """
    tile_m, tile_k = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = (m % M).to(tl.int64), (k % K).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left = ds + row[:, None] * ds_row
    acc = _add_thin(acc, left, a + column[None, :], K, R, 1.0, BLOCK_R, True, PRECISION)
    if DROPS:
        acc = drop(acc, seed, stream, m, k, K, p, rest)
    if HAS_W:
        n = tl.arange(0, BLOCK_K)
        wide = n.to(tl.int64)[:, None] * w_n + column[None, :] * w_k
        step = BLOCK_K * w_n
        left = dy0 + row[:, None] * dy_row0 + n[None, :]
        acc = _add_wide(acc, left, w0 + wide, BLOCK_K, step, N0, BLOCK_K, EVEN, PRECISION)
        if COUNT > 1:
            left = dy1 + row[:, None] * dy_row1 + n[None, :]
            acc = _add_wide(acc, left, w1 + wide, BLOCK_K, step, N1, BLOCK_K, EVEN, PRECISION)
        if COUNT > 2:
            left = dy2 + row[:, None] * dy_row2 + n[None, :]
            acc = _add_wide(acc, left, w2 + wide, BLOCK_K, step, N2, BLOCK_K, EVEN, PRECISION)
    out = dx + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit
def _part_of_s(
    x, a, row, r, part, K, R, x_row, depth,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x·Aᵀ [BM, BR] over the *part*-th *depth* of K, fp32."""
    start, k = part * depth, tl.arange(0, STEP)
    left = x + row[:, None] * x_row + start + k[None, :]
    right = a + (r % R)[None, :] * K + start + k[:, None]
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    depth = tl.minimum(depth, K - start)
    return _add_wide(low, left, right, STEP, STEP, depth, STEP, EVEN, PRECISION)


@triton.jit
def _await(count, enough, POLLS: tl.constexpr):
    """Whether *count* reached *enough*, after POLLS more looks at most."""
    seen = tl.atomic_add(count, 0, sem="acquire")
    looks = 0
    while (seen < enough) & (looks < POLLS):
        seen = tl.atomic_add(count, 0, sem="acquire")
        looks += 1
    return seen >= enough


@triton.jit
def low_rank_linear_decode_kernel(
    x, s, w0, w1, w2, a0, a1, a2, b0, b1, b2, bias0, bias1, bias2, scale0, scale1, scale2,
    y0, y1, y2, low_parts, count, M, K, N0, N1, N2, R0, R1, R2, x_row, s_row, w_n, w_k, parts,
    depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STEP: tl.constexpr, POLLS: tl.constexpr, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward in one launch, meant for few rows (R ≤ BLOCK_R).

    The first programs make S, a part of K each, into *low_parts* [parts, M, ΣR], and add one to
    *count*, which was 0. The others stream through W, once per BLOCK_M rows, and then want S: they
    wait, but not for ever. Who looked POLLS times in vain makes S itself, by the same additions, so
    that the bits are the same, and no order in which programs start can have them wait for each
    other. A site's first program stores S.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    makers = COUNT * parts * tiles_m
    program = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    total = R0
    if COUNT > 1:
        total += R1
    if COUNT > 2:
        total += R2
    if program < makers:
        site, part = program // tiles_m // parts, program // tiles_m % parts
        R = pick(site, R0, R1, R2, COUNT)
        m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        low = _part_of_s(
            x, pick(site, a0, a1, a2, COUNT), (m % M).to(tl.int64), r, part, K, R, x_row, depth,
            BLOCK_M, BLOCK_R, STEP, EVEN, PRECISION,
        )  # fmt: skip
        to = low_parts + pick(site, 0, R0, R0 + R1, COUNT)
        to += (part * M + m).to(tl.int64)[:, None] * total
        tl.store(to + r[None, :], low, mask=(m[:, None] < M) & (r[None, :] < R))
        tl.debug_barrier()
        tl.atomic_add(count, 1, sem="release")
    else:
        tile = program - makers
        site, tile_n = _site_of(tile // tiles_m, N0, N1, N2, BLOCK_N, COUNT)
        N, R = pick(site, N0, N1, N2, COUNT), pick(site, R0, R1, R2, COUNT)
        m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = (m % M).to(tl.int64), (n % N).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        left = x + row[:, None] * x_row + k[None, :]
        right = pick(site, w0, w1, w2, COUNT) + column[None, :] * w_n + k[:, None] * w_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _add_wide(acc, left, right, BLOCK_K, BLOCK_K * w_k, K, BLOCK_K, EVEN, PRECISION)
        up = pick(site, b0, b1, b2, COUNT) + column[None, :] * R + r[:, None]
        b = tl.load(up, mask=r[:, None] < R, other=0.0)  # [BR, BN]
        scale = tl.load(pick(site, scale0, scale1, scale2, COUNT)).to(tl.float32)
        if HAS_BIAS:
            acc += tl.load(pick(site, bias0, bias1, bias2, COUNT) + column).to(tl.float32)[None, :]

        first = pick(site, 0, R0, R0 + R1, COUNT)
        here = (m[:, None] < M) & (r[None, :] < R)
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if _await(count, makers, POLLS):
            at = low_parts + first + m.to(tl.int64)[:, None] * total + r[None, :]
            for _ in range(parts):
                low += tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
                at += M * total
        else:
            a = pick(site, a0, a1, a2, COUNT)
            for part in range(parts):
                low += _part_of_s(
                    x, a, row, r, part, K, R, x_row, depth, BLOCK_M, BLOCK_R, STEP, EVEN, PRECISION
                )
        dtype: tl.constexpr = x.dtype.element_ty
        at = s + first + m.to(tl.int64)[:, None] * s_row + r[None, :]
        width = tl.where(tile_n == 0, R, 0)
        tl.store(at, low.to(dtype), mask=(m[:, None] < M) & (r[None, :] < width))
        scaled = tl.where(r[None, :] < R, low.to(dtype).to(tl.float32) * scale, 0.0).to(dtype)
        acc = dot(scaled, b.to(dtype), acc, PRECISION)
        y = pick(site, y0, y1, y2, COUNT) + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y, acc.to(dtype), mask=(m[:, None] < M) & (n[None, :] < N))
