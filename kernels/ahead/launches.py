"""The launches that shipped tiles are for: what the host side does with tensors of no device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels import fused
from peftfx.kernels.devices import KNOWN
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes
from peftfx.kernels.low_rank_linear.configs import Config, Shape, shipped_config
from peftfx.kernels.low_rank_linear.runner import Runner
from peftfx.kernels.shrink import launch as shrink
from peftfx.kernels.shrink.calls import Producer

GROUP = (4096, 1024, 1024)
CALLS = (
    (Sizes(8192), True),  # with descriptors where there are any, and without
    (Sizes(8192), False),
    (Sizes(2048, outs=GROUP, bias=True), True),
    (Sizes(2048, outs=GROUP), False),
    (Sizes(8192, rank=64), True),
    (Sizes(8192, drops=True), True),
    (Sizes(8192, drops=True), False),
    (Sizes(8192, weight=False), True),
    (Sizes(256), True),
    (Sizes(256), False),
    (Sizes(256, outs=(14336, 14336)), True),
    (Sizes(64), True),
    (Sizes(64, outs=(14336, 14336)), False),
    (Sizes(32, rank=64), False),
    (Sizes(8, outs=GROUP), True),
)
SHRINKS = (
    Producer(8192, ranks=(16, 16, 16), adds=True),
    Producer(8192, ranks=(16, 16), centred=True),
    Producer(8192, ranks=(64, 64), adds=True, centred=True),
    Producer(8192, 14336, act="silu", gated=True),
    Producer(8192, 14336, act="gelu"),
    Producer(2048, 14336, act="silu", gated=True),
    Producer(2048, 14336, (64,), act="gelu"),
    Producer(2048, 14336, (64,), act="gelu_tanh", gated=True),
)

FUSED = ((8192, 64), (2048, 128), (64, 16))  # rows and inner widths (or ranks) of a 4096 wide op


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, its arguments by name, and a name that says what they fix."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, tile, what is fixed at compile time: equal for launches of the same code."""
        kinds = inspect.signature(self.kernel.fn).parameters.values()
        given = {p.name: self.arguments[p.name] for p in kinds if p.annotation == "tl.constexpr"}
        tile = "x".join(str(v) for k, v in given.items() if k.startswith("BLOCK"))
        flags = [k.lower() for k, v in given.items() if v is True]
        flags += [given["ACT"]] if "ACT" in given else []
        sites = [f"sites={given['COUNT']}"] if given.get("COUNT", 1) > 1 else []
        run = [f"warps={self.arguments['num_warps']}", f"stages={self.arguments['num_stages']}"]
        short = self.kernel.fn.__name__.removeprefix("low_rank_linear_").removesuffix("_kernel")
        return " ".join([short, tile, *sites, *flags, *run])


@dataclass(frozen=True)
class _Recorder(Runner):
    """A runner that launches nothing, and remembers what it was asked for."""

    found: list[Launch] = field(default_factory=list)
    used: set[tuple[str, Config]] = field(default_factory=set)

    def __call__(self, kernel: Any, grid: tuple[Any, ...], **arguments: Any) -> None:
        self.found.append(Launch(kernel, arguments))

    def config(self, kernel: str, shape: Shape) -> Config:
        chosen = super().config(kernel, shape)
        self.used.add((kernel, chosen))
        return chosen


def launches(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of what is listed above on a device of *target*, each kind of code once."""
    seen: set[str] = set()
    for run in _runs(target, dtype):
        for launch in run.found:
            if launch.name not in seen:
                seen.add(launch.name)
                yield launch


def tiles(target: str, dtype: torch.dtype) -> set[tuple[str, Config]]:
    """The tiles that those launches use, with the kernels' names."""
    return {pair for run in _runs(target, dtype) for pair in run.used}


def _runs(target: str, dtype: torch.dtype) -> Iterator[_Recorder]:
    device = next(d for d in KNOWN.values() if d.target == target)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for sizes, descriptors in CALLS:
        run = _Recorder(device, configs=shipped_config, descriptors=descriptors)
        operands = Operands.of(sizes, dtype, make)
        _, s = operands.forward(run)
        operands.backward(run, s)
        yield run
    for m, width in FUSED:
        run = _Recorder(device, configs=shipped_config)
        y, weight, one = make(m, 4096, dtype=dtype), make(4096, 4096, dtype=dtype), make(1)
        inner = (make(width, 4096), make(width), make(4096, width), make(4096), one, "gelu")
        calls: dict[str, tuple[Any, ...]] = {
            "low_rank_norms": (weight, make(width, 4096), make(4096, width), one),
            "bottleneck": (y, None, *inner),
            "bottleneck_backward": (y, y, *inner, True, [True] * 3),
        }
        for name, args in calls.items():
            if fused.FORMS[name].unsuited(*args) is None:
                fused.FORMS[name].launch(run, *args)
        yield run
    for producer in SHRINKS:
        run = _Recorder(device, configs=shipped_config)
        shrink.FORMS[producer.op](run, *producer.arguments(dtype, make))
        yield run
    yield _Recorder(device, configs=shipped_config, found=list(_by_rows(dtype)))


def _by_rows(dtype: torch.dtype) -> Iterator[Launch]:
    """Launches of the kernels that work by rows: of logits, and of a sparse weight."""
    from peftfx.kernels.linear_cross_entropy import triton as losses
    from peftfx.kernels.sparse_add import triton as sparse

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    z, per_row = made(1024, 128256), made(1024, of=torch.float32)
    for smoothing, cap in ((0.0, 0.0), (0.1, 30.0)):
        yield Launch(losses.cross_entropy_kernel, losses.cross_entropy_arguments(
            z, made(1024, of=torch.int64), per_row, -100, smoothing, 1.0, cap, True
        ))  # fmt: skip
    counts = made(1024, of=torch.int8)
    yield Launch(losses.kl_kernel, losses.kl_arguments(z, z, counts, per_row, 2.0, True))
    y, turned, kept = made(8192, 4096), made(4096, 8192), 83_886
    values, places = made(kept, of=torch.float32), made(kept, of=torch.int64)
    yield Launch(sparse.sparse_add_sum_kernel, sparse.sum_arguments(
        y, turned, values, places, made(4097, of=torch.int64), y
    ))  # fmt: skip
    yield Launch(sparse.sparse_add_dot_kernel, sparse.dot_arguments(
        turned, turned, places, places, values
    ))  # fmt: skip
