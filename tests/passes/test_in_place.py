"""Products added up in place, through Inductor: memory that is lent out again must not be read.

``aten.addmm_`` gives back the tensor that it changes, and Inductor does not know that: it lends the
memory to others while the result is still read. Layers of one shape and inputs that are shared make
it want to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import relative
from tests.kernels.adapted import WIDTH, adapted, step


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"options": {"cpp_wrapper": True}}, id="cpp", marks=pytest.mark.slow)],
)
def test_training(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """At several numbers of rows, of one graph."""
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate")
    model, backend = adapted(dynamic=True, **options)
    for rows in (7, 12, 33):
        x = torch.randn(rows, WIDTH)
        got, expected = (step(run, model, x) for run in (model, model._orig_mod))
        assert all(relative(a, b) < 1e-4 for a, b in zip(got, expected, strict=True)), rows
    assert {c.claim for c in backend.reports[-1].choices} == {"accumulate"}
    assert len(backend.reports) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 9])
def test_evaluation(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate")
    model, _ = adapted(dynamic=False)
    model.eval()
    x = torch.randn(rows, WIDTH)
    with torch.no_grad():
        assert relative(model(x), model._orig_mod(x)) < 1e-4
