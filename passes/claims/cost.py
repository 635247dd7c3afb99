"""What a call of a low-rank op costs in each of its forms: measured where it was, else arithmetic.

``measured/<device>.json`` holds what was measured on a device, and nothing else: its figures
(matrix rate, bandwidth, launch) and times of calls by op, shape class and form. For calls of other
shapes, and for other devices, times are the roofline's, from figures that are then called assumed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peftfx.errors import SpecError, nearest
from peftfx.kernels.devices import Device, describe
from peftfx.kernels.low_rank_linear.configs import Shape, slug, tuned
from peftfx.kernels.low_rank_linear.forms import FORMS as OPS
from peftfx.kernels.low_rank_linear.forms import shape_of, tensors
from peftfx.kernels.low_rank_linear.runner import FEW, MOST_R

MEASURED = Path(__file__).parent / "measured"
FORMS = ("triton", "accumulate", "definition")
BACKWARD = ("low_rank_backward", "low_rank_group_backward")


@dataclass(frozen=True)
class Figures:
    """Rates of a device. ``source`` says where they are from."""

    tflops: float  # of 16-bit products, by the library
    tflops_fp32: float  # of fp32 products as torch is told to make them
    gigabytes: float  # per second, of device memory
    launch: float  # microseconds between two small kernels of a stream
    triton: float  # rate of a Triton product over the library's
    source: str


# Rates for want of measured ones: 16-bit and fp32 TFLOP/s, GB/s. Those of H100 and H200 were read
# off one machine each by plain torch, the others are 0.8 of the vendor's. That a launch takes 3 µs
# and that Triton makes 0.92 of the library's rate are guesses, here to be replaced.
ASSUMED = {
    "NVIDIA A100-SXM4-80GB": (250.0, 15.6, 1600.0),
    "NVIDIA H100 80GB HBM3": (790.0, 53.0, 3000.0),
    "NVIDIA H200": (790.0, 53.0, 4300.0),
    "NVIDIA B200": (1800.0, 64.0, 6400.0),
    "AMD Instinct MI300X": (1045.0, 130.0, 4240.0),
}


@dataclass(frozen=True)
class Price:
    """Work of a call: floating-point operations, bytes of device memory, and the time predicted."""

    flops: int
    bytes: int
    seconds: float | None = None
    source: str = ""

    def __str__(self) -> str:
        text = f"{_unit(self.flops)}FLOP, {_unit(self.bytes)}B"
        if self.seconds is None:
            return text
        return f"{text}, {self.seconds * 1e3:.3f} ms ({self.source})"


def _unit(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


@functools.cache
def table(device: str) -> Mapping[str, Any]:
    """What was measured on *device*: ``figures`` and ``calls``; empty where nothing was."""
    path = MEASURED / f"{slug(device)}.json"
    found: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def figures(device: Device) -> Figures | None:
    """The rates of *device*, None where nobody knows any."""
    found = table(device.name).get("figures")
    if found is not None:
        return Figures(**found, source="roofline, measured rates")
    if device.name not in ASSUMED:
        return None
    matrix, wide, memory = ASSUMED[device.name]
    source = f"roofline, assumed {matrix:.0f} TFLOP/s, {memory:.0f} GB/s, 3 µs, Triton 0.92"
    return Figures(matrix, wide, memory, 3.0, 0.92, source)


@dataclass(frozen=True)
class Call:
    """One call of an op, as far as its cost goes."""

    op: str
    shape: Shape
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    has_weight: bool
    factor_bytes: int  # of one element of A and B

    @classmethod
    def of(cls, op: str, args: Sequence[Any]) -> Call:
        shape = shape_of(op, args)
        at = {"low_rank_add": 2, "low_rank_linear": 3, "low_rank_linear_group": 3}.get(op, 4)
        A, B = (x if isinstance(x, (list, tuple)) else [x] for x in args[at : at + 2])
        weight = {"low_rank_add": None, "low_rank_backward": args[3]}.get(op, True)
        return cls(
            op, shape, tuple(int(b.shape[0]) for b in B), tuple(int(a.shape[0]) for a in A),
            weight is not None, A[0].element_size(),
        )  # fmt: skip

    @property
    def key(self) -> str:
        return f"{self.op}/{self.shape.key}"

    @property
    def rival(self) -> str:
        """The form of the library's products: added up in place where there is what to add to."""
        return "accumulate" if self.has_weight else "definition"

    @property
    def few(self) -> bool:
        """Whether the kernels take it in one launch."""
        enough = self.shape.m <= FEW and max(self.ranks) <= MOST_R and not self.shape.drops
        return enough and self.has_weight and self.op not in BACKWARD


