"""Specs: what to adapt and how, as values.

A spec is a list of rules. A rule has selectors, all of which must hold, and the options of its
method. Options are checked by pydantic models made from the methods' own dataclasses, so that a
file and a method cannot disagree; the models live only while something is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftfx.errors import SpecError, nearest
from peftfx.methods.method import Method, lookup, names
from peftfx.rates import KEYS as RATES
from peftfx.rates import UNSAID, Rates
from peftfx.rows import ALL, Rows
from peftfx.select import SELECTORS, Selector
from peftfx.site import Site
from peftfx.spec_file import Document, Path_, read

VERSION = 1
MAX_RULES = 1000  # with their overrides
MAX_PATTERNS = 16 * 1024  # characters of globs, each of which is tried on every name
DTYPES = ("float32", "base")


@dataclass(frozen=True)
class Override:
    """Other option values for some of a rule's sites."""

    selector: Selector
    options: tuple[tuple[str, Any], ...]
    rates: Rates = UNSAID

    def to_dict(self) -> dict[str, Any]:
        rates = self.rates.to_dict()
        return {**self.selector.to_dict(), **_plain(dict(self.options)), **rates}


@dataclass(frozen=True)
class Rule:
    """One method, where it acts, and with what options."""

    method: Method
    selector: Selector
    overrides: tuple[Override, ...] = ()
    where: str | None = field(default=None, compare=False)
    rates: Rates = UNSAID
    rows: Rows = ALL

    def rates_at(self, site: Site) -> Rates:
        """The rates that hold at *site*."""
        rates = self.rates
        for override in self.overrides:
            if override.selector.matches(site, self.method, site.layers or 0):
                rates = override.rates.over(rates)
        return rates

    def method_at(self, site: Site) -> Method:
        """The method with the options that hold at *site*."""
        method = self.method
        for override in self.overrides:
            if override.selector.matches(site, method, site.layers or 0):
                method = dataclasses.replace(method, **dict(override.options))
        return method

    def to_dict(self) -> dict[str, Any]:
        """The rule as a spec file has it; options at their defaults are left out."""
        options = {
            f.name: getattr(self.method, f.name)
            for f in dataclasses.fields(self.method)
            if getattr(self.method, f.name) != f.default
        }
        content = {"method": self.method.name, **self.selector.to_dict(), **_plain(options)}
        content |= {**self.rows.to_dict(), **self.rates.to_dict()}
        if self.overrides:
            content["overrides"] = [o.to_dict() for o in self.overrides]
        return content


