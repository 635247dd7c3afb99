"""Writing specs, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfx.errors import SaveError, SpecError
from peftfx.spec_file import PARSERS


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes *content* to *path* in the format of its ending."""
    form = WRITERS.get(path.suffix.lower())
    if form is None:
        raise SpecError(
            f"the ending {path.suffix!r} names no format of specs",
            where=str(path),
            remedy="use " + ", ".join(PARSERS),
        )
    text = form(content)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise SaveError(f"the spec cannot be written: {error.strerror}", where=str(path)) from None


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _yaml(content: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(dict(content), stream)
    return stream.getvalue()


def _toml(content: Mapping[str, Any]) -> str:
    lines: list[str] = []
    _table(content, "", lines)
    return "\n".join(lines) + "\n"


def _table(content: Mapping[str, Any], name: str, lines: list[str]) -> None:
    nested = {k: v for k, v in content.items() if isinstance(v, list) and v and _is_table(v[0])}
    for key, value in content.items():
        if key not in nested:
            lines.append(f"{key} = {json.dumps(value)}")  # TOML writes these values as JSON does
    for key, tables in nested.items():
        full = f"{name}.{key}" if name else key
        for table in tables:
            lines += ["", f"[[{full}]]"]
            _table(table, full, lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


WRITERS = {".json": _json, ".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
