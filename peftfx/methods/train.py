"""Selective training: the parameters that a rule names are trained in full."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.errors import SpecError
from peftfx.methods.method import Acts, Method, Param, Tensors, option
from peftfx.methods.peft import Known, PeftForm
from peftfx.site import Site

VALUE = "value"
BASE = "base"  # what the parameter was before, given to mix


class TrainForm(PeftForm):
    """``modules_to_save``: modules with all their parameters, beside any other type."""

    def rules_beside(
        self,
        method: str,
        value: Any,
        rule: Mapping[str, Any],
        content: Mapping[str, Any],
        known: Known | None,
    ) -> list[dict[str, Any]]:
        if known is None:
            return [{"method": method, "name": [f"*{n}" for n in sorted(value)]}]  # endings, too
        found = [n for n in known.modules if n.endswith(tuple(value))]
        return [{"method": method, "name": found}] if found else []


@dataclass(frozen=True, kw_only=True)
class Train(Method):
    """Trains what the selectors name.

    The adapter's parameter takes the place of the base's, of which it starts as a copy and whose
    dtype it keeps; the base's own stays aside, untouched. Merging is the identity: the trained
    value is what the model computes with.
    """

    name: ClassVar[str] = "train"
    acts: ClassVar[Acts] = "parameter"
    peft: ClassVar[PeftForm | None] = TrainForm(
        "",
        keys={VALUE: "{module}.{parameter}"},
        kinds=(),
        whole=True,
        beside="modules_to_save",
    )

    example: ClassVar[Mapping[str, Any]] = {"name": "lm_head"}

    l2_sp: float = option("Weight of the penalty ½‖w - w₀‖² on moves from the base.", 0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.l2_sp < math.inf:
            raise SpecError(f"l2_sp is {self.l2_sp}", remedy="a weight of at least 0")

    def accepts(self, site: Site) -> str | None:
        if not site.dtype.is_floating_point:
            return f"a parameter of dtype {site.dtype} cannot be trained"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        return {VALUE: Param(site.shape, lambda t: t)}  # bind copies the base's value

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        return p[VALUE].detach().to(w.dtype)

    def penalty(self, sites: Sequence[tuple[Site, Tensors]]) -> Tensor | None:
        """L2-SP, Li et al., 2018 (arXiv 1802.01483): half the squared distance from the start."""
        if not self.l2_sp:
            return None
        moves = [(p[VALUE] - p[BASE].detach()).square().sum() for _, p in sites]
        return self.l2_sp / 2 * torch.stack([m.to(moves[0].device) for m in moves]).sum()

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """``base + Σ wᵢ (vᵢ - base)``."""
        base = parts[0][2][BASE].detach()
        moves = [w * (p[VALUE].detach() - base) for w, _, p in parts]
        return self, {VALUE: base + torch.stack(moves).sum(0)}
