"""One token of each of M sequences through a layer of Llama-8B, without a cache of keys and
values, on a GPU as a CUDA graph. A merged adapter costs what `frozen` does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from benchmarks.compare import Stand, outputs
from benchmarks.models import LLAMA_8B, TINY, Layer
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.variants import Adapter
from benchmarks.verify import gate

TARGET = "unmerged ≤1.05 of merged"
DEVICES = ("cuda", "cpu")
NAMES = ("frozen", "peftfx", "peft, bf16 adapters", "peft + compile, bf16 adapters")


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows: tuple[int, ...] = (1, 4, 16, 64) if setting.gpu else (1, 16)
    if setting.tiny:
        rows = (4,)
    names = {m: f"M {m}, {short(setting.dtypes[0])}" for m in rows}
    return {name: functools.partial(_token, setting, name, m) for m, name in names.items()}


def _token(setting: Setting, case: str, rows: int) -> list[Row]:
    sizes, rank = (TINY, 3) if setting.tiny else (LLAMA_8B, 16)
    stand = Stand.of(
        setting, setting.dtypes[0], lambda: Layer(sizes, 1), (rows, 1, sizes.hidden), Adapter(rank),
        NAMES,
    )  # fmt: skip
    x = stand.x.detach()
    with torch.no_grad():
        expected = outputs(stand.plain(torch.float64), x.double())
        errors = {
            name: gate(name, outputs(one, x), expected)
            for name, one in stand.variants.items()
            if one.factors
        }
        runs = {n: functools.partial(outputs, one, x) for n, one in stand.variants.items()}
        values, spread = setting.measure(runs)
    return [Row(case, values, "forward", errors=errors, spread=spread, missing=stand.missing)]
