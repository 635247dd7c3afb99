"""A first spec for a model: what its run shows, and a method with all that can be said of it."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peftfx.binding import unwrap
from peftfx.errors import PeftfxError, PlanError
from peftfx.methods.method import Method, lookup
from peftfx.plans import make_plan
from peftfx.rates import DOCS as RATES
from peftfx.roles import Roles
from peftfx.roles import roles as roles_of
from peftfx.rows import DOC as ROWS
from peftfx.schema import schema
from peftfx.select import SELECTORS
from peftfx.spec import Spec
from peftfx.trace import trace

WIDTH = 100


def draft(model: nn.Module, method: str = "lora", example: Any = None) -> str:
    """The text of a spec file that plans on *model*, with everything else commented out.

    Raises:
        PlanError: the method finds no place in the model.
        TraceError: there is no example, or the model fails on it.
    """
    model, chosen = unwrap(model), lookup(method)
    roles = roles_of(trace(model, example))
    rule = _first(model, chosen, roles, example)
    return "\n".join([*_head(model, roles), *_rule(chosen, rule)]) + "\n"


def _first(model: nn.Module, method: type[Method], roles: Roles, example: Any) -> Mapping[str, Any]:
    """The selectors and options of the first rule of those in question that plans."""
    options = {f.name for f in dataclasses.fields(method)}
    needed = {k: v for k, v in method.example.items() if k in options}
    refused: PeftfxError | None = None
    for selector in _selectors(method, roles):
        rule = {**selector, **needed}
        try:
            make_plan(model, Spec.parse({"rules": [{"method": method.name, **rule}]}), example)
        except PeftfxError as error:
            refused = refused or error
        else:
            return rule
    assert refused is not None
    raise PlanError(
        f"{method.name} finds no place in this {type(model).__name__}: {refused.message}",
        remedy="peftfx methods shows where each method acts",
    ) from refused


def _selectors(method: type[Method], roles: Roles) -> Iterator[dict[str, Any]]:
    shown = sorted({role for found in roles.found.values() for role in found})
    usual = [r for r in ("attention.query", "attention.value") if r in shown]
    example = {k: v for k, v in method.example.items() if k in SELECTORS}
    if example != Method.example:
        yield example
    if usual and method.acts != "parameter":
        yield {"role": usual}
    yield {"role": ["tokens"]}
    outputs = {output.role for found in roles.outputs.values() for output in found}
    for role in [*shown, *sorted(outputs)]:
        yield {"role": [role]}
    if method.kinds:
        yield {"kind": list(method.kinds)}
    yield {"name": ["*"]}


def _head(model: nn.Module, roles: Roles) -> Iterator[str]:
    count = sum(p.numel() for p in model.parameters())
    yield f"# {type(model).__name__}, {count:,} parameters. Roles that its run shows, and how many"
    yield "# parameters have each:"
    by_role: dict[str, list[str]] = {}
    for name, found in sorted(roles.found.items()):
        for role in found:
            by_role.setdefault(role, []).append(name)
    for path, outputs in sorted(roles.outputs.items()):
        for output in outputs:
            by_role.setdefault(output.role, []).append(f"{path} (its output)")
    for role, names in sorted(by_role.items()):
        line = f"#   {role:28} {len(names):5}   {names[0]}"
        yield line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    if not by_role:
        yield "#   none: select by name or kind"
    yield "version: 1"
    for key, about in schema()["properties"].items():
        if key not in ("version", "rules"):
            yield from _commented("# ", key, json.dumps(about["default"]), about["description"])
    yield "rules:"


def _rule(method: type[Method], rule: Mapping[str, Any]) -> Iterator[str]:
    doc = (method.__doc__ or "").strip().splitlines()[0]
    yield from _wrapped("  # ", doc + (f" {method.paper}." if method.paper else ""))
    yield f"  - method: {method.name}"
    docs = {f.name: f.metadata.get("doc", "") for f in dataclasses.fields(method)}
    for key, value in rule.items():
        yield from _wrapped("    #   ", docs.get(key, ""))
        yield f"    {key}: {json.dumps(value)}"
    yield f"    # Selectors, all that are given have to hold: {', '.join(SELECTORS)}."
    for field in dataclasses.fields(method):
        if field.name not in rule:
            default = json.dumps(field.default)
            yield from _commented("    # ", field.name, default, field.metadata.get("doc", ""))
    for key, about in (*RATES.items(), ("rows", ROWS)):
        yield from _wrapped("    #   ", f"{key}: {about}")


def _commented(start: str, key: str, default: str, about: str) -> Iterator[str]:
    """A key with its default, and what it means: on one line, or above it."""
    line = f"{start}{key}: {default}"
    if len(line) + len(about) + 4 <= WIDTH:
        yield f"{line:<{min(32, WIDTH - len(about) - 4)}}  # {about}"
        return
    yield from _wrapped(f"{start}  ", about)
    yield line


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start)
