"""What a device can do at most: its matrix rates, its memory's bandwidth, and a launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peftfx.kernels.timing import clock, medians


def rates(device: torch.device, rounds: int = 15, size: int | None = None) -> dict[str, float]:
    """Measures *device* by plain torch.

    Returns:
        ``tflops`` of 16-bit, tf32 and fp32 products x·Wᵀ of random numbers, ``gigabytes`` a second
        of a copy (bytes read and written), ``launch``: microseconds from one tiny kernel of a graph
        to the next; on a CPU, what a call on one number takes.

    Args:
        size: of the matrices; 8192 on a GPU and 1024 on a CPU.
    """
    gpu = device.type == "cuda"
    size = size or (8192 if gpu else 1024)
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for name, dtype, precision in (
            ("tflops", torch.bfloat16, "highest"),
            ("tflops_tf32", torch.float32, "high"),
            ("tflops_fp32", torch.float32, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            taken = medians(clock(device), {"": lambda: F.linear(a, b)}, rounds)  # noqa: B023
            found[name] = 2 * size**3 / taken[""] / 1e12
    finally:
        torch.set_float32_matmul_precision(before)
    numbers = torch.randn(size**2 * (32 if gpu else 16), device=device)
    other, one, many = torch.empty_like(numbers), torch.zeros(1, device=device), 100

    def calls() -> None:
        for _ in range(many):
            one.add_(1.0)

    taken = medians(
        clock(device), {"copy": lambda: other.copy_(numbers), "calls": calls}, rounds
    )  # fmt: skip
    found["gigabytes"] = 2 * numbers.nbytes / taken["copy"] / 1e9
    found["launch"] = 1e6 * taken["calls"] / many
    return found
