"""A Triton kernel that stores ``tl.rand``, run by the interpreter on machines without a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rand_kernel(out, seed, n: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, n)
    tl.store(out + index, tl.rand(seed, index))


def draw(seed: int, count: int) -> torch.Tensor:
    """*count* numbers of ``tl.rand(seed, 0…)``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.full((count,), float("nan"), device=device)
    _rand_kernel[(1,)](out, seed, count)
    return out.cpu()
