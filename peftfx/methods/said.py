"""Intrinsic dimension: one short vector for all sites, projected at random to their weights.

    W' = W + λ·reshape(P·θ)

Aghajanyan et al., 2020 (arXiv 2012.13255): θ of ``dimension`` numbers is shared by the rule's
sites, λ is a trained scale at each (SAID; without ``scales`` it stays 1, which is DID). P is a
Fastfood transform from a seed and the site's name: it is never stored, ΔW is formed anew each time.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import peftfx.kernels.fastfood.op  # noqa: F401 - defines the op used below
from peftfx.errors import MergeError, SpecError
from peftfx.methods.additive import Additive, wide
from peftfx.methods.method import Method, Param, Tensors, option
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Said(Additive):
    """Structure-aware intrinsic dimension: all sites move along one short vector."""

    name: ClassVar[str] = "said"
    paper: ClassVar[str] = "arXiv 2012.13255"

    dimension: int = option("Numbers in the shared vector.", 1000)
    scales: bool = option("A trained scale at each site.", True)
    seed: int = option("Seed of the projections.", 0)

    def __post_init__(self) -> None:
        if not 1 <= self.dimension <= 2**24:
            raise SpecError(f"dimension is {self.dimension}", remedy="between 1 and 16777216")

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "scale": Param((1,), torch.nn.init.ones_, trains=self.scales),
            "theta": Param((self.dimension,), torch.nn.init.zeros_, shared="rule"),
        }

    def buffers(self, site: Site) -> dict[str, Tensor]:
        mixed = zlib.crc32(f"{self.seed}:{site.name}".encode())
        return {"seed": torch.tensor(mixed, dtype=torch.int64)}

    def delta(self, p: Tensors, site: Site) -> Tensor:
        theta = p["theta"].to(wide(p["theta"]))
        size = torch.Size(site.shape).numel()
        v: Any = torch.ops.peftfx.fastfood(theta, p["seed"], size)
        return v.reshape(site.shape) * p["scale"]  # type: ignore[no-any-return]

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        if len({(m.dimension, m.seed) for _, m, _ in parts if isinstance(m, Said)}) > 1:
            raise MergeError("their projections differ", site=site.name)
        theta = torch.stack([w * p["scale"] * p["theta"] for w, _, p in parts]).sum(0)
        first = parts[0][2]
        return self, {
            "scale": torch.ones_like(first["scale"]), "theta": theta, "seed": first["seed"],
        }  # fmt: skip
