"""Modules whose linears share one input, each variant as its users run it, compiled where it is.
Forward, and forward with dX, dA and dB; `frozen` has dX alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from benchmarks.compare import Stand
from benchmarks.models import Sites
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.variants import ALL, Adapter
from peftfx.passes.claims.measure import LLAMA_8B

TARGET = (
    "forward ≤1.05 (≤1.03 where N or K is 14336, a fused QKV ≤1.06), with backward ≤1.07; ≥1.15× "
    "faster than Unsloth's order, ≥1.25× than PEFT with bf16 adapters, ≥1.6× than PEFT"
)
DEVICES = ("cuda", "cpu")


def cases(setting: Setting) -> Mapping[str, Measure]:
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    rows, ranks = ((2048, 8192), (16, 64)) if setting.gpu else ((512,), (16,))
    shapes = LLAMA_8B if setting.gpu else ((768, (768, 768, 768)), (768, (2048,)), (2048, (768,)))
    if setting.tiny:
        rows, ranks, shapes = (24,), (3,), ((40, (48, 16)),)
    found: dict[str, Measure] = {}
    for dtype in setting.dtypes:
        for k, outs in shapes:
            for m in rows:
                for rank in ranks:
                    name = f"{k}→{', '.join(map(str, outs))}, M {m}, r {rank}, {short(dtype)}"
                    found[name] = functools.partial(
                        _sites, setting, name, dtype, (k, *outs), m, rank
                    )
    return found


def _sites(
    setting: Setting, case: str, dtype: torch.dtype, sizes: Sequence[int], rows: int, rank: int
) -> list[Row]:
    stand = Stand.of(
        setting, dtype, lambda: Sites(*sizes), (rows, sizes[0]), Adapter(rank), ALL
    )  # fmt: skip
    return stand.rows(case)
