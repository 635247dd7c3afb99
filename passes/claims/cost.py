"""What a call of a low-rank op costs in each of its forms: measured where it was, else arithmetic.

:mod:`peftfx.kernels.measured` holds what was measured on a device: its rates, and times of calls by
op, shape class and form. For calls of other shapes times are the roofline's, from those rates; for
devices where nothing was measured from rates that are then called assumed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftfx.errors import SpecError, nearest
from peftfx.kernels import measured
from peftfx.kernels.devices import KNOWN, Device, computes
from peftfx.kernels.fused import FORMS as FUSED
from peftfx.kernels.low_rank_linear.configs import Shape, config
from peftfx.kernels.low_rank_linear.forms import FORMS as OPS
from peftfx.kernels.low_rank_linear.forms import shape_of, tensors
from peftfx.kernels.low_rank_linear.runner import DEPTH, one_launch

FORMS = ("triton", "opaque", "accumulate", "folded", "definition", "absorbed")
BACKWARD = ("low_rank_backward", "low_rank_group_backward")
EXPAND = "low_rank_expand"  # the forward of sites whose S is there already


@dataclass(frozen=True)
class Figures:
    """Rates of a device. ``source`` says where they are from."""

    tflops: float  # of 16-bit products, by the library
    tflops_tf32: float
    tflops_fp32: float
    gigabytes: float  # per second, of device memory
    launch: float  # microseconds between two small kernels of a stream
    source: str
    triton: float = 0.92  # rate of a Triton product over the library's, in 16 bits
    triton_fp32: float = 0.7

    def rate(self, dtype: torch.dtype, tf32: bool) -> float:
        """Operations a second of the library's products."""
        if dtype.itemsize == 2:
            return self.tflops * 1e12
        cut = dtype == torch.float32 and tf32
        return (self.tflops_tf32 if cut else self.tflops_fp32) * 1e12


# Rates for want of measured ones: 16-bit, tf32 and fp32 TFLOP/s, GB/s. Those of H100 and H200 in
# 16 bits and fp32 were read off one machine each by plain torch, other GPUs' are 0.8 of the
# vendor's, a core's are guesses. So are what a launch takes and Triton's rate over the library's,
# above. `peftfx tune` replaces them all.
ASSUMED = {
    "NVIDIA A100-SXM4-80GB": (250.0, 125.0, 15.6, 1600.0),
    "NVIDIA H100 80GB HBM3": (790.0, 395.0, 53.0, 3000.0),
    "NVIDIA H200": (790.0, 395.0, 53.0, 4300.0),
    "NVIDIA B200": (1800.0, 900.0, 64.0, 6400.0),
    "AMD Instinct MI300X": (1045.0, 130.0, 130.0, 4240.0),
}
CORE = (0.5, 0.1, 0.1, 8.0)
LAUNCH = 3.0
CACHE = 3.0  # rate of the L2 cache over the memory's, a guess


def figures(device: Device) -> Figures | None:
    """The rates of *device*, None where nobody knows any, nor those of one like it."""
    found = measured.table(device.name).figures
    if found:
        return Figures(**found, source="roofline, measured rates")
    like = [device.name, *(d.name for d in KNOWN.values() if d.target == device.target)]
    known = next((name for name in like if name in ASSUMED), None)
    if device.target != "cpu" and known is None:
        return None
    matrix, cut, wide, memory = ASSUMED[known] if known else CORE
    cores = 1 if known else device.processors
    source = f"roofline, rates assumed for {known or 'a CPU'}"
    return Figures(
        cores * matrix, cores * cut, cores * wide, cores * memory, LAUNCH, source
    )  # fmt: skip


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
        at = {"low_rank_add": 3, "low_rank_linear": 4, "low_rank_linear_group": 4, EXPAND: 4}
        given = args[at.get(op, 5)]
        B = given if isinstance(given, (list, tuple)) else [given]
        weight = {"low_rank_add": None, "low_rank_backward": args[3]}.get(op, True)
        weight = weight if op != EXPAND else args[2] or None
        return cls(
            op, shape, tuple(int(b.shape[0]) for b in B), tuple(int(b.shape[1]) for b in B),
            weight is not None, B[0].element_size(),
        )  # fmt: skip

    @property
    def key(self) -> str:
        alone = "" if self.has_weight or self.op == "low_rank_add" else "/alone"
        return f"{self.op}/{self.shape.key}{alone}"

    @property
    def few(self) -> bool:
        """Whether the kernels take it in one launch."""
        alone = self.has_weight and self.op not in (*BACKWARD, EXPAND)
        return alone and one_launch(self.shape, self.ranks)


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
    if call.op == EXPAND:
        flops, factors = wide + 2 * s.m * low, low * call.factor_bytes
        return Price(flops, s.m * (s.n + s.k + s.r) * e + weights + factors)
    more = 0 if call.has_weight else s.m * s.n * e  # the y that is added to
    flops = wide + 2 * s.m * (s.r * s.k + low)
    return Price(flops, (s.m * (s.n + s.k + s.r)) * e + weights + factors + more)


