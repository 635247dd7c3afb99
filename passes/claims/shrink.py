"""Claims of the kernels that make S where x is made (:mod:`peftfx.kernels.shrink`), and prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.devices import Device, computes, describe
from peftfx.kernels.low_rank_linear.forms import OPAQUE, tensors
from peftfx.kernels.shrink.launch import FORMS, MOST_R, compute, shape_of
from peftfx.passes.claims import cost
from peftfx.passes.claims.kernels import DTYPES

ROWS = 16  # of a program
ABSORBED = "absorbed"  # what PEFTFX_FORMS calls a low-rank op whose S is made elsewhere


@dataclass(frozen=True)
class Shrink:
    """Triton's kernels; ``anywhere``: on any device where they run, the interpreter included."""

    name: str = "triton"
    anywhere: bool = False
    ops: tuple[str, ...] = tuple(FORMS)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        A = args[4] if op == "norm_shrink" else args[2]
        return self.suits(args[0], sum(int(a.shape[0]) for a in A))

    def suits(self, x: Tensor, ranks: int) -> str | None:
        """Why an x [..., K] with so many ranks behind it is nothing for the kernels."""
        if x.device.type != "cuda" and not self.anywhere:
            return f"it is for GPUs, and this is on {x.device.type}"
        if describe(x.device) is None:
            return "no GPU is at hand for which there are kernels"
        if x.dtype not in DTYPES:
            return f"there is no kernel for {x.dtype}"
        return f"{ranks} ranks read one x, a program holds {MOST_R}" if ranks > MOST_R else None

    def emit(self, op: str, *args: Any) -> Any:
        if tensors(args)[0].is_cuda:
            return compute(op, args, traced=True)
        opaque: Any = getattr(torch.ops.peftfx, OPAQUE + op)
        return opaque(*args)


def pays(
    site: tuple[str, Sequence[Any]], rest: Sequence[Any], made: tuple[str, Sequence[Any]],
    looped: bool,
) -> str | None:  # fmt: skip
    """Why a low-rank op should make its S itself, if it should.

    Args:
        site: the low-rank op and its arguments, fake tensors for tensors.
        rest: arguments of ``low_rank_expand``, which would be left of it.
        made: the op that would make x and S, and its arguments.
        looped: whether x is made in one loop with what it is made of, which would have to be read.
    """
    order, device = cost.forced(site[0]), computes(made[1][0].device)
    if order is not None:
        return None if order == ABSORBED else f"PEFTFX_FORMS orders {order}"
    apart, whole = loop(*made, looped, device), price(*made, device)
    before, after = _least(site, device), _least((cost.EXPAND, rest), device)
    if None in (apart, whole, before, after):
        return "the times are not known here"
    one, two = before + apart, after + whole  # type: ignore[operator]
    if two < one:
        return None
    more = ", which is made in one loop with what it is a norm of" if looped else ""
    return (
        f"S made with x{more} is predicted at {two * 1e3:.3f} ms, by itself at {one * 1e3:.3f} ms"
    )


def price(op: str, args: Sequence[Any], device: Device | None) -> float | None:
    """Seconds of *op*: every tensor once from memory, A for each program and what a norm reads
    twice from the L2 cache."""
    rates = None if device is None else cost.figures(device)
    if rates is None or device is None:
        return None
    A = args[4] if op == "norm_shrink" else args[2]
    shape = shape_of(op, args[0], A, args[-1])
    once = _bytes(op, args)
    programs = max(1, -(-shape.m // ROWS))
    again = programs * shape.r * shape.k * shape.dtype.itemsize
    again += _sources(op, args) if op == "norm_shrink" else 0
    filled = min(1.0, programs / device.processors)
    memory = rates.gigabytes * 1e9 * filled
    flops = 2 * shape.m * shape.k * shape.r
    most = max(
        flops / (rates.rate(shape.dtype, shape.tf32) * filled),
        once / memory,
        (once + again) / (cost.CACHE * memory),
    )
    return most + 2 * rates.launch * 1e-6  # A is joined and rounded first


def loop(op: str, args: Sequence[Any], looped: bool, device: Device | None) -> float | None:
    """Seconds of the loop that makes x and no S, beyond those of the loop that it is part of."""
    rates = None if device is None else cost.figures(device)
    if rates is None:
        return None
    size = _bytes(op, args) - (_sources(op, args) if looped else 0)
    return size / (rates.gigabytes * 1e9) + (0.0 if looped else rates.launch * 1e-6)


def _sources(op: str, args: Sequence[Any]) -> int:
    """Bytes of the wide tensors that are read: x and what is added to it, or gate and up."""
    return sum(_size(t) for t in args[:2] if t is not None)


def _bytes(op: str, args: Sequence[Any]) -> int:
    """Bytes that are read and written at least, S left out."""
    y = _size(args[0]) // args[0].element_size() * args[-1].itemsize
    adds = op == "norm_shrink" and args[1] is not None
    return _sources(op, args) + y + (_size(args[0]) if adds else 0)


def _size(t: Tensor) -> int:
    count = 1
    for size in t.shape:
        count *= dynamo.hint(size)
    return count * t.element_size()


def _least(call: tuple[str, Sequence[Any]], device: Device | None) -> float | None:
    if device is None:
        return None
    known = [p.seconds for p in cost.prices(cost.Call.of(*call), device).values() if p.seconds]
    return min(known) if known else None
