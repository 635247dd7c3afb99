"""A layer of Llama-8B, LoRA of rank 16 on its seven linears, sequences of 2048 tokens; on a CPU
a layer of Llama-1B, 256 tokens. Of the orders of products that are written anew, the rest of
the layer is compiled piece by piece. Work and roofline are those of the linears alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from benchmarks.compare import Stand
from benchmarks.models import LLAMA_1B, LLAMA_8B, TINY, Layer
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.variants import ALL, Adapter

TARGET = "forward and backward ≤1.06 of the frozen layer; ≥1.15× faster than PEFT + compile; peak \
memory ≤0.5 of PEFT's and ≤0.9 of PEFT + compile's"
DEVICES = ("cuda", "cpu")


def cases(setting: Setting) -> Mapping[str, Measure]:
    batches = (1, 4) if setting.gpu and not setting.tiny else (1,)
    found: dict[str, Measure] = {}
    for dtype in setting.dtypes[:1]:
        for batch in batches:
            name = f"batch {batch}, r 16, {short(dtype)}"
            found[name] = functools.partial(_layer, setting, name, batch)
    return found


def _layer(setting: Setting, case: str, batch: int) -> list[Row]:
    full = (LLAMA_8B, 2048, 16) if setting.gpu else (LLAMA_1B, 256, 16)
    sizes, length, rank = (TINY, 8, 3) if setting.tiny else full
    stand = Stand.of(
        setting, setting.dtypes[0], lambda: Layer(sizes, length), (batch, length, sizes.hidden),
        Adapter(rank), ALL,
    )  # fmt: skip
    return stand.rows(case)
