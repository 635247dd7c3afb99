"""What rules add to the loss: AdaLoRA's orthogonality, L2-SP, budgets of gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfx.binding import Adapter, Binding, bound, tensors_of
from peftfx.methods.method import Method, Tensors
from peftfx.methods.train import BASE
from peftfx.site import Site

Sites = list[tuple[Site, Tensors]]


def penalty(model: nn.Module) -> Tensor:
    """The sum of what the active adapters' rules add to the loss: a scalar, 0 where they do not.

    Add it to the training loss. It is computed from the parameters alone, outside of the compiled
    model.
    """
    model, binding = bound(model)
    terms = [
        term
        for name in binding.active
        for method, sites in by_rule(model, binding, binding.adapter(name)).values()
        if (term := method.penalty(sites)) is not None
    ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    zero = torch.zeros((), device=device)
    return torch.stack([zero, *(t.to(device) for t in terms)]).sum()


def by_rule(
    model: nn.Module, binding: Binding, adapter: Adapter
) -> dict[int, tuple[Method, Sites]]:
    """For each rule its method, and its sites with their tensors; what was replaced is ``base``."""
    found: dict[int, tuple[Method, Sites]] = {}
    held = tensors_of(model, binding, adapter.name)
    for p, tensors in zip(adapter.plan, held, strict=True):
        if not p.method.trains:
            continue
        base = binding.base.get(p.site.name)
        extra = {} if base is None else {BASE: base}
        found.setdefault(p.rule, (p.method, []))[1].append((p.site, {**tensors, **extra}))
    return found
