"""The launches that shipped tiles are for: what the host side does with tensors of no device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.devices import KNOWN, Device
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes
from peftfx.kernels.low_rank_linear.configs import Config, Shape, shipped_config
from peftfx.kernels.low_rank_linear.runner import Runner
from peftfx.kernels.shrink.calls import Producer
from peftfx.kernels.shrink.launch import FORMS

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
    """The launches of :data:`CALLS` on a device of *target*, each kind of code once."""
    return _distinct(_calls(target, dtype))


def producers(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Those of :data:`SHRINKS`."""
    return _distinct(_shrinks(target, dtype))


def tiles(target: str, dtype: torch.dtype) -> set[tuple[str, Config]]:
    """The tiles that all of them use, with the kernels' names."""
    runs = (*_calls(target, dtype), *_shrinks(target, dtype))
    return {pair for run in runs for pair in run.used}


def _distinct(runs: Iterator[_Recorder]) -> Iterator[Launch]:
    seen: set[str] = set()
    for run in runs:
        for launch in run.found:
            if launch.name not in seen:
                seen.add(launch.name)
                yield launch


def _calls(target: str, dtype: torch.dtype) -> Iterator[_Recorder]:
    for sizes, descriptors in CALLS:
        run = _Recorder(_device(target), configs=shipped_config, descriptors=descriptors)
        operands = Operands.of(sizes, dtype, _make)
        _, s = operands.forward(run)
        operands.backward(run, s)
        yield run


def _shrinks(target: str, dtype: torch.dtype) -> Iterator[_Recorder]:
    for one in SHRINKS:
        run = _Recorder(_device(target), configs=shipped_config)
        FORMS[one.op](run, *one.arguments(dtype, _make))
        yield run


def _device(target: str) -> Device:
    return next(d for d in KNOWN.values() if d.target == target)


def _make(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
