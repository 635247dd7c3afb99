"""Installing adapters: their tensors go into the slots and parameters of a bound model, and out.

Nothing here changes a graph: marks read the slots at each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftfx import attention, multihead, places, rungs, sequence, slots
from peftfx.binding import (
    Binding,
    Tensors,
    Waits,
    entry_of,
    parameter,
    refuse_fixed,
    tensors_of,
)
from peftfx.distributed import put, refuse_shards, whole
from peftfx.errors import BindError, MergeError
from peftfx.methods import part
from peftfx.methods.method import Method, Param, float_dtype
from peftfx.methods.train import VALUE
from peftfx.plans import Placement, Plan
from peftfx.registry import own, owner_of
from peftfx.spec import Spec


@torch.no_grad()
def create(model: nn.Module, plan: Plan, spec: Spec) -> list[Tensors]:
    """Fresh tensors for every placement, on the device of its site."""
    held: dict[tuple[object, ...], Tensor] = {}  # what several placements share
    values = []
    for p in plan:
        like = parameter(model, p.site.like)
        made: Tensors = {}
        for name, param in p.params.items():
            if p.method.acts == "parameter":
                made[name] = nn.Parameter(like.detach().clone())
                continue
            holder = p.holder(name)
            if holder not in held:
                dtype = param.dtype or float_dtype(like.dtype, spec.dtype)
                value = torch.empty(param.shape, dtype=dtype, device=like.device)
                param.init(value)
                held[holder] = as_held(value, param)
            made[name] = held[holder]
        base = part.cut(whole(like.detach()), p.site, p.site.axes[0])
        p.method.start(base, made, p.site)
        values.append(made | constants(p, like.device))
    return values


def waiting(plan: Plan, values: list[Tensors]) -> Waits:
    """What a fresh adapter of *plan*, with *values*, has to see before it means anything."""
    if any(t.is_meta for tensors in values for t in tensors.values()):
        return "values"
    calibrated = (p.method.calibration(p.site) for p in plan if p.method.trains)
    return "data" if any(c is not None for c in calibrated) else ""


def as_held(value: Tensor, param: Param) -> Tensor:
    """*value* in the form in which slots hold it.

    What is frozen is a buffer; where it is shared it is a parameter, for ``.to()`` keeps those one.
    """
    if param.trains or (param.shared is not None and value.is_floating_point()):
        return nn.Parameter(value, requires_grad=param.trains)
    return value


def constants(p: Placement, device: torch.device) -> Tensors:
    """The method's buffers at a placement."""
    return {name: buffer.to(device) for name, buffer in p.method.buffers(p.site).items()}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of norms, which move in training though no rule says so."""
    norms = nn.modules.batchnorm._NormBase
    return {
        f"{path}.{name}" if path else name: buffer.clone()
        for path, module in model.named_modules()
        if isinstance(module, norms)
        for name, buffer in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def exchange(model: nn.Module, binding: Binding) -> None:
    """Exchanges the running statistics at hand with those kept in the binding."""
    for name, kept in binding.statistics.items():
        buffer = model.get_buffer(name)
        now = buffer.to(kept, copy=True)
        buffer.copy_(kept)
        kept.copy_(now)


def swap(model: nn.Module, binding: Binding, names: tuple[str, ...], new: nn.Parameter) -> None:
    """Puts *new* in the place of a parameter, under all the *names* given.

    The base's own parameter object is kept aside by its first name.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        current = owner._parameters[leaf]
        assert current is not None
        binding.base.setdefault(name, current)
        owner._parameters[leaf] = new


def restore(model: nn.Module, binding: Binding, names: tuple[str, ...]) -> nn.Parameter:
    """Puts the base's own parameter back; gives what was in its place."""
    current = parameter(model, names[0])
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if binding.base.get(name, current).is_meta != current.is_meta:
            raise BindError(
                "the base's own value is not known: an adapted model's was loaded over it",
                site=name,
                remedy="load the base's state dict",
            )
        original = binding.base.pop(name, None)
        if original is None:
            continue
        if original.device != current.device or original.dtype != current.dtype:
            original.data = original.data.to(current.device, current.dtype)
        owner._parameters[leaf] = original
    return current


def place_all(model: nn.Module, binding: Binding, plan: Plan) -> None:
    """Sets the marks of *plan*, switched off."""
    for p in plan:
        if p.method.acts != "parameter":
            owner = model.get_submodule(p.site.module)
            entry = slots.place(owner, p.site, p.method, binding.acts_of(p, p.method))
            if p.method.acts == "tokens":
                sequence.feed(model, entry, p.site.around)
            elif p.method.acts == "attention":
                attention.scope(model, entry, p.site.around)
            elif p.method.positional():
                places.watch(model, entry, p.site.module)
    multihead.expand(model, plan)


