"""Adapters as files and as state dicts.

An adapter that PEFT can represent is saved as PEFT's directory, readable by
``peft.PeftModel.from_pretrained`` and the servers that follow it; any other in peftfx's own form,
which loses nothing. Beside either lies ``peftfx.json``: the spec, and a fingerprint of the base
weights that the adapter was trained on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfx import files, fingerprint, own_format, peft_config, peft_format, peft_prompts
from peftfx import tensors as tensor_files
from peftfx.binding import Binding, Tensors, binding_of, bound, parameter, tensors_of
from peftfx.distributed import by_one, whole
from peftfx.errors import CheckpointError, PlanError, SpecError
from peftfx.install import as_held, base_of, constants, create, fill
from peftfx.log import logger
from peftfx.methods.method import Param, float_dtype
from peftfx.methods.peft_prompt import PromptForm
from peftfx.own_format import Layout
from peftfx.plans import Placement, Plan, make_plan
from peftfx.spec import Spec

MAX_CONFIG = 16 * 2**20
Format = Literal["auto", "peft", "peftfx"]


# -- state dicts ---------------------------------------------------------------------------------


def state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors by ``<site>:<method>.<tensor>``; the tensors themselves, detached.

    Of shards, it is the whole tensors: every process has to ask.
    """
    model, binding = bound(model)
    held = tensors_of(model, binding, adapter)
    plan = binding.adapter(adapter).plan
    return {
        key: whole(held[i][name].detach())
        for i, names in enumerate(own_format.keys_of(plan.placements))
        for name, key in names.items()
    }


def load_state_dict(
    model: nn.Module, mapping: Mapping[str, Tensor], adapter: str = "default"
) -> None:
    """Copies values into the adapter, in place.

    Raises:
        CheckpointError: keys, shapes or values that do not fit. Nothing is changed then.
    """
    model, binding = bound(model)
    plan = binding.adapter(adapter).plan
    fill(model, binding, adapter, _matched(plan, own_format.Directory(), mapping, "<state dict>"))


def _matched(plan: Plan, layout: Layout, given: Mapping[str, Tensor], where: str) -> list[Tensors]:
    """The given tensors for each placement, checked: exactly these keys, shapes, finite floats."""
    keys = layout.keys_of(plan.placements)
    expected = {key for names in keys for key in names.values()}
    _same_keys(given, expected, layout.optional(plan.placements), where)
    found: list[Tensors] = []
    for p, names in zip(plan.placements, keys, strict=True):
        values = {name: given[key] for name, key in names.items() if key in given}
        values = layout.unpack(p, values)
        for name, value in values.items():
            reason = _unfit(value, p.params[name])
            if reason is not None:
                told = names.get(name, name)
                raise CheckpointError(f"{told} {reason}", where=where, site=p.site.name)
        found.append(values)
    return found


def _same_keys(given: Iterable[str], expected: set[str], optional: set[str], where: str) -> None:
    missing = sorted(expected - set(given) - optional)
    extra = sorted(set(given) - expected)
    if missing or extra:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unknown {_some(extra)}"] if extra else []
        raise CheckpointError(
            "the tensors are not those of this adapter: " + "; ".join(parts), where=where
        )


def _unfit(value: Tensor, param: Param) -> str | None:
    """What is wrong with a loaded value, None where nothing is."""
    if tuple(value.shape) != param.shape:
        return f"is {list(value.shape)}, and {list(param.shape)} is needed"
    if value.is_floating_point() != (param.dtype is None or param.dtype.is_floating_point):
        return f"is {value.dtype}"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "holds NaN or infinity"
    return None if param.valid(value) else "holds values that are not possible"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


