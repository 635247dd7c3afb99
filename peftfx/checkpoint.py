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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfx import files, fingerprint, peft_format
from peftfx import tensors as tensor_files
from peftfx.binding import Binding, Tensors, binding_of, bound, parameter, tensors_of
from peftfx.errors import CheckpointError, PlanError, SpecError
from peftfx.install import base_of
from peftfx.log import logger
from peftfx.methods.method import float_dtype
from peftfx.plans import Placement, Plan, make_plan
from peftfx.spec import Spec

OWN_CONFIG, OWN_WEIGHTS = "peftfx.json", "peftfx_model.safetensors"
MAX_CONFIG = 16 * 2**20
Format = Literal["auto", "peft", "peftfx"]


# -- state dicts ---------------------------------------------------------------------------------


def _own_keys(placements: tuple[Placement, ...]) -> list[dict[str, str]]:
    return [
        {n: f"{p.site.name}:{p.method.name}.{n}" for n in p.method.params(p.site)}
        if p.method.trains
        else {}
        for p in placements
    ]


def state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors by ``<site>:<method>.<tensor>``; the tensors themselves, detached."""
    model, binding = bound(model)
    held = tensors_of(model, binding, adapter)
    plan = binding.adapter(adapter).plan
    return {
        key: held[i][name].detach()
        for i, names in enumerate(_own_keys(plan.placements))
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
    held = tensors_of(model, binding, adapter)
    plan = binding.adapter(adapter).plan
    found = _matched(plan, _own_keys(plan.placements), mapping, "<state dict>")
    with torch.no_grad():
        for into, values in zip(held, found, strict=True):
            for name, value in values.items():
                into[name].copy_(value)


def _matched(
    plan: Plan, keys: list[dict[str, str]], given: Mapping[str, Tensor], where: str
) -> list[Tensors]:
    """The given tensors for each placement, checked: exactly these keys, shapes, finite floats."""
    expected = {key for names in keys for key in names.values()}
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing or extra:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unknown {_some(extra)}"] if extra else []
        raise CheckpointError(
            "the tensors are not those of this adapter: " + "; ".join(parts), where=where
        )
    found: list[Tensors] = []
    for p, names in zip(plan.placements, keys, strict=True):
        shapes = p.method.params(p.site) if names else {}
        values: Tensors = {}
        for name, key in names.items():
            value = given[key]
            if tuple(value.shape) != shapes[name].shape:
                raise CheckpointError(
                    f"{key} is {list(value.shape)}, and {list(shapes[name].shape)} is needed",
                    where=where,
                    site=p.site.name,
                )
            if not value.is_floating_point():
                raise CheckpointError(f"{key} is {value.dtype}", where=where, site=p.site.name)
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"{key} holds NaN or infinity", where=where, site=p.site.name)
            values[name] = value
        found.append(values)
    return found


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

    Args:
        format: ``peft`` (refused where PEFT has no way to say it), ``peftfx`` (its own, lossless),
            or ``auto``: PEFT's where it can represent the adapter.

    Raises:
        CheckpointError: the format cannot represent the adapter.
        SaveError: the directory cannot be written. What was there before is still whole.
    """
    model, binding = bound(model)
    made = binding.adapter(adapter)
    held = tensors_of(model, binding, adapter)
    config = None
    if format not in ("auto", "peft", "peftfx"):
        raise CheckpointError(f"format {format!r} is not known", remedy="auto, peft or peftfx")
    if format != "peftfx":
        try:
            config = peft_format.config_from(model, made.plan.placements)
        except CheckpointError as error:
            if format == "peft":
                raise
            logger.info("saved in peftfx's own form: %s", error)
    peft = config is not None
    keys = peft_format.keys_of(made.plan.placements) if peft else _own_keys(made.plan.placements)
    values = {key: held[i][name] for i, names in enumerate(keys) for name, key in names.items()}
    for key, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{key} holds NaN or infinity: it would be refused when loaded",
                where=str(directory),
                remedy="the training diverged; lower the learning rate",
            )
    weights = {
        p.site.name: fingerprint.fingerprint(base_parameter(model, binding, p.site.name))
        for p in made.plan
    }
    own = {"version": 1, "spec": made.spec.to_dict(), "fingerprint": weights}
    content = {
        OWN_CONFIG: _json(own),
        (peft_format.WEIGHTS if peft else OWN_WEIGHTS): tensor_files.to_bytes(values),
    }
    if config is not None:
        content[peft_format.CONFIG] = _json(config)
    stale = (OWN_WEIGHTS,) if peft else (peft_format.CONFIG, peft_format.WEIGHTS)
    files.write_directory(directory, content, without=stale)


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
    model: nn.Module, directory: str | os.PathLike[str], example: Any = None
) -> tuple[Spec, list[Tensors]]:
    """The spec of a saved adapter and its values for each placement on *model*, all checked.

    Raises:
        CheckpointError: files that are incomplete, malformed, unsafe, or do not fit the model.
        FingerprintError: the adapter was trained on other base weights.
    """
    path = Path(directory)
    files.recover(path)
    spec, keys_of, weights, known = _describe(path, model)
    binding = binding_of(model)
    try:
        with base_of(model, binding) if binding is not None else contextlib.nullcontext():
            plan, _ = make_plan(model, spec, example)
    except (PlanError, SpecError) as error:
        raise CheckpointError(
            f"the adapter does not fit this {type(model).__name__}: {error}", where=str(path)
        ) from error
    values = _values(path, plan, keys_of, weights)
    _check_base(model, binding, plan, known)
    return spec, _on_sites(model, plan, spec, values)


