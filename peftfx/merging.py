"""Merging adapters into the weights, and taking them out again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftfx.binding import Binding, bound, entry_of, parameter, refuse_fixed
from peftfx.distributed import refuse_shards
from peftfx.errors import BindError, MergeError
from peftfx.install import set_keys
from peftfx.methods import part
from peftfx.methods.method import Method
from peftfx.plans import Placement
from peftfx.site import OUTPUT


@torch.inference_mode(False)  # tensors that are made inside of it could never train
def merge(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Folds the active adapters into the weights; the model then runs without marks.

    The weights before are kept, so that :func:`unmerge` gives them back exactly.

    Args:
        untie: merge into a tied weight too, for the adapted module alone; the others keep theirs.

    Raises:
        MergeError: a method without a merge rule, or a tied weight. Nothing is changed then.
    """
    plain, binding = bound(model)
    refuse_fixed(binding)
    if binding.merged:
        return model
    refuse_shards(plain, "merge")
    if not binding.enabled:
        raise BindError("the adapters are off", remedy="leave `with peftfx.disabled(model)` first")
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for p, method in _as_applied(plain, binding):
            if p.site.kind == OUTPUT:
                raise MergeError("a module's output has no weight to merge into", site=p.site.name)
            _check_tied(plain, p, untie)
            entry, owner = entry_of(plain, p), plain.get_submodule(p.site.module)
            tensors = entry.tensors()
            tensors |= dict(zip(method.reads_at(p.site), entry.of_base(owner), strict=True))
            weight = merged.get(p.site.name, parameter(plain, p.site.name))
            merged[p.site.name] = part.merge(method, weight, tensors, p.site)
            _merge_bias(plain, p, method, tensors, merged)
    for name, value in merged.items():
        path, _, leaf = name.rpartition(".")
        owner = plain.get_submodule(path)
        original = owner._parameters[leaf]
        assert original is not None
        binding.unmerged[name] = original
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if not merged:
        return model
    set_keys(plain, binding)
    return model


def _as_applied(model: nn.Module, binding: Binding) -> list[tuple[Placement, Method]]:
    """The adapters in the order in which they act on the weight.

    First those where it is read, then those on the output; the input that its product is taken
    with was changed by the first of the rules first, so that the last of them is next to it.
    """
    by_side: dict[str, list[tuple[Placement, Method]]] = {"weight": [], "output": [], "input": []}
    for p, method in binding.installed:
        if p.method.acts != "parameter":  # a trained value is in its place already
            by_side.setdefault(entry_of(model, p).acts, []).append((p, method))
    sides = (by_side.pop("weight"), by_side.pop("output"), reversed(by_side.pop("input")))
    others = by_side.values()  # what acts on no weight refuses when it is its turn
    return [found for side in (*others, *sides) for found in side]


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes :func:`merge`: the weights are the very tensors they were, the marks are on."""
    plain, binding = bound(model)
    restore_merged(plain, binding)
    set_keys(plain, binding)
    return model


def restore_merged(model: nn.Module, binding: Binding) -> None:
    """Puts the weights from before the merge back."""
    for name, original in binding.unmerged.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        current = owner._parameters[leaf]
        if current is not None and current.device != original.device:
            original.data = original.data.to(current.device)
        owner._parameters[leaf] = original
    binding.unmerged.clear()


def _merge_bias(
    model: nn.Module,
    p: Placement,
    method: Method,
    tensors: Mapping[str, Tensor],
    merged: dict[str, Tensor],
) -> None:
    if p.site.bias is None:
        part.merge_bias(method, None, tensors, p.site)  # raises where a bias has nowhere to go
        return
    own, start, stop = p.site.bias
    name = f"{p.site.module}.{own}" if p.site.module else own
    whole = merged.get(name, parameter(model, name))
    before = whole[start:stop]
    after = part.merge_bias(method, before, tensors, p.site)
    if after is not None and after is not before:
        merged[name] = torch.cat([whole[:start], after, whole[stop:]])


def _check_tied(model: nn.Module, p: Placement, untie: bool) -> None:
    owner = model.get_submodule(p.site.module)
    others = [a for a in p.site.aliases if model.get_submodule(a.rpartition(".")[0]) is not owner]
    if others and not untie:
        raise MergeError(
            f"the weight is tied to {', '.join(others)}: merging would change that too",
            site=p.site.name,
            remedy="peftfx.merge(model, untie=True) gives this module a weight of its own",
        )
