"""HF PEFT's adapter directories: the configuration that is written, and keys both ways.

``adapter_config.json`` and ``adapter_model.safetensors``, as peft 0.21 reads and writes them. What
is particular to a method, the method states (:class:`peftfx.methods.peft.PeftForm`); here is what
PEFT does alike for all: how modules are named, patterns of values, modules that are saved whole.
What PEFT cannot represent exactly is refused with the reason, and never written half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from peftfx.binding import Tensors
from peftfx.errors import CheckpointError, SpecError
from peftfx.methods.peft import PeftForm, Placed, suffix
from peftfx.plans import Placement
from peftfx.site import PACKED, SLOT, Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def config_from(model: nn.Module, placements: Sequence[Placement]) -> dict[str, Any]:
    """The PEFT configuration that says the same as *placements*.

    Raises:
        CheckpointError: PEFT has no way to say it.
    """
    main, others = _sort(placements)
    form = _form(main[0])
    for p in (*main, *others):
        reason = _form(p).refusal(p.method, p.site)
        if reason is not None:
            raise CheckpointError(reason)
        if not p.site.module:
            raise CheckpointError("PEFT cannot adapt a model that is a single layer")
    main, others = _untied(main), _untied(others)
    options = {theirs: _only(form, main, ours) for theirs, ours in form.options.items()}
    if form.whole:
        _covers(model, main)
    targets = _targets(main)
    for theirs, (ours, pattern) in form.varied.items():
        values = [_whole(form.value(p.method, ours)) for p in main]
        options[theirs] = usual = Counter(values).most_common(1)[0][0]
        options[pattern] = _pattern(targets, values, usual, ours)
    every = [n for n, _ in model.named_modules() if n and SLOT not in n.split(".")]
    try:
        options |= {**form.fixed} | form.more(_placed(main))
        options |= {"modules_to_save": None, **_besides(model, form, main, others)}
    except SpecError as error:
        raise CheckpointError(error.message) from None
    modules = [t for t, p in zip(targets, main, strict=True) if p.site.kind != "parameter"]
    if bare := [p.site.name for p in main if p.site.kind == "parameter"]:
        options["target_parameters"] = _parameters(model, bare)
    return {
        "peft_type": form.type,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        **options,
        "target_modules": _unambiguous(sorted(set(modules)), every),
    }


def _placed(placements: Sequence[Placement]) -> Placed:
    return [(p.site, p.method) for p in placements]


def _parameters(model: nn.Module, names: list[str]) -> list[str]:
    """PEFT's target_parameters of bare parameters; it takes their names for endings."""
    for other, _ in model.named_parameters():
        if other not in names and any(suffix(other, n) for n in names):
            raise CheckpointError(f"PEFT would read the name of another parameter as {other} too")
    return sorted(names)


def _form(placement: Placement) -> PeftForm:
    form = placement.method.peft
    if form is None:
        raise CheckpointError(f"PEFT has no {placement.method.name}")
    return form


def _sort(placements: Sequence[Placement]) -> tuple[list[Placement], list[Placement]]:
    """The placements of the configuration's own type, and those that stand beside it."""
    trained = [p for p in placements if p.method.trains]
    own = [p for p in trained if _form(p).beside is None]
    own = own or [p for p in trained if _form(p).type]
    kinds = {p.method.name for p in own}
    if len(kinds) > 1:
        raise CheckpointError(f"PEFT has no {' with '.join(sorted(kinds))} in one adapter")
    if not own:
        raise CheckpointError("PEFT's format needs a method beside modules that are trained whole")
    return own, [p for p in trained if p.method.name not in kinds]


def _untied(placements: Sequence[Placement]) -> list[Placement]:
    """The placements that PEFT names: where it follows ties by itself, the first of those tied."""
    names = {p.site.name for p in placements}
    seen: set[str] = set()
    found = []
    for p in placements:
        if _form(p).tied:
            if missing := sorted({*p.site.aliases} - names):
                raise CheckpointError(f"PEFT would adapt {', '.join(missing)} too: they are tied")
            if p.site.name in seen:
                continue
            seen |= {*p.site.aliases}
        found.append(p)
    return found


