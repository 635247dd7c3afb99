"""The base comes back bit for bit after training, whatever trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import SpecError
from peftfx.methods import Method, lookup, register
from tests.architectures import by_name
from tests.helpers import fill, output
from tests.laws.test_methods import IDS, loss_of, made, shake
from tests.methods import ROWS, Row

EVERY = pytest.mark.parametrize("row", ROWS, ids=str)


def traces(model: nn.Module) -> dict[str, Any]:
    """All that peftfx could leave on a model: classes, attributes, hooks, flags."""
    found: dict[str, Any] = {n: p.requires_grad for n, p in model.named_parameters()}
    for path, module in model.named_modules():
        hooks = [k for k, v in vars(module).items() if k.endswith("_hooks") and v]
        own = sorted(vars(module).keys() - {"_is_torch_compile"})  # which torch.compile sets
        found[f"{path}:"] = (type(module), own, hooks, module.training)
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    left = dict(a.named_parameters()) | dict(a.named_buffers())
    right = dict(b.named_parameters()) | dict(b.named_buffers())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@EVERY
def test_release_after_training(row: Row) -> None:
    """Steps of AdamW with weight decay, another adapter, a merge, a cycle of off and on."""
    base, model, backend = made(row, "aot_eager")
    shake(row, model)
    model.train()
    run: Any = model
    if lookup(row.method).gathers:  # which checkpoints that run eagerly refuse
        run = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.AdamW(peftfx.parameters(model), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        (loss_of(run(IDS)) + peftfx.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert not torch.equal(model(IDS), base(IDS))
    peftfx.add(model, {"rules": [row.rule()]}, "b", (IDS,))
    peftfx.activate(model, "b")
    with peftfx.disabled(model):
        assert same_values(model, base) and torch.equal(model(IDS), base(IDS))
    if row.merges:
        peftfx.merge(model)
    peftfx.release(model)
    assert same(model, base) and traces(model) == traces(base)
    assert torch.equal(model(IDS), base(IDS))


def same_values(bound: nn.Module, base: nn.Module) -> bool:
    now = dict(bound.named_parameters())
    return all(torch.equal(now[n], p) for n, p in base.named_parameters())


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "prefix", "role": "attention", "length": 3},
        {"method": "prompt", "role": "tokens", "length": 2},
        {"method": "ptuning", "role": "tokens", "length": 2},
    ],
    ids=lambda r: r["method"],
)
def test_release_of_prompts(rule: dict[str, Any]) -> None:
    arch = by_name("llama")
    base, x = arch.build(), arch.example()
    model = copy.deepcopy(base)
    Backend({"rules": [rule]}, "eager").bind(model)
    fill(peftfx.parameters(model))
    optimizer = torch.optim.AdamW(peftfx.parameters(model), lr=0.1)
    output(model, x).square().mean().backward()
    optimizer.step()
    peftfx.release(model)
    assert same(model, base) and traces(model) == traces(base)
    assert torch.equal(output(model, x), output(base, x))


def normed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return model, torch.randn(6, 3, 4, 4)


def test_running_statistics(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Norms that training moves: the base has its own when off and after release; a save warns."""
    base, x = normed()
    model = copy.deepcopy(base)
    spec = {"rules": [{"method": "lora", "name": "3", "rank": 2}]}
    Backend(spec, "eager").bind(model, (x,))
    peftfx.save(model, tmp_path)
    assert "running statistics" not in caplog.text
    model.train()
    model(x).sum().backward()
    model.eval()
    base.eval()
    moved = model(x)
    assert not torch.equal(moved, base(x))
    with peftfx.disabled(model):
        assert torch.equal(model(x), base(x))
        with peftfx.disabled(model):
            assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), moved)
    peftfx.save(model, tmp_path)
    assert "2 running statistics" not in caplog.text and "running statistics" in caplog.text
    peftfx.release(model)
    assert same(model, base) and torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", ["half", "forward", "not a name", "training"])
def test_methods_are_not_named_like_attributes(name: str) -> None:
    """A method's tensors lie in a module of its name."""

    @dataclass(frozen=True, kw_only=True)
    class Named(Method):
        pass

    Named.name = name
    with pytest.raises(SpecError, match=r"cannot name|exists already"):
        register(Named)
