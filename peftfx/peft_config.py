"""HF PEFT's configurations, read as specs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peftfx import peft_prompts
from peftfx.errors import SpecError
from peftfx.methods.method import Method, lookup, names
from peftfx.methods.peft import PeftForm
from peftfx.methods.peft_prompt import PromptForm
from peftfx.peft_format import suffix
from peftfx.site import SLOT, Site, sites
from peftfx.spec import Spec

_COMMON = {  # options of every configuration that this reader knows how to follow
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias",
}  # fmt: skip
_HARMLESS = {  # about the bookkeeping of a training, not about what is computed
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "fan_in_fan_out",
}  # fmt: skip


def spec_from_config(config: Any, model: nn.Module | None = None) -> Spec:
    """The spec that a PEFT configuration (or its mapping) amounts to.

    Args:
        model: needed where modules are chosen by a regular expression or a pattern.

    Raises:
        SpecError: a type or an option without an equal here, by name.
    """
    content = dict(config if isinstance(config, Mapping) else config.to_dict())
    kind = getattr(content.get("peft_type"), "value", content.get("peft_type"))
    method, form = _meant(str(kind), content)
    if isinstance(form, PromptForm):
        return peft_prompts.spec_from_config(method.name, form, content, model)
    content = {**form.defaults, **content}
    patterns = {pattern for _, pattern in form.varied.values()}
    known = {*_COMMON, *_HARMLESS, *form.options, *form.varied, *form.fixed, *form.special}
    known |= {*form.takes}
    for key, value in content.items():
        if key not in known | patterns | {*form.ignored} and value not in _EMPTY:
            raise SpecError(f"the {kind} option {key}={value!r} is not supported")
    if content.get("bias", "none") != "none":
        raise SpecError(f"bias={content['bias']!r} is not supported", remedy="bias='none' is")
    rule: dict[str, Any] = {"method": method.name, **_modules(content, model)}
    for theirs, ours in (*form.options.items(), *((t, o) for t, (o, _) in form.varied.items())):
        if theirs in content:
            rule[ours] = content[theirs]
    rule |= _patterns(form, content, model)
    weights = None if model is None else _weights(model)
    adapted = None
    if model is not None and weights is not None:
        matched = set(_matched(content, model))
        adapted = {module: site for module, site in weights.items() if module in matched}
    rules = form.rules(rule, content, adapted)
    for method, other in _forms():
        value = content.get(other.beside) if other.beside and other.beside in form.takes else None
        if not value:
            continue
        if other.whole:
            saved = sorted(value)
            rules.append({"method": method.name, "name": [g for n in saved for g in (n, f"*.{n}")]})
        else:
            rules += other.rules_beside(method.name, value, weights)
    return Spec.parse({"rules": rules})


_EMPTY: tuple[Any, ...] = (None, False, [], {}, 0, "")


def _forms() -> Iterator[tuple[type[Method], PeftForm]]:
    for name in names():
        method = lookup(name)
        if method.peft is not None:
            yield method, method.peft


def _meant(kind: str, content: Mapping[str, Any]) -> tuple[type[Method], PeftForm]:
    """The method that a configuration means, with its form."""
    found = [(m, f) for m, f in _forms() if f.type == kind]
    for method, form in found:
        if form.meant(content):
            return method, form
    types = sorted({f.type for _, f in _forms() if f.type})
    raise SpecError(f"peft_type {kind!r} is not supported", remedy=f"these are: {', '.join(types)}")


def _modules(content: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    targets = content.get("target_modules")
    if not targets:
        raise SpecError("the configuration has no target_modules")
    if model is not None:
        return {"name": _matched(content, model)}
    if isinstance(targets, str) or content.get("layers_pattern"):
        raise SpecError(
            "modules are chosen by an expression: it takes the model to say which",
            remedy="peftfx.load(model, directory) resolves it",
        )
    chosen: dict[str, Any] = {"name": [g for t in sorted(targets) for g in (t, f"*.{t}")]}
    excluded = content.get("exclude_modules")
    if isinstance(excluded, str):
        raise SpecError("exclude_modules is an expression: it takes the model to say which")
    if excluded:
        chosen["except"] = [g for t in sorted(excluded) for g in (t, f"*.{t}")]
    layers = content.get("layers_to_transform")
    if layers is not None:
        chosen["layers"] = layers
    return chosen


def _matched(content: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Names of the modules that PEFT would adapt, as globs of one module each."""
    targets, excluded = content["target_modules"], content.get("exclude_modules") or []
    layers = content.get("layers_to_transform")
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    names = []
    for name, module in model.named_modules():
        if not name or SLOT in name.split(".") or not _chosen(targets, name):
            continue
        if excluded and _chosen(excluded, name):
            continue
        if layers is not None and _layer(name, content.get("layers_pattern")) not in wanted:
            continue
        if isinstance(module, nn.MultiheadAttention):
            names += [f"{name}.in_proj_weight", f"{name}.out_proj"]
        else:
            names.append(name)
    if not names:
        raise SpecError(
            f"target_modules {targets!r} name no module of this {type(model).__name__}",
            remedy="load the adapter on the architecture that it was trained on",
        )
    return names


def _weights(model: nn.Module) -> dict[str, Site]:
    """The weights of a model, by module."""
    return {s.module: s for s in sites(model) if s.parameter == "weight" and not s.computed}


def _layer(name: str, pattern: Any) -> int | None:
    parts = name.split(".")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    for i in range(1, len(parts) - 1):
        if parts[i].isdigit() and (parts[i - 1] in patterns if patterns else i >= 2):
            return int(parts[i])
    return None


def _chosen(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return _expression(targets, name)
    return any(suffix(name, t) for t in targets)


def _expression(pattern: str, name: str, prefix: str = "") -> bool:
    """``re.fullmatch`` in linear time, whatever the expression."""
    import re2

    try:
        return re2.fullmatch(prefix + f"({pattern})", name) is not None
    except re2.error as error:
        raise SpecError(
            f"the expression {pattern[:80]!r} is not supported: {error}",
            remedy="list the modules instead; look-around and back references are not read",
        ) from None


def _patterns(
    form: PeftForm, content: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Any]:
    """Values by module, such as ``rank_pattern``, as overrides."""
    overrides: list[dict[str, Any]] = []
    for option, key in form.varied.values():
        patterns = content.get(key) or {}
        if patterns and model is None:
            raise SpecError(
                f"{key} holds expressions: it takes the model to say which modules they mean",
                remedy="peftfx.load(model, directory) resolves them",
            )
        if not patterns or model is None:
            continue
        by_value: dict[Any, list[str]] = {}
        for name in _matched(content, model):
            found = next((p for p in patterns if _expression(p, name, r"(.*\.)?")), None)
            if found is not None:
                by_value.setdefault(patterns[found], []).append(name)
        overrides += [{"name": names, option: value} for value, names in by_value.items()]
    return {"overrides": overrides} if overrides else {}
