"""``peftfx::sum_of_products``: ``Σ leftᵢ·rightᵢ + bias``, added up in place by the library.

Out of place, ``torch.addmm(y, x, w)`` copies y before the library adds to it, and a functional
graph has no other. Here the first product makes the result and the others are accumulated into it:
a write of [M, N] for each, and a read for every one after the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("peftfx", "FRAGMENT")
_library.define(
    "sum_of_products(Tensor[] left, Tensor[] right, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sum_of_products(left: list[Tensor], right: list[Tensor], bias: Tensor | None) -> Tensor:
    """``Σ leftᵢ [M, Kᵢ]·rightᵢ [Kᵢ, N] + bias [N]``. The cheapest product is best given first."""
    first = left[0] @ right[0] if bias is None else torch.addmm(bias, left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        first.addmm_(a, b)
    return first


def _fake(left: list[Tensor], right: list[Tensor], bias: Tensor | None) -> Tensor:
    return left[0].new_empty((left[0].shape[0], right[0].shape[1]))


_library.impl("sum_of_products", sum_of_products, "CompositeExplicitAutograd")
torch.library.register_fake("peftfx::sum_of_products", _fake, lib=_library)
