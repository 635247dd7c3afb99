"""The bypass table: every known way to lose an adapter, tried.

Each situation runs a small adapted model in some way that has lost adapters. What comes out is
the adapter's result or an error; the base's result or another adapter's would be a defect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peftfx.bypass import calls, models, modes, prompts
from peftfx.bypass.bench import SITUATIONS, Bench
from peftfx.errors import PeftfxError

assert calls and modes and models and prompts  # importing them fills the table


@dataclass(frozen=True)
class Row:
    """One line of the table. ``verdict``: adapted, refused, torch's error, SILENT or WRONG."""

    situation: str
    fullgraph: bool
    verdict: str
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.verdict in ("adapted", "refused", "torch's error")


def try_one(name: str, fullgraph: bool) -> Row:
    """Runs one situation in a fresh state and judges what comes out."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(7)
    bench = Bench(fullgraph, torch.randn(2, 5, 6, generator=generator))
    base = bench.model()(bench.x).detach()
    try:
        result = SITUATIONS[name](bench)
    except PeftfxError as error:
        return Row(name, fullgraph, "refused", f"{type(error).__name__}: {error.message}")
    except Exception as error:
        typed = _typed(error)
        if typed is not None:
            return Row(name, fullgraph, "refused", f"{type(typed).__name__}: {typed.message}")
        text = str(error).strip().splitlines()
        return Row(
            name, fullgraph, "torch's error", f"{type(error).__name__}: {text[0] if text else ''}"
        )
    finally:
        torch._dynamo.reset()
    out, expected = result if isinstance(result, tuple) else (result, bench.expected())
    out = out.detach()
    loose = 6e-2 if out.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if out.shape == expected.shape and torch.allclose(
        out.double(), expected.double(), rtol=loose, atol=loose
    ):
        return Row(name, fullgraph, "adapted")
    if out.shape == base.shape and torch.allclose(
        out.double(), base.double(), rtol=loose, atol=loose
    ):
        return Row(name, fullgraph, "SILENT", "the base's result")
    return Row(name, fullgraph, "WRONG", "neither the base's result nor the adapter's")


def _typed(error: BaseException) -> PeftfxError | None:
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "inner_exception", None)
        for found in (seen, inner):
            if isinstance(found, PeftfxError):
                return found
        seen = seen.__cause__ or seen.__context__
    return None


def run() -> Iterator[Row]:
    """The table, row by row."""
    for name in SITUATIONS:
        for fullgraph in (False, True):
            yield try_one(name, fullgraph)