@dataclass(frozen=True)
class Spec:
    """A list of rules. ``strict`` refuses every run that goes around the backend; ``dtype`` is that
    of adapter tensors, ``float32`` (at least) or the ``base``'s.
    """

    rules: tuple[Rule, ...]
    strict: bool = False
    dtype: Literal["float32", "base"] = "float32"
    version: int = VERSION
    path: str | None = field(default=None, compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spec:
        """The spec in a YAML, TOML or JSON file.

        Raises:
            SpecError: with file, line and what is known instead.
        """
        return _parse(read(path))

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> Spec:
        """The spec in a mapping of the same form as a file's."""
        if not isinstance(mapping, Mapping):
            raise SpecError(f"a spec is a mapping, not {type(mapping).__name__}")
        return _parse(Document(mapping, {}, "<spec>"))

    @classmethod
    def of(cls, spec: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> Spec:
        """*spec* itself, or the one in a file or mapping."""
        if isinstance(spec, Spec):
            return spec
        if isinstance(spec, (str, os.PathLike)):
            return cls.load(spec)
        return cls.parse(spec)

    @classmethod
    def from_peft(cls, config: Any, model: Any = None) -> Spec:
        """The spec that a configuration of HF PEFT, or its mapping, amounts to.

        Args:
            model: says which modules are meant, where expressions or patterns choose them.
        """
        from peftfx.peft_config import spec_from_config

        return spec_from_config(config, model)

    def to_peft(self, model: Any, example: Any = None) -> dict[str, Any]:
        """The configuration of HF PEFT that trains the same on *model*.

        ``peft.PeftConfig.from_peft_type(**spec.to_peft(model))``.

        Raises:
            CheckpointError: PEFT has no way to say all of it.
        """
        from peftfx.peft_config import config_from_spec

        return config_from_spec(self, model, example)

    def to_dict(self) -> dict[str, Any]:
        """The spec as a mapping: ``Spec.parse(spec.to_dict()) == spec``."""
        content: dict[str, Any] = {"version": self.version}
        if self.strict:
            content["strict"] = True
        if self.dtype != "float32":
            content["dtype"] = self.dtype
        return content | {"rules": [r.to_dict() for r in self.rules]}

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes the spec to a file, in the format of its ending, whole or not at all."""
        from peftfx.spec_write import write

        write(self.to_dict(), Path(path))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


# -- parsing -------------------------------------------------------------------------------------


def _parse(document: Document) -> Spec:
    values = document.values
    known = ("version", "rules", "strict", "dtype")
    _known_keys(document, (), values, known)
    if values.get("version", VERSION) != VERSION or isinstance(values.get("version"), bool):
        raise SpecError(
            f"version {values['version']!r} is not known",
            where=document.where(("version",)),
            remedy=f"write `version: {VERSION}`",
        )
    strict, dtype = values.get("strict", False), values.get("dtype", "float32")
    if not isinstance(strict, bool):
        raise SpecError(
            f"strict is {strict!r}",
            where=document.where(("strict",)),
            remedy="write true or false",
        )
    if dtype not in DTYPES:
        raise SpecError(
            f"dtype is {dtype!r}",
            where=document.where(("dtype",)),
            remedy=nearest(str(dtype), DTYPES),
        )
    rules = values.get("rules")
    if not isinstance(rules, (list, tuple)) or not rules:
        raise SpecError(
            "a spec has a list of `rules`, with one at least", where=document.where(("rules",))
        )
    overrides = sum(
        len(r.get("overrides") or ())
        for r in rules
        if isinstance(r, Mapping) and isinstance(r.get("overrides"), (list, tuple))
    )
    if len(rules) + overrides > MAX_RULES:
        raise SpecError(
            f"more than {MAX_RULES} rules and overrides",
            where=document.where(("rules",)),
            remedy="join rules of one method by lists of names, or globs",
        )
    parsed = [_rule(document, ("rules", i), rule) for i, rule in enumerate(rules)]
    selectors = [s for r in parsed for s in (r.selector, *(o.selector for o in r.overrides))]
    if sum(len(pattern) for s in selectors for pattern in s.patterns) > MAX_PATTERNS:
        raise SpecError(
            f"globs of more than {MAX_PATTERNS} characters in all",
            where=document.where(("rules",)),
            remedy="names that are written out, and `*.name`, may be as many as there are modules",
        )
    path = document.file if document.lines else None
    return Spec(tuple(parsed), strict, dtype, VERSION, path)


def _rule(document: Document, at: Path_, rule: Any) -> Rule:
    if not isinstance(rule, Mapping):
        raise SpecError("a rule is a mapping", where=document.where(at))
    rule = dict(rule)
    if "method" not in rule:
        raise SpecError(
            "a rule names its `method`", where=document.where(at), remedy=nearest("", names())
        )
    name = rule.pop("method")
    try:
        method = lookup(name if isinstance(name, str) else repr(name))
    except SpecError as error:
        where = document.where((*at, "method"))
        raise SpecError(error.message, where=where, remedy=error.remedy) from None
    overrides = rule.pop("overrides", [])
    if not isinstance(overrides, (list, tuple)):
        raise SpecError("overrides is a list", where=document.where((*at, "overrides")))
    rows = _rows(document, at, rule.pop("rows", None))
    selector, options, rates = _split(document, at, rule, method)
    made = _make(document, at, method, options)
    parsed = []
    for i, override in enumerate(overrides):
        place = (*at, "overrides", i)
        if not isinstance(override, Mapping):
            raise SpecError("an override is a mapping", where=document.where(place))
        chosen, changed, other = _split(document, place, dict(override), method)
        if not changed and other == UNSAID:
            raise SpecError(
                "an override changes no option",
                where=document.where(place),
                remedy=nearest("", _options(method)),
            )
        try:
            dataclasses.replace(made, **changed)
        except SpecError as error:
            where = document.where((*place, next(iter(changed))))
            raise SpecError(error.message, where=where, remedy=error.remedy) from None
        parsed.append(Override(chosen, tuple(sorted(changed.items())), other))
    if selector == Selector():
        raise SpecError(
            "a rule says where its method acts",
            where=document.where(at),
            remedy="select by " + ", ".join(SELECTORS),
        )
    line = document.where(at) if document.lines else None
    return Rule(made, selector, tuple(parsed), line, rates, rows)


def _rows(document: Document, at: Path_, value: Any) -> Rows:
    try:
        return Rows.parse(value)
    except SpecError as error:
        where = document.where((*at, "rows"))
        raise SpecError(error.message, where=where, remedy=error.remedy) from None


def _options(method: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(method)]


def _split(
    document: Document, at: Path_, content: dict[str, Any], method: type[Method]
) -> tuple[Selector, dict[str, Any], Rates]:
    """Selector, validated options and rates of a rule or an override."""
    options = _options(method)
    _known_keys(document, at, content, ("method", "overrides", *SELECTORS, *RATES, *options))
    given = {k: content[k] for k in (*SELECTORS, *RATES) if k in content}
    try:
        selector, rates = Selector.parse(given), Rates.parse(given)
    except SpecError as error:
        key = next((k for k in given if error.message.startswith(f"{k} ")), None)
        where = document.where((*at, key) if key else at)
        raise SpecError(error.message, where=where, remedy=error.remedy) from None
    found = _validated(document, at, method, {k: v for k, v in content.items() if k in options})
    return selector, found, rates


def _known_keys(
    document: Document, at: Path_, content: Mapping[str, Any], known: tuple[str, ...]
) -> None:
    for key in content:
        if key not in known:
            raise SpecError(
                f"unknown key {key!r}",
                where=document.where((*at, str(key))),
                remedy=nearest(str(key), known),
            )


def _make(document: Document, at: Path_, method: type[Method], options: dict[str, Any]) -> Method:
    try:
        return method(**options)
    except SpecError as error:
        key = next((k for k in options if error.message.startswith(k)), None)
        where = document.where((*at, key) if key else at)
        raise SpecError(error.message, where=where, remedy=error.remedy) from None


@functools.cache
def model_of(method: type[Method]) -> Any:
    """The pydantic model of a method's options."""
    import pydantic

    hints = typing.get_type_hints(method)
    fields: dict[str, Any] = {
        f.name: (
            hints[f.name],
            pydantic.Field(default=f.default, description=f.metadata.get("doc")),
        )
        for f in dataclasses.fields(method)
    }
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic.create_model(method.__name__, __config__=config, **fields)


def _validated(
    document: Document, at: Path_, method: type[Method], options: dict[str, Any]
) -> dict[str, Any]:
    import pydantic

    # strict JSON mode takes a list where a tuple is declared, and nothing else that differs
    try:
        text = json.dumps(options)
    except (TypeError, ValueError):
        raise SpecError("an option is not a plain value", where=document.where(at)) from None
    try:
        made = model_of(method).model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        raise SpecError(
            f"{key} is {options.get(key)!r}: {first['msg']}",
            where=document.where((*at, key)),
            remedy=f"see `peftfx schema` for the options of {method.name}",
        ) from None
    return {k: getattr(made, k) for k in options}
