"""Bottleneck adapters: a narrow feed-forward with a residual, behind a sublayer or beside it.

    y' = y + s·g(h)·(U·f(D·h + d) + u)      h = y, or the sublayer's input where it is parallel

Behind attention and behind the feed-forward: Houlsby et al., 2019 (arXiv 1902.00751); behind the
feed-forward alone: Pfeiffer et al., 2021 (arXiv 2005.00247); beside it, scaled: He et al., 2022
(arXiv 2110.04366). Options:

- ``gate``: g is a gate, as in UniPELT (see :mod:`peftfx.methods.gates`); without it g is 1.
- ``drop``: adapters of the lowest layers are left out at random while training, so that they can
  be left out later (AdapterDrop, Rücklé et al., 2021, arXiv 2010.11918).
- ``density``: only a share of D's and U's entries exists (SparseAdapter, He et al., 2022, arXiv
  2210.04284).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.kernels.bottleneck.op import bottleneck
from peftfx.methods import gates
from peftfx.methods.additive import LINEAR, kaiming
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.site import OUTPUT, Site


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A bottleneck adapter. For widths N of y and K of h: D ``[size, K]``, U ``[N, size]``."""

    name: ClassVar[str] = "bottleneck"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT, *LINEAR)
    baked: ClassVar[tuple[str, ...]] = (
        "activation", "parallel", "gate", "norm", "drop", "dropout", "density",
    )  # fmt: skip
    paper: ClassVar[str] = "arXiv 1902.00751"
    example: ClassVar[Mapping[str, Any]] = {"role": ["residual.attention", "residual.mlp"]}

    size: int = option("Width of the bottleneck.", 64)
    reduction: float | None = option("Instead: the width of h over that of the bottleneck.", None)
    activation: Literal[
        "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "mish",
        "softplus", "identity",
    ] = option("The nonlinearity f.", "relu")  # fmt: skip
    parallel: bool = option("Reads the input of the sublayer (or linear), not its output.", False)
    scale: float = option("The factor s.", 1.0)
    learned_scale: bool = option("Whether s is trained.", False)
    gate: Literal["token", "sequence"] | None = option(
        "A trained gate of the update, by token or sequence.", None
    )
    norm: bool = option("A layer norm of h, trained.", False)
    dropout: float = option("Probability with which a value of h is dropped, in training.", 0.0)
    init: Literal["zeros", "small"] = option(
        "U starts with zeros, so that y' = y; or D and U with noise of 0.01, as Houlsby's.", "zeros"
    )
    density: float = option("Share of the entries of D and U that exists.", 1.0)
    mask: Literal["random", "magnitude"] = option("Which these are.", "random")
    seed: int = option("Seed of random masks.", 0)
    drop: int = option("Up to how many of the lowest layers a step leaves out, in training.", 0)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 2**20:
            raise SpecError(f"size is {self.size}", remedy="between 1 and 1048576")
        if self.reduction is not None and not 0 < self.reduction <= 2**20:
            raise SpecError(f"reduction is {self.reduction}", remedy="a ratio such as 16")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout}", remedy="a dropout is in [0, 1)")
        if not 0.0 < self.density <= 1.0:
            raise SpecError(f"density is {self.density}", remedy="a share is in (0, 1]")
        if self.mask == "magnitude" and self.density < 1 and self.init == "zeros":
            raise SpecError("U starts with zeros, of equal magnitude", remedy="init: small")
        if self.drop < 0:
            raise SpecError(f"drop is {self.drop}", remedy="a number of layers")

    def check(self, site: Site) -> None:
        if self.drop and site.layer is None:
            raise PlanError("drop goes by layers, and this site is in none", remedy="drop: 0")

    # -- its tensors -----------------------------------------------------------------------------

    def widths(self, site: Site) -> tuple[int, int, int]:
        """Of what is read, of the bottleneck, and of what is given."""
        read = site.in_features if self.parallel else site.out_features
        size = self.size if self.reduction is None else max(round(read / self.reduction), 1)
        return read, size, site.out_features

    def params(self, site: Site) -> dict[str, Param]:
        read, size, width = self.widths(site)
        zeros, ones = torch.nn.init.zeros_, torch.nn.init.ones_
        found = self.maps(site)
        found["down_bias"], found["up_bias"] = Param((size,), zeros), Param((width,), zeros)
        if self.learned_scale:
            found["scale"] = Param((1,), lambda t: torch.nn.init.constant_(t, self.scale))
        if self.gate:
            found |= gates.params(read)
        if self.norm:
            found["norm"], found["norm_bias"] = Param((read,), ones), Param((read,), zeros)
        if self.density < 1:
            for name in ("down", "up"):
                found[f"{name}_mask"] = Param(found[name].shape, ones, False, torch.bool)
        if self.drop:
            found["on"] = Param((1,), ones, False)
        return found

    def maps(self, site: Site) -> dict[str, Param]:
        """What D and U are made of."""
        read, size, width = self.widths(site)
        if self.init == "small":
            return {"down": Param((size, read), _small), "up": Param((width, size), _small)}
        return {
            "down": Param((size, read), kaiming),
            "up": Param((width, size), torch.nn.init.zeros_),
        }

    def buffers(self, site: Site) -> dict[str, Tensor]:
        return {} if self.learned_scale else {"scale": torch.tensor([self.scale])}

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        if self.density == 1:
            return
        for name in ("down", "up"):
            scores = p[name].detach().abs()
            if self.mask == "random":
                salt = zlib.crc32(f"{self.seed}:{site.name}:{name}".encode())
                scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(salt))
            kept = max(round(self.density * scores.numel()), 1)
            places = scores.flatten().topk(kept).indices.to(p[name].device)
            mask = p[f"{name}_mask"]
            mask.zero_().view(-1)[places] = True
            p[name].mul_(mask)

    # -- its math --------------------------------------------------------------------------------

    def draws(self, training: bool) -> bool:
        return training and self.dropout > 0

    def weights(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """D and U."""
        if self.density == 1:
            return p["down"], p["up"]
        return p["down"] * p["down_mask"], p["up"] * p["up_mask"]

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        h = x.to(y.dtype) if self.parallel else y
        down, up = self.weights(p)
        scale = p["scale"] * p["on"] if self.drop and call.training else p["scale"]
        if self.gate:
            scale = scale * gates.opened(self.gate, h, p)
        if self.norm:
            norm, shift = p["norm"].to(y.dtype), p["norm_bias"].to(y.dtype)
            h = F.layer_norm(h, [self.widths(call.weight)[0]], norm, shift)
        if call.seed is not None:
            h = torch.ops.peftfx.dropout(h, call.seed, self.dropout, call.site)
        inner = (down, p["down_bias"], up, p["up_bias"], scale, self.activation)
        if self.gate:
            return bottleneck(y, h, *inner)
        return torch.ops.peftfx.bottleneck(  # type: ignore[no-any-return]
            y, None if h is y else h, *inner
        )

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        raise MergeError(
            f"a {self.name} adapter is no linear map: no weight is equal to it",
            site=site.name,
            remedy="keep the adapter unmerged",
        )

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """One adapter as wide as all: ``Σ wᵢ sᵢ Uᵢ f(Dᵢ h) = [w₁s₁U₁ …]·f([D₁; …] h)``."""
        for _, m, _ in parts:
            assert isinstance(m, Bottleneck)
            if m.gate or m.norm or (m.activation, m.parallel) != (self.activation, self.parallel):
                raise MergeError(
                    "adapters with gates or norms, or of several kinds, cannot be mixed",
                    site=site.name,
                )
        tensors = joined(parts)
        tensors["up_bias"] = tensors["up_bias"].sum(0)
        tensors["scale"] = torch.ones_like(parts[0][2]["scale"])
        alone = Bottleneck(
            size=len(tensors["down"]), activation=self.activation, parallel=self.parallel
        )
        return alone, tensors

    # -- in training -----------------------------------------------------------------------------

    def advance(
        self, step: int, sites: Sequence[tuple[Site, Tensors]], memory: dict[str, Tensor]
    ) -> None:
        if not self.drop:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        out = int(torch.randint(self.drop + 1, (), generator=generator))
        for site, p in sites:
            p["on"].fill_(float((site.layer or 0) >= out))


def joined(parts: Sequence[tuple[float, Method, Tensors]]) -> dict[str, Tensor]:
    """Weighted adapters side by side: as one, but for a row of ``up_bias`` for each."""
    found: list[tuple[Tensor, ...]] = []
    for weight, m, p in parts:
        assert isinstance(m, Bottleneck)
        factor, (down, up) = weight * p["scale"], m.weights(p)
        found.append((down, up * factor, p["down_bias"], p["up_bias"] * factor))
    downs, ups, biases, sums = zip(*found, strict=True)
    return {
        "down": torch.cat(downs), "up": torch.cat(ups, 1),
        "down_bias": torch.cat(biases), "up_bias": torch.stack(sums),
    }  # fmt: skip


def _small(t: Tensor) -> None:
    torch.nn.init.trunc_normal_(t, std=1e-2, a=-2e-2, b=2e-2)
