"""Keys of marks, read: what a graph bakes in of a method, and its math on the tensors of a mark."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftfx.errors import NotAdaptedError
from peftfx.methods import part
from peftfx.methods.method import Acts, Call, Method, lookup
from peftfx.site import Site


@dataclass(frozen=True)
class Key:
    """A decoded mark key."""

    method: Method
    acts: Acts
    weight: Site
    names: tuple[str, ...]
    strict: bool
    state: str = ""  # of the call at hand, see peftfx.sequence and peftfx.places
    given: tuple[str, ...] = ()  # inputs of the call beside the first

    def apply(
        self,
        y: Tensor | None,
        x: Tensor,
        tensors: Sequence[Tensor],
        *,
        training: bool,
        seed: Tensor | None,
        site: int = 0,
    ) -> Tensor:
        """The method's math on the tensors of a mark, in the order of ``names`` and ``given``."""
        if self.state == "unarmed":
            raise NotAdaptedError(
                f"{self.method.name} acts on the whole model's sequence, and this is a part of the "
                "model called by itself",
                remedy="call the model, or its forward",
            )
        if self.state == "skip":
            assert y is not None
            return y
        if self.acts == "attention":
            raise NotAdaptedError(
                f"{self.method.name} acts at the attention call behind this module, and the graph "
                "was not compiled by peftfx",
                remedy="compile the model with backend=peftfx.backend(spec), or run it eagerly",
            )
        values = dict(zip((*self.names, *self.given), tensors, strict=True))
        given = {name: values.pop(name) for name in self.given}
        if self.acts == "weight":
            return part.merge(self.method, x, values, self.weight)
        call = Call(self.weight, training, seed, site, given)
        return part.apply(self.method, y, x, values, call)

    def front(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values in front of an attention call, and how far they are let through.

        See :meth:`Method.front` and :meth:`Method.opened`.
        """
        p, call = dict(zip(self.names, tensors, strict=True)), Call(self.weight, training=False)
        return *self.method.front(p, call), self.method.opened(x, p, call)

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the key says of the site."""
        return self.weight.attrs


@functools.lru_cache(maxsize=4096)
def decode(key: str) -> Key:
    """The inverse of :meth:`Method.key`; options that are not baked have their defaults.

    A mark puts the state of its call in front of the key, and the names of its other inputs.
    """
    call, brace, rest = key.partition("{")
    state, *given = call.split("+")
    content = json.loads(brace + rest)
    attrs = {n: tuple(v) if isinstance(v, list) else v for n, v in content.get("attrs", {}).items()}
    return Key(
        method=lookup(content["method"])(**content.get("options", {})),
        acts=content["acts"],
        weight=Site("", "weight", content["kind"], tuple(content["shape"]), attrs=attrs),
        names=tuple(content["names"]),
        strict=content.get("strict", False),
        state=state,
        given=tuple(given),
    )
