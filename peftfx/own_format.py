"""peftfx's own adapter directories, which lose nothing.

``peftfx.json``: the spec, and a fingerprint of the base weights that the adapter was trained on; it
lies beside PEFT's files too. ``peftfx_model.safetensors``: the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from peftfx.binding import Tensors
from peftfx.plans import Placement

CONFIG, WEIGHTS = "peftfx.json", "peftfx_model.safetensors"


class Layout(Protocol):
    """How the tensors of placements lie in a file."""

    def keys_of(self, placements: Sequence[Placement]) -> list[dict[str, str]]:
        """For each placement, the key of each tensor in the file, by the tensor's name."""
        ...

    def optional(self, placements: Sequence[Placement]) -> set[str]:
        """Keys that may be missing."""
        ...

    def pack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """A placement's tensors as the file has them."""
        ...

    def unpack(self, placement: Placement, tensors: Tensors) -> Tensors:
        """The inverse of :meth:`pack`."""
        ...

    def file_keys(self, placements: Sequence[Placement]) -> set[str]:
        """The keys that the file has."""
        ...

    def of_base(self, key: str) -> str | None:
        """The parameter of the base that a key which is not expected may hold a copy of."""
        ...

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """What the file holds, of all placements' tensors by key."""
        ...

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """The inverse of :meth:`join`."""
        ...


def keys_of(placements: Sequence[Placement]) -> list[dict[str, str]]:
    """``<site>:<method>.<tensor>`` of each tensor; what placements share has that of the first."""
    first: dict[tuple[object, ...], str] = {}
    return [
        {n: first.setdefault(p.holder(n), f"{p.site.name}:{p.method.name}.{n}") for n in p.params}
        for p in placements
    ]


class Directory:
    """How tensors lie in peftfx's own weight file: every one as it is."""

    def keys_of(self, placements: Sequence[Placement]) -> list[dict[str, str]]:
        return keys_of(placements)

    def optional(self, placements: Sequence[Placement]) -> set[str]:
        return set()

    def pack(self, placement: Placement, tensors: Tensors) -> Tensors:
        return {name: tensors[name] for name in placement.params}

    def unpack(self, placement: Placement, tensors: Tensors) -> Tensors:
        return tensors

    def file_keys(self, placements: Sequence[Placement]) -> set[str]:
        return {key for names in keys_of(placements) for key in names.values()}

    def of_base(self, key: str) -> str | None:
        return None

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        return values

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        return values
