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
    adapters: set[int] = set()
    frozen: set[int] = set()
    for p in held:
        owner = owner_of(p)
        model = owner.model() if owner is not None else None
        if owner is not None and model is not None:
            (frozen if owner.site is None else adapters).add(id(model))
    if frozen - adapters:
        raise OptimizerError(
            "this optimizer holds frozen parameters of an adapted model and none of the adapter's: "
            "nothing would train",
            remedy="bind first (backend.bind(model) or peftfx.adapt(model, spec)), then make the "
            "optimizer from peftfx.parameters(model)",
        )
    _checked[optimizer] = len(held)
