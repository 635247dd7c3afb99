"""Single products, each alone: the frozen one; the kernels that add the update to it, forward
(`fwd`) and backward (`dx`), with descriptors and without; S = x·Aᵀ by the library and by a
kernel (`s`), beside the time that reading x takes; frozen products on one x, one by one and
with their weights joined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.runner import Runner
from peftfx.kernels.low_rank_linear.tune import Alone
from peftfx.kernels.timing import Run

TARGET = "a kernel beats the library and `addmm_` where its own deficit is below 367/K"
DEVICES = ("cuda", "cpu")
SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
GROUPS = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)))


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows = (80,) if setting.tiny else (2048, 8192) if setting.gpu else (512,)
    shapes = ((40, 48),) if setting.tiny else SHAPES if setting.gpu else ((768, 768), (768, 2048))
    groups = ((40, (48, 16)),) if setting.tiny else GROUPS if setting.gpu else (
        (768, (768, 768, 768)), (768, (2048, 2048)),
    )  # fmt: skip
    found: dict[str, Measure] = {}
    for dtype in setting.dtypes:
        name = short(dtype)
        for m in rows:
            for k, n in shapes:
                one = Sizes(m, k, (n,))
                found[f"{one}, {name}"] = functools.partial(_one, setting, one, dtype)
            for k, outs in groups:
                many = Sizes(m, k, outs)
                found[f"{many}, {name}"] = functools.partial(_joined, setting, many, dtype)
    return found


def _one(setting: Setting, sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    """Each direction and the thin product."""
    operands = Operands.of(sizes, dtype, drawn(setting.device))
    x, w, a, dy = operands.x, operands.weights[0], operands.A[0].to(dtype), operands.dys[0]
    ahead: dict[str, Run] = {"frozen": lambda: F.linear(x, w)}
    back: dict[str, Run] = {"frozen": lambda: dy @ w}
    thin: dict[str, Run] = {"library": lambda: F.linear(x, a), "reading x": lambda: x.sum()}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    device = describe(setting.device)
    if device is not None:
        S = F.linear(x, a)
        exact = [F.linear(x.double(), a.double())]
        errors["s"] = gate("s", [operands.forward(Runner(device))[1]], exact)
        passes = {"fwd": (ahead, operands.forward), "dx": (back, _with(operands, S))}
        passes["s"] = thin, operands.forward
        for name in ("fwd", "fwd_descriptor", "dx", "dx_descriptor", "s"):
            runs, run = passes[name.removesuffix("_descriptor")]
            only = Alone(device, kernel=name, descriptors=name.endswith("descriptor"))
            run(only)
            if name in {used for used, _ in only.used}:
                runs[name] = functools.partial(run, only)
            else:
                missing[name] = f"not used at {sizes}"
    case = f"{sizes}, {short(dtype)}"
    found = []
    for way, runs, over in (("forward", ahead, "frozen"), ("dX", back, "frozen"),
                            ("S", thin, "reading x")):  # fmt: skip
        values, spread = setting.measure(runs)
        row = Row(case, values, way, over=over, spread=spread, errors=errors, missing=missing)
        found.append(row)
    return found


def _with(operands: Operands, S: Tensor) -> Callable[[Alone], Any]:
    return lambda run: operands.backward(run, S)


def _joined(setting: Setting, sizes: Sizes, dtype: torch.dtype) -> list[Row]:
    """Frozen products that share x, one by one, and one with all weights."""
    operands = Operands.of(sizes, dtype, drawn(setting.device))
    x, weights = operands.x, operands.weights
    whole = torch.cat(weights)
    runs: dict[str, Run] = {
        "frozen": lambda: [F.linear(x, w) for w in weights],
        "weights joined": lambda: F.linear(x, whole),
    }
    error = gate("joined", [runs["weights joined"]()], [torch.cat(runs["frozen"](), dim=-1)])
    values, spread = setting.measure(runs)
    case = f"{sizes}, {short(dtype)}"
    return [Row(case, values, "frozen alone", spread=spread, errors={"weights joined": error})]
