"""Launches every kernel at odd sizes on a GPU: run under ``compute-sanitizer``.

Operands and what is expected are made on the CPU: nothing but the kernels, and copies and sums
around them, runs under the checker.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.runner import Drop, kernels
from peftfx.kernels.low_rank_linear.tune import exact, results, verify
from tests.kernels.test_low_rank_kernels import noting

CALLS = (
    Sizes(70, 72, (40,), 3, bias=True),  # descriptors take it, with a ragged edge all around
    Sizes(70, 65, (40, 33, 7), 5),
    Sizes(70, 65, (41,), 5, drops=True),
    Sizes(70, 65, (41,), 5, weight=False),
    Sizes(9, 65, (41, 12), 5),
    Sizes(300, 129, (70,), 130),
)


def moved(value: Any, device: str) -> Any:
    """*value* with its tensors on *device*."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [moved(v, device) for v in value]
    if isinstance(value, (Operands, Drop)):
        return replace(value, **{f.name: moved(getattr(value, f.name), device)
                                 for f in fields(value)})  # fmt: skip
    return value


def main(
    device: str = "cuda",
    calls: Sequence[Sizes] = CALLS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> None:
    launched: set[str] = set()
    for dtype in dtypes:
        for sizes in calls:
            operands = Operands.of(sizes, dtype, drawn(torch.device("cpu")))
            expected, given = exact(operands), moved(operands, device)
            for descriptors in (True, False):
                run = noting(device, descriptors=descriptors)
                wrong = verify([t.cpu() for t in results(given, run)], expected)
                assert wrong is None, (sizes, dtype, wrong)
                launched.update(run.launched)
    missing = {k.fn.__name__ for k in vars(kernels()).values() if hasattr(k, "fn")} - launched
    assert not missing, missing
    print(f"launched {len(launched)} kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])
