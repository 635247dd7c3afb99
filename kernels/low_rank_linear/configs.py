"""Tiles of the kernels: shipped by target, tuned by device and shape class, looked up by hints.

What ``peftfx tune`` found on the device (:mod:`peftfx.kernels.measured`) comes before
``configs.json``, which has tiles for each target.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftfx.kernels import measured
from peftfx.kernels.devices import Device

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """A kernel's tile, and how it is run. ``parts`` 0: as many as fill the device."""

    block_m: int
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 2
    group_m: int = 8
    parts: int = 0

    @property
    def run(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, hints where they are symbolic. ``n`` and ``r`` are sums over the sites.

    ``tf32``: whether fp32 products may be made of numbers that were cut to 19 bits.
    """

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    count: int = 1
    drops: bool = False
    tf32: bool = field(default_factory=lambda: torch.get_float32_matmul_precision() != "highest")

    @property
    def key(self) -> str:
        """The shape class: rows by powers of two, all else as it is."""
        rows = 1 << max(4, (self.m - 1).bit_length()) if self.m > 1 else 16
        name = str(self.dtype).removeprefix("torch.")
        name = "tf32" if name == "float32" and self.tf32 else name
        drops = "/drops" if self.drops else ""
        return f"{name}/m{min(rows, 1 << 15)}/k{self.k}/n{self.n}/r{self.r}/x{self.count}{drops}"


@functools.cache
def shipped() -> dict[str, Any]:
    """``configs.json``: target → kernel → bits of the dtype → tiles, by the most rows."""
    content: dict[str, Any] = json.loads((HERE / "configs.json").read_text())
    return content


@dataclass(frozen=True)
class Rule:
    """A shipped tile and the calls that it is for: so many rows at most, so many columns of all
    sites at least, with dropout."""

    config: Config
    rows: int | None = None
    columns: int = 0
    drops: bool = False

    def fits(self, shape: Shape) -> bool:
        few = self.rows is None or shape.m <= self.rows
        return few and shape.n >= self.columns and (shape.drops or not self.drops)


def rules(kernel: str, target: str, dtype: torch.dtype) -> list[Rule]:
    """Shipped tiles of *kernel* on *target*; the first that fits is taken. None: no such kernel."""
    found = shipped()[target].get(kernel, [])
    listed = found.get(str(8 * dtype.itemsize), []) if isinstance(found, Mapping) else found
    return [
        Rule(_config(e), e.get("rows"), e.get("columns", 0), e.get("drops", False)) for e in listed
    ]


def has(kernel: str, target: str, dtype: torch.dtype) -> bool:
    """Whether *kernel* is shipped for that target and dtype."""
    return bool(rules(kernel, target, dtype))


def _config(entry: Mapping[str, Any]) -> Config:
    return Config(**{k: v for k, v in entry.items() if k not in ("rows", "columns", "drops")})


@functools.lru_cache(maxsize=4096)
def config(kernel: str, device: Device, shape: Shape) -> Config:
    """The tile for a call of *kernel* with these sizes."""
    entry = measured.table(device.name).tiles.get(f"{kernel}/{shape.key}")
    return shipped_config(kernel, device, shape) if entry is None else _config(entry)


def shipped_config(kernel: str, device: Device, shape: Shape) -> Config:
    """The target's own tile, whatever was tuned."""
    for rule in rules(kernel, device.target, shape.dtype):
        if rule.fits(shape):
            return rule.config
    raise LookupError(f"configs.json has no tile for {kernel} on {device.target}")
