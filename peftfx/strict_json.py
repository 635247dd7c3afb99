"""JSON that a file from elsewhere may hold: no key twice, and no more values than are asked for."""

from __future__ import annotations

import json
from typing import Any


def parse(data: bytes, most: int) -> Any:
    """The value in *data*.

    Args:
        most: values that it may hold. They are counted before any is made, by the marks that are
            between them: a hostile text of some megabytes makes gigabytes of empty lists.

    Raises:
        ValueError: no JSON, a key that stands twice, too many values or too deep, half a character.
    """
    marks = sum(data.count(mark) for mark in (b",", b"[", b"{")) + data.count(b'"') // 2
    if marks > most:
        raise ValueError(f"it holds more than {most} values")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs)
        if b"\\u" in data:  # a half of a pair would fail wherever it is written or matched
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("a string in it has half a character") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found
