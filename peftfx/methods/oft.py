"""OFT: the input of a weight, rotated block by block.

    W' = W·Rᵀ,   R = diag(R₁, R₂, …),   Rᵢ = (I + Qᵢ)⁻¹·(I - Qᵢ)   with Qᵢ skew-symmetric

Qiu et al., 2023 (arXiv 2306.07280). By default the inverse is a Neumann series of ``terms`` terms,
as HF PEFT has it: ``R = I + 2·(Q + … + Qᵗ⁻²) + Qᵗ⁻¹``. Computed is ``x + x·(R - I)``, so that small
rotations survive low precision.

A convolution is rotated over channels and kernel, where its weight is read. PEFT rotates unfolded
inputs and folds them again, which adds up overlapping windows: unmerged it is another function than
merged, and not the base at the start. Here both are what PEFT is when merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.errors import PlanError, SpecError
from peftfx.methods.additive import CONV, LINEAR, plain, wide
from peftfx.methods.method import Acts, Call, Method, Param, Tensors, option
from peftfx.methods.peft import PeftForm, Placed
from peftfx.site import Site


class OftForm(PeftForm):
    """``OFT``; a block size that does not divide a site's width is PEFT's nearest that does."""

    def refusal(self, method: Method, site: Site) -> str | None:
        if site.kind in CONV and len({*site.shape[2:]}) > 1:
            return f"PEFT's {self.type} takes {site.module} for a square convolution"
        return super().refusal(method, site)

    def more(self, placed: Placed) -> dict[str, Any]:
        blocks = [(_width(s), m.block) for s, m in placed if isinstance(m, OFT)]
        most = max(b for _, b in blocks)
        sizes = [b for b in range(most, 1, -1) if all(_nearest(w, b) == own for w, own in blocks)]
        terms = {m.terms for _, m in placed if isinstance(m, OFT)}
        if not sizes or len(terms) > 1:
            raise SpecError("PEFT has one block size and one series for all sites")
        count = terms.pop()
        return {
            "oft_block_size": sizes[0], "r": 0, "use_cayley_neumann": count > 0,
            "num_cayley_neumann_terms": count or 5, "fan_in_fan_out": False, "bias": "none",
        }  # fmt: skip

    def rules(
        self, rule: dict[str, Any], content: Mapping[str, Any], sites: Mapping[str, Site] | None
    ) -> list[dict[str, Any]]:
        series = content.get("use_cayley_neumann", True)
        terms = content.get("num_cayley_neumann_terms", 5) if series else 0
        rule = {**rule, "terms": 4 if terms == 3 else terms}  # PEFT's 3 and 4 are the same series
        size, count = content.get("oft_block_size", 32), content.get("r", 0)
        if sites is None:
            if not size:
                raise SpecError("r blocks a site: it takes the model to say of what size")
            return [{**rule, "block": size}]
        by_size: dict[int, list[str]] = {}
        for module, site in sites.items():
            width = _width(site)
            block = _nearest(width, size) if size else width // _nearest(width, count)
            by_size.setdefault(block, []).append(module)
        usual = max(by_size, key=lambda block: len(by_size[block]))
        overrides = [{"name": n, "block": b} for b, n in by_size.items() if b != usual]
        return [{**rule, "block": usual, **({"overrides": overrides} if overrides else {})}]


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Orthogonal fine-tuning: the base's weights, rotated."""

    name: ClassVar[str] = "oft"
    kinds: ClassVar[tuple[str, ...]] = (*LINEAR, "embedding", *CONV)
    baked: ClassVar[tuple[str, ...]] = ("terms",)
    paper: ClassVar[str] = "arXiv 2306.07280"
    peft: ClassVar[PeftForm | None] = OftForm(
        "OFT",
        keys={"R": "{module}.oft_R.weight"},
        of_tables={"R": "{module}.oft_embedding_R.weight"},
        options={"block_share": "share"},
        special=(
            "oft_block_size", "r", "use_cayley_neumann", "num_cayley_neumann_terms", "bias",
            "fan_in_fan_out",
        ),
        called={"block": "oft_block_size", "terms": "num_cayley_neumann_terms"},
        ignored=("init_weights", "eps"),
        kinds=("linear", "conv2d", "embedding"),
    )  # fmt: skip

    block: int = option("Size of the blocks; it divides the width that is rotated.", 32)
    share: bool = option("One rotation for all blocks.", False)
    terms: int = option("Terms of the series for the inverse; 0: solve for it exactly.", 5)

    def __post_init__(self) -> None:
        if self.block < 2:
            raise SpecError(f"block is {self.block}", remedy="a block has at least 2 rows")
        if self.terms not in (0, *range(4, 65)):
            raise SpecError(f"terms is {self.terms}", remedy="0, or between 4 and 64")

    def accepts(self, site: Site) -> str | None:
        if int(site.attrs.get("groups", 1)) > 1:
            return "the groups of a convolution see different channels"
        return super().accepts(site) or plain(site)

    def acts_at(self, site: Site) -> Acts:
        if site.kind == "embedding":
            return "output"  # its rows are rotated
        return "weight" if site.kind in CONV else "input"

    def weight_form(self, site: Site) -> str | None:
        return None

    def check(self, site: Site) -> None:
        width = _width(site)
        if width % self.block:
            raise PlanError(
                f"blocks of {self.block} do not divide a width of {width}",
                remedy=f"the nearest that do are of {_nearest(width, self.block)}",
            )

    def params(self, site: Site) -> dict[str, Param]:
        blocks = 1 if self.share else _width(site) // self.block
        return {"R": Param((blocks, self.block * (self.block - 1) // 2), torch.nn.init.zeros_)}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        rows, columns = torch.triu_indices(self.block, self.block, 1)
        return {"upper": rows * self.block + columns}

    def _moves(self, p: Tensors) -> Tensor:
        """Rᵢ - I of the blocks, [blocks, b, b], in fp32 at least."""
        v, (blocks, side) = p["R"].to(wide(p["R"])), _sides(p)
        q = v.new_zeros(blocks, side * side).index_copy(1, p["upper"], v)
        q = q.unflatten(1, (side, side))
        q = q - q.transpose(1, 2)
        if not self.terms:
            eye = torch.diag_embed(torch.ones_like(q[:, 0]))
            return torch.linalg.solve(eye + q, -2 * q, left=False)
        total, power = 2 * q, q
        for _ in range(2, self.terms - 1):
            power = power @ q
            total = total + 2 * power
        return total + power @ q

    def _moved(self, x: Tensor, p: Tensors, back: bool = False) -> Tensor:
        """x with its last axis rotated, block by block; *back*: the other way."""
        moves = self._moves(p).to(x.dtype)
        moves = moves.transpose(1, 2) if back else moves
        count, side = _sides(p)
        blocks = x.unflatten(-1, (-1, side))
        if count == 1:
            return x + (blocks @ moves[0]).flatten(-2)
        return x + torch.einsum("...rk,rkc->...rc", blocks, moves).flatten(-2)

    def apply(self, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
        return self._moved(x if y is None else y, p)

    def merge(self, w: Tensor, p: Tensors, site: Site) -> Tensor:
        wider = w.to(wide(w))
        if site.kind == "embedding":
            return self._moved(wider, p).to(w.dtype)
        flat = wider.t() if site.kind == "hf_conv1d" else wider.flatten(1)  # [N, K]
        moved = self._moved(flat, p, back=True)  # W·Rᵀ
        return (moved.t() if site.kind == "hf_conv1d" else moved.reshape(w.shape)).to(w.dtype)


def _sides(p: Tensors) -> tuple[int, int]:
    """How many blocks there are, and their size."""
    count, above = p["R"].shape
    return count, (1 + math.isqrt(1 + 8 * above)) // 2


def _width(site: Site) -> int:
    """The axis that is rotated: inputs, of all channels and the kernel; an embedding's columns."""
    if site.kind == "embedding":
        return site.out_features
    return site.in_features * math.prod(site.shape[2:])


def _nearest(width: int, size: int) -> int:
    """The divisor of *width* that is nearest to *size*, the smaller of two as near."""
    divisors: Sequence[int] = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (abs(d - size), d))
