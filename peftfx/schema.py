"""The JSON Schema (draft 7) of spec files, from the methods' own options."""

from __future__ import annotations

from typing import Any

from peftfx.methods.method import lookup, names
from peftfx.rates import DOCS, KEYS
from peftfx.rows import DOC as ROWS
from peftfx.rows import NAMES as PARTS
from peftfx.select import ROLES
from peftfx.site import KINDS, STACKS
from peftfx.spec import DTYPES, VERSION, model_of

_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _choice(values: tuple[str, ...]) -> dict[str, Any]:
    one = {"enum": list(values)}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _selectors() -> dict[str, Any]:
    return {
        "name": {**_TEXTS, "description": "Globs over names of modules and parameters."},
        "role": {**_choice(ROLES), "description": "What a site is for, found by dataflow."},
        "kind": {**_choice(KINDS), "description": "Kind of the module that owns the site."},
        "layers": {
            "description": "0-5, [0, 2, 4], `last 4`, `first 2` or `every 2`.",
            "anyOf": [
                {"type": "string", "pattern": r"^(\d+(-\d+)?|(last|first|every) [1-9]\d*)$"},
                {"type": "integer", "minimum": 0},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ],
        },
        "stack": {**_choice(STACKS), "description": "Which stack, where a model has several."},
        "except": {**_TEXTS, "description": "Globs over names to leave out."},
    }


def _rates() -> dict[str, Any]:
    most = {"layer_decay": {"maximum": 1}}
    return {
        key: {"type": "number", "minimum": 0, **most.get(key, {}), "description": DOCS[key]}
        for key in KEYS
    }


def _rows() -> dict[str, Any]:
    one = {"anyOf": [{"type": "string", "pattern": r"^\d{1,9}(-\d{1,9})?$"}, {"enum": [*PARTS]}]}
    several = {"type": "array", "items": one, "minItems": 1}
    return {"description": ROWS, "anyOf": [*one["anyOf"], several]}


def _rule(name: str) -> dict[str, Any]:
    """One form of a rule: that of a method."""
    method = lookup(name)
    doc = (method.__doc__ or "").strip().splitlines()[0]
    options = model_of(method).model_json_schema().get("properties", {})
    keys = {**_selectors(), **_rates(), **options}
    overrides = {
        "description": "Other values for some of the same sites; selectors say for which.",
        "type": "array",
        "items": {"type": "object", "properties": keys, "additionalProperties": False},
    }
    return {
        "type": "object",
        "title": name,
        "description": doc,
        "properties": {
            "method": {"const": name, "description": doc},
            **keys,
            "rows": _rows(),
            "overrides": overrides,
        },
        "required": ["method"],
        "additionalProperties": False,
    }


def schema() -> dict[str, Any]:
    """The schema of a spec file; each method is one form of a rule."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "peftfx spec",
        "type": "object",
        "properties": {
            "version": {
                "const": VERSION,
                "default": VERSION,
                "description": "Version of the form of spec files.",
            },
            "strict": {
                "type": "boolean",
                "default": False,
                "description": "Refuse every run that goes around the backend.",
            },
            "dtype": {
                "enum": list(DTYPES),
                "default": "float32",
                "description": "Of adapter tensors: float32 at least, or the base's.",
            },
            "rules": {
                "description": "Every rule that matches acts; what no rule names is frozen.",
                "type": "array",
                "items": {"anyOf": [_rule(name) for name in names()]},
                "minItems": 1,
            },
        },
        "required": ["rules"],
        "additionalProperties": False,
    }
