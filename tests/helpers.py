"""Small things that several tests need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def fill(parameters: Iterable[Tensor], seed: int = 0, scale: float = 0.2) -> None:
    """Puts reproducible non-zero numbers into *parameters*."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_((torch.randn(p.shape, generator=generator) * scale).to(p.dtype))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, over the largest value of *b*."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def output(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    """The main output of *model*: logits, or what comes first."""
    named = not isinstance(model, nn.Sequential) and not isinstance(
        getattr(model, "_orig_mod", None), nn.Sequential
    )
    out: Any = model(**example) if named else model(*example.values())
    if isinstance(out, Tensor):
        return out
    found = out["logits"] if "logits" in out else out[0]
    assert isinstance(found, Tensor)
    return found
