"""What has to hold of a bound model whenever it runs, or a graph of it is compiled."""

from __future__ import annotations

import torch
from torch import nn

from peftfx import attention, multihead, places, sequence, slots
from peftfx.binding import SURGERY, Binding, entry_of, parameter
from peftfx.errors import NotAdaptedError
from peftfx.plans import Placement
from peftfx.registry import owner_of


def check(model: nn.Module, binding: Binding) -> None:
    """Raises :class:`NotAdaptedError` where the model does not run as it was planned."""
    if binding.fixed:
        return  # the graph itself is adapted
    on = binding.enabled and not binding.merged
    for name in binding.active if on else ():
        waits = binding.adapters[name].waits
        if waits:
            raise NotAdaptedError(f"adapter {name!r} {_WAITS[waits][0]}", remedy=_WAITS[waits][1])
    for placement, _ in binding.installed:
        reason = _amiss(model, binding, placement, on)
        if reason is not None:
            raise NotAdaptedError(reason, site=placement.site.name, remedy=SURGERY)
        _check_devices(model, placement)
    if on and torch.is_grad_enabled():
        _check_frozen(model, binding)


_WAITS = {
    "data": (
        "starts from data, and has seen none",
        "call peftfx.calibrate(model, batches), or load its values",
    ),
    "values": (
        "was made on the meta device, and has no values",
        "load the base's state dict into the model, in one, or the adapter's values",
    ),
}


def _check_devices(model: nn.Module, p: Placement) -> None:
    """Raises where a tensor of the adapter and the weight beside it are on two devices.

    A weight on the meta device may be elsewhere while its module runs: offloaded ones are. One that
    is computed of others, as a parametrized one is, is no parameter here.
    """
    path, _, leaf = p.site.like.rpartition(".")
    home = model.get_submodule(path)._parameters.get(leaf)
    if p.method.acts == "parameter" or home is None or home.is_meta:
        return
    for name, tensor in entry_of(model, p).tensors().items():
        if tensor.device != home.device:
            raise NotAdaptedError(
                f"the adapter's {name!r} is on {tensor.device}, and the weight on {home.device}",
                site=p.site.name,
                remedy="move them together: model.to(device)",
            )


def _amiss(model: nn.Module, binding: Binding, p: Placement, on: bool) -> str | None:
    """Why the adapter at a placement is not in force as it was planned, None where it is."""
    try:
        owner = model.get_submodule(p.site.module)
    except AttributeError:
        return "the module is gone"
    weight = owner._parameters.get(p.site.parameter)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        weight = None  # shapes are tensors there, which no condition may ask
    if weight is not None and weight.is_floating_point() and tuple(weight.shape) != p.site.whole:
        return f"the parameter is {list(weight.shape)}, and was {list(p.site.whole)} when bound"
    if p.method.acts == "parameter":
        return _replaced(model, binding, p) if on else None
    entry = entry_of(model, p)
    if not multihead.armed(model, p.site) or not slots.armed(owner, entry):
        return "the hook that carried the adapter is gone"
    if entry.acts == "tokens" and not sequence.fed(model, entry, p.site.around):
        return "the forward that lengthened the sequence is gone"
    if entry.acts == "attention" and not attention.scoped(model, p.site.around):
        return "a hook on the attention or its positions is gone"
    if entry.positional and not places.watched(model, entry.places):
        return "the hook that counted the tokens is gone"
    if bool(entry.key) != on:
        return "the adapter was switched behind peftfx's back"
    return None


def _replaced(model: nn.Module, binding: Binding, p: Placement) -> str | None:
    """Why what is at a placement is not the parameter that the adapter trains.

    ``torch.func.functional_call`` may have put another's value there.
    """
    home = binding.homes[p.site.module]()
    if home is not model.get_submodule(p.site.module):
        return "the module whose parameter is trained was replaced"
    current = parameter(model, p.site.name)
    if any(parameter(model, alias) is not current for alias in p.site.aliases):
        return f"the parameter is not tied to {', '.join(p.site.aliases)} any more"
    owner = owner_of(current)
    if owner is None or owner.model() is not model or owner.site in (p.site.name, *p.site.aliases):
        return None
    return "another parameter of the model took the place of the one that is trained"


def _check_frozen(model: nn.Module, binding: Binding) -> None:
    trained: set[int] = set()
    for p, _ in binding.installed:
        own = p.method.acts == "parameter"
        held = [parameter(model, p.site.name)] if own else entry_of(model, p).tensors().values()
        trained |= {id(t) for t in held}
    for name, q in model.named_parameters():
        if q.requires_grad and id(q) not in trained:
            raise NotAdaptedError(
                "the plan freezes a parameter that requires a gradient",
                site=name,
                remedy="train it by a rule of the spec, `method: train`",
            )
