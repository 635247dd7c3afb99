"""Norm tuning: train the normalisations, nothing else. Zhao et al., 2023 (arXiv 2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftfx.methods.peft import PeftForm
from peftfx.methods.train import VALUE, Train
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class Norm(Train):
    """Trains the scales and shifts of the normalisations that the selectors name."""

    name: ClassVar[str] = "norm"
    paper: ClassVar[str] = "arXiv 2312.11420"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LN_TUNING",
        keys={VALUE: "{module}.ln_tuning_layers.{parameter}"},
        kinds=("norm",),
        whole=True,
    )
    example: ClassVar[Mapping[str, Any]] = {"kind": "norm"}

    def accepts(self, site: Site) -> str | None:
        if site.kind != "norm":
            return f"norm trains normalisations, this is of a {site.kind}"
        return super().accepts(site)
