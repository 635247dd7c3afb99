"""What the methods have in common that put virtual tokens in front of the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.errors import MergeError, SpecError
from peftfx.methods.method import Acts, Call, Method, option
from peftfx.site import Site

LONGEST = 2**16


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """``length`` virtual tokens, whose embeddings :meth:`rows` gives.

    The model's ``forward`` makes room for them (see :mod:`peftfx.sequence`): masks are lengthened,
    labels left out of the loss, positions count from the first of them, and what the model gives
    for each position it gives for them too.
    """

    acts: ClassVar[Acts] = "tokens"
    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    baked: ClassVar[tuple[str, ...]] = ("length",)

    length: int = option("Number of virtual tokens.", 20)

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST:
            raise SpecError(
                f"length is {self.length}", remedy=f"a length is between 1 and {LONGEST}"
            )

    def accepts(self, site: Site) -> str | None:
        if site.around.get("encoder", "") is None:
            return f"{self.name} goes in front of an encoder's ids, and here the decoder takes them"
        return super().accepts(site)

    def rows(self, p: Mapping[str, Tensor], call: Call) -> Tensor:
        """The embeddings of the virtual tokens, ``[P, D]``."""
        raise NotImplementedError

    def apply(self, y: Tensor | None, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor:
        assert y is not None  # [B, P + S, D]
        rows = self.rows(p, call).to(y.dtype).unsqueeze(0)
        return torch.cat([rows.expand_as(y[:, : self.length]), y[:, self.length :]], dim=1)

    def merge(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> Tensor:
        raise MergeError(
            "virtual tokens are no change of a weight: they stay a part of the sequence",
            site=site.name,
            remedy="keep the adapter unmerged",
        )
