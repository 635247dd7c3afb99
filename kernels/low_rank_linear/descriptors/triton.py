"""The wide products with tensor descriptors: tiles are moved by the copy engine of sm_90 and later.

The same accumulator as in :mod:`..triton`. W and x need rows that are contiguous and start at
multiples of 16 bytes. Programs walk over tiles, so that a grid of any size covers the result.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftfx.kernels.low_rank_linear.triton import (
    _add_thin,
    _low_rank_term,
    _place,
    dot,
)
from peftfx.kernels.philox.triton import drop


def descriptor(t: Tensor, block: list[int]) -> Any:
    """A descriptor of the matrix *t*, read in tiles of *block*."""
    return TensorDescriptor.from_tensor(t, block)


@triton.jit
def _add_down(acc, left, right, m, k, depth, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BM, BN] + left [M, depth] · right [depth, K], tiles at row m and column k."""
    for start in range(0, depth, BLOCK):
        acc = dot(left.load([m, start]), right.load([start, k]), acc, PRECISION)
    return acc


@triton.jit
def low_rank_linear_fwd_descriptor_kernel(
    x, s, w, b, bias, scale, y, M, K, N, R, s_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K]·Wᵀ + bias + scale·S·Bᵀ, of one site: a descriptor cannot be picked."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = _low_rank_term(
            s, b, bias, scale, R, (m % M).to(tl.int64), (n % N).to(tl.int64), s_row,
            BLOCK_M, BLOCK_N, BLOCK_R, HAS_BIAS, PRECISION,
        )  # fmt: skip
        for start in range(0, K, BLOCK_K):
            left, right = x.load([first_m, start]), w.load([first_n, start])
            acc = dot(left, right.T, acc, PRECISION)
        out = y + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def low_rank_linear_dx_descriptor_kernel(
    dy0, dy1, dy2, ds, w0, w1, w2, a, seed, dx, M, K, N0, N1, N2, R, ds_row, stream, p, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, COUNT: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = Σ dY·W + mask ⊙ (dS·A) / (1 - p); blocks as in the kernel with pointers."""
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = _place(tile, tiles_m, tiles_k, GROUP_M)
        first_m, first_k = tile_m * BLOCK_M, tile_k * BLOCK_N
        m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_N)
        row, column = (m % M).to(tl.int64), (k % K).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        left = ds + row[:, None] * ds_row
        acc = _add_thin(acc, left, a + column[None, :], K, R, 1.0, BLOCK_R, True, PRECISION)
        if DROPS:
            acc = drop(acc, seed, stream, m, k, K, p, rest)
        acc = _add_down(acc, dy0, w0, first_m, first_k, N0, BLOCK_K, PRECISION)
        if COUNT > 1:
            acc = _add_down(acc, dy1, w1, first_m, first_k, N1, BLOCK_K, PRECISION)
        if COUNT > 2:
            acc = _add_down(acc, dy2, w2, first_m, first_k, N2, BLOCK_K, PRECISION)
        out = dx + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out, acc.to(dx.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))
