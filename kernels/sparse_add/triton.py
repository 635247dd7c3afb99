"""Kernels of the sparse update: sums over the kept places, in one fixed order, without atomics.

Both read x and dY turned, ``[K, M]`` and ``[N, M]``: a kept place then is a row of neighbours in
memory, where a column of x would be one element out of every 32 bytes that are read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfx.kernels.devices import INTERPRETER, describe

TILE = {"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


@triton.jit
def sparse_add_sum_kernel(
    y, turned, values, columns, starts, out, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``out [m, n] = y + Σ values·turned[column]`` over each row's places, one a step."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(starts + outs, mask=outs < n, other=0)
    last = tl.load(starts + outs + 1, mask=outs < n, other=0)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(tl.max(last - first, 0)):
        there = first + step < last
        value = tl.load(values + first + step, mask=there, other=0.0).to(tl.float32)
        column = tl.load(columns + first + step, mask=there, other=0).to(tl.int64)
        read = turned + column[:, None] * m + rows[None, :]
        x = tl.load(read, mask=there[:, None] & (rows < m)[None, :], other=0.0).to(tl.float32)
        total += value[:, None] * x
    at = rows.to(tl.int64)[:, None] * n + outs[None, :]
    inside = (rows < m)[:, None] & (outs < n)[None, :]
    base = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (base + tl.trans(total)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def sparse_add_dot_kernel(
    dy, turned, rows, columns, out, m, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``out[i] = dy[row i]·turned[column i]``, sums over m."""
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows + at, mask=at < count, other=0).to(tl.int64)
    column = tl.load(columns + at, mask=at < count, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, m, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        inside = (at < count)[:, None] & (part < m)[None, :]
        a = tl.load(dy + row[:, None] * m + part[None, :], mask=inside, other=0.0)
        b = tl.load(turned + column[:, None] * m + part[None, :], mask=inside, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + at, tl.sum(total, 1).to(out.dtype.element_ty), mask=at < count)


# -- launches --------------------------------------------------------------------------------------


def added(y: Tensor, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """``y [M, N] + x [M, K]·ΔWᵀ``."""
    (m, k), n = x.shape, y.shape[1]
    bounds = torch.arange(n + 1, device=index.device, dtype=index.dtype) * k
    y, out = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
    launch(sparse_add_sum_kernel, sum_arguments(
        y, x.t().contiguous(), values, index % k, torch.searchsorted(index, bounds), out
    ), (triton.cdiv(m, TILE["BLOCK_M"]), triton.cdiv(n, TILE["BLOCK_N"])))  # fmt: skip
    return out


def sum_arguments(
    y: Tensor, turned: Tensor, values: Tensor, columns: Tensor, starts: Tensor, out: Tensor
) -> dict[str, Any]:
    return {
        "y": y, "turned": turned, "values": values, "columns": columns, "starts": starts,
        "out": out, "m": y.shape[0], "n": y.shape[1], **TILE,
    }  # fmt: skip


def sampled(dy: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``dYᵀ·X`` at the places of *index*, ``[n]`` in *dtype*."""
    k, out = x.shape[1], torch.empty(index.shape, dtype=dtype, device=x.device)
    launch(sparse_add_dot_kernel, dot_arguments(
        dy.t().contiguous(), x.t().contiguous(), index // k, index % k, out
    ), (triton.cdiv(len(index), TILE["BLOCK_N"]),))  # fmt: skip
    return out


def dot_arguments(
    dy: Tensor, turned: Tensor, rows: Tensor, columns: Tensor, out: Tensor
) -> dict[str, Any]:
    return {
        "dy": dy, "turned": turned, "rows": rows, "columns": columns, "out": out,
        "m": dy.shape[1], "count": len(rows), **TILE,
    }  # fmt: skip


def launch(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Launched on the device of the operands."""
    device = describe(arguments["out"].device)
    if device is not None and device.target == INTERPRETER:
        arguments = {k: v for k, v in arguments.items() if k not in ("num_warps", "num_stages")}
    with torch.cuda.device_of(arguments["out"]):
        kernel[grid](**arguments)
