"""Kernels of the losses: a program takes a row of logits, and puts their gradient in their place.

The first pass keeps the row's maximum and sum (Milakov & Gimelshein, 2018, arXiv 1805.02867), the
second reads the row again, from the L2 cache where it fits, and writes. A label that is no class
makes NaN of its loss.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfx.kernels.devices import INTERPRETER, describe

BLOCK, WARPS = 4096, 8  # classes of one step


@triton.jit
def _bent(z, cap, CAPPED: tl.constexpr):
    """``cap·tanh(z / cap)``, by the sigmoid that every target has."""
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    return z


@triton.jit
def _more(z, most, total):
    """The maximum and the sum of exponentials of a row, with a block of it more."""
    new = tl.maximum(most, tl.max(z, 0))
    base = tl.where(new == -float("inf"), 0.0, new)  # nothing but classes that cannot be, so far
    return new, total * tl.exp(most - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def cross_entropy_kernel(
    z, labels, losses, classes, stride, ignore, smoothing, scale, cap,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    if label == ignore:
        tl.store(losses + row, 0.0)
        if GRAD:
            for start in range(0, classes, BLOCK):
                at = start + columns
                tl.store(z + at, tl.zeros([BLOCK], z.dtype.element_ty), mask=at < classes)
    else:
        most, total, plain = -float("inf"), 0.0, 0.0
        for start in range(0, classes, BLOCK):
            at = start + columns
            given = tl.load(z + at, mask=at < classes, other=0.0).to(tl.float32) * scale
            bent = _bent(given, cap, CAPPED)
            if SMOOTH:
                plain += tl.sum(tl.where(at < classes, bent, 0.0), 0)
            most, total = _more(tl.where(at < classes, bent, -float("inf")), most, total)
        lse = most + tl.log(total)
        known = (label >= 0) & (label < classes)
        own = tl.load(z + label, mask=known, other=float("nan")).to(tl.float32) * scale
        loss = lse - (1.0 - smoothing) * _bent(own, cap, CAPPED)
        if SMOOTH:
            loss -= smoothing * plain / classes
        tl.store(losses + row, loss)
        if GRAD:
            for start in range(0, classes, BLOCK):
                at = start + columns
                given = tl.load(z + at, mask=at < classes, other=0.0).to(tl.float32) * scale
                bent = _bent(given, cap, CAPPED)
                d = tl.exp(bent - lse) - tl.where(at == label, 1.0 - smoothing, 0.0)
                if SMOOTH:
                    d -= smoothing / classes
                if CAPPED:
                    d *= 1.0 - (bent / cap) * (bent / cap)
                tl.store(z + at, (d * scale).to(z.dtype.element_ty), mask=at < classes)


@triton.jit
def kl_kernel(
    z, t, counts, losses, classes, stride, stride_t, temperature,
    GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    t += row * stride_t
    columns = tl.arange(0, BLOCK)
    if tl.load(counts + row) == 0:
        tl.store(losses + row, 0.0)
        if GRAD:
            for start in range(0, classes, BLOCK):
                at = start + columns
                tl.store(z + at, tl.zeros([BLOCK], z.dtype.element_ty), mask=at < classes)
    else:
        most, total, most_t, total_t = -float("inf"), 0.0, -float("inf"), 0.0
        for start in range(0, classes, BLOCK):
            at = start + columns
            inside, low = at < classes, -float("inf")
            most, total = _more(
                tl.load(z + at, mask=inside, other=low).to(tl.float32) / temperature, most, total
            )
            most_t, total_t = _more(
                tl.load(t + at, mask=inside, other=low).to(tl.float32) / temperature,
                most_t, total_t,
            )  # fmt: skip
        lse, lse_t, loss = most + tl.log(total), most_t + tl.log(total_t), 0.0
        for start in range(0, classes, BLOCK):
            at = start + columns
            inside = at < classes
            log_s = tl.load(z + at, mask=inside, other=0.0).to(tl.float32) / temperature - lse
            log_t = tl.load(t + at, mask=inside, other=0.0).to(tl.float32) / temperature - lse_t
            p_t = tl.exp(log_t)
            loss += tl.sum(tl.where(inside & (p_t > 0), p_t * (log_t - log_s), 0.0), 0)
            if GRAD:
                d = temperature * (tl.exp(log_s) - p_t)
                tl.store(z + at, d.to(z.dtype.element_ty), mask=inside)
        tl.store(losses + row, temperature * temperature * loss)


# -- launches --------------------------------------------------------------------------------------


def cross_entropy(
    z: Tensor, labels: Tensor, losses: Tensor, ignore: int, smoothing: float, scale: float,
    cap: float, grad: bool,
) -> None:  # fmt: skip
    """Losses of logits ``z [C, V]``, which become their own gradient where that is wanted."""
    launch(cross_entropy_kernel, cross_entropy_arguments(
        z, labels.contiguous(), losses, ignore, smoothing, scale, cap, grad
    ))  # fmt: skip


def cross_entropy_arguments(
    z: Tensor, labels: Tensor, losses: Tensor, ignore: int, smoothing: float, scale: float,
    cap: float, grad: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "z": z, "labels": labels, "losses": losses, "classes": z.shape[1], "stride": z.stride(0),
        "ignore": ignore, "smoothing": smoothing, "scale": scale, "cap": cap or 1.0,
        "CAPPED": cap > 0, "SMOOTH": smoothing > 0, "GRAD": grad, **_tile(z),
    }  # fmt: skip


def kl(
    z: Tensor, teacher: Tensor, counts: Tensor, losses: Tensor, temperature: float, grad: bool
) -> None:
    """The divergence of each row of logits ``z [C, V]`` from *teacher* ``[C, V]``."""
    t = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    launch(kl_kernel, kl_arguments(z, t, counts.to(torch.int8), losses, temperature, grad))


def kl_arguments(
    z: Tensor, t: Tensor, counts: Tensor, losses: Tensor, temperature: float, grad: bool
) -> dict[str, Any]:
    return {
        "z": z, "t": t, "counts": counts, "losses": losses, "classes": z.shape[1],
        "stride": z.stride(0), "stride_t": t.stride(0), "temperature": temperature, "GRAD": grad,
        **_tile(z),
    }  # fmt: skip


def _tile(z: Tensor) -> dict[str, int]:
    block = min(triton.next_power_of_2(z.shape[1]), BLOCK)
    return {"BLOCK": block, "num_warps": max(1, WARPS * block // BLOCK), "num_stages": 1}


def launch(kernel: Any, arguments: dict[str, Any]) -> None:
    """A program for each row; launched on the device of the logits."""
    z = arguments["z"]
    device = describe(z.device)
    if device is not None and device.target == INTERPRETER:
        arguments = {k: v for k, v in arguments.items() if k not in ("num_warps", "num_stages")}
    with torch.cuda.device_of(z):
        kernel[(z.shape[0],)](**arguments)
