"""Results on disk: one JSON file for each part and device, which a later run goes on with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Part, Row, Setting
from peftfx.errors import SpecError
from peftfx.kernels import measured
from peftfx.kernels.devices import computes

RESULTS = Path(__file__).parent / "results"


def environment(setting: Setting) -> dict[str, Any]:
    """Device, commit, versions: what numbers mean nothing without."""
    device = computes(setting.device)
    if device is None:
        raise SpecError(f"there are no kernels for {torch.cuda.get_device_name()}")
    versions = {}
    for name in ("torch", "triton", "peft", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    return {
        "device": device.name, "commit": setting.commit or measured.commit(), **versions,
        "python": platform.python_version(), "size": "tiny" if setting.tiny else "full",
    }  # fmt: skip


class Results:
    """The rows of one part on one device.

    Args:
        environment: rows that were measured in another one are dropped.
        again: rows of this one are dropped too.
    """

    def __init__(self, root: Path, part: Part, environment: dict[str, Any], again: bool) -> None:
        self.path = root / measured.slug(environment["device"]) / f"{part.name}.json"
        self.head = {"part": part.name, **environment}
        self.rows: list[Row] = []
        if self.path.exists() and not again:
            head, rows = read(self.path)
            if head == self.head:
                self.rows = rows

    def done(self, case: str) -> bool:
        return any(row.case == case for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps *rows*, on disk too."""
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self.head, "rows": [_written(row) for row in self.rows]}
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _written(row: Row) -> dict[str, Any]:
    """*row* without what is empty, numbers to four digits."""
    found = {}
    for key, value in dataclasses.asdict(row).items():
        if isinstance(value, dict):
            value = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in value.items()}
        if value not in ({}, "") and (value is not None or key != "least"):
            found[key] = value
    return found


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What is said of all rows of a file, and the rows."""
    content = json.loads(path.read_text())
    return content, [Row(**row) for row in content.pop("rows")]


Found = dict[str, dict[str, tuple[dict[str, Any], list[Row]]]]  # device's folder → part


def load(root: Path) -> Found:
    """All results under *root*."""
    found: Found = {}
    for path in sorted(root.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = read(path)
    return found
