"""The thin products: S, dS, dA and dB, each from one pass over a wide tensor.

Sums that several programs share are written as partial sums, in fp32, and added up by a kernel of
their own in a fixed order: no atomics, the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from peftfx.kernels.low_rank_linear.triton import _site_of, dot, pick
from peftfx.kernels.philox.triton import drop


@triton.jit
def low_rank_linear_s_kernel(
    x, a, seed, out, M, K, R, x_row, depth, stream, p, rest,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DROPS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S [M, R] = drop(x)·Aᵀ, or parts of it: planes [P, M, R], of slices of K of *depth* each."""
    part = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = part * depth + tl.arange(0, BLOCK_K)
    end = tl.minimum(K, (part + 1) * depth)
    row = (m % M).to(tl.int64)
    dtype = x.dtype.element_ty
    left = x + row[:, None] * x_row + k[None, :]
    right = a + (r % R)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for _ in range(part * depth, end, BLOCK_K):
        if EVEN:
            xs, at = tl.load(left), tl.load(right)
        else:
            inside = k < end
            xs = tl.load(left, mask=inside[None, :], other=0.0)
            at = tl.load(right, mask=inside[:, None], other=0.0)
        if DROPS:
            xs = drop(xs, seed, stream, m, k, K, p, rest)
        acc = dot(xs, at.to(dtype), acc, PRECISION)
        left += BLOCK_K
        right += BLOCK_K
        k += BLOCK_K
    store = out + (part * M + m).to(tl.int64)[:, None] * R + r[None, :]
    tl.store(store, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def low_rank_linear_dsb_kernel(
    dy0, dy1, dy2, s, b0, b1, b2, scale0, scale1, scale2, ds, db,
    M, N0, N1, N2, R0, R1, R2, dy_row0, dy_row1, dy_row2, s_row, ds_plane, db_plane, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS = scale·dY·B and dB = scale·dYᵀ·S, of one pass over dY.

    A program has BLOCK_N columns of one dY and *depth* of its rows. It stores its part of dS in the
    plane of its column of tiles, ds [ΣT, M, ·], and its part of dB in the plane of its rows,
    db [P, Σ N·R]. Both are fp32.
    """
    tile, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    site, tile_n = _site_of(tile, N0, N1, N2, BLOCK_N, COUNT)
    N, R = pick(site, N0, N1, N2, COUNT), pick(site, R0, R1, R2, COUNT)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    column = n.to(tl.int64)
    dtype = dy0.dtype.element_ty
    scale = tl.load(pick(site, scale0, scale1, scale2, COUNT)).to(tl.float32)
    inside = (n[:, None] < N) & (r[None, :] < R)
    b = tl.load(pick(site, b0, b1, b2, COUNT) + column[:, None] * R + r[None, :], inside, other=0.0)
    b = b.to(dtype)  # [BN, BR]
    wide = pick(site, dy0, dy1, dy2, COUNT)
    wide_row = pick(site, dy_row0, dy_row1, dy_row2, COUNT)
    low = s + pick(site, 0, R0, R0 + R1, COUNT)
    up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(part * depth, tl.minimum(M, (part + 1) * depth), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)
        dy = tl.load(
            wide + row[:, None] * wide_row + column[None, :],
            mask=(m[:, None] < M) & (n[None, :] < N),
            other=0.0,
        )  # [BM, BN]
        thin = (m[:, None] < M) & (r[None, :] < R)
        sm = tl.load(low + row[:, None] * s_row + r[None, :], mask=thin, other=0.0)  # [BM, BR]
        part_s = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION) * scale
        to = ds + tile.to(tl.int64) * ds_plane + row[:, None] * R + r[None, :]
        tl.store(to, part_s, mask=thin)
        up = dot(tl.trans(dy), sm, up, PRECISION)
    before = pick(site, 0, N0 * R0, N0 * R0 + N1 * R1, COUNT)
    to = db + part.to(tl.int64) * db_plane + before + column[:, None] * R + r[None, :]
    tl.store(to, up * scale, mask=inside)


@triton.jit
def low_rank_linear_da_kernel(
    x, ds, seed, da, M, K, R, x_row, ds_row, depth, stream, p, rest,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dA [R, K] = dSᵀ·drop(x): planes da [P, R, K], fp32, of *depth* rows each."""
    part = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(part * depth, tl.minimum(M, (part + 1) * depth), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)
        inside = (m[:, None] < M) & (k[None, :] < K)
        xs = tl.load(x + row[:, None] * x_row + k[None, :], mask=inside, other=0.0)  # [BM, BK]
        if DROPS:
            xs = drop(xs, seed, stream, m, k, K, p, rest)
        thin = (m[None, :] < M) & (r[:, None] < R)
        low = tl.load(ds + row[None, :] * ds_row + r[:, None], mask=thin, other=0.0)  # [BR, BM]
        acc = dot(low, xs, acc, PRECISION)
    to = da + (part * R + r).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(to, acc, mask=(r[:, None] < R) & (k[None, :] < K))


@triton.jit
def low_rank_linear_sum_kernel(
    parts, out0, out1, out2, plane, first1, first2, E0, E1, E2, P0, P1, P2, C0, C1, C2,
    row0, row1, row2, from0, from1, from2, to0, to1, to2,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Adds up planes, for up to three results, in order.

    Result g has E elements in rows of C; they are in planes ``first … first + P - 1`` of *parts*,
    from element *from* of each, and go to rows that are *row* apart, from element *to* on.
    """
    site = tl.program_id(1)
    E, P = pick(site, E0, E1, E2, COUNT), pick(site, P0, P1, P2, COUNT)
    C, row = pick(site, C0, C1, C2, COUNT), pick(site, row0, row1, row2, COUNT)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = pick(site, 0, first1, first2, COUNT)
    source = parts + pick(site, from0, from1, from2, COUNT) + e
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(P):
        total += tl.load(source + (first + part).to(tl.int64) * plane, mask=e < E, other=0.0)
    to = pick(site, out0, out1, out2, COUNT) + pick(site, to0, to1, to2, COUNT)
    tl.store(to + (e // C).to(tl.int64) * row + e % C, total.to(out0.dtype.element_ty), mask=e < E)