def least(call: Call) -> Price:
    """What no form can go below: every input read once, every result written once."""
    s = call.shape
    e = s.dtype.itemsize
    low = sum(n * r for n, r in zip(call.outs, call.ranks, strict=True))
    wide = 2 * s.m * s.n * s.k if call.has_weight else 0
    factors = (s.r * s.k + low) * call.factor_bytes
    weights = s.n * s.k * e if call.has_weight else 0
    if call.op in BACKWARD:  # reads dY, x, S, W, A, B; writes dX, dA, dB
        flops = wide + 2 * s.m * (2 * s.r * s.k + 2 * low)
        return Price(flops, (s.m * (s.n + 2 * s.k + s.r)) * e + weights + 2 * factors)
    more = 0 if call.has_weight else s.m * s.n * e  # the y that is added to
    flops = wide + 2 * s.m * (s.r * s.k + low)
    return Price(flops, (s.m * (s.n + s.k + s.r)) * e + weights + factors + more)


def prices(call: Call, device: Device) -> dict[str, Price]:
    """The price of each form that can be priced, measured ones before computed ones."""
    rates = figures(device)
    if rates is None:
        return {}
    known = table(device.name).get("calls", {}).get(call.key, {})
    found = {}
    for form, parts in (("triton", _triton(call, device)), (call.rival, _library(call))):
        if form in known:
            found[form] = replace(least(call), seconds=known[form] / 1e3, source="measured")
        else:
            found[form] = _price(call, parts, rates, rates.triton if form == "triton" else 1.0)
    measured = {form: price for form, price in found.items() if price.source == "measured"}
    return measured if len(measured) == len(found) else found


@dataclass(frozen=True)
class Part:
    """One launch: operations at the matrix rate, and bytes."""

    flops: int
    bytes: int


def _price(call: Call, parts: Sequence[Part], rates: Figures, efficiency: float) -> Price:
    wide = call.shape.dtype == torch.float32
    rate = (rates.tflops_fp32 if wide else rates.tflops) * 1e12 * efficiency
    seconds = sum(
        max(p.flops / rate, p.bytes / (rates.gigabytes * 1e9)) + rates.launch * 1e-6 for p in parts
    )
    return Price(sum(p.flops for p in parts), sum(p.bytes for p in parts), seconds, rates.source)


