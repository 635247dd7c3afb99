"""The gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftfx.kernels.low_rank_linear.tune import BOUND, TF32
from peftfx.kernels.timing import distance


class Mismatch(Exception):
    """A variant gives something else than the reference: it gets no time."""


def gate(
    variant: str, got: Sequence[Tensor], expected: Sequence[Tensor], bound: float | None = None
) -> float:
    """The largest distance of a result from the reference's, ‖got - ref‖ / ‖ref‖.

    Args:
        bound: what is allowed; else :func:`usual`.

    Raises:
        Mismatch: it is above the bound, or not a number.
    """
    bound, worst = usual(got) if bound is None else bound, 0.0
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        off = distance(one, other)
        if not off < bound:
            raise Mismatch(f"{variant}: result {number} is off by {off:.2g}, above {bound:g}")
        worst = max(worst, off)
    return worst


def usual(got: Sequence[Tensor]) -> float:
    """What the narrowest dtype among results of one product makes of them."""
    narrow = min((t.dtype for t in got), key=lambda dtype: torch.finfo(dtype).bits)
    cut = narrow == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TF32 if cut else BOUND[narrow]


def dropped(variant: str, y: Tensor, without: Tensor, update: Tensor, p: float) -> float:
    """Whether *y* is *without* its dropout but for noise of the right size.

    Each x is 0 or 1 / (1 - p) times itself, so that the update is off by √(p / (1 - p)) of its
    norm, about. Gives the ratio of the noise that is there to that.

    Raises:
        Mismatch: there is a fifth more or less of it.
    """
    with torch.no_grad():
        noise = float((y.double() - without.double()).norm() / update.double().norm())
    ratio = noise / (p / (1 - p)) ** 0.5
    if not 0.8 < ratio < 1.2:
        raise Mismatch(f"{variant}: {ratio:.2g} of the noise that dropout of {p} makes")
    return ratio