# -- saving --------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter: str = "default",
    format: Format = "auto",
) -> None:
    """Writes an adapter to *directory*, whole or not at all.

    Of a sharded model every process has to save, and the first one writes.

    Args:
        format: ``peft`` (refused where PEFT has no way to say it; what only made a prompt or prefix
            is left behind), ``peftfx`` (its own, lossless), or ``auto``: PEFT's where it can
            represent the adapter.

    Raises:
        CheckpointError: the format cannot represent the adapter.
        SaveError: the directory cannot be written. What was there before is still whole.
    """
    model, binding = bound(model)
    made = binding.adapter(adapter)
    held = [
        {name: whole(tensor.detach()) for name, tensor in tensors.items()}
        for tensors in tensors_of(model, binding, adapter)
    ]
    spec, placements = made.spec, made.plan.placements
    config = None
    if format not in ("auto", "peft", "peftfx"):
        raise CheckpointError(f"format {format!r} is not known", remedy="auto, peft or peftfx")
    if format == "peft":
        spec, placements, held = _finished(spec, placements, held)
    peft_kind = peft_prompts if peft_prompts.meant(placements) else peft_format
    if format != "peftfx":
        try:
            config = peft_kind.config_from(model, placements)
            values = _file(peft_kind.Directory(), placements, held)
        except CheckpointError as error:
            if format == "peft":
                raise
            logger.info("saved in peftfx's own form: %s", error)
            config = None
    peft = config is not None
    if not peft:
        values = _file(own_format.Directory(), placements, held)
    for key, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{key} holds NaN or infinity: it would be refused when loaded",
                where=str(directory),
                remedy="the training diverged; lower the learning rate",
            )
    moved = [n for n, t in binding.statistics.items() if not torch.equal(t, model.get_buffer(n))]
    if moved and binding.enabled:
        logger.warning(
            "%d running statistics moved in training (%s), and are no part of the adapter: a model "
            "that it is loaded into has the base's. Keep those norms in eval() while you train",
            len(moved), moved[0],
        )  # fmt: skip
    weights = {
        p.site.like: fingerprint.fingerprint(whole(base_parameter(model, binding, p.site.like)))
        for p in made.plan
    }
    own = {"version": 1, "spec": spec.to_dict(), "fingerprint": weights}
    content = {
        own_format.CONFIG: _json(own),
        (peft_format.WEIGHTS if peft else own_format.WEIGHTS): tensor_files.to_bytes(values),
    }
    if config is not None:
        content[peft_format.CONFIG] = _json(config)
    stale = (own_format.WEIGHTS,) if peft else (peft_format.CONFIG, peft_format.WEIGHTS)
    by_one(model, lambda: files.write_directory(directory, content, without=stale))


def _file(layout: Layout, placements: Sequence[Placement], held: Sequence[Tensors]) -> Tensors:
    """What a file of that layout holds."""
    values: Tensors = {}
    for p, names, tensors in zip(placements, layout.keys_of(placements), held, strict=True):
        packed = layout.pack(p, tensors)
        values |= {key: packed[name] for name, key in names.items()}
    return layout.join(placements, values)


def _finished(
    spec: Spec, placements: Sequence[Placement], held: list[Tensors]
) -> tuple[Spec, tuple[Placement, ...], list[Tensors]]:
    """The adapter without what only makes its tensors, see :meth:`Method.finished`."""
    rules = []
    for rule in spec.rules:
        method = rule.method.finished()
        if method != rule.method and rule.overrides:
            raise CheckpointError(
                f"the {method.name} rule has overrides, which say how its tensors are made",
                remedy="save with format='peftfx'",
            )
        rules.append(replace(rule, method=method))
    with torch.no_grad():
        tensors = [
            p.method.finish(t, p.site) if p.method.trains else t
            for p, t in zip(placements, held, strict=True)
        ]
    made = tuple(replace(p, method=p.method.finished()) for p in placements)
    return replace(spec, rules=tuple(rules)), made, [dict(t) for t in tensors]


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def base_parameter(model: nn.Module, binding: Binding, name: str) -> Tensor:
    """The base's own value of a parameter, whatever is in its place."""
    for aside in (binding.base, binding.unmerged):
        if name in aside:
            return aside[name]
    return parameter(model, name)


# -- loading -------------------------------------------------------------------------------------


def read(
    model: nn.Module,
    directory: str | os.PathLike[str],
    example: Any = None,
    adapter: str | None = None,
) -> tuple[Spec, list[Tensors]]:
    """The spec of a saved adapter and its values for each placement on *model*, all checked.

    Args:
        adapter: the one that the values are for; where it has the same spec, its plan is taken.

    Raises:
        CheckpointError: files that are incomplete, malformed, unsafe, or do not fit the model.
        FingerprintError: the adapter was trained on other base weights.
    """
    path = Path(directory)
    files.recover(path)
    return files.read_whole(path, lambda: _read(model, path, example, adapter))


def _read(
    model: nn.Module, path: Path, example: Any, adapter: str | None
) -> tuple[Spec, list[Tensors]]:
    spec, layout, weights, known = _describe(path, model)
    binding = binding_of(model)
    there = binding.adapters.get(adapter or "") if binding is not None else None
    if there is not None and there.spec == spec:
        values = _values(there.plan, layout, weights)
        _check_base(model, binding, there.plan, known)
        return spec, _on_sites(model, there.plan, spec, values)
    with base_of(model, binding) if binding is not None else contextlib.nullcontext():
        try:
            plan, _ = make_plan(model, spec, example)
        except (PlanError, SpecError) as error:
            raise CheckpointError(
                f"the adapter does not fit this {type(model).__name__}: {error}", where=str(path)
            ) from error
        values = _values(plan, layout, weights)
        _check_base(model, binding, plan, known)
        return spec, _on_sites(model, plan, spec, values)


