"""Dropout's mask inside a kernel: the sequence of ``op.py``, for one tile of a matrix."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, stream, rows, columns, width, p):
    """Which elements of the tile *rows* × *columns* of a matrix [·, width] stay: bool.

    *stream* is what a site adds to the seed: ``stream(0, site)`` of ``op.py``.
    """
    key = (tl.load(seed) + stream) & 0x7FFFFFFF
    index = rows.to(tl.int64)[:, None] * width + columns[None, :]  # row-major, any size
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(key, low, high, low * 0, low * 0)
    return tl.uint_to_uniform_float(word) >= p


@triton.jit
def drop(x, seed, stream, rows, columns, width, p, rest):
    """The tile x of that matrix after dropout, in its own dtype; *rest* is ``1 / (1 - p)``."""
    stays = kept(seed, stream, rows, columns, width, p)
    return tl.where(stays, x.to(tl.float32) * rest, 0.0).to(x.dtype)
