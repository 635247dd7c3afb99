"""ReFT: hidden states are moved within a subspace of few dimensions, at chosen positions.

    h' = h + Rᵀ(W·h + b - R·h),     R [rank, D] with orthonormal rows

LoReFT, Wu et al., 2024 (arXiv 2404.03592), where also: without orthogonality (NoReFT), and without
``- R·h`` (DiReFT). Positions are the first and last tokens of a prompt, counted without padding;
tokens that a generation adds are left alone, unless all positions are meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.methods.additive import LINEAR
from peftfx.methods.method import RANKS, Call, Method, Param, Tensors, option
from peftfx.site import OUTPUT, Site


@dataclass(frozen=True, kw_only=True)
class ReFT(Method):
    """Trains R ``[rank, D]``, W ``[rank, D]`` and b ``[rank]``. It starts as the identity.

    R's rows are those of an orthonormal basis that is taken of the tensor ``basis`` (QR).
    """

    name: ClassVar[str] = "reft"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT, *LINEAR)
    baked: ClassVar[tuple[str, ...]] = ("orthogonal", "subtract", "first", "last", "dropout")
    paper: ClassVar[str] = "arXiv 2404.03592"
    example: ClassVar[Mapping[str, Any]] = {"role": "block", "rank": 4}

    rank: int = option("Dimensions of the subspace.", 4)
    first: int = option("Acts at so many first tokens; with last 0 too: at all.", 0)
    last: int = option("Acts at so many last tokens.", 0)
    orthogonal: bool = option("Whether R's rows are orthonormal.", True)
    subtract: bool = option("Whether what h is in the subspace is replaced, not added to.", True)
    dropout: float = option("Probability with which a value of W·h is dropped, in training.", 0.0)

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("first", 0), ("last", 0)):
            if not least <= (value := getattr(self, name)) <= 2**20:
                raise SpecError(f"{name} is {value}", remedy=f"between {least} and {2**20}")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout}", remedy="a dropout is in [0, 1)")

    def check(self, site: Site) -> None:
        if self.rank > site.out_features:
            raise PlanError(
                f"rank {self.rank} of {site.out_features} dimensions", remedy="use a lower rank"
            )

    def params(self, site: Site) -> dict[str, Param]:
        shape = (self.rank, site.out_features)
        return {
            "basis": Param(shape, torch.nn.init.orthogonal_),
            "source": Param(shape, torch.nn.init.zeros_),
            "bias": Param((self.rank,), torch.nn.init.zeros_),
        }

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        if self.subtract:
            p["source"].copy_(self._rows(p))

    def positional(self) -> bool:
        return self.first + self.last > 0

    def draws(self, training: bool) -> bool:
        return training and self.dropout > 0

    def _rows(self, p: Tensors) -> Tensor:
        """R."""
        if not self.orthogonal:
            return p["basis"]
        q, upper = torch.linalg.qr(p["basis"].t().float())
        return (q * upper.diagonal().sign()).t()  # the basis itself where it is orthonormal

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        rows = self._rows(p).to(y.dtype)
        made = F.linear(y, p["source"].to(y.dtype), p["bias"].to(y.dtype))
        if call.seed is not None:
            made = torch.ops.peftfx.dropout(made, call.seed, self.dropout, call.site)
        moved = (made - F.linear(y, rows) if self.subtract else made) @ rows
        if not self.positional():
            return y + moved
        ahead, behind = p[RANKS][0], p[RANKS][1]  # [B, S], -1 at padding
        chosen = (ahead >= 0) & ((ahead < self.first) | (behind < self.last))
        return torch.where(chosen.unsqueeze(-1), y + moved, y)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        raise MergeError(
            "ReFT acts on hidden states, which no weight gives",
            site=site.name,
            remedy="keep the adapter unmerged",
        )
