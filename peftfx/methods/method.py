"""What a method is: its options, its parameters, its reference math and how it merges.

A method is a frozen dataclass whose fields are the options that a spec may set. Everything else
about it is stated by the members of :class:`Method`; no pass and no other module knows a method by
name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError, nearest
from peftfx.site import Site

Acts = Literal["output", "input", "weight", "parameter", "attention", "tokens"]


@dataclass(frozen=True)
class Param:
    """A trainable tensor that a method asks for: its shape and how it is filled, in place."""

    shape: tuple[int, ...]
    init: Callable[[Tensor], object]


@dataclass(frozen=True)
class Call:
    """What :meth:`Method.apply` may know of the call: only what the graph may bake in.

    ``seed`` is an int64 tensor of shape ``[]`` where :meth:`Method.draws` said that the method
    needs randomness, else None. Sites that share a seed differ in ``site``, a small ordinal.
    """

    kind: str
    attrs: Mapping[str, Any]
    training: bool
    seed: Tensor | None = None
    site: int = 0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen keyword-only dataclasses.

    Class variables:
        name: as written in a spec.
        acts: where the mark sits. ``output``: after the site's module, :meth:`apply` gets its
            result ``y`` and input ``x`` and gives the new result. ``input``: before the module,
            ``y`` is None and the new input is given. ``weight``: where the weight is read,
            :meth:`merge` gives the one to use instead. ``parameter``: the parameter itself is
            trained, there is no mark. ``attention`` and ``tokens``: at an attention call and at
            the token sequence; these are not local, their eager kernel refuses.
        kinds: the site kinds it acts at (see :class:`peftfx.site.Site`).
        baked: options that :meth:`apply` reads. They are part of a mark's key, and two adapters
            that differ only in other options share their compiled graph.
        reads: base parameters of the site's module that :meth:`apply` needs, by name; it finds
            them in ``p`` under the same name.
    """

    name: ClassVar[str]
    acts: ClassVar[Acts] = "output"
    kinds: ClassVar[tuple[str, ...]] = ()
    baked: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = ""

    def accepts(self, site: Site) -> str | None:
        """None if the method can act at *site*, else the reason why not."""
        if site.kind not in self.kinds:
            return f"{self.name} acts at {', '.join(self.kinds)}, this is {site.kind}"
        if site.parameter != "weight":
            return f"{self.name} acts at a module's weight, this is its {site.parameter}"
        return None

    def acts_at(self, site: Site) -> Acts:
        """Where the mark of *site* belongs, if nothing speaks against it."""
        return self.acts

    def params(self, site: Site) -> dict[str, Param]:
        """Trainable tensors at *site*. Bounds are checked here, before anything is allocated."""
        return {}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Constant tensors at *site* that depend on options which are not baked."""
        return {}

    def draws(self, training: bool) -> bool:
        """Whether :meth:`apply` needs a seed."""
        return False

    def apply(self, y: Tensor | None, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor:
        """The reference math, in plain torch functions, traceable with proxies for tensors.

        ``p`` holds the site's parameters, buffers and what ``reads`` names. They may have another
        dtype than the activations: compute in that of ``y`` (of ``x`` where ``y`` is None).
        """
        raise PlanError(f"method {self.name!r} has no local form")

    def merge(self, w: Tensor, p: Mapping[str, Tensor], site: Site) -> Tensor:
        """The merged parameter of *site*: a new tensor of the shape and dtype of ``w``."""
        raise MergeError(f"method {self.name!r} cannot be merged", site=site.name)

    def merge_bias(self, bias: Tensor | None, p: Mapping[str, Tensor], site: Site) -> Tensor | None:
        """The merged bias of the site's module; *bias* itself where the method leaves it alone."""
        return bias

    def weight_form(self, site: Site) -> str | None:
        """None if :meth:`merge` may stand in for :meth:`apply` at *site*, else the reason why not.

        Bind asks where no call of the owner can be marked, since others read its weight.
        """
        return f"{self.name} acts on what a module computes, and this module is never called"

    def mix(
        self, parts: Sequence[tuple[float, Method, Mapping[str, Tensor]]], site: Site
    ) -> tuple[Method, dict[str, Tensor]]:
        """One method with tensors that acts as the weighted sum of *parts* do."""
        raise MergeError(f"adapters of method {self.name!r} cannot be mixed", site=site.name)

    # -- the key of a mark ---------------------------------------------------------------------

    def key(self, site: Site, acts: Acts | None = None, strict: bool = False) -> str:
        """Everything of the method that a graph bakes in, as a string that guards can compare.

        It holds nothing of the site's name: instances of one class share their graph.
        """
        content: dict[str, Any] = {
            "method": self.name,
            "acts": acts or self.acts_at(site),
            "kind": site.kind,
            "names": [*self.params(site), *self.buffers(site), *self.reads],
        }
        options = {n: getattr(self, n) for n in self.baked}
        optional = {"options": options, "attrs": dict(site.attrs), "strict": strict}
        content |= {name: value for name, value in optional.items() if value}
        return json.dumps(content, separators=(",", ":"))


