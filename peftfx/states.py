"""What travels with a bound model: its state dict, and what HF's ``save_pretrained`` writes.

A state dict that is taken while the adapter is in force holds it, and its metadata say so. Taken
while the adapter is merged or off, it is a plain model's. A plain model's that is loaded is the
base's: the adapter stays, and what a rule trains in full follows the base as long as it is equal
to it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftfx import mark
from peftfx.binding import Binding, binding_of, bound, parameter
from peftfx.checkpoint import save
from peftfx.distributed import put, whole
from peftfx.errors import AdapterError, BindError, PeftfxError
from peftfx.install import begin, settle
from peftfx.log import logger

TAG = "peftfx"  # in a state dict's metadata: the adapters whose values it has


def hook(model: nn.Module) -> None:
    """Makes the state dicts and ``save_pretrained`` of a bound model tell of its adapter."""
    model.register_state_dict_post_hook(_after_taking)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_before_loading)
    model.register_load_state_dict_post_hook(_after_loading)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)


def unhook(model: nn.Module) -> None:
    """Undoes :func:`hook`."""
    for hooks in (
        model._state_dict_hooks,
        model._load_state_dict_pre_hooks,
        model._load_state_dict_post_hooks,
    ):
        for key in [k for k, f in hooks.items() if getattr(f, "hook", f) in _OURS]:
            del hooks[key]
    model.__dict__.pop("save_pretrained", None)


def _after_taking(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    binding = binding_of(module)
    if binding is None or binding.fixed:
        return
    if binding.merged or not binding.enabled:
        for name, _ in _in_slots(module):
            state.pop(prefix + name, None)
    else:
        metadata[TAG] = sorted(binding.active)


def _before_loading(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    binding = binding_of(module)
    if binding is None:
        return
    if binding.merged or not binding.enabled:
        raise BindError(
            f"a state dict is loaded while the adapter is {'merged' if binding.merged else 'off'}",
            remedy="peftfx.unmerge(model) or the end of `with peftfx.disabled(model)` comes first",
        )
    slots = {prefix + name: tensor for name, tensor in _in_slots(module)}
    # torch.distributed fills what a state dict lacks with the model's own tensors
    others = any(name in state and state[name] is not own for name, own in slots.items())
    binding.arrived = TAG in metadata or others
    trained = [prefix + n for n in binding.base if prefix + n in state]
    if slots and not binding.arrived:
        logger.warning("the state dict has no adapter: the model keeps the one that it has")
        state.update(slots)
        for name in trained:
            _follow(module, binding, state, prefix, name)
        for name in binding.statistics.keys() & {k.removeprefix(prefix) for k in state}:
            binding.statistics[name] = state[prefix + name].detach().clone()
    elif trained and not binding.arrived:
        binding.arrived = True
        logger.warning(
            "the state dict does not say whether it is a base's or an adapted model's: %s go into "
            "the adapter, and what the base has there stays aside",
            ", ".join(n.removeprefix(prefix) for n in trained),
        )


@torch.no_grad()
def _follow(
    module: nn.Module, binding: Binding, state: dict[str, Any], prefix: str, name: str
) -> None:
    """A base's value of a parameter that is trained in full: the adapter's follows if unmoved."""
    own = name.removeprefix(prefix)
    base, value, trained = binding.base[own], state[name], parameter(module, own)
    if base.is_meta or value.shape != base.shape:
        return  # the trained one takes the value, or says that it cannot
    if not torch.equal(whole(trained).to(base), base):
        logger.warning("%s keeps the value that it was trained to", own)
        state[name] = trained.detach().clone()
    put(base, whole(value))


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    binding = binding_of(module)
    if binding is None or binding.fixed:
        return
    settle(module, binding)
    needed = {p.site.name for p, _ in binding.installed} | {n for n, _ in _in_slots(module)}
    if not any(n == k or k.endswith(f".{n}") for k in incompatible.missing_keys for n in needed):
        begin(module, binding)


def _in_slots(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what the state dict has of marks."""
    for path, slot in module.named_modules():
        if isinstance(slot, mark.Slot):
            for name, tensor in slot.state_dict(keep_vars=True).items():
                yield f"{path}.{name}", tensor


def _save_pretrained(model: nn.Module, save_directory: Any, **options: Any) -> None:
    """What ``model.save_pretrained`` does while the model is bound: it saves the adapter alone."""
    if options.get("push_to_hub"):
        raise PeftfxError("peftfx pushes nothing", remedy="save, then upload the directory")
    if not options.get("is_main_process", True):
        return
    _, binding = bound(model)
    if len(binding.active) != 1:
        raise AdapterError(
            f"{len(binding.active)} adapters are active: they cannot share a directory",
            remedy="peftfx.save(model, directory, adapter=…) for each",
        )
    save(model, save_directory, adapter=next(iter(binding.active)))


_OURS = (_after_taking, _before_loading, _after_loading)
