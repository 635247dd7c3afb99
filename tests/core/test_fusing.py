"""AdapterFusion: attention over adapters that were trained before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import peftfx
from peftfx.errors import AdapterError, PlanError
from peftfx.plans import make_plan
from tests.architectures import by_name
from tests.helpers import fill, output, relative

RULE = {"method": "bottleneck", "role": ["residual.attention", "residual.mlp"], "scale": 0.5}


def test_attends_over_adapters(tmp_path: Path) -> None:
    arch = by_name("bert")
    model, x = arch.build(), arch.example()
    base = output(model, x)
    peftfx.adapt(model, {"rules": [{**RULE, "size": 5}]}, x, adapter="a", lower="eager")
    fill(peftfx.parameters(model), 1)
    peftfx.add(model, {"rules": [{**RULE, "size": 3}]}, "b", x)
    peftfx.activate(model, "b")
    fill(peftfx.parameters(model), 2)
    before = {n: peftfx.state_dict(model, adapter=n) for n in "ab"}
    peftfx.fuse(model, ["a", "b"], "both", x)
    peftfx.activate(model, "both")
    names = {n.rpartition(".")[2] for n, _ in peftfx.named_parameters(model)}
    assert names == {
        "to_query", "to_query_bias", "to_key", "to_key_bias", "to_value",
    }  # fmt: skip

    with torch.no_grad():  # without a query attention is even: the mean of the adapters
        for name, p in peftfx.named_parameters(model):
            if "query" in name:
                p.zero_()
    mean = output(model, x)
    peftfx.activate(model, {"a": 0.5, "b": 0.5})
    assert relative(mean, output(model, x)) < 1e-5 and relative(mean, base) > 1e-3
    peftfx.activate(model, "both")

    fill(peftfx.parameters(model), 3)
    out = output(model, x)
    out.square().mean().backward()
    assert all(p.grad is not None for p in peftfx.parameters(model))
    for name, state in before.items():
        now = peftfx.state_dict(model, adapter=name)
        assert all(torch.equal(state[k], now[k]) for k in state)
    peftfx.save(model, tmp_path, adapter="both")
    fresh = arch.build()
    peftfx.load(fresh, tmp_path, compile=False, example=x)  # nothing but the file is needed
    assert torch.equal(output(fresh, x), out)


def test_formula_at_a_linear() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(3, 4)
    rule = {"method": "bottleneck", "name": "0", "size": 2, "parallel": True, "activation": "tanh"}
    peftfx.adapt(model, {"rules": [rule]}, (x,), adapter="a", lower="eager")
    with peftfx.disabled(model):
        y = model(x)
    outs = []
    for seed, name in enumerate("ab"):
        if name == "b":
            peftfx.add(model, {"rules": [rule]}, "b", (x,))
        peftfx.activate(model, name)
        fill(peftfx.parameters(model), seed)
        outs.append(model(x))
    peftfx.fuse(model, ["a", "b"], example=(x,))
    peftfx.activate(model, "fusion")
    fill(peftfx.parameters(model), 7, scale=0.7)
    p = {n.rpartition(".")[2]: t for n, t in peftfx.state_dict(model, adapter="fusion").items()}
    query = y @ p["to_query"].T + p["to_query_bias"]
    scores = torch.stack([(query * (z @ p["to_key"].T + p["to_key_bias"])).sum(-1) for z in outs])
    shares = scores.exp() / scores.exp().sum(0)
    want = sum(s[:, None] * (z @ p["to_value"].T) for s, z in zip(shares, outs, strict=True))
    assert isinstance(want, torch.Tensor) and relative(model(x), want) < 1e-5


def test_refusals() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), torch.randn(3, 4)
    peftfx.adapt(model, {"rules": [{"method": "bottleneck", "name": "*"}]}, (x,), adapter="a")
    for name, rule in {
        "b": {"method": "bottleneck", "name": "0"},
        "c": {"method": "bottleneck", "name": "*", "activation": "tanh"},
        "d": {"method": "bottleneck", "name": "*", "gate": "token"},
        "e": {"method": "lora", "name": "*", "rank": 2},
    }.items():
        peftfx.add(model, {"rules": [rule]}, name, (x,))
        with pytest.raises(AdapterError):
            peftfx.fuse(model, ["a", name], "f", (x,))
        assert "f" not in peftfx.adapters(model)
    with pytest.raises(AdapterError, match="nothing to fuse"):
        peftfx.fuse(model, ["a"])
    with pytest.raises(PlanError, match=r"peftfx\.fuse"):
        make_plan(model, {"rules": [{"method": "fusion", "name": "*"}]})
