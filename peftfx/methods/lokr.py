"""LoKr: a Kronecker product, its second factor low-rank where that is smaller.

    W' = W + s·(W1 ⊗ W2),   s = alpha / rank

Edalati et al., 2022 (KronA, arXiv 2212.10650); LyCORIS, Yeh et al., 2024 (arXiv 2309.14859). A
linear never forms the product: with x as a matrix X, ``(W1 ⊗ W2)·x = W1·X·W2ᵀ``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.errors import MergeError, SpecError
from peftfx.methods.additive import CONV, LINEAR, Additive, kaiming, wide
from peftfx.methods.method import Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class LoKr(Additive):
    """Low-rank Kronecker product adaptation."""

    name: ClassVar[str] = "lokr"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, *CONV)
    paper: ClassVar[str] = "arXiv 2212.10650"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LOKR",
        keys={n: "{module}.lokr_" + n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        options={
            "use_effective_conv2d": "tucker", "decompose_both": "both", "decompose_factor": "split",
        },
        varied={"r": ("rank", "rank_pattern"), "alpha": ("alpha", "alpha_pattern")},
        ignored=("init_weights", "rank_dropout_scale"),
        kinds=("linear", "conv1d", "conv2d"),
    )  # fmt: skip

    rank: int = option("Rank of the factors that are low-rank products.", 8)
    alpha: float = option("The update is scaled by alpha / rank.", 8.0)
    split: int = option("Size of W1's axes, at most; -1: as square as can be.", -1)
    both: bool = option("W1 may be a low-rank product too.", False)
    tucker: bool = option("A convolution's kernel axes get a factor of their own.", False)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 2**20:
            raise SpecError(f"rank is {self.rank}", remedy="a rank is between 1 and 1048576")
        if self.split != -1 and self.split < 1:
            raise SpecError(f"split is {self.split}", remedy="-1, or a size of at least 1")

    def params(self, site: Site) -> dict[str, Param]:
        r, kernel = self.rank, site.shape[2:]
        width = site.in_features if site.kind in LINEAR else site.shape[1]
        (n1, n2), (k1, k2) = divisors(site.out_features, self.split), divisors(width, self.split)
        found: dict[str, tuple[int, ...]] = {}
        if self.both and r < max(n1, k1) / 2:
            found |= {"w1_a": (n1, r), "w1_b": (r, k1)}
        else:
            found["w1"] = (n1, k1)
        if r >= max(n2, k2) / 2:
            found["w2"] = (n2, k2, *kernel)
        elif self.tucker and 1 <= len(kernel) <= 2 and math.prod(kernel) > 1:
            found |= {"t2": (r, r, *(*kernel, 1)[:2]), "w2_a": (r, n2), "w2_b": (r, k2)}
        else:
            found |= {"w2_a": (n2, r), "w2_b": (r, k2 * math.prod(kernel))}
        zero = "w1" if "w1" in found else "w1_a"
        return {
            n: Param(shape, torch.nn.init.zeros_ if n == zero else kaiming)
            for n, shape in found.items()
        }

    def buffers(self, site: Site) -> dict[str, Tensor]:
        return {"scale": torch.tensor([self.alpha / self.rank])}

    def _sides(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """W1 [N1, K1] with the scale, and W2 [N2, K2, ...]; the kernel's axes may be in one."""
        first = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        if "w2" in p:
            second = p["w2"]
        elif "t2" in p:
            second = torch.einsum("ijkl,ip,jr->prkl", p["t2"], p["w2_a"], p["w2_b"])
        else:
            second = p["w2_a"] @ p["w2_b"]
        return first * p["scale"], second

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        if call.kind not in LINEAR:
            return super().apply(y, x, p, call)
        assert y is not None
        first, second = (t.to(y.dtype) for t in self._sides(p))
        width = p["w1" if "w1" in p else "w1_b"].shape[1]
        x = x.to(y.dtype).unflatten(-1, (width, -1))  # [..., K1, K2]
        half = (x @ second.t()).transpose(-1, -2)  # [..., N2, K1]
        return y + (half @ first.t()).transpose(-1, -2).flatten(-2)

    def delta(self, p: Tensors, site: Site) -> Tensor:
        first, second = (t.to(wide(t)) for t in self._sides(p))
        kernel = site.shape[2:]
        height = p["w1" if "w1" in p else "w1_a"].shape[0]
        first = first.reshape(height, -1, *(1 for _ in kernel))
        second = second.reshape(site.out_features // height, -1, *kernel)
        update = torch.kron(first, second)
        return (update.t() if site.kind == "hf_conv1d" else update).reshape(site.shape)

    def mix(
        self, parts: Sequence[tuple[float, Method, Tensors]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        raise MergeError(
            "a sum of Kronecker products is none",
            site=site.name,
            remedy="merge one adapter into the base, then activate the other",
        )


def divisors(size: int, at_most: int) -> tuple[int, int]:
    """Two factors of *size*, the first the smaller: near its root, or near *at_most*."""
    if at_most > 0 and size % at_most == 0:
        return at_most, size // at_most
    bound = size if at_most == -1 else at_most
    first = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= bound)
    return first, size // first