def prices(call: Call, device: Device) -> dict[str, Price]:
    """The price of each form: as measured where two or more of the call were, else as computed."""
    whole = least(call)
    known = measured.table(device.name).calls.get(call.key, {})
    if len(known) > 1:
        return {f: replace(whole, seconds=ms / 1e3, source="measured") for f, ms in known.items()}
    rates = figures(device)
    if rates is None:
        return {}
    found = {"definition": _price(call, _library(call, in_place=False), rates)}
    if call.has_weight:
        found["accumulate"] = _price(call, _library(call, in_place=True), rates)
    if device.target != "cpu":
        wide = call.shape.dtype.itemsize == 4
        efficiency = rates.triton_fp32 if wide else rates.triton
        found["triton"] = _price(call, _triton(call, device), rates, efficiency)
    elif call.has_weight and call.op != EXPAND:
        found["folded"] = _price(call, _folded(call), rates)
    return found


@dataclass(frozen=True)
class Part:
    """One launch: operations at the matrix rate, bytes of memory, and bytes read once more."""

    flops: int
    bytes: int
    again: int = 0  # from the L2 cache, which what is read from memory goes through as well

    def seconds(self, rate: float, memory: float) -> float:
        """Without the launch itself."""
        cached = (self.bytes + self.again) / (CACHE * memory)
        return max(self.flops / rate, self.bytes / memory, cached)


def _price(call: Call, parts: Sequence[Part], rates: Figures, efficiency: float = 1.0) -> Price:
    return _sum(parts, rates, rates.rate(call.shape.dtype, call.shape.tf32) * efficiency)


def _sum(parts: Sequence[Part], rates: Figures, rate: float) -> Price:
    memory = rates.gigabytes * 1e9
    seconds = sum(p.seconds(rate, memory) + rates.launch * 1e-6 for p in parts)
    return Price(sum(p.flops for p in parts), sum(p.bytes for p in parts), seconds, rates.source)


def _fused(op: str, args: Sequence[Any], device: Device) -> dict[str, Price]:
    """The price of each form of an op whose kernel is one launch, by what its folder says."""
    rates = figures(device)
    if rates is None:
        return {}
    dtype, found = args[0].dtype, {}
    rate = rates.rate(dtype, torch.get_float32_matmul_precision() != "highest")
    for form, parts in FUSED[op].work(op, args, device.processors).items():
        efficiency = rates.triton if form == "triton" else 1.0
        found[form] = _sum([Part(*part) for part in parts], rates, rate * efficiency)
    return found


def _triton(call: Call, device: Device) -> list[Part]:
    """The launches of :mod:`peftfx.kernels.low_rank_linear.launch`."""
    s, e, whole = call.shape, call.shape.dtype.itemsize, least(call)
    low = sum(n * r for n, r in zip(call.outs, call.ranks, strict=True))
    weights = s.n * s.k * e if call.has_weight else 0
    a, b = s.r * s.k * call.factor_bytes, low * call.factor_bytes
    if call.few:
        return [Part(whole.flops, whole.bytes, _again(call, device))]
    wide = 2 * s.m * s.n * s.k if call.has_weight else 0
    if call.op not in BACKWARD:
        product = Part(
            wide + 2 * s.m * low, (s.m * (s.n + s.k + s.r)) * e + weights + b
            if call.has_weight else (s.m * (2 * s.n + s.r)) * e + b,
        )  # fmt: skip
        thin = Part(2 * s.m * s.r * s.k, s.m * (s.k + s.r) * e + a)
        return [product] if call.op == EXPAND else [thin, product]
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


