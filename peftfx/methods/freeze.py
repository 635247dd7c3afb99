"""Freezing, said aloud: what no rule names is frozen anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftfx.methods.method import Acts, Method
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Keeps what the selectors name frozen: a rule that would train it is then a clash."""

    name: ClassVar[str] = "freeze"
    acts: ClassVar[Acts] = "parameter"
    trains: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"name": "lm_head"}

    def accepts(self, site: Site) -> str | None:
        return None
