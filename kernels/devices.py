"""What is known of devices: the target that kernels are compiled for, and its limits.

``PEFTFX_DEVICE=NAME`` stands in for the device at hand: a lowering for it can then be looked at,
compiled and priced on a machine that has none.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from peftfx.errors import SpecError, nearest

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Target:
    """What tiles are made for. ``instructions``: the tensor-core ones, the best first."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_memory: int  # bytes that one program may have
    instructions: tuple[str, ...]


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 101_376, ("mma.sync",)),  # sm_86, 89 and 120 take its tiles
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
    """The device that tensors of *device* are on, None where no kernel of Triton's can run."""
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
    elif found.major in (9, 10):
        target = f"sm_{found.major}0"
    else:
        target = "sm_80" if found.major >= 8 else ""
    return Device(found.name, target, found.multi_processor_count) if target in TARGETS else None


KERNELS = (torch.bfloat16, torch.float16, torch.float32)  # dtypes that kernels are for


def why_plain(t: torch.Tensor) -> str | None:
    """None where Triton's kernels can compute with *t*, else why plain torch does."""
    if t.device.type != "cuda":
        return f"it is for GPUs, and this is on {t.device.type}"
    if t.dtype not in KERNELS:
        return f"there is no kernel for {t.dtype}"
    return None if describe(t.device) else "no GPU is at hand for which there are kernels"


def host() -> Device:
    """The CPU, by its name, what makes its 16-bit products, and torch's threads."""
    threads = torch.get_num_threads()
    return Device(f"{_processor()}, {threads} threads", "cpu", threads)


@functools.cache
def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    wide = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{facts.get('model name', platform.machine())} {wide}".strip()


def computes(device: torch.device) -> Device | None:
    """What computes with tensors of *device*, whether it has kernels or not: a GPU or the CPU."""
    return describe(device) if device.type == "cuda" else host()
