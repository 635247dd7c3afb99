"""Seconds to bind 1,000 linears by name; microseconds that each linear takes of a compiled call
whose graph is not run, guards included, without a mark (`plain`) and what a mark adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.registry import Measure, Row, Setting
from peftfx.backends import Backend

TARGET = "a mark ≤1.5 µs"
DEVICES = ("cpu",)


def cases(setting: Setting) -> Mapping[str, Measure]:
    count = 20 if setting.tiny else 1000
    return {
        f"binding {count} linears": lambda: [_binding(count)],
        "a mark": lambda: [_mark(*((4, 3) if setting.tiny else (200, 300)))],
    }


def _binding(count: int) -> Row:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
    backend = Backend({"rules": [{"method": "lora", "name": "*", "rank": 2}]}, "eager")
    start = time.perf_counter()
    backend.bind(model)
    took = time.perf_counter() - start
    return Row(f"binding {count} linears", {"bind": took}, unit="s", over=None)


def _mark(sites: int, rounds: int) -> Row:
    x = torch.randn(1, 8)

    def median(adapts: bool) -> float:
        torch._dynamo.reset()
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(sites))).requires_grad_(False)

        def nothing(gm: Any, inputs: Any) -> Any:
            return lambda *args: (x,)  # the graph is not run: what is left is the call itself

        backend: Any = nothing
        if adapts:
            backend = Backend({"rules": [{"method": "lora", "name": "*", "rank": 2}]}, nothing)
            backend.bind(model, (x,))
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            compiled(x)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    plain = median(False)
    values = {"plain": 1e6 * plain / sites, "a mark adds": 1e6 * (median(True) - plain) / sites}
    return Row("a mark", values, unit="µs", over=None)
