"""What was measured on devices: their rates, the tiles that were best, and times of whole calls.

``<device>.json`` beside this file is shipped. ``peftfx tune`` writes one for the machine that it
runs on into the cache directory, named after device and versions; its entries come before shipped
ones. Nothing else measures, and nothing measures by itself.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftfx.errors import SaveError, SpecError

SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """``figures``: rates by name (:class:`peftfx.passes.claims.cost.Figures`). ``tiles``:
    ``kernel/shape class`` → fields of a tile. ``calls``: ``op/shape class`` → form → milliseconds.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    calls: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def over(self, other: Table) -> Table:
        """The entries of both; those of *self* where both have one."""
        return Table(
            {**other.figures, **self.figures},
            {**other.tiles, **self.tiles},
            {**other.calls, **self.calls},
        )


@functools.cache
def table(device: str) -> Table:
    """What is known of the device of that name; empty where nothing was measured."""
    return read(cached_file(device)).over(read(shipped_file(device)))


def read(path: Path) -> Table:
    """The table in a file, an empty one where there is no file.

    Raises:
        SpecError: the file is there and is no such table.
    """
    if not path.exists():
        return Table()
    try:
        content = json.loads(path.read_text())
        return Table(content["figures"], content["tiles"], content["calls"])
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"this is no table of measurements: {error!r}",
            where=str(path),
            remedy="delete the file; `peftfx tune` writes a new one",
        ) from error


def write(path: Path, device: str, found: Table) -> None:
    """Puts *found* over what the file holds, whole or not at all. Processes read it at their start.

    Raises:
        SaveError: the file cannot be written.
    """
    content: dict[str, Any] = {
        "device": device, "commit": commit(), "torch": torch.__version__,
        "triton": triton_version(), **asdict(found.over(read(path))),
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
        os.replace(stream.name, path)
    except OSError as error:
        raise SaveError(f"{error.strerror or error}", where=str(path)) from error


def shipped_file(device: str) -> Path:
    """Where the package keeps a device's table."""
    return SHIPPED / f"{slug(device)}.json"


def cached_file(device: str) -> Path:
    """Where this machine's table of a device is kept, for the versions that are installed."""
    versions = f"torch-{torch.__version__}_triton-{triton_version()}"
    return cache_directory() / f"{slug(device)}_{versions}.json"


def cache_directory() -> Path:
    """``$PEFTFX_CACHE``, or the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEFTFX_CACHE") or Path(home) / "peftfx")


def slug(device: str) -> str:
    """A device's name as a file name."""
    return "-".join(re.findall(r"[a-z0-9_.]+", device.lower()))


@functools.cache
def commit() -> str:
    """The commit of the sources, ``-dirty`` where they differ from it; empty in an installation."""

    def git(*arguments: str) -> Any:
        return subprocess.run(["git", *arguments], cwd=SHIPPED, capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    results = [f":(exclude,top)benchmarks/{name}" for name in ("results", "README.md")]
    changed = git("diff", "--quiet", "HEAD", "--", ":(top)", *results).returncode
    return f"{head}-dirty" if head and changed else head


def triton_version() -> str:
    """Triton's version, ``-`` where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "-"
