"""The page of errors, ``peftfx/errors.md``, by sections."""

from __future__ import annotations

import re
from pathlib import Path

from peftfx.errors import SpecError, nearest

PAGE = Path(__file__).resolve().parents[1] / "errors.md"


def sections() -> dict[str, str]:
    """The sections of the page by the error's name."""
    found = re.split(r"^## (\w+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[1::2], (text.strip() for text in found[2::2]), strict=True))


def section(error: str) -> str:
    """What the page says of *error*; the whole page if it is empty."""
    if not error:
        return PAGE.read_text(encoding="utf-8").strip()
    found = sections()
    if error not in found:
        raise SpecError(f"there is no error {error!r}", remedy=nearest(error, found))
    return f"{error}\n\n{found[error]}"
