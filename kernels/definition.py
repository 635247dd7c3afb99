"""Ops and their definitions.

An op of ours is opaque to transforms of ``torch.func`` and to derivatives beyond the first. Its
definition is plain torch, which takes part in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEFINITIONS: dict[Any, Callable[..., Any]] = {}


def define(
    library: torch.library.Library,
    name: str,
    definition: Callable[..., Any],
    plain: Callable[..., Any] | None = None,
) -> None:
    """Makes *definition* what the op ``peftfx::name`` computes, on every device.

    Args:
        plain: the same by functions that torch can transform, where the definition's are not.
    """
    library.impl(name, definition, "CompositeExplicitAutograd")
    _DEFINITIONS[getattr(torch.ops.peftfx, name)] = plain or definition


class Defined(TorchFunctionMode):
    """Inside the block, ops are called by their definitions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        definition = _DEFINITIONS.get(getattr(func, "overloadpacket", func))
        if definition is None:
            return func(*args, **(kwargs or {}))
        with self:  # a definition may call other ops
            return definition(*args, **(kwargs or {}))
