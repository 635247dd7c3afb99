"""The launches that shipped tiles are for: what the host side does with tensors of no device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.devices import KNOWN
from peftfx.kernels.low_rank_linear.configs import Config, Shape, shipped_config
from peftfx.kernels.low_rank_linear.launch import backward, forward
from peftfx.kernels.low_rank_linear.runner import KEEP, Drop, Runner

META = torch.device("meta")


@dataclass(frozen=True)
class Call:
    """A call of the ops, by its sizes; forward and backward are both made."""

    name: str
    rows: int
    outs: tuple[int, ...] = (4096,)
    k: int = 4096
    rank: int = 16
    bias: bool = False
    drops: bool = False
    weight: bool = True
    descriptors: bool = True


CALLS = (
    Call("large", 8192),
    Call("large, pointers", 8192, descriptors=False),
    Call("group", 2048, (4096, 1024, 1024), bias=True),
    Call("group, pointers", 2048, (4096, 1024, 1024), descriptors=False),
    Call("rank 64", 8192, rank=64),
    Call("dropout", 8192, drops=True),
    Call("dropout, pointers", 8192, drops=True, descriptors=False),
    Call("update alone", 8192, weight=False),
    Call("256 rows", 256),
    Call("256 rows, pointers", 256, descriptors=False),
    Call("64 rows", 64),
    Call("8 rows, group", 8, (4096, 1024, 1024)),
)


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, its arguments by name, and a name that says what they fix."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, tile, what is fixed at compile time: equal for launches of the same code."""
        given = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
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
    for call in CALLS:
        for launch in _record(call, target, dtype).found:
            if launch.name not in seen:
                seen.add(launch.name)
                yield launch


def tiles(target: str, dtype: torch.dtype) -> set[tuple[str, Config]]:
    """The tiles that those launches use, with the kernels' names."""
    return {pair for call in CALLS for pair in _record(call, target, dtype).used}


def _record(call: Call, target: str, dtype: torch.dtype) -> _Recorder:
    device = next(d for d in KNOWN.values() if d.target == target)

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=META)

    wide, run = (
        torch.float32,
        _Recorder(device, configs=shipped_config, descriptors=call.descriptors),
    )
    x, none = empty(call.rows, call.k), [None] * len(call.outs)
    weights = [empty(n, call.k) for n in call.outs] if call.weight else []
    biases = [empty(n) if call.bias else None for n in call.outs]
    A = [empty(call.rank, call.k, of=wide) for _ in call.outs]
    B = [empty(n, call.rank, of=wide) for n in call.outs]
    scales = [empty(1, of=wide)] * len(call.outs)
    drop = Drop(empty(of=torch.int64), 0.1, 1) if call.drops else KEEP
    base = None if call.weight else empty(call.rows, call.outs[0])
    ys, s = forward(run, x, weights, biases, A, B, none, scales, drop, base)
    backward(run, ys, x, s, weights, A, B, scales, [True] * 3, drop)
    return run