def _besides(
    model: nn.Module, form: PeftForm, main: Sequence[Placement], others: Sequence[Placement]
) -> dict[str, Any]:
    """The options of what stands beside the configuration's own type."""
    by_option: dict[str, list[Placement]] = {}
    for p in others:
        by_option.setdefault(str(_form(p).beside), []).append(p)
    saved = {p.site.name for p in others if _form(p).whole}
    free = [n for n, _ in model.named_parameters() if SLOT not in n.split(".") and n not in saved]
    found = {}
    for option, placed in by_option.items():
        if option not in form.takes:
            raise CheckpointError(f"PEFT's {form.type} has no {option}")
        if _form(placed[0]).whole:
            found[option] = modules_to_save(model, placed)
        else:
            found[option] = _form(placed[0]).besides(_placed(placed), _placed(main), free)
    return found


def _only(form: PeftForm, placements: Sequence[Placement], option: str) -> Any:
    values = {form.value(p.method, option) for p in placements}
    if len(values) > 1:
        raise CheckpointError(f"PEFT has one {option} for all sites")
    return _whole(values.pop())


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value == int(value) else value


def _targets(placements: Sequence[Placement]) -> list[str]:
    """PEFT's target of each placement; it adapts both projections of an nn.MultiheadAttention."""
    packed = {p.site.module: p.method for p in placements if _packs(p.site)}
    by_module = {p.site.module: p.method for p in placements}
    for owner, method in packed.items():
        if by_module.get(f"{owner}.out_proj") != method:
            raise CheckpointError(
                f"PEFT adapts {owner}.in_proj_weight and {owner}.out_proj together, alike"
            )
    found = []
    for p in placements:
        parent = p.site.module.rpartition(".")[0]
        inner = p.site.name if p.site.kind == "parameter" else p.site.module
        found.append(parent if parent in packed else inner)
    return found


def _packs(site: Site) -> bool:
    return site.kind == "attention" and site.parameter == PACKED


def _pattern(
    modules: Sequence[str], values: Sequence[Any], usual: Any, option: str
) -> dict[str, Any]:
    chosen = {m: v for m, v in zip(modules, values, strict=True) if v != usual}
    for key in chosen:
        for module, value in zip(modules, values, strict=True):
            if suffix(module, key) and value != chosen[key]:
                raise CheckpointError(f"PEFT would read the {option} of {key} for {module} too")
    return chosen


def _unambiguous(modules: list[str], every: Iterable[str]) -> list[str] | str:
    """The targets as a list, or as an expression where PEFT's suffixes would match more."""
    wanted = set(modules)
    if any(name not in wanted and any(suffix(name, m) for m in modules) for name in every):
        return "(" + "|".join(m.replace(".", r"\.") for m in modules) + ")"
    return modules


def _inside(model: nn.Module, path: str) -> set[str]:
    """Names of the base's parameters in a module."""
    found = model.get_submodule(path).named_parameters()
    return {f"{path}.{n}" for n, _ in found if SLOT not in n.split(".")}


def _covers(model: nn.Module, placements: Sequence[Placement]) -> None:
    names = {p.site.name for p in placements}
    for module in {p.site.module for p in placements}:
        if not _inside(model, module) <= names:
            raise CheckpointError(f"PEFT takes whole modules, and {module} trains in part")


def modules_to_save(model: nn.Module, trained: Sequence[Placement]) -> list[str]:
    """The modules that *trained* covers whole."""
    names = {p.site.name for p in trained}
    covered: set[str] = set()
    for module in {p.site.module for p in trained}:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):  # the largest module that is covered whole
            path = ".".join(parts[:depth])
            if (inside := _inside(model, path)) and inside <= names:
                covered.add(path)
                break
        else:
            raise CheckpointError(f"PEFT saves whole modules, and {module} trains in part")
    every = [n for n, _ in model.named_modules() if n and SLOT not in n.split(".")]
    for path in covered:
        if any(n != path and n.endswith(path) for n in every):
            raise CheckpointError(f"PEFT would read {path!r} as other modules too")
    return sorted(covered)


