"""HF PEFT's configurations, read as specs, and specs as configurations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peftfx import peft_format, peft_prompts
from peftfx.errors import CheckpointError, PlanError, SpecError
from peftfx.methods.method import Method, lookup, names
from peftfx.methods.peft import LINEARS, Known, PeftForm, expression, matching, named
from peftfx.methods.peft_prompt import PromptForm
from peftfx.plans import Plan, make_plan
from peftfx.site import PACKED, SLOT, kind_of, sites
from peftfx.spec import Spec

COMMON = {  # options of every configuration that this reader knows how to follow
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying",
}  # fmt: skip
HARMLESS = {  # about the bookkeeping of a training, not about what is computed
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "fan_in_fan_out",
}  # fmt: skip
_EMPTY: tuple[Any, ...] = (None, False, [], {}, 0, "", "none")
MAX_EXPRESSIONS, MAX_LISTS = 2000, 50  # of names of modules, and of the lists that layers are in
_HEADS = ("score", "classifier")  # what PEFT takes for the heads of classifiers


def spec_from_config(config: Any, model: nn.Module | None = None) -> Spec:
    """The spec that a PEFT configuration (or its mapping) amounts to.

    Args:
        model: needed where modules are chosen by a regular expression or a pattern.

    Raises:
        SpecError: a type or an option without an equal here, by name.
    """
    content = dict(config if isinstance(config, Mapping) else config.to_dict())
    try:
        return _spec(content, model)
    except (TypeError, AttributeError, KeyError) as error:  # a list where PEFT has a mapping, …
        raise SpecError(f"an option has a value that PEFT's never have: {error}") from error


def _spec(content: dict[str, Any], model: nn.Module | None) -> Spec:
    kind = getattr(content.get("peft_type"), "value", content.get("peft_type"))
    method, form = _meant(str(kind), content)
    if isinstance(form, PromptForm):
        return peft_prompts.spec_from_config(method.name, form, content, model)
    content = {**form.defaults, **content}
    for key in (*(p for _, p in form.varied.values()), "modules_to_save", "layers_pattern"):
        most = MAX_LISTS if key == "layers_pattern" else MAX_EXPRESSIONS
        if isinstance(content.get(key), (list, dict)) and len(content[key]) > most:
            raise SpecError(f"{key} holds more than {most} expressions")
    patterns = {pattern for _, pattern in form.varied.values()}
    known = {*COMMON, *HARMLESS, *form.options, *form.varied, *form.fixed, *form.special}
    known |= {*form.takes, *form.ignored}
    for key, value in content.items():
        if key not in known | patterns and value not in _EMPTY:
            raise SpecError(f"the {kind} option {key}={value!r} is not supported")
    rule: dict[str, Any] = {"method": method.name}
    rule |= _selected(form, content) if model is None else {"name": _adapted(content, model)}
    for theirs, ours in (*form.options.items(), *((t, o) for t, (o, _) in form.varied.items())):
        if theirs in content:
            rule[ours] = content[theirs]
    rule |= _patterns(form, content, rule["name"], model)
    told = None if model is None else _known(content, rule["name"], model)
    if content.get("ensure_weight_tying") and (told is None or told.tied):
        raise SpecError("ensure_weight_tying=True gives tied weights one adapter: not supported")
    rules = form.rules(rule, content, told.adapted if told is not None else None)
    for method, other in _forms():
        value = content.get(other.beside) if other.beside and other.beside in form.takes else None
        if value not in _EMPTY:
            rules += other.rules_beside(method.name, value, rule, content, told)
    return Spec.parse({"rules": rules})


def config_from_spec(spec: Spec, model: nn.Module, example: Any = None) -> dict[str, Any]:
    """The PEFT configuration that trains on *model* what *spec* says.

    Raises:
        CheckpointError: PEFT has no way to say all of it.
    """
    plan, _ = make_plan(model, spec, example)
    written = peft_prompts if peft_prompts.meant(plan.placements) else peft_format
    placements, starts = [], []
    for p in plan:
        method, start = p.method.peft.fresh(p.method) if p.method.peft else (p.method, {})
        placements.append(replace(p, method=method))
        if start and start not in starts:
            starts.append(start)
    content = written.config_from(model, placements)
    if len(starts) > 1:
        raise CheckpointError(f"PEFT has one {', '.join(starts[0])} for all sites")
    content |= {**(starts[0] if starts else {}), "inference_mode": False}
    back = spec_from_config(content, model)
    lost = _lost(spec, plan, back, make_plan(model, back, example)[0])
    if lost is not None:
        raise CheckpointError(f"a PEFT configuration does not say {lost}")
    return content


def difference(model: nn.Module, plan: Plan, config: Mapping[str, Any], example: Any) -> str | None:
    """What *config* says otherwise than *plan*, None where both adapt the same alike."""
    written = peft_prompts if peft_prompts.meant(plan.placements) else peft_format
    try:
        ours = written.config_from(model, plan.placements)
    except CheckpointError as error:
        return error.message
    said = [
        {k: v for k, v in content.items() if k not in HARMLESS and v not in _EMPTY}
        for content in (ours, config)
    ]
    if said[0] == said[1]:
        return None
    try:
        acts = [
            {(p.site.name, p.method.name): p.method for p in make_plan(model, spec, example)[0]}
            for spec in (spec_from_config(ours, model), spec_from_config(config, model))
        ]
    except (SpecError, PlanError) as error:
        return error.message
    other = sorted(key for key in {*acts[0], *acts[1]} if acts[0].get(key) != acts[1].get(key))
    if not other:
        return None
    site, method = other[0]
    old, new = (vars(found[other[0]]) if other[0] in found else None for found in acts)
    if old is None or new is None:
        return f"{method} at {site} in one of them alone"
    key = next(k for k in old if old[k] != new[k])
    return f"{key} of {method} at {site} is {old[key]!r} in one and {new[key]!r} in the other"


def _lost(spec: Spec, plan: Plan, back: Spec, again: Plan) -> str | None:
    """What *back*, read from a configuration, has lost of *spec*."""
    found = {(p.site.name, p.method.name): p for p in again}
    for p in plan:
        other = found.get((p.site.name, p.method.name))
        if other is None:
            return f"{p.method.name} at {p.site.name}"
        for key, value in vars(p.method).items():
            if vars(other.method)[key] != value:
                return f"{key}: {value} at {p.site.name}"
        if p.site.part != other.site.part:
            return f"rows of {p.site.name}"
        rates = spec.rules[p.rule].rates_at(p.site).to_dict()
        if rates != back.rules[other.rule].rates_at(p.site).to_dict():
            return f"{', '.join(rates)} at {p.site.name}"
    return None


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


# -- which modules ---------------------------------------------------------------------------------


def _selected(form: PeftForm, content: Mapping[str, Any]) -> dict[str, Any]:
    """The selectors that a configuration amounts to on any model."""
    targets, parameters = content.get("target_modules"), content.get("target_parameters")
    excluded, layers = content.get("exclude_modules"), content.get("layers_to_transform")
    if not targets and not parameters:
        raise _no_targets()
    if isinstance(targets, str) or isinstance(excluded, str) or content.get("layers_pattern"):
        raise _expressions("modules are chosen by an expression")
    if layers not in (None, []):
        raise _expressions("layers_to_transform is not for modules that are named in full")
    if targets and parameters:
        raise _expressions("both target_modules and target_parameters are given")
    chosen: dict[str, Any] = {"name": _globs(targets or parameters or ())}
    if left_out := [*(excluded or ()), *(content.get("modules_to_save") or ())]:
        chosen["except"] = _globs(left_out)
    if kinds := [k for k in form.kinds if (k == "parameter") == (not targets)]:
        chosen["kind"] = kinds
    return chosen


def _globs(targets: Iterable[str]) -> list[str]:
    return [g for t in sorted(targets) for g in (t, f"*.{t}")]


def _no_targets() -> SpecError:
    return SpecError(
        "the configuration has no target_modules",
        remedy="name them; PEFT's defaults for known architectures are not read",
    )


def _expressions(why: str) -> SpecError:
    return SpecError(
        f"{why}: it takes the model to say which are meant",
        remedy="Spec.from_peft(config, model), or peftfx.load(model, directory)",
    )


def _adapted(content: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What PEFT would adapt, as globs of one module or parameter each."""
    targets, parameters = content.get("target_modules"), content.get("target_parameters")
    excluded = content.get("exclude_modules")
    if not targets and not parameters:
        raise _no_targets()
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(content, model)
    targets, parameters = _as_set(targets), _as_set(parameters)
    content = {**content, "exclude_modules": _as_set(excluded)}
    modules = {n: m for n, m in model.named_modules() if SLOT not in n.split(".")}
    meant = {n for n in modules if n and _targeted(targets, content, n)}
    for saved in content.get("modules_to_save") or ():
        meant -= matching(rf"(.*\.)?({saved})(\..*)?", meant)
    found = []
    for name, module in modules.items():
        if name in meant:
            if not isinstance(module, nn.MultiheadAttention):
                found.append(name)
            elif module.in_proj_weight is None:
                raise SpecError(f"PEFT adapts packed projections, and {name} has separate ones")
            else:
                found += [f"{name}.{PACKED}", f"{name}.out_proj"]
        own = [f"{name}.{p}" for p, _ in module.named_parameters(recurse=False) if name]
        found += [n for n in own if named(n, parameters)]
    if not found:
        raise SpecError(
            f"target_modules {content.get('target_modules')!r} name no module of this "
            f"{type(model).__name__}",
            remedy="load the adapter on the architecture that it was trained on",
        )
    return found


