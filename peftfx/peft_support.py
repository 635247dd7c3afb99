"""What HF PEFT's files can say of a spec, and what is read of its configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

from peftfx.methods.method import lookup, names
from peftfx.methods.peft_prompt import PromptForm
from peftfx.peft_config import COMMON, HARMLESS


def said() -> dict[str, dict[str, Any]]:
    """By method: PEFT's type, the kinds of sites, and what it calls each option, None for nothing.

    An option without a name there is kept in peftfx.json, which PEFT does not read.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names():
        method = lookup(name)
        form = method.peft
        if form is None:
            found[name] = {"type": None, "kinds": [], "options": {}}
            continue
        called = form.said
        found[name] = {
            "type": form.type or f"beside others: {form.beside}",
            "kinds": list(form.kinds),
            "options": {f.name: called.get(f.name) for f in dataclasses.fields(method)},
        }
    return found


def read() -> dict[str, dict[str, list[str]]]:
    """By PEFT's type: options that are read, and those that are passed over, being of training.

    Any other is refused where it has a value, for it would change what is computed.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in names():
        form = lookup(name).peft
        if form is None or not form.type or isinstance(form, PromptForm):
            continue
        patterns = {pattern for _, pattern in form.varied.values()}
        options = {*COMMON, *form.options, *form.varied, *patterns, *form.fixed, *form.special}
        told = found.setdefault(form.type, {"read": [], "passed over": []})
        told["read"] = sorted({*told["read"], *options, *form.takes})
        told["passed over"] = sorted({*told["passed over"], *form.ignored, *HARMLESS} - options)
    return found
