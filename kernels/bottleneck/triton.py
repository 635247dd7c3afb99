"""A bottleneck in one launch each way: a program has BLOCK_M rows and all of the inner width.

Rows of h and y stream through once, D and U come from the L2 cache. Nothing that is as wide as y is
written but the result.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from peftfx.kernels.low_rank_linear.triton import dot


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def activation(x, ACT: tl.constexpr):
    """f(x), fp32; the names are those of ``op.ACTIVATIONS``."""
    if ACT == "relu":
        out = tl.maximum(x, 0.0)
    elif ACT == "gelu":
        out = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "silu":
        out = x * tl.sigmoid(x)
    elif ACT == "tanh":
        out = _tanh(x)
    elif ACT == "sigmoid":
        out = tl.sigmoid(x)
    elif ACT == "leaky_relu":
        out = tl.where(x > 0, x, 0.01 * x)
    elif ACT == "elu":
        out = tl.where(x > 0, x, tl.exp(tl.minimum(x, 0.0)) - 1)
    elif ACT == "mish":
        out = x * _tanh(_softplus(x))
    elif ACT == "softplus":
        out = _softplus(x)
    else:
        tl.static_assert(ACT == "identity")
        out = x
    return out


@triton.jit
def slope(x, ACT: tl.constexpr):
    """f'(x)."""
    if ACT == "relu":
        out = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "gelu":
        bell = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        out = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * bell
    elif ACT == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1 + 0.134145 * x * x)
        out = share + x * share * (1 - share) * inner
    elif ACT == "silu":
        share = tl.sigmoid(x)
        out = share * (1 + x * (1 - share))
    elif ACT == "tanh":
        high = _tanh(x)
        out = 1 - high * high
    elif ACT == "sigmoid":
        share = tl.sigmoid(x)
        out = share * (1 - share)
    elif ACT == "leaky_relu":
        out = tl.where(x > 0, 1.0, 0.01)
    elif ACT == "elu":
        out = tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif ACT == "mish":
        high = _tanh(_softplus(x))
        out = high + x * (1 - high * high) * tl.sigmoid(x)
    elif ACT == "softplus":
        out = tl.sigmoid(x)
    else:
        tl.static_assert(ACT == "identity")
        out = tl.full(x.shape, 1.0, tl.float32)
    return out


@triton.jit
def _inner(
    h, down, down_bias, row, c, K, C, h_row,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D·h + d, [BM, BC], fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        hs = tl.load(h + row[:, None] * h_row + k[None, :], mask=k[None, :] < K, other=0.0)
        d = tl.load(down + c[None, :] * K + k[:, None], mask=(k[:, None] < K) & (c[None, :] < C),
                    other=0.0)  # fmt: skip
        acc = dot(hs, d, acc, PRECISION)
    return acc + tl.load(down_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def bottleneck_fwd_kernel(
    y, h, down, down_bias, up, up_bias, scale, out, M, N, K, C, y_row, h_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] = y + s·(U·f(D·h + d) + u); C ≤ BLOCK_C."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    row = (m % M).to(tl.int64)
    pre = _inner(
        h, down, down_bias, row, c, K, C, h_row, BLOCK_M, BLOCK_K, BLOCK_C, PRECISION
    )  # fmt: skip
    inner = activation(pre, ACT).to(y.dtype.element_ty)  # columns from C on meet zeros of U
    s = tl.load(scale).to(tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        u = tl.load(up + n[None, :] * C + c[:, None], mask=(n[None, :] < N) & (c[:, None] < C),
                    other=0.0)  # fmt: skip
        acc = dot(inner, u, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        acc += tl.load(up_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        held = (m[:, None] < M) & (n[None, :] < N)
        ys = tl.load(y + row[:, None] * y_row + n[None, :], mask=held, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * N + n[None, :], (ys + s * acc).to(out.dtype.element_ty), held)


@triton.jit
def bottleneck_bwd_kernel(
    dy, h, down, down_bias, up, scale, dh, dpre, inner, sums, products, M, N, K, C, dy_row, h_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACT: tl.constexpr, SERIAL: tl.constexpr, NEEDS_H: tl.constexpr, NEEDS_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [M, K] (with dy where SERIAL), and what gradients of parameters are made of.

    dpre [M, C], the gradient of D·h + d; inner [M, C], s·f(…); of each program sums [P, N], those
    of its rows of dy, and products [P], Σ f(…)·(Uᵀ·dy).
    """
    part = tl.program_id(0)
    m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    row, live = (m % M).to(tl.int64), m < M
    dtype = dy.dtype.element_ty
    pre = _inner(
        h, down, down_bias, row, c, K, C, h_row, BLOCK_M, BLOCK_K, BLOCK_C, PRECISION
    )  # fmt: skip
    low = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)  # dy·U
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        g = tl.load(dy + row[:, None] * dy_row + n[None, :],
                    mask=live[:, None] & (n[None, :] < N), other=0.0)  # fmt: skip
        u = tl.load(up + n[:, None] * C + c[None, :], mask=(n[:, None] < N) & (c[None, :] < C),
                    other=0.0)  # fmt: skip
        low = dot(g, u, low, PRECISION)
        if NEEDS_P:
            total = tl.sum(g.to(tl.float32), 0)
            tl.store(sums + part.to(tl.int64) * N + n, total, mask=n < N)
    s = tl.load(scale).to(tl.float32)
    thin = (low * s * slope(pre, ACT)).to(dtype)
    if NEEDS_P:
        made = activation(pre, ACT)
        tl.store(products + part, tl.sum(tl.sum(made * low, 1), 0))
        kept = live[:, None] & (c[None, :] < C)
        place = row[:, None] * C + c[None, :]
        tl.store(dpre + place, thin, mask=kept)
        tl.store(inner + place, (made * s).to(dtype), mask=kept)
    if NEEDS_H:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (c[:, None] < C) & (k[None, :] < K)
            d = tl.load(down + c[:, None] * K + k[None, :], mask=inside, other=0.0)
            acc = dot(thin, d, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
            held = live[:, None] & (k[None, :] < K)
            if SERIAL:
                g = tl.load(dy + row[:, None] * dy_row + k[None, :], mask=held, other=0.0)
                acc += g.to(tl.float32)
            tl.store(dh + row[:, None] * K + k[None, :], acc.to(dh.dtype.element_ty), mask=held)
