"""One square linear with dropout of 0.1, rank 16, α 16: the setup of LoRAFusion (Zhu et al.,
EuroSys 2026), whose own kernels are not here. `plain torch` is LoRA written out with factors
in x's dtype. Errors are what dropout's noise amounts to, over what it should (1).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from benchmarks.compare import Stand
from benchmarks.models import Sites
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.variants import Adapter

TARGET = "forward and backward ≥1.45× faster than plain torch (the paper: 1.27 on the mean)"
DEVICES = ("cuda", "cpu")
NAMES = ("frozen", "peftfx", "plain torch", "peft, bf16 adapters", "peft + compile, bf16 adapters")


def cases(setting: Setting) -> Mapping[str, Measure]:
    widths = (4096, 5120, 8192) if setting.gpu else (768,)
    rows = (2048, 4096, 8192) if setting.gpu else (512,)
    if setting.tiny:
        widths, rows = (48,), (64,)
    found: dict[str, Measure] = {}
    for width in widths:
        for m in rows:
            dtype = short(setting.dtypes[0])
            name = f"{width}→{width}, M {m}, r 16, dropout 0.1, {dtype}"
            found[name] = functools.partial(_square, setting, name, width, m)
    return found


def _square(setting: Setting, case: str, width: int, rows: int) -> list[Row]:
    stand = Stand.of(
        setting, setting.dtypes[0], lambda: Sites(width, width), (rows, width),
        Adapter(16, 1.0, dropout=0.1), NAMES,
    )  # fmt: skip
    return stand.rows(case)