def _triton(call: Call, device: Device) -> list[Part]:
    """The launches of :mod:`peftfx.kernels.low_rank_linear.launch`."""
    s, e, whole = call.shape, call.shape.dtype.itemsize, least(call)
    low = sum(n * r for n, r in zip(call.outs, call.ranks, strict=True))
    weights = s.n * s.k * e if call.has_weight else 0
    a, b = s.r * s.k * call.factor_bytes, low * call.factor_bytes
    if call.few:  # every program of 32 columns reads its A, from a cache three times as fast
        return [Part(whole.flops, whole.bytes + s.n // 32 * a // len(call.ranks) // 3)]
    wide = 2 * s.m * s.n * s.k if call.has_weight else 0
    if call.op not in BACKWARD:
        product = Part(
            wide + 2 * s.m * low, (s.m * (s.n + s.k + s.r)) * e + weights + b
            if call.has_weight else (s.m * (2 * s.n + s.r)) * e + b,
        )  # fmt: skip
        return [Part(2 * s.m * s.r * s.k, s.m * (s.k + s.r) * e + a), product]
    tiles = sum(-(-n // 128) for n in call.outs)
    planes_s = tiles * s.m * max(call.ranks) * 4
    parts = max(1, -(-2 * device.processors // tiles))
    planes_b, planes_a = parts * low * 4, parts * s.r * s.k * 4
    return [
        Part(4 * s.m * low, s.m * (s.n + s.r) * e + b + planes_s + planes_b),
        Part(0, planes_s + s.m * s.r * e),
        Part(0, planes_b + b),
        Part(2 * s.m * s.r * s.k, s.m * (s.k + s.r) * e + planes_a),
        Part(0, planes_a + a),
        Part(wide + 2 * s.m * s.r * s.k, (s.m * (s.n + s.k + s.r)) * e + weights + a),
    ]


def _library(call: Call) -> list[Part]:
    """The library's products: thin ones, and the wide one added to one of them in place.

    Where that cannot be, a pass of its own adds: it reads two wide tensors and writes one.
    """
    s, e = call.shape, call.shape.dtype.itemsize
    pairs = list(zip(call.outs, call.ranks, strict=True))
    down = Part(2 * s.m * s.r * s.k, (s.m * (s.k + s.r) + s.r * s.k) * e)
    in_place = call.rival == "accumulate"
    if call.op not in BACKWARD:
        parts = [down]
        for n, r in pairs:
            parts.append(Part(2 * s.m * n * r, (s.m * (n + r) + n * r) * e))
            if in_place:
                parts.append(Part(2 * s.m * n * s.k, (s.m * (2 * n + s.k) + n * s.k) * e))
            else:
                parts.append(Part(0, 3 * s.m * n * e))
        return parts
    parts = []
    for n, r in pairs:  # dS and dB
        parts += [Part(2 * s.m * n * r, (s.m * (n + r) + n * r) * e)] * 2
    parts += [down, down]  # dA, and what dX starts from
    if call.has_weight:
        for n, _ in pairs:
            parts.append(Part(2 * s.m * n * s.k, (s.m * (n + 2 * s.k) + n * s.k) * e))
        if s.drops:  # the mask lies between the thin product and the sum
            parts.append(Part(0, 2 * s.m * s.k * e))
    return parts


def settings() -> tuple[Any, ...]:
    """What else than code and tables decides a choice: orders by hand, tiles found here."""
    names = ("PEFTFX_FORMS", "PEFTFX_TRITON", "PEFTFX_DEVICE", "PEFTFX_CACHE")
    device = describe(torch.device("cuda")) if torch.cuda.is_available() else None
    tiles = sorted(tuned(device.name).items()) if device is not None else []
    return (*(os.environ.get(name) for name in names), repr(tiles))


def forced(op: str) -> str | None:
    """The form that ``PEFTFX_FORMS`` orders for *op*: ``form`` or ``op=form``, by commas."""
    chosen = None
    for item in filter(None, (i.strip() for i in os.environ.get("PEFTFX_FORMS", "").split(","))):
        name, equals, form = item.rpartition("=")
        if form not in FORMS:
            raise SpecError(f"PEFTFX_FORMS: {form!r} is no form", remedy=nearest(form, FORMS))
        if equals and name not in OPS:
            raise SpecError(f"PEFTFX_FORMS: {name!r} is no op", remedy=nearest(name, OPS))
        if name in ("", op):
            chosen = form
    return chosen


def verdict(form: str, op: str, args: Sequence[Any]) -> str | None:
    """None if *form* is the one to take for this call, else the reason."""
    order = forced(op)
    if order is not None:
        return None if order == form else f"PEFTFX_FORMS orders {order}"
    device = describe(tensors(args)[0].device)
    found = prices(Call.of(op, args), device) if device is not None else {}
    if form not in found:
        return None
    best = min(found, key=lambda f: found[f].seconds or 0.0)
    if best == form:
        return None
    return f"{best} is predicted at {_ms(found[best])}, this at {_ms(found[form])}"


def _ms(price: Price) -> str:
    return f"{(price.seconds or 0.0) * 1e3:.3f} ms"


def predict(op: str, args: Sequence[Any], form: str) -> str:
    """The price of a call in *form*, for people; the least work where no device's is known."""
    if op not in OPS:
        return ""
    call = Call.of(op, args)
    first = tensors(args)[0]
    device = describe(first.device) if first.is_cuda else None
    found = prices(call, device) if device is not None else {}
    return str(found.get(form, least(call)))