def install(model: nn.Module, binding: Binding, weights: Mapping[str, float]) -> None:
    """Makes *weights* the active adapters: their tensors go into the slots and marks go on.

    Raises:
        MergeError: they cannot be mixed. What was active before still is.
    """
    before = binding.active
    if before:
        refuse_shards(model, "another adapter is activated")
    uninstall(model, binding)
    try:
        _install(model, binding, weights)
    except MergeError:
        uninstall(model, binding)
        if before:
            _install(model, binding, before)
        raise


def _install(model: nn.Module, binding: Binding, weights: Mapping[str, float]) -> None:
    binding.active = dict(weights)
    single = len(weights) == 1 and next(iter(weights.values())) == 1.0
    if single:
        adapter = binding.adapters[next(iter(weights))]
        assert adapter.stored is not None
        found = [(p, p.method, t) for p, t in zip(adapter.plan, adapter.stored, strict=True)]
        adapter.stored = None
    else:
        found = list(_mixed(model, binding))
    for p, method, tensors in found:
        if not p.method.trains:
            continue
        if p.method.acts == "parameter":
            value = tensors[VALUE]
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            current = parameter(model, p.site.name)
            if new.device != current.device:
                new.data = new.data.to(current.device)
            swap(model, binding, (p.site.name, *p.site.aliases), new)
        else:
            entry = entry_of(model, p)
            device = parameter(model, p.site.like).device
            for name, tensor in tensors.items():
                if tensor.device == device:
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(device)
                else:
                    tensors[name] = tensor.to(device)
            entry.fill(method, tensors, p.params if single else (), method.reads_at(p.site))
        binding.installed.append((p, method))
    marked = [p for p, _ in binding.installed if p.method.acts != "parameter"]
    rungs.join([(p, entry_of(model, p)) for p in marked])
    set_keys(model, binding)
    own_all(model, binding)


def own_all(model: nn.Module, binding: Binding) -> None:
    """Tells the registry whose tensors these are."""
    for p, _ in binding.installed:
        if p.method.acts == "parameter":
            own(parameter(model, p.site.name), model, p.site.name)
            binding.homes[p.site.module] = weakref.ref(model.get_submodule(p.site.module))
            continue
        for tensor in entry_of(model, p).tensors().values():
            own(tensor, model, p.site.name)
    for frozen in model.parameters():
        if not frozen.requires_grad and owner_of(frozen) is None:
            own(frozen, model, None)
    binding.owned = True


def settle(model: nn.Module, binding: Binding) -> None:
    """Makes tensors one again that placements share, where each was given its own."""
    held: dict[tuple[object, ...], Tensor] = {}
    for p, _ in binding.installed:
        if p.method.acts == "parameter":
            current = parameter(model, p.site.name)
            for alias in p.site.aliases:
                path, _, leaf = alias.rpartition(".")
                model.get_submodule(path)._parameters[leaf] = current
            continue
        entry = entry_of(model, p)
        for name in set(p.params) & set(entry.names):
            setattr(entry, name, held.setdefault(p.holder(name), getattr(entry, name)))
    own_all(model, binding)


@torch.no_grad()
def begin(model: nn.Module, binding: Binding) -> None:
    """Gives adapters that were made on the meta device their values, now that the base has its.

    What a state dict brought along stays; constants are not in it, and are made again.
    """
    for name in binding.active:
        adapter = binding.adapter(name)
        if binding.arrived and adapter.waits == "data":
            adapter.waits = ""
        if adapter.waits != "values":
            continue
        if any(parameter(model, p.site.like).is_meta for p in adapter.plan):
            continue
        fresh = None if binding.arrived else create(model, adapter.plan, adapter.spec)
        held = tensors_of(model, binding, name)
        for i, p in enumerate(adapter.plan):
            if p.method.acts == "parameter":
                _base_follows(model, binding, p)
                continue
            device = parameter(model, p.site.like).device
            values = (fresh[i] if fresh else {}) | constants(p, device)
            entry = entry_of(model, p)
            for leaf, value in values.items():
                if held[i][leaf].is_meta:
                    held[i][leaf] = value
                else:
                    put(held[i][leaf], value)
            entry.fill(p.method, held[i], p.params, p.method.reads_at(p.site))
        adapter.waits = "" if binding.arrived else waiting(adapter.plan, held)
        adapter.flag(held)
    own_all(model, binding)


def _base_follows(model: nn.Module, binding: Binding, p: Placement) -> None:
    """A base's value that was loaded where the trained one is."""
    if binding.arrived:
        return
    value = parameter(model, p.site.name)
    kept = nn.Parameter(value.detach().clone(), requires_grad=False)
    for name in (p.site.name, *p.site.aliases):
        if binding.base[name].is_meta:
            binding.base[name] = kept


