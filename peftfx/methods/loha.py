"""LoHa: the elementwise product of two low-rank products.

    W' = W + s·(W1a·W1b) ⊙ (W2a·W2b),   s = alpha / rank

Hyeon-Woo et al., 2022 (FedPara, arXiv 2108.06098); LyCORIS, Yeh et al., 2024 (arXiv 2309.14859).
Row i of the product is ``(W1a[i] ⊗ W2a[i])·(W1b ⊗ W2b)`` with Khatri-Rao products, so a linear's
update is a low-rank one of rank R², and ΔW is formed only where that would cost more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError
from peftfx.methods.additive import CONV, LINEAR, Additive, LowRank, kaiming, wide
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm
from peftfx.site import Site


class LohaForm(PeftForm):
    """``LOHA``; its linears and convolutions, without dropout."""

    def refusal(self, method: Method, site: Site) -> str | None:
        if getattr(method, "dropout", 0.0):
            return f"PEFT's {self.type} drops no inputs"
        return super().refusal(method, site)


@dataclass(frozen=True, kw_only=True)
class LoHa(LowRank):
    """Low-rank Hadamard product adaptation, of rank up to R²."""

    name: ClassVar[str] = "loha"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *CONV)
    baked: ClassVar[tuple[str, ...]] = ("dropout", "rank")
    paper: ClassVar[str] = "arXiv 2108.06098"
    peft: ClassVar[PeftForm | None] = LohaForm(
        "LOHA",
        keys={
            **{f"w{i}_{side}": f"{{module}}.hada_w{i}_{side}" for i in (1, 2) for side in "ab"},
            "t1": "{module}.hada_t1", "t2": "{module}.hada_t2",
        },
        options={"use_effective_conv2d": "tucker"},
        varied={"r": ("rank", "rank_pattern"), "alpha": ("alpha", "alpha_pattern")},
        ignored=("init_weights",),
        kinds=("linear", "conv1d", "conv2d"),
    )  # fmt: skip

    rank: int = option("Width R of the four factors.", 8)
    alpha: float = option("The update is scaled by alpha / rank.", 8.0)
    tucker: bool = option("A convolution's kernel axes get factors of their own.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")

    def factor(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        width = math.prod(site.shape[1:])
        if self.rank > min(width, site.shape[0]):
            raise PlanError(
                f"rank {self.rank} is larger than the weight {list(site.shape)} has",
                remedy=f"use a rank of at most {min(width, site.shape[0])}",
            )

    def params(self, site: Site) -> dict[str, Param]:
        r, n = self.rank, site.out_features
        kernel = site.shape[2:]
        if self.tucker and 1 <= len(kernel) <= 2 and math.prod(kernel) > 1:
            core = Param((r, r, *(*kernel, 1)[:2]), kaiming)
            n_side, k_side = (r, n), (r, site.shape[1])
            more = {"t1": core, "t2": core}
        else:
            width = site.in_features if site.kind in LINEAR else math.prod(site.shape[1:])
            n_side, k_side, more = (n, r), (r, width), {}
        return {
            "w1_a": Param(n_side, kaiming),
            "w1_b": Param(k_side, kaiming),
            "w2_a": Param(n_side, kaiming),
            "w2_b": Param(k_side, torch.nn.init.zeros_),
            **more,
        }

    def factors(self, p: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        r = self.rank
        a = (p["w1_b"][:, None] * p["w2_b"][None]).reshape(r * r, -1)
        b = (p["w1_a"][:, :, None] * p["w2_a"][:, None]).reshape(-1, r * r)
        return a, b

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        assert y is not None
        cheap = 2 * self.rank**2 <= min(call.weight.shape)
        if call.kind in LINEAR and (cheap or self.dropout):
            return super().apply(y, x, p, call)
        return Additive.apply(self, y, x, p, call)

    def delta(self, p: Tensors, site: Site) -> Tensor:
        dtype = wide(p["scale"])
        q = {n: t.to(dtype) for n, t in p.items() if n != "scale"}
        if "t1" in q:
            sides = [
                torch.einsum("ijkl,jr,ip->prkl", q[f"t{i}"], q[f"w{i}_b"], q[f"w{i}_a"])
                for i in (1, 2)
            ]
        else:
            sides = [q[f"w{i}_a"] @ q[f"w{i}_b"] for i in (1, 2)]
        update = sides[0] * sides[1] * p["scale"]
        return (update.t() if site.kind == "hf_conv1d" else update).reshape(site.shape)

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        if any("t1" in p for _, _, p in parts) or int(site.attrs.get("groups", 1)) > 1:
            raise MergeError("its updates are not low-rank in all of the input", site=site.name)
        return super().mix(parts, site)
