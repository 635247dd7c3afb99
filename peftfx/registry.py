"""Which model and site a tensor belongs to, for checks that see only tensors.

The check that matters: an optimizer made before an automatic bind holds the frozen parameters and
none of the adapter's, so that nothing trains and nothing fails. Its first step is refused.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from peftfx.errors import OptimizerError


@dataclass(frozen=True)
class Owner:
    """The model of a tensor, and its site; None for a frozen parameter of the base."""

    model: weakref.ref[nn.Module]
    site: str | None


_owners: Any = WeakTensorKeyDictionary()  # Tensor -> Owner
_checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def own(tensor: Tensor, model: nn.Module, site: str | None) -> None:
    """Records that *tensor* is an adapter's tensor at *site*, or a frozen one of the base."""
    _watch_optimizers()
    _owners[tensor] = Owner(weakref.ref(model), site)
    _checked.clear()


def disown(tensor: Tensor) -> None:
    """Forgets *tensor*."""
    _owners.pop(tensor, None)


def owner_of(tensor: Tensor) -> Owner | None:
    """What is known of *tensor*."""
    found: Owner | None = _owners.get(tensor)
    return found


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if _checked.get(optimizer) == len(held):
        return
    adapters: dict[int, list[Tensor]] = {}
    models: dict[int, nn.Module] = {}
    frozen: set[int] = set()
    for p in held:
        owner = owner_of(p)
        model = owner.model() if owner is not None else None
        if owner is None or model is None:
            continue
        if owner.site is None:
            frozen.add(id(model))
        else:
            models[id(model)] = model
            adapters.setdefault(id(model), []).append(p)
    if frozen - set(adapters):
        raise OptimizerError(
            "this optimizer holds frozen parameters of an adapted model and none of the adapter's: "
            "nothing would train",
            remedy="bind first (backend.bind(model) or peftfx.adapt(model, spec)), then make the "
            "optimizer from peftfx.parameters(model)",
        )
    away = [key for key, tensors in adapters.items() if not _present(models[key], tensors)]
    for key in away:
        missed = any(p.requires_grad and _moves(p) for p in models[key].parameters())
        if missed and not any(_moves(p) for p in adapters[key]):
            raise OptimizerError(
                "this optimizer holds the parameters of an adapter that is not active, and the "
                "gradients are those of another: nothing would train",
                remedy="make an optimizer for each adapter, from peftfx.parameters(model, adapter)",
            )
    if not away:
        _checked[optimizer] = len(held)


def _present(model: nn.Module, tensors: list[Tensor]) -> bool:
    now = {id(p) for p in model.parameters()}
    return any(id(t) in now for t in tensors)


def _moves(p: Tensor) -> bool:
    return p.grad is not None and bool(p.grad.any())
