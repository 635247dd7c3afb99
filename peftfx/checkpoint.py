"""Adapters as files and as state dicts.

An adapter that PEFT can represent is saved as PEFT's directory, readable by
``peft.PeftModel.from_pretrained`` and the servers that follow it; any other in peftfx's own form,
which loses nothing. Beside either lies ``peftfx.json``: the spec, and a fingerprint of the base
weights that the adapter was trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfx import files, fingerprint, own_format, peft_format, peft_prompts
from peftfx import tensors as tensor_files
from peftfx.binding import Binding, Tensors, bound, parameter, tensors_of
from peftfx.distributed import by_one, whole
from peftfx.errors import CheckpointError
from peftfx.install import fill
from peftfx.log import logger
from peftfx.methods.method import Param
from peftfx.own_format import Layout
from peftfx.plans import Placement, Plan
from peftfx.spec import Spec

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
    fill(model, binding, adapter, matched(plan, own_format.Directory(), mapping, "<state dict>"))


def matched(plan: Plan, layout: Layout, given: Mapping[str, Tensor], where: str) -> list[Tensors]:
    """The given tensors for each placement, checked: exactly these keys, shapes, finite floats."""
    keys = layout.keys_of(plan.placements)
    expected = {key for names in keys for key in names.values()}
    same_keys(given, expected, layout.optional(plan.placements), where)
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


def same_keys(given: Iterable[str], expected: set[str], optional: set[str], where: str) -> None:
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
    stored = Stored(made.spec, made.plan, held, weights)
    content, stale = contents(model, stored, format, str(directory))
    by_one(model, lambda: files.write_directory(directory, content, without=stale))


@dataclass(frozen=True)
class Stored:
    """An adapter as files have it: values for each placement, fingerprints where they are known."""

    spec: Spec
    plan: Plan
    values: list[Tensors]
    fingerprint: Mapping[str, Any] | None


def contents(
    model: nn.Module, stored: Stored, format: Format, where: str
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of an adapter by name, and the names of those that must not stay beside them.

    Raises:
        CheckpointError: the format cannot represent the adapter.
    """
    spec, placements, held = stored.spec, stored.plan.placements, stored.values
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
        if not tensor_files.is_finite(value):
            raise CheckpointError(
                f"{key} holds NaN or infinity: it would be refused when loaded",
                where=where,
                remedy="the training diverged; lower the learning rate",
            )
    own: dict[str, Any] = {"version": 1, "spec": spec.to_dict()}
    if stored.fingerprint is not None:
        own["fingerprint"] = stored.fingerprint
    content = {
        own_format.CONFIG: _json(own),
        (peft_format.WEIGHTS if peft else own_format.WEIGHTS): tensor_files.to_bytes(values),
    }
    if config is not None:
        content[peft_format.CONFIG] = _json(config)
    return content, (own_format.WEIGHTS,) if peft else (peft_format.CONFIG, peft_format.WEIGHTS)


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