@dataclass(frozen=True)
class Key:
    """A decoded mark key."""

    method: Method
    acts: Acts
    kind: str
    attrs: Mapping[str, Any]
    names: tuple[str, ...]
    strict: bool

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
        """The method's math on the tensors of a mark, in the order of ``names``."""
        p = dict(zip(self.names, tensors, strict=True))
        if self.acts == "weight":
            return self.method.merge(x, p, self._weight(x))
        return self.method.apply(y, x, p, Call(self.kind, self.attrs, training, seed, site))

    def _weight(self, w: Tensor) -> Site:
        return Site("", "weight", self.kind, tuple(w.shape), w.dtype, self.attrs)


@functools.lru_cache(maxsize=4096)
def decode(key: str) -> Key:
    """The inverse of :meth:`Method.key`; options that are not baked have their defaults."""
    content = json.loads(key)
    attrs = {n: tuple(v) if isinstance(v, list) else v for n, v in content.get("attrs", {}).items()}
    return Key(
        method=lookup(content["method"])(**content.get("options", {})),
        acts=content["acts"],
        kind=content["kind"],
        attrs=attrs,
        names=tuple(content["names"]),
        strict=content.get("strict", False),
    )


# -- the table of methods ------------------------------------------------------------------------

_TABLE: dict[str, str | type[Method]] = {
    "lora": "peftfx.methods.lora:LoRA",
    "bitfit": "peftfx.methods.bitfit:BitFit",
    "train": "peftfx.methods.train:Train",
    "freeze": "peftfx.methods.freeze:Freeze",
}


def register(method: type[Method]) -> type[Method]:
    """Adds a method to the table; usable as a decorator. A name can be taken only once."""
    known = _TABLE.get(method.name)
    if known is not None and known is not method:
        raise SpecError(f"a method named {method.name!r} exists already")
    if not dataclasses.is_dataclass(method):
        raise SpecError(f"method {method.name!r} is not a dataclass")
    _TABLE[method.name] = method
    return method


def lookup(name: str) -> type[Method]:
    """The method class of that name."""
    entry = _TABLE.get(name)
    if entry is None:
        raise SpecError(f"unknown method {name!r}", remedy=nearest(name, _TABLE))
    if isinstance(entry, str):
        module, _, attr = entry.partition(":")
        entry = _TABLE[name] = getattr(importlib.import_module(module), attr)
    return entry


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_TABLE)


def float_dtype(dtype: torch.dtype, policy: str) -> torch.dtype:
    """The dtype of an adapter's tensors on a base of *dtype*: ``float32`` or ``base``."""
    if not dtype.is_floating_point:
        return torch.float32  # a quantised base
    return dtype if policy == "base" else torch.promote_types(dtype, torch.float32)