def fill(model: nn.Module, binding: Binding, name: str, values: list[Tensors]) -> None:
    """Copies *values*, one mapping for each placement, into an adapter, in place.

    Raises:
        MergeError: the adapter is merged into the weights, which would keep the values before.
    """
    if binding.merged and name in binding.active:
        raise MergeError(
            f"adapter {name!r} is merged into the weights",
            remedy="peftfx.unmerge(model), load, and merge again",
        )
    with torch.no_grad():
        for into, found in zip(tensors_of(model, binding, name), values, strict=True):
            for leaf, value in found.items():
                put(into[leaf], value)
    binding.adapter(name).waits = ""
    if name in binding.active and binding.active != {name: 1.0}:  # it is part of a sum
        install(model, binding, dict(binding.active))


def _key(binding: Binding, p: Placement, method: Method) -> str:
    strict = any(binding.adapters[a].spec.strict for a in binding.active)
    return method.key(p.site, binding.acts_of(p, method), strict)


def set_keys(model: nn.Module, binding: Binding) -> None:
    """Switches the marks of the active adapters on or off, as the binding says."""
    on = binding.enabled and not binding.merged
    refuse_fixed(binding)
    for p, method in binding.installed:
        if p.method.acts != "parameter":
            entry = entry_of(model, p)
            entry.acts = binding.acts_of(p, method)
            entry.key = _key(binding, p, method) if on else ""


def uninstall(model: nn.Module, binding: Binding) -> None:
    """Takes the active adapters' tensors back out of the slots; their marks go off."""
    taken: dict[tuple[str, str], Tensors] = {}
    for p, _ in binding.installed:
        if p.method.acts == "parameter":
            value = restore(model, binding, (p.site.name, *p.site.aliases))
            taken[p.site.name, p.method.name] = {VALUE: value}
        else:
            entry = entry_of(model, p)
            taken[p.site.name, p.method.name] = entry.tensors()
            entry.empty()
    if len(binding.active) == 1:
        adapter = binding.adapters.get(next(iter(binding.active)))
        if adapter is not None and adapter.stored is None:
            adapter.stored = [taken.get((p.site.name, p.method.name), {}) for p in adapter.plan]
    binding.installed.clear()
    binding.active = {}


def _mixed(model: nn.Module, binding: Binding) -> Iterator[tuple[Placement, Method, Tensors]]:
    parts: dict[tuple[str, str], list[tuple[float, Placement, Tensors]]] = {}
    for name, weight in binding.active.items():
        adapter = binding.adapters[name]
        for p, tensors in zip(adapter.plan, tensors_of(model, binding, name), strict=True):
            if p.method.trains:
                at = (p.site.name, p.method.name)
                parts.setdefault(at, []).append((weight, p, tensors))
    for found in parts.values():
        p = found[0][1]
        if len(found) == 1 and found[0][0] == 1.0:  # it stands for itself
            yield p, p.method, {n: t.detach() for n, t in found[0][2].items()}
            continue
        base = part.cut(parameter(model, p.site.like), p.site, p.site.axes[0])
        given = [(w, q.method, {**t, "base": base}) for w, q, t in found]
        with torch.no_grad():
            method, tensors = p.method.mix(given, p.site)
        yield p, method, {n: t.detach() for n, t in tensors.items()}


@contextmanager
def marks_off(model: nn.Module, binding: Binding) -> Iterator[None]:
    """Inside the block, no mark does anything; what is trained in full stays."""
    enabled, binding.enabled = binding.enabled, False
    set_keys(model, binding)
    try:
        yield
    finally:
        binding.enabled = enabled
        set_keys(model, binding)


@contextmanager
def base_of(model: nn.Module, binding: Binding) -> Iterator[None]:
    """Inside the block, *model* is its base: marks are off, trained parameters put aside."""
    taken = [p for p, _ in binding.installed if p.method.acts == "parameter"]
    taken = [p for p in taken if p.site.name not in binding.aside]
    if taken:
        refuse_shards(model, "what is trained in full is put aside")
    enabled, put_aside = binding.enabled, []
    with marks_off(model, binding):
        try:
            for p in taken:
                names = (p.site.name, *p.site.aliases)
                binding.aside[p.site.name] = restore(model, binding, names)
                put_aside.append(p)
            if enabled:
                exchange(model, binding)
            try:
                yield
            finally:
                if enabled:
                    exchange(model, binding)
        finally:
            for p in put_aside:
                names = (p.site.name, *p.site.aliases)
                swap(model, binding, names, binding.aside.pop(p.site.name))
