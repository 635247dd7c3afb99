"""Calls of the ops by their sizes, with operands: for compiling, testing and measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftfx.kernels.low_rank_linear.calls import Make


@dataclass(frozen=True)
class Producer:
    """Sizes of a call, and what makes y: a norm, or *act* where that is given."""

    rows: int
    k: int = 4096
    ranks: tuple[int, ...] = (16,)
    adds: bool = False
    centred: bool = False
    act: str = ""
    gated: bool = False

    @property
    def op(self) -> str:
        return "gate_shrink" if self.act else "norm_shrink"

    def __str__(self) -> str:
        norm = "layer norm" if self.centred else "RMS norm"
        what = f"{self.act}{' gate' * self.gated}" if self.act else f"{'sum, ' * self.adds}{norm}"
        return f"{what}, M {self.rows}, K {self.k}, r {' + '.join(map(str, self.ranks))}"

    def arguments(self, dtype: torch.dtype, make: Make) -> tuple[Any, ...]:
        """Arguments of the op, A in fp32; ``make(*shape, dtype=…)`` makes each."""
        A = [make(r, self.k, dtype=torch.float32) for r in self.ranks]
        x = make(self.rows, self.k, dtype=dtype)
        other = make(self.rows, self.k, dtype=dtype) if self.adds or self.gated else None
        if self.act:
            return x, other, A, self.act, dtype
        weight = make(self.k, dtype=dtype)
        shift = make(self.k, dtype=dtype) if self.centred else None
        return x, other, weight, shift, A, 1e-5, 0.0, self.centred, dtype
