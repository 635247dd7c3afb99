"""Reading spec files: YAML 1.2, TOML and JSON into plain values that know their lines.

Nothing in a file is imported, evaluated or fetched. Sizes, depths and aliases are bounded before
anything is built from them.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftfx.errors import SpecError
from peftfx.files import open_regular

MAX_BYTES = 64 * 1024  # a spec is a page of text; some YAML scanners are quadratic in its size
MAX_DEPTH = 16
MAX_EVENTS = 10_000  # of YAML, two or three to a value

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The values of a file and the line of each, by its path of keys and indexes."""

    values: Mapping[str, Any]
    lines: Mapping[Path_, int]
    file: str

    def where(self, path: Path_) -> str:
        """``file:line`` of the value at *path*, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"


def read(path: str | os.PathLike[str]) -> Document:
    """The document in a file; its ending tells the format.

    Raises:
        SpecError: the file cannot be read, or is not a mapping in its format.
    """
    file = Path(path)
    parse = PARSERS.get(file.suffix.lower())
    if parse is None:
        raise SpecError(
            f"the ending {file.suffix!r} names no format of specs",
            where=str(file),
            remedy="use " + ", ".join(PARSERS),
        )
    try:
        with open_regular(file) as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(
            f"the file cannot be read: {error.strerror}", where=str(file), remedy="check the path"
        ) from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"the file is larger than {MAX_BYTES} bytes", where=str(file))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError("the file is not UTF-8 text", where=f"{file}:{line}") from None
    lines: dict[Path_, int] = {}
    values = parse(text, str(file), lines)
    if not isinstance(values, dict):
        raise SpecError("a spec is a mapping with the key `rules`", where=f"{file}:1")
    return Document(values, lines, str(file))


# -- YAML, and JSON for its lines ----------------------------------------------------------------


def _yaml(text: str, file: str, lines: dict[Path_, int]) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="safe", pure=True)
    events: list[Any] = []
    depth = 0
    try:
        for event in reader.parse(text):
            kind = type(event).__name__
            line = event.start_mark.line + 1
            if kind == "AliasEvent" or getattr(event, "anchor", None) is not None:
                raise SpecError("anchors and aliases are not allowed", where=f"{file}:{line}")
            tag = getattr(event, "tag", None)
            if tag is not None and kind != "DocumentStartEvent":
                raise SpecError(f"the tag {tag} is not allowed", where=f"{file}:{line}")
            depth += kind in ("MappingStartEvent", "SequenceStartEvent")
            depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
            if depth > MAX_DEPTH:
                raise SpecError(f"nested deeper than {MAX_DEPTH}", where=f"{file}:{line}")
            if kind == "DocumentStartEvent" and any(
                type(e).__name__ == "DocumentStartEvent" for e in events
            ):
                raise SpecError("a spec is one document", where=f"{file}:{line}")
            events.append(event)
            if len(events) > MAX_EVENTS:
                raise SpecError(
                    "the file holds too many values",
                    where=f"{file}:{line}",
                    remedy="write names as globs, or several specs",
                )
    except SpecError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1 if mark else 1}"
        raise SpecError(f"not YAML: {error.problem or error.context}", where=where) from None
    except (YAMLError, ValueError, OverflowError, TypeError, AssertionError) as error:
        raise SpecError(f"not YAML: {str(error).splitlines()[0]}", where=file) from None
    body = [e for e in events if not type(e).__name__.startswith(("Stream", "Document"))]
    if not body:
        return None
    value, _ = _build(body, 0, (), file, lines)
    return value


def _build(
    events: list[Any], at: int, path: Path_, file: str, lines: dict[Path_, int]
) -> tuple[Any, int]:
    event = events[at]
    lines.setdefault(path, event.start_mark.line + 1)
    kind = type(event).__name__
    if kind == "ScalarEvent":
        return _scalar(event, file), at + 1
    at += 1
    if kind == "SequenceStartEvent":
        items: list[Any] = []
        while type(events[at]).__name__ != "SequenceEndEvent":
            item, at = _build(events, at, (*path, len(items)), file, lines)
            items.append(item)
        return items, at + 1
    mapping: dict[str, Any] = {}
    while type(events[at]).__name__ != "MappingEndEvent":
        where = f"{file}:{events[at].start_mark.line + 1}"
        if type(events[at]).__name__ != "ScalarEvent":
            raise SpecError("a key has to be plain text", where=where)
        key = events[at].value
        if key in mapping:
            raise SpecError(f"the key {key!r} stands twice", where=where, remedy="keep one")
        lines[(*path, key)] = events[at].start_mark.line + 1
        mapping[key], at = _build(events, at + 1, (*path, key), file, lines)
    return mapping, at + 1


_INT = re.compile(r"[-+]?[0-9]{1,32}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def _scalar(event: Any, file: str) -> Any:
    """A scalar by YAML 1.2's core schema: ``no`` is text, ``1e-4`` a number."""
    text: str = event.value
    if event.style is not None:  # quoted
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return _finite(float(text), text, f"{file}:{event.start_mark.line + 1}")
    return text


def _finite(value: float, text: str, where: str) -> float:
    if not math.isfinite(value):
        raise SpecError(f"{text} is not a finite number", where=where)
    return value


def _json(text: str, file: str, lines: dict[Path_, int]) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise SpecError(f"the key {key!r} stands twice", where=file, remedy="keep one")
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise SpecError(f"{name} is not a finite number", where=file)

    try:
        values = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise SpecError(f"not JSON: {error.msg}", where=f"{file}:{error.lineno}") from None
    except SpecError:
        _yaml(text.replace("\t", "  "), file, lines)  # raises the same with the line
        raise
    except (RecursionError, ValueError) as error:
        raise SpecError(f"not JSON: {error}", where=file) from None
    _yaml(text.replace("\t", "  "), file, lines)  # JSON is YAML: this finds the lines
    return values


_DOTTED = re.compile(  # tomllib takes the square of a key's dots
    r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}"""
)


def _toml(text: str, file: str, lines: dict[Path_, int]) -> Any:
    if found := _DOTTED.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise SpecError("a name has more than 32 parts", where=f"{file}:{line}")
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        told = re.search(r"at line (\d+)", str(error))
        raise SpecError(
            f"not TOML: {error}", where=f"{file}:{told.group(1) if told else 1}"
        ) from None
    _toml_lines(text, lines)
    _check_toml(values, file, 0)
    return values


def _check_toml(value: Any, file: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise SpecError(f"nested deeper than {MAX_DEPTH}", where=file)
    if isinstance(value, float):
        _finite(value, str(value), file)
    elif isinstance(value, dict):
        for item in value.values():
            _check_toml(item, file, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_toml(item, file, depth + 1)


def _toml_lines(text: str, lines: dict[Path_, int]) -> None:
    """Lines of ``[[rules]]`` tables, their ``[[rules.overrides]]`` and the keys in them."""
    rule, override = -1, -1
    table: Path_ = ()
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*+\[\[?+([A-Za-z0-9_.\- \t]++)\]", line)
        if header:
            name = re.sub(r"\s", "", header.group(1))
            if name == "rules":
                rule, override = rule + 1, -1
                table = ("rules", rule)
            elif name == "rules.overrides":
                override += 1
                table = ("rules", rule, "overrides", override)
            else:
                table = tuple(name.split("."))
            lines[table] = number
            continue
        key = re.match(r"\s*([A-Za-z0-9_\-]+|\"[^\"]*\"|'[^']*')\s*=", line)
        if key:
            lines.setdefault((*table, key.group(1).strip("\"'")), number)


PARSERS = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}
