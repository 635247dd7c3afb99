"""Each call of `low_rank_linear` in every form that can take it, beside the frozen products
alone (forward, and their dX). `chosen` names the form that the lowering takes here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.configs import config
from peftfx.kernels.low_rank_linear.tune import exact
from peftfx.kernels.timing import Run
from peftfx.passes.claims.cost import Call, choose, least
from peftfx.passes.claims.measure import LLAMA_8B, forms

TARGET = (
    "forward ≤1.05 of frozen (≤1.03 where N or K is 14336), the form that is chosen the fastest"
)
DEVICES = ("cuda", "cpu")


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    rows, ranks = ((2048, 8192), (16, 64)) if setting.gpu else ((512,), (16,))
    shapes = LLAMA_8B if setting.gpu else ((768, (768, 768, 768)), (768, (2048,)), (2048, (768,)))
    if setting.tiny:
        rows, ranks, shapes = (24,), (3,), ((40, (48,)), (40, (32, 16)))
    found: dict[str, Measure] = {}
    for dtype in setting.dtypes:
        for k, outs in shapes:
            for m in rows:
                for rank in ranks:
                    sizes = Sizes(m, k, outs, rank)
                    name = f"{sizes}, {short(dtype)}"
                    found[name] = functools.partial(_calls, setting, name, sizes, dtype)
    return found


def _calls(setting: Setting, case: str, sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    operands = Operands.of(sizes, dtype, drawn(setting.device))
    expected, count = exact(operands), len(operands.A) + 1
    S, wanted = expected[count - 1].to(dtype), (expected[:count], expected[count:])
    alone = _ahead, _back
    found = []
    for way, (op, args), values, frozen in zip(
        ("forward", "backward"), operands.ops(S).items(), wanted, alone, strict=True
    ):
        runs: dict[str, Run] = forms(op, args, config)
        errors = {name: gate(name, tree_leaves(run()), values) for name, run in runs.items()}
        chosen = choose(op, args, list(runs)).form
        times, spread = setting.measure({"frozen": functools.partial(frozen, operands), **runs})
        price = least(Call.of(op, args))
        row = Row(case, times, way, errors=errors, spread=spread, chosen=chosen)
        row.work = {"flops": price.flops, "bytes": price.bytes}
        row.least = setting.floor(price.flops, price.bytes, dtype)
        if describe(setting.device) is None:
            row.missing = dict.fromkeys(("triton", "opaque"), "no GPU that has kernels")
        found.append(row)
    return found


def _ahead(operands: Operands) -> list[Tensor]:
    return [F.linear(operands.x, w) for w in operands.weights]


def _back(operands: Operands) -> Tensor:
    """dY·W of all sites, added up."""
    pairs = list(zip(operands.dys, operands.weights, strict=True))
    dx = pairs[0][0] @ pairs[0][1]
    for dy, w in pairs[1:]:
        dx.addmm_(dy, w)
    return dx
