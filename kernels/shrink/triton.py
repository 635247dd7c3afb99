"""Norms and gates that make S = y·Aᵀ of the y that they write, while it is on the chip.

A program has BLOCK_M rows and all of K and R; what a norm reads twice comes from a cache the second
time. Operands have a unit last stride. R ≤ BLOCK_R.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from peftfx.kernels.low_rank_linear.triton import dot


@triton.jit
def _part(tensor, row, stride, k, K, EVEN: tl.constexpr):
    """A tile [BM, BK], fp32."""
    at = tensor + row[:, None] * stride + k[None, :]
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=k[None, :] < K, other=0.0)
    return found.to(tl.float32)


@triton.jit
def _shrink(
    y, a, k, r, K, R, low, dtype: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr
):
    """low [BM, BR] + y [BM, BK]·Aᵀ; beyond K, A is taken for 0."""
    at = a + (r % R)[None, :] * K + k[:, None]
    if EVEN:
        right = tl.load(at)
    else:
        right = tl.load(at, mask=k[:, None] < K, other=0.0)
    return dot(y, right.to(dtype), low, PRECISION)


@triton.jit
def _activated(g, ACT: tl.constexpr):
    """act(g), fp32."""
    if ACT == "silu":
        out = g * tl.sigmoid(g)
    elif ACT == "gelu":
        out = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh t) / 2 is the sigmoid of 2t
        out = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACT == "quick_gelu":
        out = g * tl.sigmoid(1.702 * g)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu_squared")
        out = tl.maximum(g, 0.0)
        if ACT == "relu_squared":
            out = out * out
    return out


@triton.jit
def norm_shrink_kernel(
    x, more, weight, shift, a, total, y, s, mean, rstd,
    M, K, R, x_row, more_row, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ADDS: tl.constexpr,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y, S, and the statistics of rows; with ADDS the sum that is normed too.

    Mean and deviation are gathered for each of BLOCK_K columns by itself (Welford, 1962), and then
    put together, so that a large mean takes no digits from the deviation.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, here = (m % M).to(tl.int64), m[:, None] < M
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    first = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + k
        h = _part(x, row, x_row, column, K, EVEN)
        if ADDS:
            sums = (h + _part(more, row, more_row, column, K, EVEN)).to(total.dtype.element_ty)
            at = total + m.to(tl.int64)[:, None] * K + column[None, :]
            tl.store(at, sums, mask=here & (column[None, :] < K))
            h = sums.to(tl.float32)
        if CENTRED:
            count = start // BLOCK_K + 1
            step = tl.where(column[None, :] < K, h - first, 0.0)
            first += step / count
            second += step * tl.where(column[None, :] < K, h - first, 0.0)
        else:
            second += h * h
    centre = tl.zeros((BLOCK_M, 1), tl.float32)
    if CENTRED:
        count = ((K - k + BLOCK_K - 1) // BLOCK_K).to(tl.float32)[None, :]  # seen in each column
        count = tl.maximum(count, 0.0)
        centre = tl.sum(first * count, axis=1)[:, None] / K
        second += count * (first - centre) * (first - centre)
        tl.store(mean + m[:, None], centre, mask=here)
    scale = tl.rsqrt(tl.sum(second, axis=1)[:, None] / K + eps)
    tl.store(rstd + m[:, None], scale, mask=here)

    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(0, K, BLOCK_K):
        column = start + k
        inside = column < K
        h = _part(x, row, x_row, column, K, EVEN)
        if ADDS:
            h += _part(more, row, more_row, column, K, EVEN)
            h = h.to(total.dtype.element_ty).to(tl.float32)
        h = (h - centre) * scale
        if HAS_WEIGHT:
            w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            h *= (w + offset)[None, :]
        if HAS_SHIFT:
            h += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = h.to(dtype)
        at = y + m.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(at, out, mask=here & inside[None, :])
        low = _shrink(out, a, column, r, K, R, low, dtype, EVEN, PRECISION)
    at = s + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, low.to(dtype), mask=here & (r[None, :] < R))


@triton.jit
def gate_shrink_kernel(
    gate, up, a, y, s, M, K, R, gate_row, up_row,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = act(gate)·up, or act(gate), and S."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, here = (m % M).to(tl.int64), m[:, None] < M
    r = tl.arange(0, BLOCK_R)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        out = _activated(_part(gate, row, gate_row, column, K, EVEN), ACT)
        if GATED:
            out *= _part(up, row, up_row, column, K, EVEN)
        out = out.to(dtype)
        at = y + m.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(at, out, mask=here & (column[None, :] < K))
        low = _shrink(out, a, column, r, K, R, low, dtype, EVEN, PRECISION)
    at = s + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, low.to(dtype), mask=here & (r[None, :] < R))
