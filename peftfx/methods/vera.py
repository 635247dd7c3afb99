"""VeRA: one random low-rank pair for all sites, and two trained vectors at each.

    W' = W + diag(b)·B·diag(d)·A,   A and B frozen, shared, cut to the site's widths

Kopiczko et al., 2023 (arXiv 2310.11454). A and B come from a seed, as HF PEFT makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.errors import PlanError, SpecError
from peftfx.methods.additive import LowRank
from peftfx.methods.method import Method, Param, Tensors, option
from peftfx.methods.peft import LINEARS, PeftForm, Placed
from peftfx.site import Site


class VeraForm(PeftForm):
    """``VERA``; a file may leave A and B out, since their seed makes them."""

    def more(self, placed: Placed) -> dict[str, Any]:
        every = all(site.kind == "hf_conv1d" for site, _ in placed)
        return {"fan_in_fan_out": every, "save_projection": True, "bias": "none"}


@dataclass(frozen=True, kw_only=True)
class VeRA(LowRank):
    """Vector-based random matrix adaptation."""

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv 2310.11454"
    peft: ClassVar[PeftForm | None] = VeraForm(
        "VERA",
        keys={
            "b": "{module}.vera_lambda_b", "d": "{module}.vera_lambda_d",
            "A": "base_model.vera_A", "B": "base_model.vera_B",
        },
        options={
            "r": "rank", "vera_dropout": "dropout", "d_initial": "first",
            "projection_prng_key": "seed",
        },
        special=("save_projection", "bias", "fan_in_fan_out"),
        ignored=("init_weights",),
        optional=("A", "B"),
        kinds=LINEARS,
    )  # fmt: skip

    rank: int = option("Width R of the shared factors.", 256)
    first: float = option("What d starts with; b starts with zeros.", 0.1)
    seed: int = option("Seed of A and B.", 0)
    inputs: int = option("Width of A; 0: that of the widest site.", 0)
    outputs: int = option("Height of B; 0: that of the widest site.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")

    def over(self, sites: Sequence[Site]) -> Method:
        inputs = self.inputs or max(s.in_features for s in sites)
        return replace(
            self, inputs=inputs, outputs=self.outputs or max(s.out_features for s in sites)
        )

    def check(self, site: Site) -> None:
        if site.in_features > self.inputs or site.out_features > self.outputs:
            raise PlanError(
                f"the shared factors are for {self.inputs} inputs and {self.outputs} outputs",
                remedy="raise inputs and outputs, or leave them out",
            )

    def params(self, site: Site) -> dict[str, Param]:
        def shared(shape: tuple[int, int], after: tuple[int, int] | None = None) -> Param:
            return Param(shape, _drawn(self.seed, after), trains=False, shared="rule")

        a, b = (self.rank, self.inputs), (self.outputs, self.rank)
        return {
            "b": Param((site.out_features,), torch.nn.init.zeros_),
            "d": Param((self.rank,), lambda t: torch.nn.init.constant_(t, self.first)),
            "A": shared(a),
            "B": shared(b, after=a),
        }

    def factors(self, p: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        a, b = p["A"][:, : site.in_features], p["B"][: site.out_features]
        return p["d"][:, None] * a, p["b"][:, None] * b


def _drawn(seed: int, after: tuple[int, int] | None) -> Callable[[Tensor], None]:
    """He et al.'s uniform noise from a seed, drawn on the CPU, behind a matrix of shape *after*."""

    def fill(t: Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        if after is not None:
            torch.empty(after).uniform_(generator=generator)
        bound = math.sqrt(6 / t.shape[1])
        t.copy_(torch.empty(t.shape).uniform_(-bound, bound, generator=generator))

    return fill
