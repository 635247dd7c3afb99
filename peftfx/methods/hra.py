"""HRA: a chain of Householder reflections of the input.

    W' = W·H,   H = Π (I - 2·uᵢuᵢᵀ/‖uᵢ‖²) = I - U·T·Uᵀ

Yuan et al., 2024 (arXiv 2405.17484). The chain is one low-rank update of x by its compact form:
T is upper triangular, the inverse of ``strictly upper(UᵀU) + I/2`` (Joffrain et al., 2006). With
``orthogonal`` the reflections are first made orthogonal to each other: ``H = I - 2·Q·Qᵀ``.

A convolution is reflected over channels and kernel, where its weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.errors import PlanError, SpecError
from peftfx.methods.additive import CONV, LINEAR, kaiming, plain, wide
from peftfx.methods.method import Acts, Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm
from peftfx.site import Site


class HraForm(PeftForm):
    """``HRA``; PEFT's convolutions are square, not grouped and not dilated."""

    def refusal(self, method: Method, site: Site) -> str | None:
        if site.kind in CONV:
            kernel, a = site.shape[2:], site.attrs
            alike = all(
                len({*a[n]}) == 1 for n in ("stride", "padding") if not isinstance(a[n], str)
            )
            if len({*kernel}) > 1 or not alike or a["dilation"] != (1, 1) or a["groups"] != 1:
                return f"PEFT's {self.type} takes the convolution {site.module} for another"
        return super().refusal(method, site)


@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """Householder reflection adaptation: the base's weights, reflected."""

    name: ClassVar[str] = "hra"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *CONV)
    baked: ClassVar[tuple[str, ...]] = ("orthogonal",)
    paper: ClassVar[str] = "arXiv 2405.17484"
    peft: ClassVar[PeftForm | None] = HraForm(
        "HRA",
        keys={"u": "{module}.hra_u"},
        options={"r": "rank", "apply_GS": "orthogonal"},
        special=("bias",),
        ignored=("init_weights",),
        kinds=("linear", "conv2d"),
    )

    rank: int = option("Number of reflections; an even one starts as the base.", 8)
    orthogonal: bool = option("Make them orthogonal to each other; it starts elsewhere.", False)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")

    def accepts(self, site: Site) -> str | None:
        if int(site.attrs.get("groups", 1)) > 1:
            return "the groups of a convolution see different channels"
        return super().accepts(site) or plain(site)

    def acts_at(self, site: Site) -> Acts:
        return "weight" if site.kind in CONV else "input"

    def weight_form(self, site: Site) -> str | None:
        return None

    def check(self, site: Site) -> None:
        width = _width(site)
        if self.rank > width:
            raise PlanError(
                f"{self.rank} reflections of {width} inputs", remedy=f"use at most {width}"
            )

    def params(self, site: Site) -> dict[str, Param]:
        return {"u": Param((_width(site), self.rank), kaiming if self.orthogonal else _pairs)}

    def _compact(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """U·T and U, [K, R] each, U of unit columns, in fp32 at least."""
        u = p["u"].to(wide(p["u"]))
        if self.orthogonal:
            q = torch.linalg.qr(u)[0]
            return 2 * q, q
        u = u / torch.linalg.vector_norm(u, dim=0)
        gram = u.t() @ u
        inverse = gram.triu(1) + torch.diag_embed(torch.ones_like(gram[0]) / 2)
        return torch.linalg.solve_triangular(inverse, u, upper=True, left=False), u

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        ut, u = (t.to(x.dtype) for t in self._compact(p))
        return x - (x @ u) @ ut.t()  # x·Hᵀ

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        ut, u = self._compact(p)
        flat = w.t() if site.kind == "hf_conv1d" else w.flatten(1)  # [N, K]
        flat = flat.to(wide(w))
        moved = flat - (flat @ ut.to(flat.dtype)) @ u.to(flat.dtype).t()  # W·H
        return (moved.t() if site.kind == "hf_conv1d" else moved.reshape(w.shape)).to(w.dtype)


def _width(site: Site) -> int:
    return site.in_features * math.prod(site.shape[2:])


def _pairs(t: Tensor) -> None:
    """Columns in equal pairs, whose reflections undo each other; the last alone if they are odd."""
    kaiming(t)
    half = t.shape[1] // 2
    t[:, 1 : 2 * half : 2] = t[:, 0 : 2 * half : 2]
