"""A bound model sent to another process, in every form, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.multiprocessing as multiprocessing

import peftfx
from tests.helpers import relative
from tests.state.bench import FORMS, Bench, X, adapter, base, formula


def trained(model: Any) -> tuple[torch.Tensor, Any]:
    """In the child: runs the model, takes a step with it, and gives both results."""
    torch.set_num_threads(1)
    before = model(X)
    before.square().sum().backward()
    torch.optim.SGD(peftfx.parameters(model), lr=0.1).step()
    return before.detach(), {n: t.clone() for n, t in peftfx.state_dict(model).items()}


def test_spawned() -> None:
    """The child's result and its step are those of the formula, and of its gradients."""
    benches = [Bench(form) for form in FORMS]
    models = [b.run() for b in benches]
    models[2](X)  # compiled before it is sent
    values = {n: t.requires_grad_() for n, t in adapter(benches[0].model).items()}
    expected = formula(base().state_dict(), values)
    expected.square().sum().backward()
    stepped = {n: t - 0.1 * t.grad for n, t in values.items() if t.grad is not None}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(trained, models)
    for out, after in found:
        assert relative(out, expected) < 1e-5
        assert after.keys() == stepped.keys()
        assert all(relative(after[n], t) < 1e-5 for n, t in stepped.items())
