"""Selective training: the parameters that a rule names are trained in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.methods.method import Acts, Method, Param
from peftfx.site import Site

VALUE = "value"
BASE = "base"  # what the parameter was before, given to mix


@dataclass(frozen=True, kw_only=True)
class Train(Method):
    """Trains what the selectors name.

    The adapter's parameter takes the place of the base's, of which it starts as a copy and whose
    dtype it keeps; the base's own stays aside, untouched. Merging is the identity: the trained
    value is what the model computes with.
    """

    name: ClassVar[str] = "train"
    acts: ClassVar[Acts] = "parameter"

    def accepts(self, site: Site) -> str | None:
        if not site.dtype.is_floating_point:
            return f"a parameter of dtype {site.dtype} cannot be trained"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        return {VALUE: Param(site.shape, lambda t: t)}  # bind copies the base's value

    def merge(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> Tensor:
        return p[VALUE].detach().to(w.dtype)

    def mix(
        self, parts: Sequence[tuple[float, Method, Mapping[str, Tensor]]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """``base + Σ wᵢ (vᵢ - base)``."""
        base = parts[0][2][BASE].detach()
        moves = [w * (p[VALUE].detach() - base) for w, _, p in parts]
        return self, {VALUE: base + torch.stack(moves).sum(0)}
