"""Norms of the rows of W + s·B·A, of one pass over W."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from peftfx.kernels.low_rank_linear.triton import dot


@triton.jit
def low_rank_norms_kernel(
    w, a, b, gram, scale, out, N, K, R, w_n, w_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [N] = ‖w + scale·b·A‖ for BLOCK_N rows; gram [R, R] = A·Aᵀ in fp32, R ≤ BLOCK_R.

    EXACT: the precision of fp32 products, which the small one is.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)  # wrapped: loads need no mask
    dtype = w.dtype.element_ty
    left = w + row[:, None] * w_n + k[None, :] * w_k
    right = a + (r % R)[None, :] * K + k[:, None]
    across = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            ws, at = tl.load(left), tl.load(right)
        else:
            inside = k < K - start
            ws = tl.load(left, mask=inside[None, :], other=0.0)
            at = tl.load(right, mask=inside[:, None], other=0.0)
        across = dot(ws, at.to(dtype), across, PRECISION)
        wide = ws.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        left += BLOCK_K * w_k
        right += BLOCK_K
    inside = r < R
    up = tl.load(b + row[:, None] * R + r[None, :], mask=inside[None, :], other=0.0)
    up = up.to(tl.float32) * tl.load(scale).to(tl.float32)  # [BN, BR]
    g = tl.load(
        gram + r[:, None] * R + r[None, :], mask=inside[:, None] & inside[None, :], other=0.0
    )
    both = dot(up, g, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), EXACT)
    total = square + tl.sum(up * (2 * across + both), 1)
    tl.store(out + n, tl.sqrt(tl.maximum(total, 0.0)), mask=n < N)
