"""The key ``rows`` of a rule: which output features of a weight it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from peftfx.errors import SpecError, nearest
from peftfx.methods.part import KINDS
from peftfx.select import ROLES
from peftfx.site import Site

DOC = (
    "Output features that are adapted, of a fused weight: 0-31, [0-31, 64-95], or what they are "
    "for: query, [query, value]."
)
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
NAMES = tuple(sorted({*ROLES, *(role.rpartition(".")[2] for role in ROLES)}))


@dataclass(frozen=True)
class Rows:
    """Ranges as a spec file has them, both ends included, and names; all rows without any."""

    said: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: Any) -> Rows:
        """The rows in the key of a rule. Errors begin with the key's name."""
        if value is None:
            return cls()
        values = value if isinstance(value, (list, tuple)) else [value]
        said = tuple(str(v) for v in values if isinstance(v, (str, int)) and v is not True)
        if not said or len(said) < len(values):
            raise SpecError(f"rows is {value!r}", remedy="write 0-31, [0-31, 64-95] or query")
        for text in said:
            found = _RANGE.fullmatch(text)
            if found is None and text not in NAMES:
                raise SpecError(f"rows {text!r} are not known", remedy=nearest(text, NAMES))
            if found is not None and found[2] is not None and int(found[2]) < int(found[1]):
                raise SpecError(f"rows {text!r} end before they begin", remedy="write 0-31")
        return cls(said)

    def to_dict(self) -> dict[str, Any]:
        """The key as a spec file has it."""
        if not self.said:
            return {}
        return {"rows": self.said[0] if len(self.said) == 1 else list(self.said)}

    @property
    def named(self) -> bool:
        """Whether it takes the model to say which rows they are."""
        return any(_RANGE.fullmatch(text) is None for text in self.said)

    def of(self, site: Site) -> Site | str:
        """The part of *site* that is taken, or the reason why there is none."""
        if not self.said:
            return site
        if site.kind not in KINDS or not site.is_weight:
            return f"rows are those of a matrix, this is the {site.parameter} of a {site.kind}"
        width = site.out_features
        ranges: list[tuple[int, int]] = []
        for text in self.said:
            more = list(_ranges(text, site))
            if not more:
                known = ", ".join(sorted(site.rows)) or "none of its rows"
                return f"which of its rows are {text} is not known; by the model's run: {known}"
            ranges += more
        ranges.sort()
        if any(a[1] > b[0] for a, b in pairwise(ranges)):
            return f"rows {', '.join(self.said)} overlap"
        if ranges[-1][1] > width:
            return f"there are {width} rows, and {ranges[-1][1] - 1} is asked for"
        taken = sum(stop - start for start, stop in ranges)
        if taken == width:
            return site
        shape = list(site.shape)
        shape[site.axes[0]] = taken
        attrs = {**site.attrs, "part": tuple(ranges), "width": width}
        return replace(site, shape=tuple(shape), attrs=attrs)


def _ranges(text: str, site: Site) -> Iterator[tuple[int, int]]:
    """The half-open ranges that a text means at *site*."""
    found = _RANGE.fullmatch(text)
    if found is not None:
        yield int(found[1]), int(found[2] or found[1]) + 1
    for name, ranges in site.rows.items():
        if text in (name, name.rpartition(".")[2]):
            yield from ranges


ALL = Rows()
