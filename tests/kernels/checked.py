"""Launches every kernel at odd sizes on a GPU: run under ``compute-sanitizer``.

Each tensor is an allocation of its own, so that what lies behind it is nobody's.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ["TRITON_INTERPRET"] = "0"

import torch

from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.runner import kernels
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


def main() -> None:
    launched: set[str] = set()
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in CALLS:
            operands = Operands.of(sizes, dtype, drawn(torch.device("cuda")))
            for descriptors in (True, False):
                run = noting("cuda", descriptors=descriptors)
                wrong = verify(results(operands, run), exact(operands))
                assert wrong is None, (sizes, dtype, wrong)
                launched.update(run.launched)
    torch.cuda.synchronize()
    missing = {k.fn.__name__ for k in vars(kernels()).values() if hasattr(k, "fn")} - launched
    assert not missing, missing
    print(f"launched {len(launched)} kernels")


if __name__ == "__main__":
    main()
