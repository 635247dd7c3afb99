"""The schema of spec files, as editors read it, and first specs for models."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import peftfx
from peftfx.drafting import WIDTH, draft
from peftfx.errors import PlanError
from peftfx.methods.method import lookup, names
from peftfx.schema import schema
from peftfx.spec import Spec
from tests.architectures import by_name

SCHEMA = schema()
LATER = {  # than draft 7: yaml-language-server would pass over them
    "$defs", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$vocabulary",
    "prefixItems", "unevaluatedItems", "unevaluatedProperties", "dependentRequired",
    "dependentSchemas", "minContains", "maxContains",
}  # fmt: skip


def parts(content: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of the schema that is a schema itself."""
    if isinstance(content, dict):
        yield at, content
        for key, value in content.items():
            inside = value.items() if key == "properties" else [(key, value)]
            for name, part in inside if key not in ("default", "enum", "const") else ():
                yield from parts(part, f"{at}/{name}")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            yield from parts(part, f"{at}/{number}")


def test_draft_7_and_nothing_later() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    for at, part in parts(SCHEMA):
        assert not LATER & set(part), at
        assert part.get("items") is None or isinstance(part["items"], dict), (
            at
        )  # a list is no tuple


def test_every_property_says_what_it_is() -> None:
    for at, part in parts(SCHEMA):
        for name, about in part.get("properties", {}).items():
            assert len(about.get("description", "")) > 8, f"{at}/{name}"
    for rule in SCHEMA["properties"]["rules"]["items"]["anyOf"]:
        method = lookup(rule["properties"]["method"]["const"])
        for field in dataclasses.fields(method):
            about = rule["properties"][field.name]
            assert json.loads(json.dumps(field.default)) == about["default"], field.name
            jsonschema.Draft7Validator(about).validate(about["default"])
            choices = [p for p in (about, *about.get("anyOf", ())) if "enum" in p or "const" in p]
            assert bool(choices) == ("Literal" in str(field.type)), field.name


def test_what_it_takes_and_what_not() -> None:
    check = jsonschema.Draft7Validator(SCHEMA)
    for name in names():
        rule = {"method": name, **lookup(name).example}
        assert check.is_valid({"version": 1, "rules": [rule]}), name
        assert not check.is_valid({"rules": [{**rule, "lyers": 2}]})
    good = {"method": "lora", "name": "*"}
    for more in ({"rows": "0-3"}, {"rows": ["query", "8-15"]}, {"layers": "last 2"}, {"lr": 0.1}):
        assert check.is_valid({"rules": [{**good, **more}]})
        Spec.parse({"rules": [{**good, **more}]})
    for more in (
        {"rows": "some"}, {"rows": []}, {"layers": "lst 2"}, {"lr": -1}, {"rank": "8"},
        {"init": "normal"}, {"kind": "lin"}, {"overrides": [{"rows": "0-3"}]},
    ):  # fmt: skip
        assert not check.is_valid({"rules": [{**good, **more}]}), more
        with pytest.raises(peftfx.PeftfxError):
            Spec.parse({"rules": [{**good, **more}]})
    assert not check.is_valid({"rules": []})


# -- first specs -----------------------------------------------------------------------------------

LLAMA, BERT = by_name("llama").build(), by_name("bert").build()


@pytest.mark.parametrize("method", names())
def test_drafts_parse_and_plan(method: str, tmp_path: Path) -> None:
    if method in ("tokens", "bitfit"):  # the example names 100 tokens; a Llama has no biases
        with pytest.raises(PlanError, match="no place"):
            draft(LLAMA, method)
        return
    text = draft(LLAMA, method)
    file = tmp_path / "spec.yaml"
    file.write_text(f"# yaml-language-server: $schema=peftfx.json\n{text}")
    spec = Spec.load(file)
    assert peftfx.plan(LLAMA, spec).trainable > 0 or method == "freeze"
    assert all(len(line) <= WIDTH for line in text.splitlines())
    for field in dataclasses.fields(lookup(method)):
        assert field.name in text and field.metadata["doc"].split()[0] in text
    said = re.sub(r"^(\s*)# (?=\w+: )(?!\s)", r"\1", text, flags=re.M)  # all that is commented out
    file.write_text(said)
    assert Spec.load(file) == spec  # they are the defaults
    jsonschema.Draft7Validator(SCHEMA).validate(spec.to_dict())


def test_a_draft_shows_the_roles() -> None:
    text = draft(BERT)
    assert re.search(r"attention\.query +4 ", text) and 'role: ["attention.query"' in text
    assert "# rank: 8" in text and "# strict: false" in text
