"""The page of errors has a section for each, and a line for each message without a remedy."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftfx import errors
from peftfx.cli.errors import section, sections
from peftfx.errors import PeftfxError, SpecError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, PeftfxError)
}
PAGE = sections()


def message(node: ast.expr) -> str:
    """The text of a message, with … for what differs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp):
        return message(node.left) + message(node.right)
    return "…"


def raised() -> Iterator[tuple[str, str, bool, str]]:
    """Every error that the sources make: class, message, whether it has a remedy, and where."""
    for top in ("peftfx", "passes", "kernels"):
        for file in sorted((ROOT / top).rglob("*.py")):
            if file.relative_to(ROOT).parts[:2] in (("peftfx", "passes"), ("peftfx", "kernels")):
                continue  # links
            for node in ast.walk(ast.parse(file.read_text())):
                name = getattr(getattr(node, "func", None), "id", None)
                if name in CLASSES and node.args:  # type: ignore[attr-defined]
                    told = {k.arg for k in node.keywords}  # type: ignore[attr-defined]
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]
                    text = message(node.args[0])  # type: ignore[attr-defined]
                    yield name, text, "remedy" in told, where


def listed(name: str) -> set[str]:
    return {
        line.strip().removeprefix("- `").removesuffix("`")
        for line in PAGE[name].splitlines()
        if line.startswith("- `")
    }


def test_every_class_has_a_section() -> None:
    assert set(PAGE) == set(CLASSES)
    for name, cls in CLASSES.items():
        outer = [b.__name__ for b in cls.__bases__ if b.__name__ != "PeftfxError"]
        assert name == "PeftfxError" or PAGE[name].startswith(f"[{outer[0]}]"), name
        assert "Remedy:" in PAGE[name] or name == "PeftfxError"


def test_every_message_has_a_remedy_or_a_line() -> None:
    found = list(raised())
    assert len(found) > 250
    missing = [(w, n, t) for n, t, remedy, w in found if not remedy and t not in listed(n)]
    assert not missing, "give it a remedy, or a line in peftfx/errors.md"
    for name in CLASSES:
        assert listed(name) <= {t for n, t, _, _ in found if n == name}, "no longer raised"


def test_help() -> None:
    assert section("BindError").startswith("BindError") and "TraceError" in section("")
    with pytest.raises(SpecError, match="no error 'BindErr'") as caught:
        section("BindErr")
    assert "BindError" in str(caught.value)
