"""The K-augmented form: frozen weight and factors in one block, one library product each way.

    block = [[W, B], [A, 0]]     y = [x | s·S] · [W | B]ᵀ     dX = [dY | s·dS] · [W ; A]

x and dY lie in padded rows, which their producers would have written into; `and copying` makes
such a copy, as where they cannot. The block is a second copy of W; `refresh` is what its borders
cost after each step of the optimizer, and in no other number. Rows of `tight` are as long as they
come, others are padded to 128 bytes. It has to beat `accumulate`. dA and dB, the same in all forms,
are in no number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.configs import config
from peftfx.kernels.low_rank_linear.tune import exact
from peftfx.kernels.timing import Run
from peftfx.passes.claims.measure import forms

TARGET = (
    "to be wired in it must beat the best other form; it keeps a second copy of every frozen weight"
)
DEVICES = ("cuda", "cpu")


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    rows, rank = ((2048, 8192), 16) if setting.gpu else ((512, 2048), 16)
    shapes = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)) if setting.gpu else (
        (768, 768), (768, 2048), (2048, 768),
    )  # fmt: skip
    if setting.tiny:
        rows, rank, shapes = (24,), 3, ((40, 48),)
    found: dict[str, Measure] = {}
    for dtype in setting.dtypes:
        for k, n in shapes:
            for m in rows:
                sizes = Sizes(m, k, (n,), rank)
                name = f"{sizes}, {short(dtype)}"
                found[name] = functools.partial(_both, setting, name, sizes, dtype)
    return found


class Block:
    """W and the factors of one site in one matrix [N + P, K + P], P = R padded.

    Args:
        align: bytes that rows of the block, of x and of dY are a multiple of, as far as may be.
    """

    def __init__(self, operands: Operands, align: int) -> None:
        x, self.a, self.b = operands.x, operands.A[0], operands.B[0]
        (n, k), self.rank = operands.weights[0].shape, self.a.shape[0]
        self.n, self.k, self.scale, unit = n, k, operands.scales[0], align // x.itemsize or 1
        width_k, width_n = (-(-(size + self.rank) // unit) * unit for size in (k, n))
        self.block = x.new_zeros(width_n, width_k)
        self.block[:n, :k] = operands.weights[0]
        self.x, self.dy = x.new_zeros(x.shape[0], width_k), x.new_zeros(x.shape[0], width_n)
        self.given = x, operands.dys[0]
        self.refresh()
        self.copy()

    def refresh(self) -> None:
        """After a step of the optimizer: B beside W, A below it."""
        self.block[: self.n, self.k : self.k + self.rank] = self.b
        self.block[self.n : self.n + self.rank, : self.k] = self.a

    def copy(self) -> None:
        """x and dY into their padded rows."""
        self.x[:, : self.k], self.dy[:, : self.n] = self.given

    def ahead(self) -> Tensor:
        """y [M, N]; S goes behind x, scaled."""
        low = self.x[:, : self.k] @ self.block[self.n : self.n + self.rank, : self.k].t()
        self.x[:, self.k : self.k + self.rank] = low * self.scale
        return self.x @ self.block[: self.n].t()

    def back(self) -> Tensor:
        """dX [M, K]; dS goes behind dY, scaled."""
        low = self.dy[:, : self.n] @ self.block[: self.n, self.k : self.k + self.rank]
        self.dy[:, self.n : self.n + self.rank] = low * self.scale
        return self.dy @ self.block[:, : self.k]


def _both(setting: Setting, case: str, sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    operands = Operands.of(sizes, dtype, drawn(setting.device))
    x, w, dy = operands.x, operands.weights[0], operands.dys[0]
    y, S, dx, *_ = exact(operands)
    blocks = {"K-augmented": Block(operands, 128), "K-augmented, tight": Block(operands, 1)}
    frozen = {"forward": lambda: x @ w.t(), "dX": lambda: dy @ w}
    ahead, back = operands.ops(S.to(dtype)).items()
    only_dx = (*back[1][:-1], [True, False, False])
    found = []
    for way, (op, args), expected in (("forward", ahead, y), ("dX", (back[0], only_dx), dx)):
        runs: dict[str, Run] = {"frozen": frozen[way]}
        others = forms(op, args, config)
        runs |= {
            name: functools.partial(_first, run)
            for name, run in others.items()
            if name != "definition"
        }
        for name, block in blocks.items():
            runs[name] = block.ahead if way == "forward" else block.back
            runs[f"{name}, and copying"] = functools.partial(_copied, block, runs[name])
        errors = {n: gate(n, [run()], [expected]) for n, run in runs.items() if n != "frozen"}
        values, spread = setting.measure(runs)
        block = blocks["K-augmented"]
        refresh, _ = setting.measure({"refresh": block.refresh})
        row = Row(case, {**values, **refresh}, way, errors=errors, spread=spread)
        row.megabytes = {
            "frozen": w.nbytes / 1e6, "K-augmented": (w.nbytes + block.block.nbytes) / 1e6
        }  # fmt: skip
        found.append(row)
    return found


def _first(run: Run) -> Tensor:
    made: Tensor = run()[0]
    return made


def _copied(block: Block, run: Run) -> Tensor:
    block.copy()
    made: Tensor = run()
    return made
