"""BitFit: train the biases, nothing else. Ben Zaken et al., 2021 (arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftfx.methods.peft import PeftForm
from peftfx.methods.train import Train
from peftfx.site import Site


@dataclass(frozen=True, kw_only=True)
class BitFit(Train):
    """Trains the biases of the modules that the selectors name."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "arXiv 2106.10199"
    peft: ClassVar[PeftForm | None] = None  # PEFT trains biases beside another method alone

    def accepts(self, site: Site) -> str | None:
        if "bias" not in site.parameter:
            return f"bitfit trains biases, this is a {site.parameter}"
        return super().accepts(site)
