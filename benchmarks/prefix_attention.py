"""Attention with a prefix, merged and joined, against attention without: ``python -m
benchmarks.prefix_attention``.

A step of decoding over a long cache, and a forward and backward as in training. Results are
compared first; then the forms run interleaved and medians are taken. The numbers go to
``benchmarks/results/cpu/prefix_attention.json``.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.run import RESULTS
from peftfx.kernels.prefix_attention import op

P, D = 20, 64
CASES: dict[str, dict[str, Any]] = {
    "decode, 8192 cached": {"batch": 4, "heads": 12, "kv": 12, "s": 1, "t": 8192, "train": False},
    "decode, 8192 cached, GQA": {"batch": 4, "heads": 12, "kv": 3, "s": 1, "t": 8192,
                                 "train": False},
    "train, 2048 tokens": {"batch": 1, "heads": 12, "kv": 12, "s": 2048, "t": 2048, "train": True},
}  # fmt: skip
Run = Callable[[], Tensor]


def forms(case: dict[str, Any]) -> tuple[dict[str, Run], list[Tensor]]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(case["train"])

    q = made(case["batch"], case["heads"], case["s"], D)
    k, v = (made(case["batch"], case["kv"], case["t"], D) for _ in range(2))
    pk, pv = (made(case["kv"], P, D) for _ in range(2))
    causal, scale = bool(case["train"]), D**-0.5
    gqa = case["heads"] != case["kv"]
    runs: dict[str, Run] = {
        "without": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal,
                                                          enable_gqa=gqa),
        "merged": lambda: torch.ops.peftfx.prefix_attention(
            q, k, v, pk, pv, None, None, causal, scale
        )[0],
        "joined": lambda: op.joined(q, k, v, pk, pv, None, None, causal, scale),
    }  # fmt: skip
    return runs, [q, k, v, pk, pv]


def timed(run: Run, train: bool) -> float:
    start = time.perf_counter()
    out = run()
    if train:
        out.backward(torch.ones_like(out))
    return (time.perf_counter() - start) * 1e3


def main(rounds: int = 15) -> None:
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        runs, _ = forms(case)
        difference = (runs["merged"]() - runs["joined"]()).abs().max()
        assert float(difference.detach()) < 1e-4, name
        times: dict[str, list[float]] = {form: [] for form in runs}
        for turn in range(rounds + 2):
            for form, run in runs.items():
                took = timed(run, case["train"])
                if turn > 1:
                    times[form].append(took)
        found[name] = {form: round(statistics.median(t), 2) for form, t in times.items()}
        print(name, found[name])
    content = {
        "unit": "ms, float32", "prefix": P, "head width": D, "cases": CASES, "median": found,
        "rounds": rounds, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }  # fmt: skip
    path = RESULTS / "cpu" / "prefix_attention.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
