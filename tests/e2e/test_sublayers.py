"""Methods at sublayers' outputs, on many architectures, against formulas in plain hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from tests.architectures import Architecture, by_name
from tests.architectures.blocks import BLOCKS
from tests.helpers import fill, output, relative

SHOWN = ("bert", "llama", "gpt2", "t5", "vit", "bart", "whisper", "qwen3", "modernbert", "phi3")
BEHIND = ("residual.attention", "residual.cross_attention", "residual.mlp")
P = dict[str, Tensor]


def bottleneck(y: Tensor, p: P) -> Tensor:
    inner = torch.nn.functional.silu(y @ p["down"].T + p["down_bias"])
    return y + 0.5 * (inner @ p["up"].T + p["up_bias"])


def compacter(y: Tensor, p: P) -> Tensor:
    def joined(name: str) -> Tensor:
        parts = (p[f"{name}_rule"], p[f"{name}_left"] @ p[f"{name}_right"])
        return torch.stack([torch.kron(a, b) for a, b in zip(*parts, strict=True)]).sum(0)

    inner = torch.relu(y @ joined("down").T + p["down_bias"])
    return y + inner @ joined("up").T + p["up_bias"]


def reft(y: Tensor, p: P) -> Tensor:
    q, r = torch.linalg.qr(p["basis"].T)
    rows = (q * torch.sign(torch.diagonal(r))).T
    return y + (y @ p["source"].T + p["bias"] - y @ rows.T) @ rows


def globs_of(arch: Architecture, roles: tuple[str, ...]) -> list[str]:
    """The modules that the tables say have one of *roles*."""
    told = {**arch.outputs, "block": BLOCKS[arch.name]}
    return [g for role in roles for g in told.get(role, ())]


Formula = Callable[[Tensor, P], Tensor]
METHODS: dict[str, tuple[Formula, tuple[str, ...], dict[str, Any]]] = {
    "bottleneck": (bottleneck, BEHIND, {"size": 5, "scale": 0.5, "activation": "silu"}),
    "compacter": (compacter, BEHIND, {"size": 4, "n": 2}),
    "reft": (reft, ("block",), {"rank": 3}),
}
CASES = [
    pytest.param(
        method,
        name,
        marks=[] if name == "bert" and method != "compacter" else [pytest.mark.sweep],
    )
    for method, (_, roles, _) in METHODS.items()
    for name in SHOWN
    if globs_of(by_name(name), roles)
]


def test_there_are_eight_of_each() -> None:
    for method in METHODS:
        assert sum(case.values[0] == method for case in CASES) >= 8, method


def places(arch: Architecture, model: nn.Module, roles: tuple[str, ...]) -> set[str]:
    globs = globs_of(arch, roles)
    return {n for n, _ in model.named_modules() if any(fnmatchcase(n, g) for g in globs)}


def by_hand(base: nn.Module, formula: Formula, values: dict[str, P]) -> nn.Module:
    """*base* with a hook at each of the modules that *values* names."""
    model = copy.deepcopy(base)

    def hook(p: P) -> Any:
        def changed(module: nn.Module, args: Any, y: Any) -> Any:
            return (formula(y[0], p), *y[1:]) if isinstance(y, tuple) else formula(y, p)

        return changed

    for path, p in values.items():
        model.get_submodule(path).register_forward_hook(hook(p))
    return model


@pytest.mark.parametrize(("method", "name"), CASES)
def test_equals_the_formula(method: str, name: str) -> None:
    formula, roles, options = METHODS[method]
    arch = by_name(name)
    base, x = arch.build().requires_grad_(False), arch.example()
    asked = [r for r in roles if globs_of(arch, (r,))]
    model = copy.deepcopy(base)
    backend = Backend({"rules": [{"method": method, "role": asked, **options}]}, "aot_eager")
    backend.bind(model, x)
    fill(peftfx.parameters(model), scale=0.5)
    held = {k: v.clone().requires_grad_() for k, v in peftfx.state_dict(model).items()}
    values: dict[str, P] = {}
    for key, tensor in held.items():
        values.setdefault(key.partition(":")[0], {})[key.rpartition(".")[2]] = tensor
    assert set(values) == places(arch, model, roles)
    for leaf in ("down_rule", "up_rule") if method == "compacter" else ():
        shared = next(p[leaf] for p in values.values() if leaf in p)  # it has one for all sites
        values = {path: {leaf: shared, **p} for path, p in values.items()}

    expected = output(by_hand(base, formula, values), x)
    assert relative(expected, output(base, x)) > 1e-2
    expected.square().mean().backward()
    want = {k: v.grad for k, v in held.items()}
    largest = max(float(g.abs().max()) for g in want.values() if g is not None)
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        out = output(run, x)
        assert relative(out, expected) < 1e-5
        out.square().mean().backward()
        for key, p in peftfx.named_parameters(model):
            wanted = want[key]
            assert p.grad is not None and wanted is not None
            assert float((p.grad - wanted).abs().max()) <= 1e-5 * largest, key
            p.grad = None
