"""The same five specs on every architecture, against their formulas on the base's own weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftfx
from peftfx.backends import Backend
from peftfx.errors import PlanError
from tests.architectures import ARCHITECTURES, Architecture
from tests.helpers import output, relative

ALL = pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
BREAKS = {"mixtral", "qwen3-moe", "deepseek-v3"}  # their experts' loop reads values
LORA = {"method": "lora", "rank": 4, "alpha": 6}
SPECS: dict[str, dict[str, Any]] = {
    "lora at attention": {**LORA, "role": ["attention", "cross_attention"]},
    "lora at mlp": {**LORA, "role": "mlp"},
    "ia3": {
        "method": "ia3", "role": ["attention.key", "attention.value", "mlp.down"],
        "overrides": [{"role": "mlp.down", "at": "input"}],
    },
    "norm": {"method": "norm", "role": "norm"},
    "head": {"method": "train", "role": "head"},
}  # fmt: skip


def places(arch: Architecture, model: nn.Module, rule: dict[str, Any]) -> set[str]:
    """The parameters that a rule should act at, by the table.

    Adapters of modules act at weights that have no other role than those asked for.
    """
    given = rule["role"] if isinstance(rule["role"], list) else [rule["role"]]
    asked = [r for r in arch.roles if r in given or r.rpartition(".")[0] in given]
    found = set(arch.having(model, *asked))
    if rule["method"] in ("norm", "train"):
        return found
    others = set(arch.having(model, *(r for r in arch.roles if r not in asked and "." in r)))
    return {
        n for n in found - others
        if "bias" not in n and not _partly(arch, n, model.get_parameter(n).shape)
    }  # fmt: skip


def _partly(arch: Architecture, name: str, shape: torch.Size) -> bool:
    """Whether the table says that some of a weight's output features have no role."""
    rows = arch.rows_of(name)
    known = sum(stop - start for spans in rows.values() for start, stop in spans)
    return bool(rows) and known not in shape


def changed(base: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of *base* as the methods change them, one method after another."""
    found: dict[str, Tensor] = {}
    own = dict(base.named_parameters(remove_duplicate=False))
    for key, value in values.items():
        name, _, leaf = key.partition(":")
        w = found.get(name, own[name])
        if leaf == "lora.A":
            update = 1.5 * (values[f"{name}:lora.B"] @ value)  # [N, K]
            found[name] = w + (update.t() if turned(base, name) else update)
        elif leaf == "ia3.l":
            along = (1, -1) if (value.shape[0] == 1) != turned(base, name) else (-1, 1)
            found[name] = w * value.reshape(along)
            bias = f"{name.rpartition('.')[0]}.bias"
            if value.shape[1] == 1 and bias in own:
                found[bias] = own[bias] * value.flatten()
        elif leaf in ("norm.value", "train.value"):
            found[name] = value
    return found


def turned(base: nn.Module, name: str) -> bool:
    return type(base.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


def example_of(arch: Architecture) -> object:
    values = arch.example()
    return tuple(values.values()) if arch.name == "sequential" else values


def adapted(
    arch: Architecture, base: nn.Module, rules: list[dict[str, Any]]
) -> tuple[nn.Module, Backend]:
    """A copy of *base* with adapters that are not at their start."""
    model = copy.deepcopy(base)
    backend = Backend({"rules": rules}, "aot_eager")
    backend.bind(model, example_of(arch))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in peftfx.named_parameters(model):
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model, backend


def check_against_formula(
    arch: Architecture, base: nn.Module, model: nn.Module, run: Any
) -> Tensor:
    """Compares *run*'s output and gradients with the formulas'; gives the output."""
    x = arch.example()
    values = {k: v.clone().requires_grad_() for k, v in peftfx.state_dict(model).items()}
    if arch.name == "flex":  # torch's flex_attention has no backward on the CPU
        with torch.no_grad():
            expected = output(_Changed(base, changed(base, values)), x)
            assert relative(output(run, x), expected) < 1e-5
        return expected
    expected = output(_Changed(base, changed(base, values)), x)
    assert relative(expected, output(base, x)) > 1e-4  # the adapter does something
    out = output(run, x)
    assert relative(out, expected) < 1e-5
    expected.square().mean().backward()
    out.square().mean().backward()
    got = {n: p.grad for n, p in peftfx.named_parameters(model)}
    assert set(got) == set(values)
    largest = max(float(v.grad.abs().max()) for v in values.values() if v.grad is not None)
    for key, value in values.items():
        want = torch.zeros_like(value) if value.grad is None else value.grad
        grad = got[key]
        assert ((torch.zeros(()) if grad is None else grad) - want).abs().max() <= 1e-5 * largest
    return expected


class _Changed(nn.Module):
    def __init__(self, base: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.base, self.weights = base, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.base, self.weights, args, kwargs)


@pytest.mark.sweep
@ALL
def test_all_five_compiled(arch: Architecture) -> None:
    base = arch.build().requires_grad_(False)
    rules = [rule for rule in SPECS.values() if places(arch, base, rule)]
    model, backend = adapted(arch, base, rules)
    compiled = torch.compile(model, backend=backend, fullgraph=arch.name not in BREAKS)
    check_against_formula(arch, base, model, compiled)


SLOW = ("ia3", "norm")


@ALL
@pytest.mark.parametrize(
    "name", [pytest.param(s, marks=[pytest.mark.sweep] if s in SLOW else []) for s in SPECS]
)
def test_acts_saves_and_merges(arch: Architecture, name: str, tmp_path: Path) -> None:
    rule = SPECS[name]
    base = arch.build().requires_grad_(False)
    expected_places = places(arch, base, rule)
    if not expected_places:  # no attention, no feed-forward, no norm, or fused and not to be cut
        with pytest.raises(PlanError, match=r"no site has the role|one weight computes"):
            peftfx.plan(base, {"rules": [rule]}, example_of(arch))
        return
    model, _ = adapted(arch, base, [rule])
    state = peftfx.state_dict(model)
    assert {key.partition(":")[0] for key in state} == expected_places
    expected = check_against_formula(arch, base, model, model)

    peftfx.save(model, tmp_path)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path, compile=False, example=example_of(arch))
    after = peftfx.state_dict(fresh)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[k], after[k]) for k in state)
    peftfx.merge(fresh, untie=True)
    assert relative(output(fresh, arch.example()), expected) < 1e-5
    peftfx.release(model)
    assert all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))
