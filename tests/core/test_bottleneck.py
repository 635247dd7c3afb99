"""Bottleneck adapters against their papers' formulas, at linears and at sublayers' outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import MergeError, PlanError, RoleError, SpecError
from peftfx.kernels.bottleneck.op import ACTIVATIONS
from peftfx.plans import make_plan
from peftfx.spec import Spec
from tests.architectures import by_name
from tests.helpers import fill, output, relative

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


def tuned(rule: dict[str, Any]) -> tuple[nn.Linear, nn.Module, dict[str, Tensor]]:
    """A linear, the same with an adapter that is not trivial, and the adapter's tensors."""
    torch.manual_seed(0)
    base = nn.Linear(6, 9)
    model = nn.Sequential(copy.deepcopy(base))
    Backend({"rules": [{"name": "0", **rule}]}, "eager").bind(model, (X,))
    fill(peftfx.parameters(model))
    held = peftfx.state_dict(model)
    return base, model.eval(), {n.rpartition(".")[2]: t for n, t in held.items()}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_formula(activation: str, parallel: bool) -> None:
    rule = {"method": "bottleneck", "size": 5, "scale": 0.7}
    base, model, p = tuned({**rule, "activation": activation, "parallel": parallel})
    y = base(X)
    h = X if parallel else y
    inner = h @ p["down"].T + p["down_bias"]
    named = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "identity": lambda t: t}
    inner = named[activation](inner) if activation in named else getattr(F, activation)(inner)
    want = y + 0.7 * (inner @ p["up"].T + p["up_bias"])
    assert relative(want, y) > 1e-2 and relative(model(X), want) < 1e-6


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_gate_norm_and_learned_scale(gate: str) -> None:
    rule = {"method": "bottleneck", "reduction": 3, "gate": gate, "norm": True}
    base, model, p = tuned({**rule, "learned_scale": True})
    y = base(X)
    assert p["down"].shape == (3, 9)
    opened = torch.sigmoid(y @ p["gate"].T + p["gate_bias"])  # [2, 4, 1]
    opened = opened.mean(1, keepdim=True) if gate == "sequence" else opened
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    inner = torch.relu((normed * p["norm"] + p["norm_bias"]) @ p["down"].T + p["down_bias"])
    want = y + p["scale"] * opened * (inner @ p["up"].T + p["up_bias"])
    assert relative(model(X), want) < 1e-5


def test_compacter_is_a_sum_of_kronecker_products() -> None:
    base, model, p = tuned({"method": "compacter", "size": 6, "n": 3, "rank": 2})
    y = base(X)

    def joined(name: str) -> Tensor:
        rule, left, right = (p[f"{name}_{part}"] for part in ("rule", "left", "right"))
        return sum(torch.kron(a, b) for a, b in zip(rule, left @ right, strict=True))  # type: ignore[return-value]

    assert joined("down").shape == (6, 9)
    inner = torch.relu(y @ joined("down").T + p["down_bias"])
    assert relative(model(X), y + inner @ joined("up").T + p["up_bias"]) < 1e-5


def test_rules_of_compacters_are_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    spec = {"rules": [{"method": "compacter", "size": 6, "n": 3, "name": "*"}]}
    peftfx.adapt(model, spec, (X,), lower="eager")
    names = [n for n, _ in peftfx.named_parameters(model)]
    assert sum("rule" in n for n in names) == 2 and sum("left" in n for n in names) == 4


def test_masks_leave_entries_out() -> None:
    _, model, p = tuned({"method": "bottleneck", "size": 5, "density": 0.3})
    assert int(p["down_mask"].sum()) == round(0.3 * 45)
    model(X).square().sum().backward()
    for name, parameter in peftfx.named_parameters(model):
        leaf = name.rpartition(".")[2]
        if leaf in ("down", "up"):
            assert parameter.grad is not None
            assert bool((parameter.grad[~p[f"{leaf}_mask"]] == 0).all())
            assert bool((parameter.grad != 0).any())


def test_lowest_layers_are_dropped_while_training() -> None:
    """Each step leaves out those below a number drawn anew; evaluation has them all."""
    arch = by_name("llama")
    model, x = arch.build(), arch.example()
    spec = {"rules": [{"method": "bottleneck", "role": "residual.mlp", "drop": 2, "size": 3}]}
    peftfx.adapt(model, spec, x, lower="eager")
    fill(peftfx.parameters(model))
    whole = output(model.eval(), x)
    schedule, found = peftfx.Schedule(model), set()
    states = []
    for _ in range(24):
        schedule.step()
        held = peftfx.state_dict(model)
        on = tuple(float(held[n]) for n in sorted(held) if n.endswith(".on"))
        states.append(on)
        found.add(on)
        assert torch.equal(output(model.eval(), x), whole)
        model.train()
        out = output(model, x)
        if on == (0.0, 0.0):
            with peftfx.disabled(model):
                assert torch.equal(out, output(model, x))
    assert found == {(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)}
    other = peftfx.Schedule(model)
    other.load_state_dict({**schedule.state_dict(), "steps": 5})
    other.step()
    held = peftfx.state_dict(model)
    assert tuple(float(held[n]) for n in sorted(held) if n.endswith(".on")) == states[5]


def test_roles_mean_sublayers() -> None:
    """``mlp`` is what the sublayer gives; ``mlp.up`` is a linear, and so is what a name says."""
    model = by_name("llama").build()

    def at(**selector: Any) -> set[tuple[str, str]]:
        plan, _ = make_plan(model, {"rules": [{"method": "bottleneck", **selector}]})
        return {
            (p.site.name.split("layers.0.")[-1], p.site.kind) for p in plan if p.site.layer == 0
        }

    assert at(role="mlp") == {("mlp", "output")}
    assert at(role=["residual.attention", "residual.mlp"]) == {
        ("self_attn", "output"), ("mlp", "output"),
    }  # fmt: skip
    assert at(role="mlp.up") == {("mlp.up_proj.weight", "linear")}
    assert at(name="*.down_proj") == {("mlp.down_proj.weight", "linear")}


def test_refusals() -> None:
    arch = by_name("llama")
    with pytest.raises(SpecError, match="size"):
        Spec.parse({"rules": [{"method": "bottleneck", "name": "*", "size": 0}]})
    with pytest.raises(SpecError, match="magnitude"):
        rule = {"method": "bottleneck", "name": "*", "density": 0.5, "mask": "magnitude"}
        Spec.parse({"rules": [rule]})
    with pytest.raises(PlanError, match="does not divide"):
        rule = {"method": "compacter", "role": "mlp", "size": 8, "n": 5}
        make_plan(arch.build(), {"rules": [rule]})
    with pytest.raises(PlanError, match="goes by layers"):
        make_plan(nn.Sequential(nn.Linear(3, 4)), {
            "rules": [{"method": "bottleneck", "name": "0", "drop": 1}]
        }, (torch.randn(2, 3),))  # fmt: skip
    arch = by_name("tables")
    with pytest.raises(RoleError):
        rule = {"method": "bottleneck", "role": "residual.attention"}
        make_plan(arch.build(), {"rules": [rule]}, arch.example())
    _, model, _ = tuned({"method": "bottleneck"})
    with pytest.raises(MergeError, match="keep the adapter unmerged"):
        peftfx.merge(model)
