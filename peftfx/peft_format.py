"""HF PEFT's adapter directories: their configuration and keys, both ways.

``adapter_config.json`` and ``adapter_model.safetensors``, as peft 0.21 reads and writes them. What
PEFT cannot represent exactly is refused with the reason, and never written half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from peftfx.errors import CheckpointError, SpecError
from peftfx.methods.method import Method
from peftfx.plans import Placement
from peftfx.site import SLOT
from peftfx.spec import Spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MEANT = {  # options of a LoraConfig that this reader knows how to follow
    "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "bias", "fan_in_fan_out", "peft_type",
}  # fmt: skip
_HARMLESS = {  # about the start or the bookkeeping of a training, not about what is computed
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "init_lora_weights", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    "lora_ga_config", "arrow_config",
}  # fmt: skip


def _suffix(name: str, tail: str) -> bool:
    return name == tail or name.endswith("." + tail)


# -- to PEFT -------------------------------------------------------------------------------------


def config_from(model: nn.Module, placements: Sequence[Placement]) -> dict[str, Any]:
    """The PEFT configuration that says the same as *placements*.

    Raises:
        CheckpointError: PEFT has no way to say it.
    """
    lora = [p for p in placements if p.method.name == "lora"]
    saved = _modules_to_save(model, [p for p in placements if p.method.name == "train"])
    other = {p.method.name for p in placements} - {"lora", "train", "freeze"}
    if other:
        raise CheckpointError(f"PEFT's LoRA format has no {', '.join(sorted(other))}")
    if not lora:
        raise CheckpointError("PEFT's LoRA format needs a LoRA")
    methods = [_options(p.method) for p in lora]
    for option in ("dropout", "rank_stabilized", "bias"):
        if len({m[option] for m in methods}) > 1:
            raise CheckpointError(f"PEFT has one {option} for all sites")
    for p in lora:
        if p.site.kind.startswith("conv") and any(d != 1 for d in p.site.attrs["dilation"]):
            raise CheckpointError(f"PEFT drops the dilation of {p.site.module}")
        if not p.site.module:
            raise CheckpointError("PEFT cannot adapt a model that is a single layer")
    modules = _targets(lora)
    rank = Counter(m["rank"] for m in methods).most_common(1)[0][0]
    alpha = Counter(m["alpha"] for m in methods).most_common(1)[0][0]
    every = [n for n, _ in model.named_modules() if n and SLOT not in n.split(".")]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": methods[0]["dropout"],
        "use_rslora": methods[0]["rank_stabilized"],
        "lora_bias": methods[0]["bias"],
        "bias": "none",
        "fan_in_fan_out": all(p.site.kind == "hf_conv1d" for p in lora),
        "init_lora_weights": True,
        "rank_pattern": _pattern(modules, methods, "rank", rank),
        "alpha_pattern": _pattern(modules, methods, "alpha", alpha),
        "target_modules": _unambiguous(sorted(set(modules)), every),
        "modules_to_save": saved or None,
    }


def _options(method: Method) -> dict[str, Any]:
    names = ("rank", "alpha", "dropout", "rank_stabilized", "bias")
    return {n: getattr(method, n) for n in names}


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _targets(lora: Sequence[Placement]) -> list[str]:
    """PEFT's target of each placement; it adapts both projections of an nn.MultiheadAttention."""
    packed = {p.site.module: p.method for p in lora if p.site.kind == "attention"}
    found = []
    by_module = {p.site.module: p.method for p in lora}
    for owner, method in packed.items():
        if by_module.get(f"{owner}.out_proj") != method:
            raise CheckpointError(
                f"PEFT adapts {owner}.in_proj_weight and {owner}.out_proj together, alike"
            )
    for p in lora:
        parent = p.site.module.rpartition(".")[0]
        found.append(parent if parent in packed else p.site.module)
    return found


def _pattern(
    modules: Sequence[str], methods: Sequence[Mapping[str, Any]], option: str, usual: Any
) -> dict[str, Any]:
    chosen = {
        module: _whole(m[option])
        for module, m in zip(modules, methods, strict=True)
        if m[option] != usual
    }
    for key in chosen:
        for module, m in zip(modules, methods, strict=True):
            if _suffix(module, key) and _whole(m[option]) != chosen[key]:
                raise CheckpointError(f"PEFT would read the {option} of {key} for {module} too")
    return chosen


