"""Transforms of ``torch.func``, and gradients of gradients, of adapted models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vjp, vmap

import peftfx
from peftfx.backends import Backend
from peftfx.errors import NotAdaptedError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.laws.test_methods import IDS, loss_of, made, shake
from tests.methods import ROWS, Row

EVERY = pytest.mark.parametrize("row", ROWS, ids=str)
Tensors = dict[str, Tensor]


def filled(row: Row) -> tuple[nn.Module, Tensors]:
    """A model that runs eagerly, and copies of what trains."""
    _, model, _ = made(row, "eager")
    shake(row, model)
    return model.eval(), {n: p.detach().clone() for n, p in trained(model).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def largest(tensors: Any) -> float:
    return max(float(t.abs().max()) for t in tensors)


@EVERY
def test_grad_is_the_backward(row: Row) -> None:
    model, values = filled(row)
    loss_of(model(IDS)).backward()
    found = grad(lambda p: loss_of(functional_call(model, p, (IDS,))))(values)
    expected = {n: p.grad for n, p in trained(model).items() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert largest(found[n] - expected[n] for n in found) <= 1e-6 * largest(expected.values())


@EVERY
def test_vmap_over_adapters(row: Row) -> None:
    """Adapters stacked along a new axis: what each of them gives by itself."""
    model, _ = filled(row)
    members = [copy.deepcopy(model) for _ in range(3)]
    for seed, member in enumerate(members):
        shake(row, member, seed)
    stacked = {n: torch.stack([m.get_parameter(n).detach() for m in members]) for n in
               trained(model)}  # fmt: skip
    found = vmap(lambda p: functional_call(model, p, (IDS,)))(stacked)
    for out, member in zip(found, members, strict=True):
        assert relative(out, member(IDS)) < 1e-5
    assert relative(found[0], found[1]) > 1e-3


@EVERY
def test_second_derivatives(row: Row) -> None:
    """Forward over reverse by ``torch.func``, and autograd's graph of the backward: one result."""
    model, values = filled(row)
    direction = {n: torch.randn_like(v) for n, v in values.items()}
    first = grad(lambda p: loss_of(functional_call(model, p, (IDS,))))
    _, expected = jvp(first, (values,), (direction,))
    parameters = trained(model)
    grads = torch.autograd.grad(loss_of(model(IDS)), list(parameters.values()), create_graph=True)
    along = torch.stack(
        [(g * direction[n]).sum() for n, g in zip(parameters, grads, strict=True)]
    ).sum()
    found = torch.autograd.grad(along, list(parameters.values()))
    bound = 1e-5 * largest(expected.values())
    assert all(largest([f - expected[n]]) <= bound for n, f in zip(parameters, found, strict=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def net(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model with LoRA, and one whose weights are the sums, by plain arithmetic."""
    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    rule = {"method": "lora", "name": ["up", "down"], "rank": 2, "alpha": 3}
    Backend({"rules": [rule], **options}, "eager").bind(model, (X,))
    fill(peftfx.parameters(model))
    with torch.no_grad():
        for owner in ("up", "down"):
            entry = model.get_submodule(f"{owner}.peftfx.lora")
            plain.get_submodule(owner).weight.add_(entry.B @ entry.A * 1.5)
    return model, plain


TRANSFORMS: dict[str, Any] = {
    "vjp": lambda m: vjp(m, X)[1](torch.ones(4, 5))[0],
    "jvp": lambda m: jvp(m, (X,), (torch.ones_like(X),))[1],
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(X[0]),
    "a gradient for each sample": lambda m: vmap(grad(lambda x: m(x).square().sum()))(X),
    "vmap in vmap": lambda m: vmap(vmap(m))(X.reshape(2, 2, 6)),
    "double backward": lambda m: _penalty(m),
}


def _penalty(model: nn.Module) -> Tensor:
    """The gradient of a penalty on the gradient, as WGAN-GP has it."""
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_a_plain_model(name: str) -> None:
    model, plain = net()
    assert relative(TRANSFORMS[name](model), TRANSFORMS[name](plain)) < 1e-5


def test_strict_refuses_transforms() -> None:
    model, _ = net(strict=True)
    with pytest.raises(NotAdaptedError, match="strict"):
        vmap(model)(X)


def test_dropout_under_vmap() -> None:
    """The same masks for all, or masks for each, as the caller says."""
    rule = {"method": "lora", "name": "up", "rank": 2, "dropout": 0.5}
    model = Net()
    Backend({"rules": [rule]}, "eager").bind(model, (X,))
    fill(peftfx.parameters(model), scale=2.0)
    same = X[:1].expand(3, 1, 6)
    for randomness, equal in (("same", True), ("different", False)):
        out = vmap(model, randomness=randomness)(same)
        assert torch.allclose(out[0], out[1]) == equal
    with pytest.raises(RuntimeError, match="random"):
        vmap(model)(same)


def test_prefixes_and_prompts() -> None:
    """What acts at attention calls and on the sequence has gradients by ``torch.func`` too."""
    for rule in (
        {"method": "prefix", "role": "attention", "length": 3},
        {"method": "prompt", "role": "tokens", "length": 2},
    ):
        arch = by_name("llama")
        model, x = arch.build(), arch.example()
        Backend({"rules": [rule]}, "eager").bind(model)
        fill(peftfx.parameters(model))

        def loss(values: Tensors, model: Any = model, x: Any = x) -> Tensor:
            return functional_call(model, values, (), x).logits.square().mean()

        found = grad(loss)({n: p.detach() for n, p in trained(model).items()})
        output(model, x).square().mean().backward()
        for name, p in trained(model).items():
            assert p.grad is not None and relative(found[name], p.grad) < 1e-5


def test_ensemble_of_models() -> None:
    """``stack_module_state`` of bound models, over a batch for each."""
    members = []
    for seed in range(3):
        model, _ = net()
        fill(peftfx.parameters(model), seed)
        members.append(model)
    parameters, buffers = stack_module_state(members)  # type: ignore[arg-type]
    batches = torch.randn(3, 4, 6)
    found = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(
        parameters, buffers, batches
    )
    for out, member, x in zip(found, members, batches, strict=True):
        assert relative(out, member(x)) < 1e-5