def _inner(path: str, wraps: Mapping[str, int]) -> str:
    """Where PEFT has the module at *path*: ``base_layer`` is what a module was that it wraps.

    Args:
        wraps: how many times PEFT wraps a module, by its path.
    """
    found: list[str] = []
    parts = path.split(".")
    for depth, part in enumerate(parts, 1):
        found.append(part)
        if depth < len(parts):
            found += ["base_layer"] * wraps.get(".".join(parts[:depth]), 0)
    return ".".join(found)


class Directory:
    """How the tensors of placements lie in PEFT's weight file."""

    def keys_of(self, placements: Sequence[Placement]) -> list[dict[str, str]]:
        """The keys of each placement's tensors, by the tensor's name."""
        own = _sort(placements)[0]
        main = {p.method.name for p in own}
        bare: dict[str, list[str]] = {}  # parameters by owner, each with a wrapper of its own
        for p in own:
            if p.site.kind == "parameter":
                bare.setdefault(p.site.module, []).append(p.site.parameter)
        wraps = {p.site.module: len(bare.get(p.site.module, "1")) for p in own}
        first: dict[tuple[object, ...], str] = {}  # of tied ones, PEFT writes one beside others
        found: list[dict[str, str]] = []
        for p in placements:
            if not p.method.trains:
                found.append({})
                continue
            site, beside = p.site, p.method.name not in main
            path = PREFIX + _inner(site.module, wraps)
            inner = path + ".base_layer" * wraps.get(site.module, 0)
            if not beside and site.kind == "parameter":  # the first of the owner's is the innermost
                order = sorted(bare[site.module], key=site.siblings.index)
                path += ".base_layer" * (len(order) - 1 - order.index(site.parameter))
            given = {"module": path, "inner": inner, "parameter": site.parameter}
            form = _form(p)
            names = (form.names_beside if beside else form.names)(p.method, site)
            keys = {n: key.format(**given) for n, key in names.items()}
            if beside:
                keys = {n: first.setdefault(p.holder(n), key) for n, key in keys.items()}
            found.append(keys)
        return found

    def optional(self, placements: Sequence[Placement]) -> set[str]:
        """Keys that may be missing."""
        missing = {
            keys[name]
            for p, keys in zip(placements, self.keys_of(placements), strict=True)
            for name in (_form(p).optional if p.method.trains else ())
        }
        return missing | self._copies(placements)

    def _copies(self, placements: Sequence[Placement]) -> set[str]:
        """Keys that PEFT writes for nothing: with bias="all", of modules that it saves whole."""
        saved = {
            (p.site.module, p.site.parameter)
            for p in placements
            if p.method.trains and _form(p).whole and p.site.parameter == "bias"
        }
        copies = ("original_module", "modules_to_save")
        return {f"{PREFIX}{m}.{copy}.{n}" for m, n in saved for copy in copies}

    def pack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """A placement's tensors as PEFT has them."""
        if not placement.method.trains:
            return {}
        return _form(placement).pack(placement.method, placement.site, tensors)

    def file_keys(self, placements: Sequence[Placement]) -> set[str]:
        """The keys that the file has."""
        return {key for names in self.keys_of(placements) for key in names.values()}

    def of_base(self, key: str) -> str | None:
        """The base's parameter of a key: PEFT adds embeddings that it adapts, or finds resized."""
        return key.removeprefix(PREFIX).replace(".base_layer", "")

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """What the file holds, of tensors by key: these."""
        return values

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """The inverse of :meth:`join`."""
        copies = self._copies(placements)
        return {key: value for key, value in values.items() if key not in copies}

    def unpack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """The inverse of :meth:`pack`."""
        if not placement.method.trains:
            return {}
        return _form(placement).unpack(placement.method, placement.site, tensors)
