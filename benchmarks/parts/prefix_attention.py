"""Attention with a prefix of 20 keys and values (heads of 64, float32; on a GPU bfloat16): its
own attention, merged by log-sum-exp (`merged`), or keys and values in one tensor (`joined`),
beside attention without it. Decoding one token over a long cache, and forward and backward
of a training step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Measure, Row, Setting
from benchmarks.verify import gate
from peftfx.kernels.prefix_attention import op
from peftfx.kernels.timing import Run

TARGET = "≤1.05 of attention without a prefix"
DEVICES = ("cuda", "cpu")
P, D = 20, 64
CASES: dict[str, dict[str, Any]] = {
    "decode, 8192 cached": {"batch": 4, "heads": 12, "kv": 12, "s": 1, "t": 8192, "train": False},
    "decode, 8192 cached, GQA": {"batch": 4, "heads": 12, "kv": 3, "s": 1, "t": 8192,
                                 "train": False},
    "train, 2048 tokens": {"batch": 1, "heads": 12, "kv": 12, "s": 2048, "t": 2048, "train": True},
}  # fmt: skip


def cases(setting: Setting) -> Mapping[str, Measure]:
    return {name: functools.partial(_row, setting, name, case) for name, case in CASES.items()}


def _row(setting: Setting, name: str, case: dict[str, Any]) -> list[Row]:
    if setting.tiny:
        case = {**case, "s": min(case["s"], 16), "t": min(case["t"], 16)}
    runs = _forms(setting, case)
    with torch.no_grad():
        joined = runs["joined"]()
        bound = None if setting.gpu else 1e-4
        errors = {"merged": gate("merged", [runs["merged"]()], [joined], bound)}
    steps: dict[str, Run] = runs
    if case["train"]:
        steps = {n: functools.partial(_backward, run) for n, run in runs.items()}
    values, spread = setting.measure(steps, capture=not case["train"])
    return [Row(name, values, over="without", errors=errors, spread=spread)]


def _backward(run: Run) -> None:
    out: Tensor = run()
    out.backward(torch.ones_like(out))


def _forms(setting: Setting, case: dict[str, Any]) -> dict[str, Run]:
    g = torch.Generator().manual_seed(0)

    dtype = torch.bfloat16 if setting.gpu else torch.float32

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        drawn = torch.randn(*shape, generator=g).to(setting.device, of)
        return drawn.requires_grad_(case["train"])

    q = made(case["batch"], case["heads"], case["s"], D)
    k, v = (made(case["batch"], case["kv"], case["t"], D) for _ in range(2))
    pk, pv = (made(case["kv"], P, D, of=torch.float32) for _ in range(2))
    causal, scale = bool(case["train"]), D**-0.5
    gqa = case["heads"] != case["kv"]
    prefix = (pk, pv, None, None, causal, scale)
    return {
        "without": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=gqa
        ),
        "merged": lambda: torch.ops.peftfx.prefix_attention(q, k, v, *prefix)[0],
        "joined": lambda: op.joined(q, k, v, *prefix),
    }
