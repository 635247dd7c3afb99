"""Calls of the ops by their sizes, with operands: for compiling, tuning and measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.low_rank_linear.launch import backward, forward
from peftfx.kernels.low_rank_linear.runner import KEEP, Drop, Runner

Make = Callable[..., Tensor]  # of sizes and a dtype


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call. ``outs``: one for each site that shares x."""

    rows: int
    k: int = 4096
    outs: tuple[int, ...] = (4096,)
    rank: int = 16
    bias: bool = False
    drops: bool = False
    weight: bool = True

    def __str__(self) -> str:
        outs = ", ".join(map(str, self.outs))
        more = ["dropout"] * self.drops + ["no weight"] * (not self.weight)
        return ", ".join([f"{self.k}→{outs}", f"M {self.rows}", f"r {self.rank}", *more])


@dataclass(frozen=True)
class Operands:
    """Operands of one call, forward and backward. Without weights, ``base`` is what is added to."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    A: list[Tensor]
    B: list[Tensor]
    scales: list[Tensor]
    dys: list[Tensor]
    drop: Drop = KEEP
    base: Tensor | None = None

    @classmethod
    def of(cls, sizes: Sizes, dtype: torch.dtype, make: Make) -> Operands:
        """Operands of *sizes*, factors in fp32; ``make(*shape, dtype=…)`` makes each."""
        wide = torch.float32
        return cls(
            x=make(sizes.rows, sizes.k, dtype=dtype),
            weights=[make(n, sizes.k, dtype=dtype) for n in sizes.outs] if sizes.weight else [],
            biases=[make(n, dtype=dtype) if sizes.bias else None for n in sizes.outs],
            A=[make(sizes.rank, sizes.k, dtype=wide) for _ in sizes.outs],
            B=[make(n, sizes.rank, dtype=wide) for n in sizes.outs],
            scales=[make(1, dtype=wide).abs() + 0.5 for _ in sizes.outs],  # not near 0
            dys=[make(sizes.rows, n, dtype=dtype) for n in sizes.outs],
            drop=Drop(make(dtype=torch.int64), 0.1, 1) if sizes.drops else KEEP,
            base=None if sizes.weight else make(sizes.rows, sizes.outs[0], dtype=dtype),
        )

    def forward(self, run: Runner) -> tuple[list[Tensor], Tensor]:
        """The kernels' ys and S."""
        none = [None] * len(self.A)
        return forward(
            run, self.x, self.weights, self.biases, self.A, self.B, none, self.scales, self.drop,
            self.base,
        )  # fmt: skip

    def backward(self, run: Runner, S: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The kernels' dX, dA and dB."""
        return backward(
            run, self.dys, self.x, S, self.weights, self.A, self.B, self.scales, [True] * 3,
            self.drop,
        )  # fmt: skip

    def ops(self, S: Tensor) -> dict[str, tuple[Any, ...]]:
        """The op of this call and the one of its backward, with their arguments."""
        none, all_three = [None] * len(self.A), [True] * 3
        drop = (self.drop.seed, self.drop.p, self.drop.site)
        a, b, scale, bias = self.A[0], self.B[0], self.scales[0], self.biases[0]
        if len(self.A) > 1:
            factors = (self.A, self.B, none, self.scales)
            return {
                "low_rank_linear_group": (self.x, self.weights, self.biases, *factors),
                "low_rank_group_backward": (
                    self.dys, self.x, S, self.weights, self.A, self.B, self.scales, all_three,
                ),
            }  # fmt: skip
        weight = self.weights[0] if self.weights else None
        back = (self.dys[0], self.x, S, weight, a, b, scale, *drop, all_three)
        ahead: dict[str, tuple[Any, ...]]
        if weight is None:
            ahead = {"low_rank_add": (self.base, self.x, a, b, None, scale, *drop)}
        else:
            ahead = {"low_rank_linear": (self.x, weight, bias, a, b, None, scale, *drop)}
        return {**ahead, "low_rank_backward": back}


def drawn(device: torch.device, seed: int = 0) -> Make:
    """Makes operands of normal numbers on *device*, small enough that no sum overflows fp16."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.int64:
            return torch.randint(0, 2**62, shape, generator=generator, device=device)
        made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (made * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)).to(dtype)

    return make