def _as_set(targets: Any) -> Any:
    """Targets in a list as a set, an expression as it is."""
    return targets if isinstance(targets, str) else frozenset(targets or ())


def _targeted(targets: Any, content: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT's rules for targets mean a module."""
    excluded = content.get("exclude_modules") or ()
    if expression(excluded, name) if isinstance(excluded, str) else named(name, excluded):
        return False
    if isinstance(targets, str):
        return expression(targets, name)
    layers = content.get("layers_to_transform")
    if name in targets or layers in (None, []):  # PEFT asks no layer of what is named in full
        return named(name, targets)
    wanted = {layers} if isinstance(layers, int) else {*layers}
    return named(name, targets) and _layer(name, content.get("layers_pattern")) in wanted


def _layer(name: str, pattern: Any) -> int | None:
    """The number that PEFT takes for the layer's."""
    lists = [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        before = ".".join(parts[:i])
        if parts[i].isdigit() and (
            any(expression(rf"(.*\.)?({p})", before) for p in lists) if lists else i >= 2
        ):
            return int(parts[i])
    return None


def _all_linear(content: Mapping[str, Any], model: nn.Module) -> set[str]:
    """Names of all linears but the head, as PEFT finds it."""
    found = {n: m for n, m in model.named_modules() if kind_of(m) in LINEARS}
    hf = any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)
    find = getattr(model, "get_output_embeddings", None) if hf else None
    task = getattr(content.get("task_type"), "value", content.get("task_type"))
    heads = [find()] if find is not None else []
    if find is not None and heads == [None] and task == "SEQ_CLS":
        heads = [getattr(model, n) for n in _HEADS if hasattr(model, n)][:1]
    return {n for n, m in found.items() if not any(m is head for head in heads)}


def _known(content: Mapping[str, Any], adapted: Iterable[str], model: nn.Module) -> Known:
    every = list(sites(model))
    weights = {s.module: s for s in every if s.parameter == "weight" and not s.computed}
    modules = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
    find = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = find() if find is not None else None
    except NotImplementedError:  # transformers has it for models without a table too
        embeddings = None
    named = model.named_modules()
    table = next((n for n, m in named if m is embeddings), None)
    wanted = {*adapted}
    return Known(
        weights=weights,
        adapted={m: s for m, s in weights.items() if m in wanted},
        parameters=tuple(s.name for s in every),
        modules=tuple(n for n in modules if SLOT not in n.split(".")),
        table=table,
        tied=any(s.aliases for s in every),
    )


def _patterns(
    form: PeftForm, content: Mapping[str, Any], adapted: Iterable[str], model: nn.Module | None
) -> dict[str, Any]:
    """Values by module, such as ``rank_pattern``, as overrides."""
    overrides: list[dict[str, Any]] = []
    for option, key in form.varied.values():
        patterns = content.get(key) or {}
        if patterns and model is None:
            raise _expressions(f"{key} holds expressions")
        by_value: dict[Any, list[str]] = {}
        left = list(adapted)
        for pattern, value in patterns.items():  # the first that matches holds
            # of an nn.MultiheadAttention, PEFT asks for both of its parts at once
            asked = {n: n.removesuffix(f".{PACKED}") for n in left}
            found = matching(rf"(.*\.)?({pattern})", asked.values())
            by_value.setdefault(value, []).extend(n for n in left if asked[n] in found)
            left = [n for n in left if asked[n] not in found]
        by_value = {value: names for value, names in by_value.items() if names}
        overrides += [{"name": names, option: value} for value, names in by_value.items()]
    return {"overrides": overrides} if overrides else {}
