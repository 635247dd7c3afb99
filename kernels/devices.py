"""What is known of devices: the target that kernels are compiled for, and its limits.

``PEFTFX_DEVICE=NAME`` stands in for the device at hand: a lowering for it can then be looked at,
compiled and priced on a machine that has none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from peftfx.errors import SpecError, nearest

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Target:
    """What code is generated for. ``instructions``: the tensor-core ones, the best first."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_memory: int  # bytes that one program may have
    instructions: tuple[str, ...]


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 166_912, ("mma.sync",)),
        Target("sm_90", "cuda", 90, 32, 232_448, ("wgmma", "mma.sync")),
        Target("sm_100", "cuda", 100, 32, 232_448, ("tcgen05", "mma.sync")),
        Target("gfx942", "hip", "gfx942", 64, 65_536, ("v_mfma",)),
    )
}


@dataclass(frozen=True)
class Device:
    """A device: its name, the target of its code, and how many programs run side by side."""

    name: str
    target: str
    processors: int


KNOWN = {
    d.name: d
    for d in (
        Device("NVIDIA A100-SXM4-80GB", "sm_80", 108),
        Device("NVIDIA H100 80GB HBM3", "sm_90", 132),
        Device("NVIDIA H200", "sm_90", 132),
        Device("NVIDIA B200", "sm_100", 148),
        Device("AMD Instinct MI300X", "gfx942", 304),
    )
}
_assumed: ContextVar[Device | None] = ContextVar("assumed", default=None)


@contextmanager
def assume(name: str) -> Iterator[Device]:
    """Inside the block, every GPU is taken for the one of that name."""
    token = _assumed.set(_named(name))
    try:
        yield _named(name)
    finally:
        _assumed.reset(token)


def _named(name: str) -> Device:
    if name not in KNOWN:
        raise SpecError(f"device {name!r} is not known", remedy=nearest(name, KNOWN))
    return KNOWN[name]


def describe(device: torch.device) -> Device | None:
    """The device that tensors of *device* are on, None where no kernel can run."""
    assumed = _assumed.get()
    if assumed is None and os.environ.get("PEFTFX_DEVICE"):
        assumed = _named(os.environ["PEFTFX_DEVICE"])
    if device.type == "cuda":
        return assumed or _present(device.index or 0)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Device(INTERPRETER, INTERPRETER, 4)
    return None


@functools.cache
def _present(index: int) -> Device | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        target = found.gcnArchName.split(":")[0]
    else:
        target = f"sm_{max(m for m in (80, 90, 100) if m <= found.major * 10 or m == 80)}"
    return Device(found.name, target, found.multi_processor_count)
