"""The JSON Schema (draft 7) of spec files, from the methods' own options."""

from __future__ import annotations

from typing import Any

from peftfx.methods.method import lookup, names
from peftfx.rates import DOCS, KEYS
from peftfx.select import ROLES
from peftfx.site import KINDS, STACKS
from peftfx.spec import DTYPES, VERSION, model_of

_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _choice(values: tuple[str, ...]) -> dict[str, Any]:
    one = {"enum": list(values)}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _selectors() -> dict[str, Any]:
    return {
        "name": {**_TEXTS, "description": "Globs over module and parameter names."},
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


def schema() -> dict[str, Any]:
    """The schema of a spec file; each method is one form of a rule."""
    rules = []
    for name in names():
        method = lookup(name)
        made = model_of(method).model_json_schema()
        options = made.get("properties", {})
        doc = (method.__doc__ or "").strip().splitlines()[0]
        override = {
            "type": "object",
            "properties": {**_selectors(), **_rates(), **options},
            "additionalProperties": False,
        }
        rules.append(
            {
                "type": "object",
                "description": doc,
                "properties": {
                    "method": {"const": name},
                    **_selectors(),
                    **_rates(),
                    **options,
                    "overrides": {"type": "array", "items": override},
                },
                "required": ["method"],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "peftfx spec",
        "type": "object",
        "properties": {
            "version": {"const": VERSION},
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
            "rules": {"type": "array", "items": {"anyOf": rules}, "minItems": 1},
        },
        "required": ["rules"],
        "additionalProperties": False,
    }