def _describe(path: Path, model: nn.Module) -> tuple[Spec, Layout, Path, Any]:
    """Spec, layout, weight file and fingerprints of a saved adapter."""
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=str(path))
    # a link to what was not downloaded is there, and cannot be read
    try:
        present = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
    own = _read_json(path / own_format.CONFIG) if own_format.CONFIG in present else None
    known = own.get("fingerprint") if own is not None else None
    if known is None:
        logger.info("%s has no fingerprint of its base weights: not compared", path)
    elif not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
        raise CheckpointError("the fingerprint is malformed", where=str(path / own_format.CONFIG))
    is_peft = peft_format.CONFIG in present
    weights = path / (peft_format.WEIGHTS if is_peft else own_format.WEIGHTS)
    if weights.name not in present:
        pickles = sorted(n for n in present if n.endswith((".bin", ".pt", ".pth", ".pkl")))
        raise CheckpointError(
            f"{weights.name} is missing"
            + (f"; {', '.join(pickles)} is a pickle, which could run code" if pickles else ""),
            where=str(path),
            remedy="convert it to safetensors with the tool that wrote it" if pickles else None,
        )
    config = _read_json(path / peft_format.CONFIG) if is_peft else None
    try:
        if own is not None:
            if not isinstance(own.get("spec"), dict):
                raise SpecError("it has no spec")
            spec = Spec.parse(own["spec"])
        elif config is not None:
            spec = peft_config.spec_from_config(config, model)
        else:
            raise SpecError("it has neither peftfx.json nor adapter_config.json")
    except (SpecError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"the configuration is not usable: {error}", where=str(path)
        ) from error
    prompts = any(isinstance(r.method.peft, PromptForm) for r in spec.rules)
    directory: Layout = peft_prompts.Directory() if prompts else peft_format.Directory()
    return spec, (directory if is_peft else own_format.Directory()), weights, known


def _read_json(path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) != len(items):
            raise CheckpointError("a key stands twice", where=str(path))
        return dict(items)

    try:
        with files.open_regular(path) as stream:
            data = stream.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise CheckpointError(f"larger than {MAX_CONFIG} bytes", where=str(path))
        content = json.loads(data, object_pairs_hook=pairs)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise CheckpointError("not a mapping", where=str(path))
    return content


def _values(plan: Plan, layout: Layout, weights: Path) -> list[Tensors]:
    header = tensor_files.read_header(weights)
    expected = layout.file_keys(plan.placements)
    size = sum(math.prod(shape) * dtype.itemsize for k, (dtype, shape) in header.items())
    allowed = sum(8 * math.prod(q.shape) for p in plan for q in p.params.values())
    if set(header) == expected and size > allowed:
        raise CheckpointError("the tensors are larger than the adapter", where=str(weights))
    unknown = (set(header) ^ expected) - layout.optional(plan.placements)
    if unknown:  # say so before anything is read
        _same_keys(header, expected, layout.optional(plan.placements), str(weights))
    values = layout.part(plan.placements, tensor_files.read(weights))
    return _matched(plan, layout, values, str(weights))


def _check_base(
    model: nn.Module, binding: Binding | None, plan: Plan, known: Mapping[str, Any] | None
) -> None:
    if known is None:
        return
    names = sorted({p.site.like for p in plan})
    binding = binding or Binding()
    weights = {n: whole(base_parameter(model, binding, n)) for n in names}
    fingerprint.compare({n: known.get(n, {}) for n in names}, weights)


def _on_sites(model: nn.Module, plan: Plan, spec: Spec, values: list[Tensors]) -> list[Tensors]:
    """Loaded values in the form of slots, on the devices of their sites, in the dtypes bind gives.

    What a file may leave out is made anew, as it started.
    """
    held: dict[tuple[object, ...], Tensor] = {}
    placed = []
    fresh: list[Tensors] | None = None
    for i, (p, found) in enumerate(zip(plan, values, strict=True)):
        like = parameter(model, p.site.like)
        made: Tensors = {}
        for name, param in p.params.items():
            holder = p.holder(name)
            if holder not in held and name not in found:
                with torch.random.fork_rng(devices=[]):
                    fresh = fresh or create(model, plan, spec)
                held[holder] = fresh[i][name]
            elif holder not in held:
                own = p.method.acts == "parameter"
                dtype = like.dtype if own else float_dtype(like.dtype, spec.dtype)
                value = found[name].to(like.device, param.dtype or dtype)
                held[holder] = as_held(value, param)
            made[name] = held[holder]
        placed.append(made | constants(p, like.device))
    return placed
