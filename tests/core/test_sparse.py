"""Sparse tuning in a model: what its first step takes in memory, and files of its places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from benchmarks.compare import peak_on_cpu as peak
from tests.helpers import fill

N, K, ROWS = 640, 500, 4
WHOLE = N * K * 4  # bytes of the weight, and of a dense gradient of it
STRUCTURES = ["element", "row", "column"]


def first_step(rule: dict[str, Any], lower: Any) -> int:
    """The peak of forward, backward and an optimizer's first step, all compiled before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(K, N), nn.Tanh()), torch.randn(ROWS, K, requires_grad=True)
    peftfx.adapt(model, {"rules": [rule | {"name": "0"}]}, (x,), lower=lower)
    model(x).sum().backward()  # compiles
    model.zero_grad()
    x.grad = None
    optimizer = torch.optim.AdamW(peftfx.parameters(model), foreach=False)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()

    found = peak(step)
    assert all(p.grad is not None for p in peftfx.parameters(model)) and x.grad is not None
    return found


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_gradient_of_a_whole_weight(structure: str, lower: str) -> None:
    """Forward, backward and the first step together take a tenth of a dense gradient."""
    rule = {"method": "sparse", "structure": structure, "density": 0.005}
    assert 0 < first_step(rule, lower) < WHOLE / 10


def test_a_weight_that_trains_has_one() -> None:
    assert first_step({"method": "train"}, "eager") >= WHOLE


@pytest.mark.parametrize(
    "options", [{"rank": 2}, *({"density": 0.3, "structure": s} for s in STRUCTURES)]
)
def test_places_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Of either format, both orders of single entries: outputs and gradients are the same bits."""
    rule = {"method": "sparse", "name": "*", **options}
    x, found = torch.randn(5, 13), []
    base = nn.Sequential(nn.Linear(13, 9))
    start = {k: v.clone() for k, v in base.state_dict().items()}
    for fresh in (False, True):
        model = nn.Sequential(nn.Linear(13, 9))
        model.load_state_dict(start)
        if fresh:
            peftfx.load(model, tmp_path / "saved", trainable=True, compile=False, example=(x,))
        else:
            backend = peftfx.backend({"rules": [rule]}, lower="eager")
            backend.bind(model, (x,))
            fill(peftfx.parameters(model))
            peftfx.save(model, tmp_path / "saved")
        given = x.clone().requires_grad_()
        out = model(given)
        out.square().sum().backward()
        (p,) = peftfx.parameters(model)
        found.append([out.detach(), given.grad, p.grad])
    names = {f.name for f in (tmp_path / "saved").iterdir()}
    assert ("adapter_config.json" in names) == (
        "rank" in options
    )  # PEFT's own, which has no second order
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
