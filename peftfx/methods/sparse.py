"""Sparse tuning: chosen entries of a weight are trained, and only they are kept.

    W' = W + ΔW,   ΔW zero but at the places of a mask

The values lie in one vector (or in whole rows or columns, with ``structure``); gradients are
computed at the kept places alone. Of single entries, ``index [2, n]`` has the places, row by row
of the weight, and what puts them into the order of columns, which the backward needs: made once,
with the mask. Masks:

- ``random`` and ``magnitude``, the controls. SHiRA (Bhardwaj et al., 2024, arXiv 2406.13175) keeps
  as many entries as a LoRA of some ``rank`` has; FAR (Vucetic et al., 2022, arXiv 2205.03228)
  trains chosen columns whole.
- ``fisher``, the largest E[g²] (FishMask, Sung et al., 2021, arXiv 2111.09839), and ``sam``, the
  largest |Σg|, the second-order approximation of Fu et al., 2022 (arXiv 2211.15583) where
  curvatures are equal. Both take ``peftfx.calibrate``.
- With ``budget`` the mask is learned among those places (DiffPruning, Guo et al., 2021, arXiv
  2012.07463): each value has a hard-concrete gate (Louizos et al., 2018, arXiv 1712.01312), the
  penalty closes gates until the budget holds on average, and whatever is not training keeps exactly
  the budget's share, those with the largest gates.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import CheckpointError, MergeError, PlanError, SpecError
from peftfx.kernels.sparse_add.op import by_columns, turned
from peftfx.methods.additive import LINEAR, Additive, wide
from peftfx.methods.method import Calibration, Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm, Placed
from peftfx.site import Site

STRETCH, HEAT = (-0.1, 1.1), 2 / 3  # of the hard-concrete gates, as Louizos et al. have them


class ShiraForm(PeftForm):
    """``SHIRA``: single entries, as many as a LoRA of its rank has, places as rows and columns."""

    def refusal(self, method: Method, site: Site) -> str | None:
        if not isinstance(method, Sparse) or method.rank is None or method.structure != "element":
            return "PEFT's SHIRA keeps single entries, as many as a rank says"
        if method.budget:
            return "PEFT's SHIRA has no gates"
        return super().refusal(method, site)

    def more(self, placed: Placed) -> dict[str, Any]:
        return {"mask_type": "random", "fan_in_fan_out": False}

    def pack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        index = p["index"][0]
        rows, columns = index // site.in_features, index % site.in_features
        return {"values": p["values"], "index": torch.stack([rows, columns]).to(torch.int32)}

    def unpack(self, method: Method, site: Site, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = p["index"].to(torch.int64)
        if places.ndim != 2 or len(places) != 2 or p["values"].shape != places.shape[1:]:
            raise CheckpointError("places and values do not go together", site=site.name)
        if not bool((places[1] < site.in_features).all() and (places >= 0).all()):
            raise CheckpointError("a place lies outside of the weight", site=site.name)
        index, order = (places[0] * site.in_features + places[1]).sort()
        return {"values": p["values"][order], "index": _places(index, site)}


@dataclass(frozen=True, kw_only=True)
class Sparse(Additive):
    """Trains chosen entries, rows or columns of the weights of linears."""

    name: ClassVar[str] = "sparse"
    kinds: ClassVar[tuple[str, ...]] = LINEAR
    baked: ClassVar[tuple[str, ...]] = ("structure", "budget")
    paper: ClassVar[str] = "arXiv 2211.15583"
    peft: ClassVar[PeftForm | None] = ShiraForm(
        "SHIRA",
        keys={"values": "{module}.shira_weight", "index": "{module}.shira_indices"},
        options={"r": "rank"},
        special=("mask_type", "random_seed", "fan_in_fan_out"),
        ignored=("init_weights",),
    )

    density: float = option("Share of the weight's entries, rows or columns that is kept.", 0.005)
    rank: int | None = option("Instead: as many entries as a LoRA of this rank has.", None)
    mask: Literal["random", "magnitude", "fisher", "sam"] = option(
        "How places are chosen; fisher and sam by peftfx.calibrate.", "random"
    )
    structure: Literal["element", "row", "column"] = option(
        "What is kept or left as one.", "element"
    )
    seed: int = option("Seed of random masks.", 0)
    budget: float = option(
        "Learn which of the places to keep, this share of the weight; 0: all.", 0.0
    )
    strength: float = option("Weight of the penalty that closes gates beyond the budget.", 1.0)

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise SpecError(f"density is {self.density}", remedy="a share is in (0, 1]")
        if self.rank is not None and (self.rank < 1 or self.structure != "element"):
            raise SpecError(f"rank is {self.rank}", remedy="at least 1, and for single entries")
        if not 0.0 <= self.budget <= 1.0 or (self.budget and self.structure != "element"):
            raise SpecError(f"budget is {self.budget}", remedy="a share of single entries")

    def _sizes(self, site: Site) -> tuple[int, int]:
        """How many places are kept, and of how many."""
        n, k = site.out_features, site.in_features
        total = {"element": n * k, "row": n, "column": k}[self.structure]
        kept = round(self.density * total) if self.rank is None else self.rank * (n + k)
        return max(kept, 1), total

    def check(self, site: Site) -> None:
        kept, total = self._sizes(site)
        if kept > total:
            raise PlanError(f"{kept} places are kept, of {total}", remedy="use a lower rank")
        if self.budget and not 1 <= round(self.budget * total) <= kept:
            raise PlanError(
                f"a budget of {round(self.budget * total)} among {kept} places",
                remedy="the budget is at least one place, and at most those that the mask keeps",
            )

    def params(self, site: Site) -> dict[str, Param]:
        (kept, total), zeros = self._sizes(site), torch.nn.init.zeros_
        shape = {"row": (kept, site.in_features), "column": (site.out_features, kept)}
        valid = _valid(total, None if self.structure in shape else site)
        found = {
            "values": Param(shape.get(self.structure, (kept,)), zeros),
            "index": Param(
                (kept,) if self.structure in shape else (2, kept), zeros, False, torch.int64,
                valid=valid,
            ),
        }  # fmt: skip
        if self.budget:
            found["gate"] = Param((kept,), lambda t: torch.nn.init.constant_(t, 2.0))
        return found

    # -- the mask --------------------------------------------------------------------------------

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        kept, total = self._sizes(site)
        if self.mask == "magnitude":
            self._choose(p, site, w.abs().t() if site.kind == "hf_conv1d" else w.abs())
        else:  # what is calibrated starts somewhere too
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{self.seed}:{site.name}".encode())
            )
            self._keep(p, site, torch.randperm(total, generator=generator)[:kept])

    def _keep(self, p: Tensors, site: Site, chosen: Tensor) -> None:
        chosen = chosen.sort().values
        p["index"].copy_(_places(chosen, site) if self.structure == "element" else chosen)

    def _choose(self, p: Tensors, site: Site, scores: Tensor) -> None:
        """Keeps the places with the largest of the *scores* [N, K]."""
        if self.structure != "element":
            scores = scores.sum(1 if self.structure == "row" else 0)
        self._keep(p, site, scores.reshape(-1).topk(p["index"].shape[-1]).indices)
        p["values"].zero_()

    def calibration(self, site: Site) -> Calibration | None:
        return Scores(self, site) if self.mask in ("fisher", "sam") else None

    # -- its math --------------------------------------------------------------------------------

    def draws(self, training: bool) -> bool:
        return training and self.budget > 0

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        x, values = x.to(y.dtype), p["values"]
        if self.structure == "row":
            return y.index_add(-1, p["index"], F.linear(x, values.to(y.dtype)))
        if self.structure == "column":
            return y + F.linear(x.index_select(-1, p["index"]), values.to(y.dtype))
        if self.budget:
            noise = None
            if call.seed is not None:
                noise = torch.ops.peftfx.uniform_like(p["gate"].detach(), call.seed, call.site)
            values = values * self._open(p, call.weight, noise)
        places = p["index"][0], p["index"][1]
        return torch.ops.peftfx.sparse_add(y, x, values, *places)  # type: ignore[no-any-return]

    def _open(self, p: Tensors, site: Site, noise: Tensor | None) -> Tensor:
        """How far each gate is open: drawn while training, else fixed and within the budget."""
        gate = p["gate"].to(wide(p["gate"]))
        if noise is not None:
            u = noise.clamp(1e-6, 1 - 1e-6)
            return _stretched((u.log() - (1 - u).log() + gate) / HEAT)
        left = round(self.budget * site.out_features * site.in_features)
        best = gate.detach().topk(left).indices
        return _stretched(gate) * torch.zeros_like(gate).index_fill(0, best, 1.0)

    def delta(self, p: Tensors, site: Site) -> Tensor:
        values = p["values"].to(wide(p["values"]))
        blank = values.new_zeros(site.out_features, site.in_features)
        if self.structure == "element":
            values = values * self._open(p, site, None) if self.budget else values
            found = blank.reshape(-1).index_copy(0, p["index"][0], values).reshape(blank.shape)
        else:
            found = blank.index_copy(0 if self.structure == "row" else 1, p["index"], values)
        return found.t() if site.kind == "hf_conv1d" else found

    def weight_form(self, site: Site) -> str | None:
        return "where its weight is read, all of it would get a gradient"

    def penalty(self, sites: Sequence[tuple[Site, Tensors]]) -> Tensor | None:
        """How far the gates that are expected to be open exceed the budget, relative to it."""
        if not self.budget:
            return None
        low, high = STRETCH
        shift = HEAT * math.log(-low / high)
        terms = []
        for site, p in sites:
            left = self.budget * site.out_features * site.in_features
            terms.append(F.relu(torch.sigmoid(p["gate"] - shift).sum() / left - 1))
        return self.strength * torch.stack([t.to(terms[0].device) for t in terms]).mean()

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """The places of all, with the weighted sums of their values."""
        if any(getattr(m, "structure", None) != self.structure for _, m, _ in parts):
            raise MergeError("one keeps entries, the other rows or columns", site=site.name)
        axis, element = int(self.structure == "column"), self.structure == "element"
        kept = [p["index"][0] if element else p["index"] for _, _, p in parts]
        index, at = torch.cat(kept).unique(return_inverse=True)
        found = []
        for weight, m, p in parts:
            assert isinstance(m, Sparse)
            values = p["values"] * m._open(p, site, None) if m.budget else p["values"]
            found.append(weight * values)
        joined = torch.cat(found, axis)
        shape = [*joined.shape]
        shape[axis] = len(index)
        values = joined.new_zeros(shape).index_add(axis, at, joined)
        held = _places(index, site) if element else index
        return replace(self, budget=0.0), {"values": values, "index": held}


class Scores:
    """Which places of a weight a task moves most, from the gradients of a few batches."""

    sees: Literal["input", "gradient"] = "gradient"

    def __init__(self, method: Sparse, site: Site) -> None:
        self.method, self.site = method, site
        self.total: Tensor | None = None

    def see(self, value: Tensor) -> None:
        g = value.detach().to(wide(value))
        g = g.square() if self.method.mask == "fisher" else g
        self.total = g.clone() if self.total is None else self.total.add_(g)

    def fill(self, p: Tensors) -> None:
        assert self.total is not None
        scores = self.total.abs()
        scores = scores.t() if self.site.kind == "hf_conv1d" else scores
        self.method._choose(p, self.site, scores)


def _stretched(logit: Tensor) -> Tensor:
    """A sigmoid that reaches 0 and 1."""
    low, high = STRETCH
    return (torch.sigmoid(logit) * (high - low) + low).clamp(0, 1)


def _places(index: Tensor, site: Site) -> Tensor:
    """Places [n] in the order of rows, with what puts them into that of columns, [2, n]."""
    return torch.stack([index, by_columns(index, site.out_features, site.in_features)])


def _valid(total: int, site: Site | None) -> Callable[[Tensor], bool]:
    """Whether places rise among *total*; in both orders where they are entries of *site*."""

    def rising(t: Tensor, limit: int) -> bool:
        inside = t.numel() == 0 or (int(t.min()) >= 0 and int(t.max()) < limit)
        return inside and bool((t[1:] > t[:-1]).all())

    def valid(index: Tensor) -> bool:
        if site is None:
            return rising(index, total)
        places, order = index
        if not rising(places, total) or not rising(order.sort().values, len(order)):
            return False
        return rising(turned(places[order], site.out_features, site.in_features), total)

    return valid
