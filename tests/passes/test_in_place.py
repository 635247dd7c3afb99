"""Products added up in place, through Inductor: memory that is lent out again must not be read.

``aten.addmm_`` gives back the tensor that it changes, and Inductor does not know that: it lends the
memory to others while the result is still read. Layers of one shape and inputs that are shared make
it want to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from tests.helpers import fill, relative

WIDTH = 16


class Block(nn.Module):
    """Three linears on one input, one behind them, and two on what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.gate = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        x = x + self.o(mixed)
        out: Tensor = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return out


def adapted(**options: Any) -> tuple[nn.Module, peftfx.backends.Backend]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(2)))
    backend = peftfx.backend({"rules": [{"method": "lora", "name": "*", "rank": 3, "alpha": 3}]})
    backend.snapshots = True  # nothing from a cache
    backend.bind(model, (torch.randn(5, WIDTH),))
    fill(peftfx.parameters(model), scale=0.3)
    return torch.compile(model, backend=backend, fullgraph=True, **options), backend


def both(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the compiled model, and of the marks' own math."""
    found = []
    for run in (model, model._orig_mod):
        given = x.clone().requires_grad_()
        y = run(given)
        wanted = [given, *peftfx.parameters(model)]
        grads = torch.autograd.grad(y.square().mean(), wanted)
        found.append([y.detach(), *grads])
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"options": {"cpp_wrapper": True}}, id="cpp", marks=pytest.mark.slow)],
)
def test_training(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """At several numbers of rows, of one graph."""
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate")
    model, backend = adapted(dynamic=True, **options)
    for rows in (7, 12, 33):
        got, expected = both(model, torch.randn(rows, WIDTH))
        assert all(relative(a, b) < 1e-4 for a, b in zip(got, expected, strict=True)), rows
    assert {c.claim for c in backend.reports[-1].choices} == {"accumulate"}
    assert len(backend.reports) == 1


@pytest.mark.slow
def test_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate")
    model, _ = adapted()
    model.eval()
    x = torch.randn(9, WIDTH)
    with torch.no_grad():
        assert relative(model(x), model._orig_mod(x)) < 1e-4
