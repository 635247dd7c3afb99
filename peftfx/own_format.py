"""peftfx's own layout of an adapter: every tensor as it is, by ``<site>:<method>.<tensor>``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from peftfx.binding import Tensors
from peftfx.plans import Placement

CONFIG, WEIGHTS = "peftfx.json", "peftfx_model.safetensors"


def keys_of(placements: Sequence[Placement]) -> list[dict[str, str]]:
    """The key of each tensor; what placements share has that of the first."""
    first: dict[tuple[object, ...], str] = {}
    return [
        {n: first.setdefault(p.holder(n), f"{p.site.name}:{p.method.name}.{n}") for n in p.params}
        for p in placements
    ]


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

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """What the file holds, of all placements' tensors by key."""
        ...

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        """The inverse of :meth:`join`."""
        ...


class Directory:
    """peftfx's own layout: every tensor as it is."""

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

    def join(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        return values

    def part(self, placements: Sequence[Placement], values: Tensors) -> Tensors:
        return values
