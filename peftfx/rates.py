"""Keys of every rule about how fast it trains: ``lr``, ``weight_decay``, ``layer_decay``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from peftfx.errors import SpecError
from peftfx.site import Site

DOCS = {
    "lr": "Learning rate of what the rule trains, in place of the one given.",
    "weight_decay": "Weight decay of all that the rule trains, in place of the one given.",
    "layer_decay": "The learning rate shrinks by this factor with each block below the last.",
}


@dataclass(frozen=True)
class Rates:
    """What a rule says of rates; None where it says nothing."""

    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Rates:
        """The rates among the keys of a rule. Errors begin with the key's name."""
        found: dict[str, float] = {}
        for key in (f.name for f in fields(cls)):
            value = given.get(key)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            bound = 1.0 if key == "layer_decay" else sys.float_info.max
            if not number or not 0 <= value <= bound:
                raise SpecError(
                    f"{key} is {value!r}",
                    remedy="give a number between 0 and 1"
                    if key == "layer_decay"
                    else "give a finite number of at least 0",
                )
            found[key] = float(value)
        return cls(**found)

    def over(self, other: Rates) -> Rates:
        """*other*, with what is said here in its place."""
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(other, **said)

    def to_dict(self) -> dict[str, float]:
        """The keys as a spec file has them."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def ratio(self, site: Site, depth: int) -> float:
        """What ``layer_decay`` multiplies the learning rate at *site* by.

        The last block of a stack has 1; what lies in no block has 1 too (heads, last norms), but
        for embeddings, which lie below all of a model's *depth* blocks.
        """
        if self.layer_decay is None:
            return 1.0
        if site.layer is not None and site.layers is not None:
            return float(self.layer_decay ** (site.layers - 1 - site.layer))
        return float(self.layer_decay**depth) if site.kind == "embedding" else 1.0


UNSAID = Rates()
KEYS = tuple(f.name for f in fields(Rates))
