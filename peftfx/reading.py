"""Reading saved adapters: every file checked before any of it is put into a model."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfx import (
    files,
    fingerprint,
    own_format,
    peft_config,
    peft_format,
    peft_prompts,
    strict_json,
)
from peftfx import tensors as tensor_files
from peftfx.binding import Binding, Tensors, binding_of, parameter
from peftfx.checkpoint import Stored, base_parameter, matched, same_keys
from peftfx.distributed import whole
from peftfx.errors import CheckpointError, PlanError, SpecError
from peftfx.install import as_held, base_of, constants, create
from peftfx.log import logger
from peftfx.methods.method import float_dtype
from peftfx.methods.peft_prompt import PromptForm
from peftfx.own_format import Layout
from peftfx.plans import Plan, make_plan
from peftfx.spec import Spec

MAX_CONFIG, MAX_VALUES = 16 * 2**20, 500_000


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
    found = stored(model, directory, example, adapter)
    return found.spec, found.values


def stored(
    model: nn.Module,
    directory: str | os.PathLike[str],
    example: Any = None,
    adapter: str | None = None,
    *,
    on_base: bool = True,
) -> Stored:
    """A saved adapter, on *model*.

    Args:
        on_base: False where *model* has the base's shapes and not its values: nothing is compared,
            and a file that takes them is refused.
    """
    path = Path(directory)
    return files.read_whole(path, lambda: _stored(model, path, example, adapter, on_base))


def _stored(
    model: nn.Module, path: Path, example: Any, adapter: str | None, on_base: bool
) -> Stored:
    spec, layout, weights, known, beside = _describe(path, model)
    header = tensor_files.read_header(weights)  # before a plan is made for what cannot be read
    binding = binding_of(model)
    base = _Base(model, binding) if on_base else None

    def on(plan: Plan) -> Stored:
        other = beside and peft_config.difference(model, plan, beside, example)
        if other:
            raise CheckpointError(
                f"{own_format.CONFIG} and {peft_format.CONFIG} do not say the same: {other}",
                where=str(path),
                remedy=f"delete {own_format.CONFIG} if PEFT's configuration is the right one",
            )
        values = _values(plan, layout, weights, header, base)
        if on_base:
            _check_base(model, binding, plan, known)
        return Stored(spec, plan, _on_sites(model, plan, spec, values, on_base), known)

    there = binding.adapters.get(adapter or "") if binding is not None else None
    if there is not None and there.spec == spec:
        return on(there.plan)
    with base_of(model, binding) if binding is not None else contextlib.nullcontext():
        try:
            plan, _ = make_plan(model, spec, example)
        except (PlanError, SpecError) as error:
            raise CheckpointError(
                f"the adapter does not fit this {type(model).__name__}: {error}", where=str(path)
            ) from error
        return on(plan)


def _describe(
    path: Path, model: nn.Module
) -> tuple[Spec, Layout, Path, Any, dict[str, Any] | None]:
    """Spec, layout, weight file, fingerprints, and PEFT's configuration beside our own file."""
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=str(path))
    # a link to what was not downloaded is there, and cannot be read
    try:
        present = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
    own = read_json(path / own_format.CONFIG) if own_format.CONFIG in present else None
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
            remedy=f"peftfx convert {path} NEW reads it without running code" if pickles else None,
        )
    config = read_json(path / peft_format.CONFIG) if is_peft else None
    try:
        if own is not None:
            if not isinstance(own.get("spec"), dict):
                raise SpecError("it has no spec")
            spec = Spec.parse(own["spec"])
        elif config is not None:
            spec = peft_config.spec_from_config(config, model)
        else:
            raise SpecError("it has neither peftfx.json nor adapter_config.json")
    except SpecError as error:
        raise CheckpointError(
            f"the configuration is not usable: {error}", where=str(path)
        ) from error
    prompts = any(isinstance(r.method.peft, PromptForm) for r in spec.rules)
    directory: Layout = peft_prompts.Directory() if prompts else peft_format.Directory()
    layout = directory if is_peft else own_format.Directory()
    return spec, layout, weights, known, config if own is not None else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        with files.open_regular(path) as stream:
            data = stream.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise CheckpointError(f"larger than {MAX_CONFIG} bytes", where=str(path))
        content = strict_json.parse(data, MAX_VALUES)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise CheckpointError("not a mapping", where=str(path))
    return content


class _Base:
    """The base's parameters, to compare copies of them with."""

    def __init__(self, model: nn.Module, binding: Binding | None) -> None:
        self.model, self.binding = model, binding or Binding()
        self.names = {n for n, _ in model.named_parameters(remove_duplicate=False)}

    def refuse_other(self, copies: Mapping[str, str], values: Tensors, where: str) -> None:
        for key, name in copies.items():
            own = whole(base_parameter(self.model, self.binding, name))
            value = values.pop(key).to(own.device, own.dtype)
            if value.shape != own.shape or not (own.is_meta or torch.equal(value, own)):
                raise CheckpointError(
                    f"{key} holds other values of {name} than the model has",
                    where=where,
                    remedy="put them into the base first, whose part they are",
                )


def _values(
    plan: Plan, layout: Layout, weights: Path, header: tensor_files.Header, base: _Base | None
) -> list[Tensors]:
    expected = layout.file_keys(plan.placements)
    known = base.names if base is not None else set()
    named = {key: layout.of_base(key) or "" for key in set(header) - expected}
    copies = {key: name for key, name in named.items() if name in known}
    header = {k: v for k, v in header.items() if k not in copies}
    size = sum(math.prod(shape) * dtype.itemsize for k, (dtype, shape) in header.items())
    allowed = sum(8 * math.prod(q.shape) for p in plan for q in p.params.values())
    if set(header) == expected and size > allowed:
        raise CheckpointError("the tensors are larger than the adapter", where=str(weights))
    unknown = (set(header) ^ expected) - layout.optional(plan.placements)
    if unknown:  # say so before anything is read
        same_keys(header, expected, layout.optional(plan.placements), str(weights))
    found = tensor_files.read(weights)
    if base is not None:
        base.refuse_other(copies, found, str(weights))
    return matched(plan, layout, layout.part(plan.placements, found), str(weights))


def _check_base(
    model: nn.Module, binding: Binding | None, plan: Plan, known: Mapping[str, Any] | None
) -> None:
    if known is None:
        return
    names = sorted({p.site.like for p in plan})
    binding = binding or Binding()
    weights = {n: whole(base_parameter(model, binding, n)) for n in names}
    fingerprint.compare({n: known.get(n, {}) for n in names}, weights)


def _on_sites(
    model: nn.Module, plan: Plan, spec: Spec, values: list[Tensors], on_base: bool
) -> list[Tensors]:
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
                if not on_base:
                    raise CheckpointError(
                        f"the file leaves out {name}, which is made with the base's weights",
                        site=p.site.name,
                        remedy="load it on its base, and save it from there",
                    )
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
