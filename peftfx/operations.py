"""Operations on the adapters of a bound model: add, remove, activate, switch off, list.

None of them changes a compiled graph: they put other tensors into the slots. After each kind of
graph was compiled once (on, off, a mix of n), switching back and forth compiles nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfx import attention, multihead, places, sequence, slots
from peftfx.bind import forms
from peftfx.binding import (
    Adapter,
    Binding,
    Tensors,
    binding_of,
    bound,
    check_name,
    refuse_fixed,
    tensors_of,
)
from peftfx.distributed import refuse_shards, refuse_unsummed
from peftfx.errors import AdapterError, BindError, MergeError, OptimizerError
from peftfx.install import base_of, create, install, place_all, waiting
from peftfx.plans import Placement, make_plan
from peftfx.reading import read
from peftfx.registry import disown
from peftfx.site import SLOT, sites
from peftfx.spec import Spec


def is_adapted(model: nn.Module) -> bool:
    """Whether *model* carries adapters."""
    return binding_of(model) is not None


def adapters(model: nn.Module) -> dict[str, float]:
    """The names of all adapters, each with its weight: 1 where active, 0 where not."""
    _, binding = bound(model)
    return {name: binding.active.get(name, 0.0) for name in binding.adapters}


@torch.inference_mode(False)  # tensors that are made inside of it could never train
def add(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    adapter: str,
    example: Any = None,
    *,
    trainable: bool = True,
) -> None:
    """Adds an adapter, inactive at first: fresh from a spec, or loaded from a directory.

    Raises:
        AdapterError: the name is taken or not allowed.
    """
    check_name(adapter)
    model, binding = bound(model)
    refuse_fixed(binding)
    if adapter in binding.adapters:
        raise AdapterError(
            f"there is an adapter {adapter!r} already", remedy="remove it, or use another name"
        )
    tensors = None
    if isinstance(spec, (str, os.PathLike)) and Path(spec).is_dir():
        spec, tensors = read(model, spec, example)
    insert(model, Spec.of(spec), adapter, example, trainable=trainable, tensors=tensors)


@torch.inference_mode(False)
def insert(
    model: nn.Module,
    spec: Spec,
    adapter: str,
    example: Any = None,
    *,
    trainable: bool = True,
    tensors: list[Tensors] | None = None,
) -> Adapter:
    """Adds an adapter with fresh tensors, or with *tensors* for each placement of its plan."""
    model, binding = bound(model)
    refuse_shards(model, "an adapter is added")
    with base_of(model, binding):
        plan, traced = make_plan(model, spec, example)
        if traced is not None:
            binding.acts.update(forms(plan, traced))
        elif any(p.method.acts != "parameter" and not _marked(model, p.site.module) for p in plan):
            binding.proven = False  # new sites: the next compile proves their marks
        values = create(model, plan, spec) if tensors is None else tensors
    place_all(model, binding, plan)
    waits = waiting(plan, values) if tensors is None else ""
    made = Adapter(adapter, spec, plan, trainable, values, waits)
    binding.adapters[adapter] = made
    return made


def _marked(model: nn.Module, path: str) -> bool:
    return SLOT in model.get_submodule(path)._modules


def remove(model: nn.Module, adapter: str) -> None:
    """Removes an inactive adapter and frees its tensors.

    Raises:
        AdapterError: it is unknown, active, or the last.
    """
    model, binding = bound(model)
    binding.adapter(adapter)
    if adapter in binding.active:
        raise AdapterError(
            f"adapter {adapter!r} is active",
            remedy="activate another first, or peftfx.release(model) to take all off",
        )
    gone = binding.adapters.pop(adapter)
    for tensors in gone.stored or []:
        for tensor in tensors.values():
            disown(tensor)
    kept = {(p.site.name, p.method.name) for a in binding.adapters.values() for p in a.plan}
    for p in gone.plan:
        if p.method.acts == "parameter" or (p.site.name, p.method.name) in kept:
            continue
        owner = model.get_submodule(p.site.module)
        slots.displace(owner, slots.entry_name(p.site, p.method))
    for tidied in (sequence, attention, places, multihead):
        tidied.tidy(model)


@torch.inference_mode(False)
def activate(model: nn.Module, adapter: str | Mapping[str, float]) -> None:
    """Makes one adapter active, or a weighted sum of several.

    A sum is for inference: its tensors are derived from the adapters', which stay as they are.

    Raises:
        AdapterError: an unknown name, an empty or non-finite mix.
        MergeError: the model is merged, or a method's adapters cannot be mixed.
    """
    model, binding = bound(model)
    refuse_fixed(binding)
    if binding.merged:
        raise MergeError("the model is merged", remedy="call peftfx.unmerge(model) first")
    if not binding.enabled:
        raise BindError("the adapters are off", remedy="leave `with peftfx.disabled(model)` first")
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
    if not weights or not all(abs(w) <= sys.float_info.max for w in weights.values()):
        raise AdapterError(f"{weights} is no mix", remedy="give each adapter a finite weight")
    for name in weights:
        binding.adapter(name)
    if weights != binding.active or len(weights) > 1:
        for name in weights if len(weights) == 1 else ():
            held = tensors_of(model, binding, name)
            refuse_unsummed(model, (t for made in held for t in made.values()))
        install(model, binding, weights)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, *model* is the base: marks are off, trained parameters put aside."""
    inner, binding = bound(model)
    refuse_fixed(binding)
    if binding.merged:
        raise MergeError("the model is merged", remedy="call peftfx.unmerge(model) first")
    with base_of(inner, binding):
        yield model


def parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """The parameters that train: of one adapter, or of all active ones."""
    return [p for _, p in named_parameters(model, adapter)]


def named_parameters(
    model: nn.Module, adapter: str | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Names (``<site>:<method>.<tensor>``) and parameters of what trains."""
    return [
        (f"{p.site.name}:{p.method.name}.{leaf}", tensor)
        for _, p, leaf, tensor in _trained(*bound(model), adapter)
    ]


def _trained(
    model: nn.Module, binding: Binding, adapter: str | None = None
) -> Iterator[tuple[Adapter, Placement, str, nn.Parameter]]:
    """What trains, each tensor once, with the first of the placements that hold it."""
    seen: set[int] = set()
    for name in [adapter] if adapter is not None else list(binding.active):
        owner = binding.adapter(name)
        for p, tensors in zip(owner.plan, tensors_of(model, binding, name), strict=True):
            for leaf, tensor in tensors.items():
                if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
                    continue
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield owner, p, leaf, tensor


def parameter_groups(
    model: nn.Module, lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer, by learning rate and weight decay.

    A rule's own ``lr`` and ``weight_decay`` come before the arguments, of which *weight_decay* is
    for matrices alone: vectors (biases, norms, magnitudes) get none. A rule's ``layer_decay`` and
    its method's ratios (LoRA+) multiply the rate.

    Raises:
        OptimizerError: a ratio, and no learning rate to multiply.
    """
    model, binding = bound(model)
    depth = max((s.layers or 0 for s in sites(model)), default=0)
    groups: dict[tuple[float | None, float | None], list[nn.Parameter]] = {}
    for adapter, p, leaf, tensor in _trained(model, binding):
        rates = adapter.spec.rules[p.rule].rates_at(p.site)
        rate = lr if rates.lr is None else rates.lr
        ratio = rates.ratio(p.site, depth) * p.method.lr_ratio(leaf)
        if ratio != 1.0 and rate is None:
            raise OptimizerError(
                f"rule {p.rule} ({p.method.name}) multiplies a learning rate, and none is given",
                remedy="peftfx.parameter_groups(model, lr=…), or `lr:` in the rule",
            )
        decay = weight_decay if sum(n > 1 for n in tensor.shape) > 1 else 0.0
        decay = decay if rates.weight_decay is None else rates.weight_decay
        groups.setdefault((None if rate is None else rate * ratio, decay), []).append(tensor)
    return [
        {"params": params}
        | ({} if rate is None else {"lr": rate})
        | ({} if decay is None else {"weight_decay": decay})
        for (rate, decay), params in groups.items()
    ]
