"""AdapterFusion: attention over bottleneck adapters that were trained before.

    y' = Σᵢ softmaxᵢ((Q·y + q)ᵀ(K·zᵢ + k)) · V·zᵢ,     zᵢ = y + sᵢ(Uᵢ·f(Dᵢ·h + dᵢ) + uᵢ)

Pfeiffer et al., 2021 (arXiv 2005.00247). Q, K and V are trained, the adapters are not.
``peftfx.fuse`` makes it from adapters of a model; a spec alone has nothing to fuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.kernels.bottleneck.op import ACTIVATIONS
from peftfx.methods.additive import LINEAR
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.site import OUTPUT, Site


@dataclass(frozen=True, kw_only=True)
class Fusion(Method):
    """Attention over N adapters at a site of width H, as wide together as R.

    Of the adapters: ``down`` ``[R, K]``, ``up`` ``[H, R]`` (with their scales), ``down_bias``
    ``[R]``, ``up_bias`` ``[N, H]``. Trained: ``to_query``, ``to_key``, ``to_value`` ``[H, H]`` and
    the first two's biases.
    """

    name: ClassVar[str] = "fusion"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT, *LINEAR)
    baked: ClassVar[tuple[str, ...]] = ("sizes", "activation", "parallel")
    paper: ClassVar[str] = "arXiv 2005.00247"
    example: ClassVar[Mapping[str, Any]] = {"role": "residual.mlp", "sizes": [64, 64, 64]}

    sizes: tuple[int, ...] = option("Widths of the fused adapters.", ())
    activation: str = option("Their nonlinearity.", "relu")
    parallel: bool = option("Whether they read the input of what they are at.", False)

    def __post_init__(self) -> None:
        if len(self.sizes) > 1024 or not all(1 <= size <= 2**20 for size in self.sizes):
            raise SpecError(f"sizes is {self.sizes[:8]}", remedy="one positive width for each")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise SpecError(f"activation is {self.activation!r}", remedy=f"one of {known}")

    def check(self, site: Site) -> None:
        if len(self.sizes) < 2:
            raise PlanError("there is nothing to fuse", remedy="peftfx.fuse(model, ['a', 'b'])")

    def params(self, site: Site) -> dict[str, Param]:
        zeros, width, rank = torch.nn.init.zeros_, site.out_features, sum(self.sizes)
        read = site.in_features if self.parallel else width
        return {
            "down": Param((rank, read), zeros, trains=False),
            "down_bias": Param((rank,), zeros, trains=False),
            "up": Param((width, rank), zeros, trains=False),
            "up_bias": Param((len(self.sizes), width), zeros, trains=False),
            "to_query": Param((width, width), _small),
            "to_query_bias": Param((width,), zeros),
            "to_key": Param((width, width), _small),
            "to_key_bias": Param((width,), zeros),
            "to_value": Param((width, width), torch.nn.init.eye_),
        }

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        p = {name: t.to(y.dtype) for name, t in p.items()}
        h = x.to(y.dtype) if self.parallel else y
        inner = ACTIVATIONS[self.activation](F.linear(h, p["down"], p["down_bias"]))
        ends = list(itertools.accumulate(self.sizes))
        places = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        parts = [y + F.linear(inner[..., at], p["up"][:, at]) for at in places]
        given = torch.stack(parts, -2) + p["up_bias"]  # [..., N, H]
        query = F.linear(y, p["to_query"], p["to_query_bias"]).unsqueeze(-1)  # [..., H, 1]
        keys = F.linear(given, p["to_key"], p["to_key_bias"])
        share = torch.softmax((keys @ query).float(), -2).to(y.dtype)  # [..., N, 1]
        return F.linear((share * given).sum(-2), p["to_value"])

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        raise MergeError(
            "attention over adapters is no linear map: no weight is equal to it",
            site=site.name,
            remedy="keep the adapter unmerged",
        )


def _small(t: Tensor) -> None:
    torch.nn.init.normal_(t, std=0.02)