def _again(call: Call, device: Device) -> int:
    """Bytes that the launch for few rows reads more than once: x, W where rows are several tiles,
    and the parts that S is the sum of."""
    s, e = call.shape, call.shape.dtype.itemsize
    tile = config("decode", device, s)
    columns = sum(-(-n // tile.block_n) for n in call.outs)
    parts = tile.parts or -(-s.k // DEPTH)
    tiles = -(-s.m // tile.block_m)
    low = columns * parts * s.m * 4 * s.r // len(call.ranks)
    x = (columns + len(call.outs)) * tiles * tile.block_m * s.k * e  # those beyond M, too
    return x + (tiles - 1) * s.n * s.k * e + low


def _library(call: Call, in_place: bool) -> list[Part]:
    """The library's products: thin ones, and the wide one added to one of them in place.

    Where that is not done, a pass of its own adds: it reads two wide tensors and writes one.
    """
    s, e = call.shape, call.shape.dtype.itemsize
    down, thin, wide = _down(call), _thin(call), _wide(call)
    forward = call.op not in BACKWARD
    parts = [down, *thin] if forward else [*thin, *thin, down, down]  # dS and dB; dA and dS·A
    parts = thin if call.op == EXPAND else parts
    sums = [s.m * (n if forward else s.k) * e for n in call.outs]
    if in_place:
        parts += [Part(p.flops, p.bytes + size) for p, size in zip(wide, sums, strict=True)]
    elif wide or forward:
        parts += [*wide, *(Part(0, 3 * size) for size in sums)]
    if s.drops and not forward:  # the mask lies between the thin product and the sum
        parts.append(Part(0, 2 * s.m * s.k * e))
    return parts


def _folded(call: Call) -> list[Part]:
    """The update folded into a copy of W, which is then multiplied by."""
    s, e = call.shape, call.shape.dtype.itemsize
    fold = [
        Part(2 * n * s.k * r, (2 * n * s.k + r * (s.k + n)) * e)
        for n, r in zip(call.outs, call.ranks, strict=True)
    ]
    thin = [*_thin(call), *_thin(call)] if call.op in BACKWARD else []
    return [*thin, _down(call), *fold, *_wide(call)]


def _wide(call: Call) -> list[Part]:
    """Products with each W; none where no W is seen."""
    s, e = call.shape, call.shape.dtype.itemsize
    outs = call.outs if call.has_weight else ()
    return [Part(2 * s.m * n * s.k, (s.m * (n + s.k) + n * s.k) * e) for n in outs]


def _down(call: Call) -> Part:
    """A product with the joined A's: S, dA, or dS·A."""
    s, e = call.shape, call.shape.dtype.itemsize
    return Part(2 * s.m * s.r * s.k, (s.m * (s.k + s.r) + s.r * s.k) * e)


def _thin(call: Call) -> list[Part]:
    """Products with each B: S·Bᵀ, dS, or dB."""
    s, e = call.shape, call.shape.dtype.itemsize
    return [
        Part(2 * s.m * n * r, (s.m * (n + r) + n * r) * e)
        for n, r in zip(call.outs, call.ranks, strict=True)
    ]


def settings() -> tuple[Any, ...]:
    """What else than code and shipped tables decides a choice: orders by hand, measurements."""
    names = ("PEFTFX_FORMS", "PEFTFX_DEVICE")
    kinds = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    found = [computes(torch.device(kind)) for kind in kinds]
    tables = [measured.table(device.name) for device in found if device is not None]
    return (*(os.environ.get(name) for name in names), repr((found, tables)))


def forced(op: str) -> str | None:
    """The form that ``PEFTFX_FORMS`` orders for *op*: ``form`` or ``op=form``, by commas."""
    chosen = None
    for item in filter(None, (i.strip() for i in os.environ.get("PEFTFX_FORMS", "").split(","))):
        name, equals, form = item.rpartition("=")
        if form not in FORMS:
            raise SpecError(f"PEFTFX_FORMS: {form!r} is no form", remedy=nearest(form, FORMS))
        ops = (*OPS, *FUSED)
        if equals and name not in ops:
            raise SpecError(f"PEFTFX_FORMS: {name!r} is no op", remedy=nearest(name, ops))
        if name in ("", op):
            chosen = form
    return chosen


@dataclass(frozen=True)
class Verdict:
    """The form to take for a call, why not each of the others, and its price for people."""

    form: str
    refusals: tuple[tuple[str, str], ...] = ()
    price: str = ""


def choose(op: str, args: Sequence[Any], forms: Sequence[str]) -> Verdict:
    """The form to take of those that can: ordered by hand, or the cheapest, or the first."""
    device = computes(tensors(args)[0].device)
    known: dict[str, Price] = {}
    least_work = ""
    if op in OPS:
        call = Call.of(op, args)
        known, least_work = prices(call, device) if device is not None else {}, str(least(call))
    elif op in FUSED:
        known = _fused(op, args, device) if device is not None else {}
    else:
        return Verdict(forms[0])
    known = {form: price for form, price in known.items() if form in forms}
    order = forced(op)
    best = min(known, key=lambda f: known[f].seconds or 0.0) if known else forms[0]
    chosen = best if order is None or order not in forms else order

    def why_not(form: str) -> str:
        if chosen == order:
            return f"PEFTFX_FORMS orders {order}"
        if form not in known:
            return "its time is not known here"
        return f"{chosen} is predicted at {_ms(known[chosen])}, this at {_ms(known[form])}"

    refusals = tuple((form, why_not(form)) for form in forms if form != chosen)
    return Verdict(chosen, refusals, str(known.get(chosen, least_work)))


def _ms(price: Price) -> str:
    return f"{(price.seconds or 0.0) * 1e3:.3f} ms"