def _unambiguous(modules: list[str], every: Iterable[str]) -> list[str] | str:
    """The targets as a list, or as an expression where PEFT's suffixes would match more."""
    wanted = set(modules)
    if any(name not in wanted and any(_suffix(name, m) for m in modules) for name in every):
        return "(" + "|".join(m.replace(".", r"\.") for m in modules) + ")"
    return modules


def _modules_to_save(model: nn.Module, trained: Sequence[Placement]) -> list[str]:
    """The modules that *trained* covers whole."""
    names = {p.site.name for p in trained}
    covered: set[str] = set()
    for module in {p.site.module for p in trained}:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):  # the largest module that is covered whole
            path = ".".join(parts[:depth])
            inside = {
                f"{path}.{n}"
                for n, _ in model.get_submodule(path).named_parameters()
                if SLOT not in n.split(".")
            }
            if inside and inside <= names:
                covered.add(path)
                break
        else:
            raise CheckpointError(f"PEFT saves whole modules, and {module} trains in part")
    every = [n for n, _ in model.named_modules() if n and SLOT not in n.split(".")]
    for path in covered:
        if any(n != path and n.endswith(path) for n in every):
            raise CheckpointError(f"PEFT would read {path!r} as other modules too")
    return sorted(covered)


def keys(placement: Placement) -> dict[str, str]:
    """The keys of a placement's tensors in PEFT's file, by the tensor's name."""
    site, method = placement.site, placement.method
    if method.name == "train":
        return {"value": _PREFIX + site.name}
    if method.name != "lora":
        return {}
    stem = _PREFIX + site.module
    if site.kind == "embedding":
        found = {"A": f"{stem}.lora_embedding_A", "B": f"{stem}.lora_embedding_B"}
    else:
        found = {"A": f"{stem}.lora_A.weight", "B": f"{stem}.lora_B.weight"}
    if _options(method)["bias"]:
        found["bias"] = f"{stem}.lora_B.bias"
    return found


def keys_of(placements: Sequence[Placement]) -> list[dict[str, str]]:
    """:func:`keys` of all placements; PEFT wraps a MultiheadAttention's output projection twice."""
    packed = {p.site.module for p in placements if p.site.kind == "attention"}
    found = []
    for p in placements:
        parent, _, leaf = p.site.module.rpartition(".")
        made = keys(p)
        if parent in packed:
            old, new = f"{parent}.{leaf}.", f"{parent}.base_layer.{leaf}."
            made = {n: k.replace(_PREFIX + old, _PREFIX + new) for n, k in made.items()}
        found.append(made)
    return found


# -- from PEFT -----------------------------------------------------------------------------------


def spec_from_config(config: Any, model: nn.Module | None = None) -> Spec:
    """The spec that a ``LoraConfig`` (or its mapping) amounts to.

    Args:
        model: needed where modules are chosen by a regular expression or a pattern.

    Raises:
        SpecError: an option without an equal here, by name.
    """
    content = dict(config if isinstance(config, Mapping) else config.to_dict())
    kind = getattr(content.get("peft_type"), "value", content.get("peft_type"))
    if kind != "LORA":
        raise SpecError(f"peft_type {kind!r} is not supported", remedy="LORA is")
    for key, value in content.items():
        if key not in _MEANT | _HARMLESS and value not in (None, False, [], {}, 0, ""):
            raise SpecError(f"the LoraConfig option {key}={value!r} is not supported")
    if content.get("bias", "none") != "none":
        raise SpecError(f"bias={content['bias']!r} is not supported", remedy="bias='none' is")
    options: dict[str, Any] = {
        "rank": content.get("r", 8),
        "alpha": content.get("lora_alpha", 8),
        "dropout": content.get("lora_dropout", 0.0),
    }
    if content.get("use_rslora"):
        options["rank_stabilized"] = True
    if content.get("lora_bias"):
        options["bias"] = True
    rules: list[dict[str, Any]] = [
        {"method": "lora", **_modules(content, model), **options, **_patterns(content, model)}
    ]
    if content.get("modules_to_save"):
        names = sorted(content["modules_to_save"])
        rules.append({"method": "train", "name": [g for n in names for g in (n, f"*.{n}")]})
    return Spec.parse({"rules": rules})


def _modules(content: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    targets = content.get("target_modules")
    if not targets:
        raise SpecError("the LoraConfig has no target_modules")
    if model is None:
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
    return {"name": _matched(content, model)}


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
    return any(_suffix(name, t) for t in targets)


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


def _patterns(content: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """``rank_pattern`` and ``alpha_pattern`` as overrides."""
    overrides: list[dict[str, Any]] = []
    for option, key in (("rank", "rank_pattern"), ("alpha", "alpha_pattern")):
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
