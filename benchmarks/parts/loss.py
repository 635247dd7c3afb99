"""The loss of a frozen head, of hidden states on: forward, and backward to them. `whole` is
`F.cross_entropy` of all logits in float32, as HF has it; `liger's order` that of Liger's fused
loss, as many chunks as the vocabulary is wider than the hidden state, their gradient in place,
in plain torch; `liger` its kernels, where they are installed. Memory is what a step takes
beside head and hidden states: on a CPU by torch's own records.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import peak_on_cpu, peaks
from benchmarks.registry import Measure, Row, Setting, short
from benchmarks.verify import gate
from peftfx.kernels.timing import Run
from peftfx.losses import linear_cross_entropy

TARGET = "on a GPU Liger's time ≥2 of ours at ≤8192 tokens; memory that of a chunk of logits"
DEVICES = ("cuda", "cpu")
GPU = {
    "Llama-3 8B's": (4096, 128256),
    "Qwen3 1.7B's": (2048, 151936),
    "Gemma 2 2B's": (2304, 256000),
}


def cases(setting: Setting) -> Mapping[str, Measure]:
    heads: Mapping[str, tuple[int, int]] = GPU
    rows: tuple[int, ...] = (2048, 4096, 8192)
    if not setting.gpu:
        heads, rows = {"SmolLM 135M's": (576, 49152)}, (512, 1024)
    if setting.tiny:
        heads, rows = {"tiny": (8, 40)}, (6,)
    return {
        f"{name}, {m} tokens, {short(dtype)}": functools.partial(_row, setting, name, m, *h, dtype)
        for name, h in heads.items()
        for m in rows
        for dtype in setting.dtypes
    }


def _row(setting: Setting, name: str, m: int, k: int, v: int, dtype: torch.dtype) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, k, generator=g).to(setting.device, dtype) for n in (m, v))
    weight /= k**0.5
    labels = torch.randint(v, (m,), generator=g).to(setting.device)
    x.requires_grad_()
    losses: dict[str, Any] = {
        "whole": lambda: F.cross_entropy(F.linear(x, weight).float(), labels),
        "peftfx": lambda: linear_cross_entropy(x, weight, labels),
        "liger's order": lambda: _Liger.apply(x, weight, labels),
    }
    missing = {}
    try:
        losses["liger"] = _liger(x, weight, labels)
    except ModuleNotFoundError as error:
        missing["liger"] = str(error)
    if not setting.gpu:  # its kernels are for GPUs
        losses.pop("liger", None)
        missing["liger"] = "its kernels are for GPUs"
    wanted = _whole(x, weight, labels, rows=min(m, 512))
    errors = {
        name: gate(name, _first(loss, x, len(wanted[1])), wanted) for name, loss in losses.items()
    }
    runs: dict[str, Run] = {
        name: functools.partial(_step, loss, x) for name, loss in losses.items()
    }
    values, spread = setting.measure(runs, capture=False)
    memory = peaks(runs) if setting.gpu else {n: peak_on_cpu(run) / 1e6 for n, run in runs.items()}
    flops, size = 4 * m * k * v, (2 * v * k + 3 * m * k) * dtype.itemsize
    case = f"{name}, {m} tokens, {short(dtype)}"
    return [Row(case, values, over="whole", errors=errors, spread=spread, megabytes=memory,
                missing=missing, least=setting.floor(flops, size, dtype))]  # fmt: skip


def _step(loss: Any, x: Tensor) -> None:
    x.grad = None
    loss().backward()


def _whole(x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> list[Tensor]:
    """The loss and the first rows' gradient in fp64 of what torch's dtype makes of the operands."""
    w, total, grads = weight.double(), x.new_zeros((), dtype=torch.float64), None
    for at in range(0, len(x), rows):
        part = x.detach()[at : at + rows].double().requires_grad_()
        loss = F.cross_entropy(part @ w.t(), labels[at : at + rows], reduction="sum") / len(x)
        if grads is None:
            (grads,) = torch.autograd.grad(loss, part)
        total += loss.detach()
    assert grads is not None
    return [total, grads]


def _first(loss: Any, x: Tensor, rows: int) -> list[Tensor]:
    """The loss and the gradient of the first *rows*."""
    found: Tensor = loss()
    return [found.detach(), torch.autograd.grad(found, x)[0][:rows]]


class _Liger(torch.autograd.Function):
    """Liger's order of work, for a frozen head: ``next_power_of_2(M / ⌈V / K⌉)`` rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        m, parts = len(x), math.ceil(len(weight) / x.shape[1])
        size = 1 << (math.ceil(m / parts) - 1).bit_length()
        dx, total = torch.empty_like(x), x.new_zeros((), dtype=torch.float32)
        for part, label, out in zip(*(t.split(size) for t in (x, labels, dx)), strict=True):
            z = part @ weight.t()
            log_p = z.float().log_softmax(-1)
            total -= log_p.gather(1, label[:, None]).sum() / m
            d = log_p.exp_()
            d.scatter_add_(1, label[:, None], d.new_full((len(d), 1), -1.0))
            torch.mm(d.div_(m).to(x.dtype), weight, out=out)
        ctx.save_for_backward(dx)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (dx,) = ctx.saved_tensors
        return dx * grad.to(dx.dtype), None, None


def _liger(x: Tensor, weight: Tensor, labels: Tensor) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(weight, x, labels)
