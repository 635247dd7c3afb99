"""Compacter: a bottleneck adapter whose maps are sums of Kronecker products.

    D = Σᵢ Aᵢ ⊗ sᵢtᵢᵀ,   U likewise      i = 1 … n

Karimi Mahabadi et al., 2021 (arXiv 2106.04647): the n small matrices Aᵢ of D, and those of U, are
shared by all layers; a layer has thin factors sᵢ and tᵢ of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.errors import PlanError, SpecError
from peftfx.methods.bottleneck import Bottleneck
from peftfx.methods.method import Param, Tensors, option
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """A bottleneck of parametrised hypercomplex multiplications.

    A map ``[N, K]`` has ``rule`` ``[n, n, n]``, ``left`` ``[n, N/n, rank]`` and ``right``
    ``[n, rank, K/n]``.
    """

    name: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "arXiv 2106.04647"

    n: int = option("How many Kronecker products are summed, and the width of their rules.", 4)
    rank: int = option("Rank of the second factors.", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("n", self.n), ("rank", self.rank)):
            if not 1 <= value <= 4096:
                raise SpecError(f"{name} is {value}", remedy="between 1 and 4096")
        if self.density < 1:
            raise SpecError("a product of factors has no entries to leave out", remedy="density: 1")

    def check(self, site: Site) -> None:
        super().check(site)
        for width in self.widths(site):
            if width % self.n:
                raise PlanError(
                    f"{self.n} does not divide a width of {width}", remedy="choose n and size so"
                )

    def maps(self, site: Site) -> dict[str, Param]:
        read, size, width = self.widths(site)
        n, r, found = self.n, self.rank, {}
        for name, (rows, columns) in (("down", (size, read)), ("up", (width, size))):
            # the variance of Glorot's noise, spread over the three factors and their sum
            deviation = (2 / (rows + columns) / (n * r)) ** (1 / 6)
            last = name == "up" and self.init == "zeros"
            found[f"{name}_rule"] = Param((n, n, n), _normal(deviation), shared="rule")
            found[f"{name}_left"] = Param(
                (n, rows // n, r), torch.nn.init.zeros_ if last else _normal(deviation)
            )
            found[f"{name}_right"] = Param((n, r, columns // n), _normal(deviation))
        return found

    def weights(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return _sum(p, "down"), _sum(p, "up")


def _sum(p: Tensors, name: str) -> Tensor:
    """The map ``[n·c, n·d]``, rows by rule and factor."""
    rule, left, right = (p[f"{name}_{part}"] for part in ("rule", "left", "right"))
    products = torch.einsum("iab,icr,ird->acbd", rule, left, right)
    return products.flatten(2).flatten(0, 1)


def _normal(deviation: float) -> Callable[[Tensor], object]:
    return functools.partial(torch.nn.init.normal_, std=deviation)
