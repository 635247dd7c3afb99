"""Tiles found by trying: asked for, bounded, kept on disk by device, versions and shape class."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch


def cache_file(device: str) -> Path:
    """Where tiles of a device are kept: ``$PEFTFX_CACHE``, else ``~/.cache/peftfx``."""
    directory = os.environ.get("PEFTFX_CACHE") or Path.home() / ".cache" / "peftfx"
    versions = f"torch-{torch.__version__}_triton-{triton_version()}"
    return Path(directory) / f"{'-'.join(device.lower().split())}_{versions}.json"


def triton_version() -> str:
    """Triton's version, ``-`` where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "-"


def cached(device: str) -> dict[str, Any]:
    """Tiles found on this machine for *device*, with these versions."""
    path = cache_file(device)
    if not path.exists():
        return {}
    tiles: dict[str, Any] = json.loads(path.read_text())["tiles"]
    return tiles