def _describe(path: Path, model: nn.Module) -> tuple[Spec, Any, Path, Any]:
    """Spec, key mapping, weight file and fingerprints of a saved adapter."""
    if not path.is_dir():
        raise CheckpointError("there is no such directory", where=str(path))
    own = _read_json(path / OWN_CONFIG) if (path / OWN_CONFIG).exists() else None
    known = own.get("fingerprint") if own is not None else None
    if known is None:
        logger.info("%s has no fingerprint of its base weights: not compared", path)
    elif not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
        raise CheckpointError("the fingerprint is malformed", where=str(path / OWN_CONFIG))
    is_peft = (path / peft_format.CONFIG).exists()
    weights = path / (peft_format.WEIGHTS if is_peft else OWN_WEIGHTS)
    if not weights.exists():
        pickles = [f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
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
            spec = peft_format.spec_from_config(config, model)
        else:
            raise SpecError("it has neither peftfx.json nor adapter_config.json")
    except (SpecError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"the configuration is not usable: {error}", where=str(path)
        ) from error
    return spec, (peft_format.keys_of if is_peft else _own_keys), weights, known


def _read_json(path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) != len(items):
            raise CheckpointError("a key stands twice", where=str(path))
        return dict(items)

    try:
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"larger than {MAX_CONFIG} bytes", where=str(path))
        content = json.loads(path.read_bytes(), object_pairs_hook=pairs)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise CheckpointError("not a mapping", where=str(path))
    return content


def _values(path: Path, plan: Plan, keys_of: Any, weights: Path) -> list[Tensors]:
    keys = keys_of(plan.placements)
    header = tensor_files.read_header(weights)
    expected = {key for names in keys for key in names.values()}
    size = sum(math.prod(shape) * dtype.itemsize for k, (dtype, shape) in header.items())
    allowed = sum(
        8 * math.prod(q.shape) for p in plan if p.method.trains
        for q in p.method.params(p.site).values()
    )  # fmt: skip
    if set(header) == expected and size > allowed:
        raise CheckpointError("the tensors are larger than the adapter", where=str(weights))
    unknown = set(header) ^ expected
    if unknown:  # say so before anything is read
        return _matched(plan, keys, {k: torch.empty(0) for k in header}, str(weights))
    return _matched(plan, keys, tensor_files.read(weights), str(weights))


def _check_base(
    model: nn.Module, binding: Binding | None, plan: Plan, known: Mapping[str, Any] | None
) -> None:
    if known is None:
        return
    names = {p.site.name for p in plan} & set(known)
    binding = binding or Binding()
    weights = {n: base_parameter(model, binding, n) for n in names}
    fingerprint.compare({n: known[n] for n in sorted(names)}, weights)


def _on_sites(model: nn.Module, plan: Plan, spec: Spec, values: list[Tensors]) -> list[Tensors]:
    """Loaded values as parameters on the devices of their sites, in the dtypes bind gives."""
    placed = []
    for p, found in zip(plan, values, strict=True):
        like = parameter(model, p.site.name)
        made: Tensors = {}
        for name, value in found.items():
            dtype = (
                like.dtype if p.method.acts == "parameter" else float_dtype(like.dtype, spec.dtype)
            )
            made[name] = nn.Parameter(value.to(like.device, dtype))
        for name, buffer in p.method.buffers(p.site).items():
            made[name] = buffer.to(like.device)
        placed.append(made)
    return placed
