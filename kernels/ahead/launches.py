"""The launches that shipped tiles are for: what the host side does with tensors of no device."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.devices import KNOWN
from peftfx.kernels.fused import FORMS
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes
from peftfx.kernels.low_rank_linear.configs import Config, Shape, shipped_config
from peftfx.kernels.low_rank_linear.runner import Runner

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
    (Sizes(64), True),
    (Sizes(8, outs=GROUP), True),
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
    """The launches of :data:`CALLS` on a device of *target*, each kind of code once."""
    seen: set[str] = set()
    calls = [_record(*call, target, dtype).found for call in CALLS]
    calls += [_fused(*call, target, dtype).found for call in FUSED]
    for launch in (*itertools.chain(*calls), *rows(dtype)):
        if launch.name not in seen:
            seen.add(launch.name)
            yield launch


def rows(dtype: torch.dtype) -> Iterator[Launch]:
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


def tiles(target: str, dtype: torch.dtype) -> set[tuple[str, Config]]:
    """The tiles that those launches use, with the kernels' names."""
    return {pair for call in CALLS for pair in _record(*call, target, dtype).used}


def _fused(rows: int, width: int, target: str, dtype: torch.dtype) -> _Recorder:
    """The kernels of :mod:`peftfx.kernels.fused`."""
    run = _recorder(target, True)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    y, weight, one = make(rows, 4096, dtype=dtype), make(4096, 4096, dtype=dtype), make(1)
    inner = (make(width, 4096), make(width), make(4096, width), make(4096), one, "gelu")
    calls = {
        "low_rank_norms": (weight, make(width, 4096), make(4096, width), one),
        "bottleneck": (y, None, *inner),
        "bottleneck_backward": (y, y, *inner, True, [True] * 3),
    }
    for name, args in calls.items():
        if FORMS[name].unsuited(*args) is None:
            FORMS[name].launch(run, *args)
    return run


def _recorder(target: str, descriptors: bool) -> _Recorder:
    device = next(d for d in KNOWN.values() if d.target == target)
    return _Recorder(device, configs=shipped_config, descriptors=descriptors)


def _record(sizes: Sizes, descriptors: bool, target: str, dtype: torch.dtype) -> _Recorder:
    run = _recorder(target, descriptors)

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = Operands.of(sizes, dtype, make)
    _, s = operands.forward(run)
    operands.backward(run, s)
    return run
