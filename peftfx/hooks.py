"""Forward hooks at module level: whether a module has one, and taking it off."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooked(module: nn.Module, hook: Any) -> bool:
    """Whether *hook* is among the forward hooks and pre-hooks of *module*."""
    return any(f is hook for hooks in _tables(module) for f in hooks.values())


def unhook(module: nn.Module, *gone: Any) -> None:
    """Takes the hooks off *module*, wherever they are."""
    extras = (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    for hooks in _tables(module):
        for key in [k for k, f in hooks.items() if any(f is hook for hook in gone)]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)


def _tables(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks
