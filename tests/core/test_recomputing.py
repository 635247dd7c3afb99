"""Gradient checkpointing: the backward runs the same adapters, with the same masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx import dynamo, engine
from peftfx.passes import JOINT
from tests.architectures import by_name
from tests.helpers import fill, output, relative


class Blocks(nn.Module):
    """Two linears with an activation behind each, checkpointed or not."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 5)])
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            run = nn.Sequential(layer, nn.Tanh())
            x = checkpoint(run, x, use_reentrant=False) if self.checkpointing else run(x)
        return x


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_masks_of_the_backward(checkpointing: bool, lower: str) -> None:
    """The gradient along a direction is the quotient of differences: it has the same masks."""
    torch.manual_seed(0)
    model, x = Blocks(checkpointing).double().train(), torch.randn(7, 6, dtype=torch.float64)
    spec = {"rules": [{"method": "lora", "name": "*", "rank": 3, "dropout": 0.5}]}
    peftfx.adapt(model, spec, (x,), lower=lower)  # type: ignore[arg-type]
    parameters = peftfx.parameters(model)
    fill(parameters)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return model(x).square().mean()

    loss().backward()
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))  # type: ignore
    step, ends = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        ends.append(loss())
    assert torch.isclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    arch = by_name(name)
    rule = {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3}
    grads = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model, x = arch.build(), arch.example()
        peftfx.adapt(model, {"rules": [rule]}, lower="aot_eager", fullgraph=True)
        fill(peftfx.parameters(model))
        if checkpointing:
            model.config.use_cache = False  # or HF warns, and that breaks the graph
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore
        model.train()
        output(model, x).square().mean().backward()
        grads.append([p.grad for p in peftfx.parameters(model)])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-6)


def test_norms_are_made_once_in_a_step() -> None:
    """DoRA's: a checkpoint makes its block's products again, and not the lengths of W's rows."""
    grads, counts = [], []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        graphs: list[fx.Graph] = []

        def lower(gm: Any, inputs: Any) -> Callable[..., Any]:
            joint = engine.GraphPasses(JOINT, engine.Report())
            return dynamo.compile_aot(gm, inputs, graphs.append, joint)  # noqa: B023

        model, x = Blocks(checkpointing).double(), torch.randn(7, 6, dtype=torch.float64)
        backend = peftfx.backend({"rules": [{"method": "dora", "name": "*", "rank": 3}]}, lower)
        backend.bind(model, (x,))
        fill(peftfx.parameters(model))
        torch.compile(model, backend=backend, fullgraph=True)(x).square().mean().backward()
        grads.append([p.grad for p in peftfx.parameters(model)])
        counts.append([
            sum(engine.is_op(n, op) for g in graphs for n in g.nodes)
            for op in ("low_rank_linear", "low_rank_norms")
        ])  # fmt: skip
    assert counts == [[2, 2], [4, 2]]
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and relative(a, b) < 1e-12
