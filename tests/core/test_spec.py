"""Specs: round trips, and errors that name file, line and what is known instead."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftfx.errors import SaveError, SpecError
from peftfx.methods import lookup, names
from peftfx.schema import schema
from peftfx.select import Globs, Selector, glob_matches
from peftfx.site import Site
from peftfx.spec import Spec

GOOD = """\
version: 1
rules:
  - method: lora
    role: [attention.query, attention.value]
    layers: 0-5
    rank: 8
    alpha: 1e-4
    dropout: 0.05
    overrides:
      - layers: last 2
        rank: 16
  - method: bitfit
    name: "*.output.dense"
  - method: train
    name: "classifier.*"
    except: "*.bias"
"""


def test_reads_what_design_shows(tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    file.write_text(GOOD)
    spec = Spec.load(file)
    lora, bitfit, train = spec.rules
    assert lora.method.alpha == 1e-4  # YAML 1.2: a number
    assert (lora.selector.layers, lora.where) == ("0-5", f"{file}:3")
    assert lora.overrides[0].selector.layers == "last 2"
    assert bitfit.method.name == "bitfit" and train.selector.except_ == ("*.bias",)
    for form in ("a.yaml", "a.toml", "a.json"):
        spec.dump(tmp_path / form)
        assert Spec.load(tmp_path / form) == spec
    assert Spec.parse(spec.to_dict()) == spec


BAD = [  # text, line, part of the message, part of the remedy
    ("rules:\n  - method: lora\n    name: q\n    rnk: 3\n", 4, "unknown key 'rnk'", "'rank'"),
    ("rules:\n  - method: lroa\n    name: q\n", 2, "unknown method 'lroa'", "'lora'"),
    ("rules:\n  - name: q\n", 2, "names its `method`", "lora"),
    ("rules:\n  - method: lora\n    name: q\n    rank: 0\n", 4, "rank is 0", "between 1"),
    ("rules:\n  - method: lora\n    name: q\n    rank: 10000000000\n", 4, "rank is", "between"),
    ("rules:\n  - method: lora\n    name: q\n    rank: true\n", 4, "rank is True", "schema"),
    ("rules:\n  - method: lora\n    name: q\n    rank: '8'\n", 4, "rank is '8'", "schema"),
    ("rules:\n  - method: lora\n    name: q\n    dropout: 1.0\n", 4, "dropout is 1.0", "[0, 1)"),
    ("rules:\n  - method: lora\n    name: q\n    alpha: 1e999\n", 4, "finite", ""),
    ("rules:\n  - method: lora\n    role: attention.quer\n", 3, "attention.quer", "query"),
    ("rules:\n  - method: lora\n    kind: linar\n", 3, "linar", "linear"),
    ("rules:\n  - method: lora\n    name: q\n    layers: 5-2\n", 4, "layers is '5-2'", "0-5"),
    ("rules:\n  - method: lora\n    name: q\n    layers: -1\n", 4, "layers is -1", "0-5"),
    ("rules:\n  - method: lora\n", 2, "says where", "name"),
    ("rules:\n  - method: lora\n    name: q\n    name: k\n", 4, "stands twice", "keep one"),
    ("rules: []\n", 1, "one at least", ""),
    ("version: 2\nrules:\n  - {method: lora, name: q}\n", 1, "version 2", "version: 1"),
    ("rules:\n  - {method: lora, name: q}\nstrct: true\n", 3, "strct", "'strict'"),
    ("strict: no\nrules:\n  - {method: lora, name: q}\n", 1, "strict is 'no'", "true"),
    ("rules: &a\n  - {method: lora, name: q}\n", 1, "anchors", ""),
    ("rules:\n  - !!python/object:os.system {}\n", 2, "tag", ""),
    ("rules:\n  - {method: lora, name: q\n", 3, "not YAML", ""),
    ("- 1\n", 1, "mapping", ""),
    ("rules:\n  - {method: lora, name: q}\n---\nrules: []\n", 3, "one document", ""),
]


@pytest.mark.parametrize(("text", "line", "message", "remedy"), BAD)
def test_bad_yaml(tmp_path: Path, text: str, line: int, message: str, remedy: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        Spec.load(file)
    error = caught.value
    assert message in error.message
    assert error.where == f"{file}:{line}"
    assert remedy in (error.remedy or "")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.toml", '[[rules]]\nmethod = "lora"\nname = "q"\nrnk = 3\n', 4),
        ("a.toml", '[[rules]]\nmethod = "lora"\nmethod = "lora"\n', 3),
        ("a.json", '{"rules": [\n {"method": "lora", "name": "q",\n  "rnk": 3}]}', 3),
        ("a.json", '{"rules": [\n {"method": "lora", "name": "q",\n  "name": "k"}]}', 3),
        ("a.json", '{"rules": [\n {"method": "lora"', 2),
        ("a.json", '{"rules": [{"method": "lora", "name": "q",\n "alpha": NaN}]}', None),
    ],
)
def test_bad_toml_and_json(tmp_path: Path, name: str, text: str, line: int | None) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        Spec.load(file)
    assert str(file) in str(caught.value.where)
    if line is not None:
        assert caught.value.where == f"{file}:{line}"


def test_bombs_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(50))
    deep = "rules: " + "[" * 3000 + "]" * 3000
    large = "rules:\n" + "#" * 2**21
    for i, text in enumerate((bomb, deep, large)):
        file = tmp_path / f"{i}.yaml"
        file.write_text(text)
        start = time.monotonic()
        with pytest.raises(SpecError):
            Spec.load(file)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["missing.yaml", "spec.txt", "."])
def test_unreadable(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError):
        Spec.load(tmp_path / name)
    with pytest.raises(SpecError):
        Spec.of(str(tmp_path / name))


def test_dump_leaves_the_old_file_whole(tmp_path: Path) -> None:
    spec = Spec.parse({"rules": [{"method": "lora", "name": "q"}]})
    with pytest.raises(SaveError):
        spec.dump(tmp_path / "no" / "such.yaml")


texts = st.text("abcdefg.*?_", min_size=1, max_size=8)
rules = st.fixed_dictionaries(
    {"method": st.just("lora"), "name": st.lists(texts, min_size=1, max_size=3)},
    optional={
        "rank": st.integers(1, 64),
        "alpha": st.floats(-1e6, 1e6, allow_nan=False),
        "dropout": st.floats(0, 0.99),
        "rank_stabilized": st.booleans(),
        "layers": st.one_of(
            st.integers(0, 40), st.just("last 2"), st.lists(st.integers(0, 9), min_size=1)
        ),
        "except": texts,
        "overrides": st.lists(
            st.fixed_dictionaries({"name": texts, "rank": st.integers(1, 9)}), max_size=2
        ),
    },
)


@given(st.lists(rules, min_size=1, max_size=3), st.booleans())
def test_round_trips(tmp_path: Path, found: list[dict[str, Any]], strict: bool) -> None:
    spec = Spec.parse({"rules": found, "strict": strict})
    for form in ("a.yaml", "a.toml", "a.json"):
        spec.dump(tmp_path / form)
        assert Spec.load(tmp_path / form) == spec
    jsonschema.Draft7Validator(schema()).validate(spec.to_dict())


@given(st.sampled_from([".yaml", ".toml", ".json"]), st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, form: str, data: bytes) -> None:
    file = tmp_path / f"spec{form}"
    file.write_bytes(data)
    with pytest.raises(SpecError):
        Spec.load(file)


def test_schema_is_draft_7_and_knows_every_method() -> None:
    made = schema()
    jsonschema.Draft7Validator.check_schema(made)
    check = jsonschema.Draft7Validator(made)
    for name in names():
        assert check.is_valid({"rules": [{"method": name, "name": "q"}]})
        assert not check.is_valid({"rules": [{"method": name, "nme": "q"}]})
    options = made["properties"]["rules"]["items"]["anyOf"][0]["properties"]
    assert options["rank"]["description"] and options["rank"]["default"] == 8


@given(st.text("ab*?[]", max_size=12), st.text("ab", max_size=12))
def test_globs_never_fail(glob: str, name: str) -> None:
    assert glob_matches(glob, name) in (True, False)


@pytest.mark.parametrize(
    ("glob", "name", "fits"),
    [
        ("*.q", "a.b.q", True), ("*.q", "q", False), ("q", "q", True), ("q*", "qkv", True),
        ("a.?.q", "a.1.q", True), ("a.[12].q", "a.2.q", True), ("a.[!12].q", "a.2.q", False),
        ("*a*a*a*a*a*a*a*a*a*b", "a" * 400, False), ("*", "", True),
    ],
)  # fmt: skip
def test_globs(glob: str, name: str, fits: bool) -> None:
    assert glob_matches(glob, name) is fits


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("0-2", [0, 1, 2]), ("last 2", [6, 7]), ("first 2", [0, 1]), ("every 3", [0, 3, 6]),
        ([1, 5], [1, 5]), (4, [4]), ("3", [3]), ("last 99", list(range(8))),
    ],
)  # fmt: skip
def test_layers(layers: Any, chosen: list[int]) -> None:
    selector = Selector.parse({"layers": layers})
    lora = lookup("lora")()
    found = [
        i
        for i in range(8)
        if selector.matches(Site(f"l.{i}", "weight", "linear", (3, 4), layer=i), lora, 8)
    ]
    assert found == chosen


WORDS = st.text(st.sampled_from("ab.*?["), max_size=8)


@given(
    st.lists(WORDS, max_size=5), st.lists(st.text(st.sampled_from("ab."), max_size=8), max_size=3)
)
def test_globs_together_are_each_of_them(globs: list[str], tried: list[str]) -> None:
    """Those that are looked up mean what they mean when they are tried one by one."""
    assert Globs(globs).match(tried) == any(glob_matches(g, n) for g in globs for n in tried)
