"""Where marks sit: the slot of a module, and what makes its entries fire.

A method that changes what a module gives or is given has a hook there. One that changes a weight
sits where the weight is read: the module gets a class in which reading the parameter fires the
mark, so that whoever computes with it has the adapted one.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.hooks import hooked, unhook
from peftfx.mark import Entry, Slot, after, before, fire
from peftfx.methods.method import Acts, Method
from peftfx.site import BASE, SLOT, Site
from peftfx.standing import stand_in


class _Kept(threading.local):
    """Weights that are read while their own module runs, by module: made once for each run."""

    def __init__(self) -> None:
        self.of: dict[int, dict[object, Tensor]] = {}


_kept = _Kept()


def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook: a loop over experts reads the same weight many times."""
    if not torch.compiler.is_compiling():
        _kept.of[id(module)] = {}


def leave(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
    """Forward hook; it is called when the module fails too."""
    if not torch.compiler.is_compiling():
        _kept.of.pop(id(module), None)


def _read(module: nn.Module, name: str) -> Tensor:
    """A parameter of *module* as others see it: with the marks of the entries that act on it."""
    if torch.compiler.is_compiling() or (kept := _kept.of.get(id(module))) is None:
        return _adapted(module, name)
    when = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if when not in kept:
        kept[when] = _adapted(module, name)
    return kept[when]


def _adapted(module: nn.Module, name: str) -> Tensor:
    w: Tensor = module._parameters[name]  # type: ignore[assignment]
    slot: Any = module._modules[SLOT]
    for entry in slot._modules.values():
        if entry.key and entry.acts == "weight" and entry.parameter == name:
            w = fire(module, entry, None, w)
    return w


def _read_as(name: str) -> property:
    return property(lambda self: _read(self, name))


@functools.cache
def _reading(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of *cls* whose parameters *names* are read through :func:`_read`.

    For weights that are used without their module being called; parameters stay where they are.
    """
    read = {name: _read_as(name) for name in names}
    return stand_in(cls, _reading, names, **read, **{BASE: cls, _READ: names})


_READ = "_peftfx_read"  # the parameters that the class reads so


def entry_name(site: Site, method: Method) -> str:
    """What the entry of *method* at *site* is called in the slot."""
    alone = site.parameter in ("weight", "")
    return method.name if alone else f"{method.name}_{site.parameter}"


def place(module: nn.Module, site: Site, method: Method, acts: Acts) -> Entry:
    """The entry of *method* at *module*, with the hook that serves *acts*; made where missing."""
    slot = module._modules.get(SLOT)
    if slot is None:
        slot = Slot()
        slot.train(module.training)
        module.add_module(SLOT, slot)
    entry = slot._modules.get(entry_name(site, method))
    if entry is None:
        entry = Entry(site)
        entry.train(module.training)
        slot.add_module(entry_name(site, method), entry)
    assert isinstance(entry, Entry)
    if acts == "weight":
        read: tuple[str, ...] = getattr(type(module), _READ, ())
        if site.parameter not in read:
            unread(module)
            kind: Any = type(module)
            module.__class__ = _reading(kind, (*read, site.parameter))
        if not hooked(module, enter):
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True, always_call=True)
    elif site.kind == "attention":
        pass  # its projections are marked where they are made, see peftfx.multihead
    elif acts == "input":
        if not hooked(module, before):
            module.register_forward_pre_hook(before, with_kwargs=True)
    elif not hooked(module, after):
        module.register_forward_hook(after, with_kwargs=True)
    return entry


def armed(module: nn.Module, entry: Entry) -> bool:
    """Whether what makes *entry* fire is still in place."""
    if entry.kind == "attention":
        return True  # its own module tells
    if entry.acts == "weight":
        return entry.parameter in getattr(type(module), _READ, ())
    return hooked(module, before if entry.acts == "input" else after)


def displace(module: nn.Module, name: str) -> None:
    """Takes the entry of that name off *module*, and the slot with its last entry."""
    slot = module._modules[SLOT]
    assert slot is not None
    del slot._modules[name]
    if not slot._modules:
        clear(module)


def clear(module: nn.Module) -> None:
    """Takes the slot and its hooks off *module*."""
    module._modules.pop(SLOT, None)
    unread(module)
    unhook(module, before, after, enter, leave)


def unread(module: nn.Module) -> None:
    """Gives *module* its own class back."""
    if hasattr(type(module), _READ):
        module.__class__ = getattr(type(module), BASE)
