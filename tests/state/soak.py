"""A small compiled model, trained and switched for long: what compiles again, and what grows.

    python -m tests.state.soak --steps 1000 --activations 10000

Memory is looked at three ways, after a warm-up of a tenth: the process's resident pages by a line
fitted through the second half (its rise over that half is told), Python's own allocations by
tracemalloc, half-way and at the end, and the number of live tensors, likewise, after a collection.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import peftfx
from tests.helpers import fill
from tests.state.bench import LORA, SPEC, X, base

SAMPLES = 100


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def live() -> tuple[int, int]:
    """Live tensors, and bytes that Python holds, after a collection."""
    gc.collect()
    tensors = sum(issubclass(type(found), Tensor) for found in gc.get_objects())
    return tensors, tracemalloc.get_traced_memory()[0]


def rise(values: list[int]) -> float:
    """What a line fitted through *values* rises by, from the first to the last."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values))
    return slope / sum((i - middle) ** 2 for i in range(n)) * (n - 1)


def soak(step: Callable[[int], object], count: int) -> dict[str, Any]:
    """Runs *step* so often; gives compilations and growth after the warm-up."""
    for i in range(count // 10):
        step(i)
    graphs = counters["stats"]["unique_graphs"]
    seen: list[int] = []
    tracemalloc.start()
    half = (0, 0)
    for i in range(count):
        step(i)
        if (i + 1) % (count // SAMPLES) == 0:
            seen.append(resident())
        if i + 1 == count // 2:
            half = live()
    end = live()
    tracemalloc.stop()
    return {
        "steps": count,
        "graphs": counters["stats"]["unique_graphs"] - graphs,
        "resident": rise(seen[SAMPLES // 2 :]),
        "tensors": end[0] - half[0],
        "python": end[1] - half[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.state.soak")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--activations", type=int, default=10_000)
    parser.add_argument("--lower", default="auto")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    model = peftfx.adapt(base(), SPEC, (X,), lower=chosen.lower)
    fill(peftfx.parameters(model))
    for i, name in enumerate("abc"):
        peftfx.add(model, {"rules": [{**LORA, "alpha": 3 + i}, SPEC["rules"][1]]}, name, (X,))
    optimizer = torch.optim.AdamW(peftfx.parameters(model), lr=1e-3)

    def train(i: int) -> None:
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    told = {"train": soak(train, chosen.steps)}
    ways: list[Any] = ["a", "b", {"a": 0.5, "c": 0.5}, "c", "default"]

    def switch(i: int) -> None:
        peftfx.activate(model, ways[i % len(ways)])
        with torch.no_grad():
            model(X)
            if i % 10 == 0:
                with peftfx.disabled(model):
                    model(X)

    told["switch"] = soak(switch, chosen.activations)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
