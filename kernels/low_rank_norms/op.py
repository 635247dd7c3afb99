"""``peftfx::low_rank_norms``: lengths of the rows of a weight plus a low-rank update.

    ‖w + s·b·A‖ = √(‖w‖² + s·b·(2·A·w + s·(A·Aᵀ)·b))      for each row w of W, b of B

The norm of DoRA (Liu et al., 2024, arXiv 2402.09353), without W + s·B·A. ``W [N, K]``, strided as
it likes, ``A [R, K]``, ``B [N, R]``, ``scale [1]``; the result ``[N]`` is fp32 at least. It has no
gradient: DoRA takes norms for constants (section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.definition import define

_library = torch.library.Library("peftfx", "FRAGMENT")
SCHEMA = "(Tensor weight, Tensor A, Tensor B, Tensor scale) -> Tensor"
_library.define("low_rank_norms" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def low_rank_norms(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """The lengths; W·Aᵀ is a product in the dtype of W."""
    dtype = _wide(A)
    across = (weight @ A.t().to(weight.dtype)).to(dtype)  # [N, R]
    a, b = A.to(dtype), B.to(dtype) * scale.to(dtype)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    return (square + (b * (2 * across + b @ (a @ a.t()))).sum(1)).clamp_min(0).sqrt()


def work(op: str, args: Sequence[Any], processors: int) -> dict[str, list[tuple[int, int]]]:
    """Operations and bytes of each launch, by form."""
    weight, A = args[:2]
    (n, k), r = weight.shape, A.shape[0]
    whole, low = n * k * weight.element_size(), (r * k + n * r) * A.element_size()
    small = (2 * r * r * k, r * k * A.element_size())  # A·Aᵀ
    return {
        "definition": [small, (2 * n * k * r, whole + low), (0, whole), (2 * n * r * r, low)],
        "triton": [small, (2 * n * k * r, whole + low)],
    }


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _fake(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return A.new_empty(weight.shape[0], dtype=_wide(A))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * 4


DEFINITIONS = {"low_rank_norms": low_rank_norms}
define(_library, "low_rank_norms", low_rank_norms)
torch.library.register_fake("peftfx::low_rank_norms", _fake, lib=_library)
torch.library.register_autograd(
    "peftfx::low_rank_norms", _backward, setup_context=_setup, lib=_library
)
