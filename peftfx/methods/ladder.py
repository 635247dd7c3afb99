"""Ladder side-tuning: a small network beside the base, fed by its layers' outputs.

    s₁ = b₁(D₁·h₁),   sᵢ = bᵢ(μᵢ·Dᵢ·hᵢ + (1 - μᵢ)·sᵢ₋₁),   μᵢ = σ(αᵢ / T)
    bᵢ(z) = z + Uᵢ·f(Vᵢ·norm(z) + vᵢ) + uᵢ                   h' = h_L + R·norm(s_L) + r

Sung et al., 2022 (arXiv 2206.06522): hᵢ is what layer i gives, and the last of them is moved by the
side state. No gradient enters the base: it is differentiated from the head down to h_L and no
further, and keeps nothing for a backward. The paper's side blocks are transformers, cut out of the
base; these are feed-forward, so that they need no mask and no cache. The model starts as the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.kernels.bottleneck.op import ACTIVATIONS
from peftfx.methods.additive import kaiming
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.site import OUTPUT, Site

TEMPERATURE = 0.1  # the paper's, so that gates move at the others' learning rate


@dataclass(frozen=True, kw_only=True)
class Ladder(Method):
    """A side network of width w beside L layers of width D; the last site has all its tensors.

    ``down`` ``[L, w, D]``, ``alpha`` ``[L - 1]``, of the blocks ``norm`` ``[L, w]``, ``inner``
    ``[L, m, w]``, ``outer`` ``[L, w, m]``, at the end ``up`` ``[D, w]``; each with its bias.
    """

    name: ClassVar[str] = "ladder"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT,)
    gathers: ClassVar[bool] = True
    baked: ClassVar[tuple[str, ...]] = ("activation",)
    paper: ClassVar[str] = "arXiv 2206.06522"
    example: ClassVar[Mapping[str, Any]] = {"role": "block"}

    reduction: float = option("The width of the base over that of the side network.", 8.0)
    expansion: float = option("The inner width of its blocks over its own.", 2.0)
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"] = option(
        "The nonlinearity f.", "relu"
    )

    def __post_init__(self) -> None:
        for name in ("reduction", "expansion"):
            if not 0 < (value := getattr(self, name)) <= 2**20:
                raise SpecError(f"{name} is {value}", remedy="a ratio such as 8")

    def over(self, sites: Sequence[Site]) -> Method:
        widths = {site.out_features for site in sites}
        if len(widths) > 1:
            raise PlanError(
                f"a ladder beside layers of widths {sorted(widths)}",
                site=sites[0].name,
                remedy="choose layers of one width",
            )
        return self

    def params(self, site: Site) -> dict[str, Param]:
        number, of = site.rung or (0, 1)
        if number + 1 < of:
            return {}
        zeros, ones, width = torch.nn.init.zeros_, torch.nn.init.ones_, site.out_features
        side = max(round(width / self.reduction), 1)
        inner = max(round(side * self.expansion), 1)
        found = {
            "down": Param((of, side, width), _each),
            "down_bias": Param((of, side), zeros),
            "norm": Param((of, side), ones),
            "norm_bias": Param((of, side), zeros),
            "inner": Param((of, inner, side), _each),
            "inner_bias": Param((of, inner), zeros),
            "outer": Param((of, side, inner), _each),
            "outer_bias": Param((of, side), zeros),
            "last_norm": Param((side,), ones),
            "last_norm_bias": Param((side,), zeros),
            "up": Param((width, side), zeros),
            "up_bias": Param((width,), zeros),
        }
        return {**found, "alpha": Param((of - 1,), zeros)} if of > 1 else found

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        p = {name: t.to(y.dtype) for name, t in p.items()}
        outputs = [*call.given.values(), y.detach()]  # of layers 1 … L, [..., D]
        side = self.block(F.linear(outputs[0], p["down"][0], p["down_bias"][0]), p, 0)
        for i, h in enumerate(outputs[1:], 1):
            gate = torch.sigmoid(p["alpha"][i - 1] / TEMPERATURE)
            new = F.linear(h, p["down"][i], p["down_bias"][i])
            side = self.block(gate * new + (1 - gate) * side, p, i)
        return y + F.linear(
            _normed(side, p["last_norm"], p["last_norm_bias"]), p["up"], p["up_bias"]
        )

    def block(self, z: Tensor, p: Tensors, i: int) -> Tensor:
        """bᵢ₊₁ of z ``[..., w]``."""
        inner = F.linear(
            _normed(z, p["norm"][i], p["norm_bias"][i]), p["inner"][i], p["inner_bias"][i]
        )
        return z + F.linear(ACTIVATIONS[self.activation](inner), p["outer"][i], p["outer_bias"][i])

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        raise MergeError(
            "a side network is no change of a weight",
            site=site.name,
            remedy="keep the adapter unmerged",
        )


def _normed(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(z, weight.shape, weight, bias)


def _each(t: Tensor) -> None:
    """Noise for each matrix of a stack by itself."""
    for matrix in t:
        kaiming(matrix)
