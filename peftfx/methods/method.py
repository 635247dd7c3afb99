"""What a method is: its options, its tensors, its reference math and how it merges.

A method is a frozen dataclass whose fields are the options that a spec may set. Everything else
about it is stated by the members of :class:`Method`; no pass and no other module knows a method by
name. What a method has to state: ``params``, and ``apply`` or ``merge``. The rest has defaults.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from peftfx.errors import MergeError, PlanError, SpecError, nearest
from peftfx.methods.peft import PeftForm
from peftfx.site import OUTPUT, Site

Acts = Literal["output", "input", "weight", "parameter", "attention", "tokens"]
RANKS = "call.ranks"  # in `p`, of a method that is positional: int64 [2, B, S], see peftfx.places
OF_BASE = "base."  # what precedes the names of base parameters that a method reads
Tensors = Mapping[str, Tensor]


def option(text: str, default: Any) -> Any:
    """A field of a method: an option of specs, with its description and default."""
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True)
class Param:
    """A tensor that a method asks for at a site: its shape and how it is filled, in place.

    Attributes:
        trains: False for what is kept and saved with the adapter, and gets no gradient.
        dtype: None is that of the adapter's tensors.
        shared: placements of one rule that have equal options and say the same here hold one
            tensor between them.
        valid: whether loaded values are possible; they come from a file.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], object]
    trains: bool = True
    dtype: torch.dtype | None = None
    shared: str | None = None
    valid: Callable[[Tensor], bool] = lambda value: True


class Calibration(Protocol):
    """Chooses a method's tensors at one site from a short run on data (``peftfx.calibrate``)."""

    sees: Literal["input", "gradient"]

    def see(self, value: Tensor) -> None:
        """One batch: the input of the site's module, or the gradient of the site's parameter."""
        ...

    def fill(self, p: Tensors) -> None:
        """Sets the site's tensors, in place."""
        ...


@dataclass(frozen=True)
class Call:
    """What :meth:`Method.apply` may know of the call: only what the graph may bake in.

    ``weight`` is the site's parameter with what the graph knows of it: kind, shape and attrs.
    Shapes of activations need not be known. ``seed`` is an int64 tensor of shape ``[]`` where
    :meth:`Method.draws` said that the method needs randomness, else None. Sites that share a seed
    differ in ``site``, a small ordinal. ``given`` are inputs of the module beside the first, by
    name (see :attr:`Site.inputs`), or what other modules gave (see ``gathers``).
    """

    weight: Site
    training: bool
    seed: Tensor | None = None
    site: int = 0
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the site."""
        return self.weight.kind

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The static arguments of the site's module."""
        return self.weight.attrs


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen keyword-only dataclasses.

    Class variables:
        name: as written in a spec.
        acts: where the mark sits. ``output``: after the site's module, :meth:`apply` gets its
            result ``y`` and input ``x`` and gives the new result. ``input``: before the module,
            ``y`` is None and the new input is given. ``weight``: where the weight is read,
            :meth:`merge` gives the one to use instead. ``parameter``: the parameter itself is
            trained, there is no mark. ``tokens``: after the embedding of the token ids, whose
            sequence the model's ``forward`` has made longer by ``length``. ``attention``: at an
            attention call; this is not local, its eager kernel refuses.
        kinds: the site kinds it acts at (see :class:`peftfx.site.Site`).
        baked: options that :meth:`apply` reads. They are part of a mark's key, and two adapters
            that differ only in other options share their compiled graph.
        reads: what :meth:`apply` needs of the base: ``weight``, ``bias``; where the module has
            them, they are in ``p``, as ``base.weight`` and ``base.bias``.
        gathers: the sites of a rule act as one, at modules' outputs: all but the last hand theirs
            on as they are, and the last has the tensors. Its :meth:`apply` finds what the others
            gave in ``call.given``, in their order and cut off from the base's gradients; where a
            site stands among them is its ``rung``.
        peft: how HF PEFT writes the method, None where PEFT does not have it.
        example: selectors and options of a rule that shows the method on a Llama.
    """

    name: ClassVar[str]
    acts: ClassVar[Acts] = "output"
    kinds: ClassVar[tuple[str, ...]] = ()
    baked: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    gathers: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    peft: ClassVar[PeftForm | None] = None
    example: ClassVar[Mapping[str, Any]] = {"name": "*_proj"}

    # -- where and with what ---------------------------------------------------------------------

    def accepts(self, site: Site) -> str | None:
        """None if the method can act at *site*, else the reason why not."""
        if site.kind not in self.kinds:
            return f"{self.name} acts at {', '.join(self.kinds)}, this is {site.kind}"
        if site.kind != OUTPUT and not site.is_weight:
            return f"{self.name} acts at a module's weight, this is its {site.parameter}"
        return None

    def acts_at(self, site: Site) -> Acts:
        """Where the mark of *site* belongs, if nothing speaks against it."""
        return "weight" if site.kind == "parameter" and self.acts == "output" else self.acts

    def over(self, sites: Sequence[Site]) -> Method:
        """The method with what it takes from all the sites that it acts at by one rule."""
        return self

    def check(self, site: Site) -> None:
        """Raises :class:`PlanError` where options and shapes do not fit; nothing exists yet."""
        return None

    def params(self, site: Site) -> dict[str, Param]:
        """The tensors that make the adapter at *site*: what is trained, saved and loaded."""
        return {}

    def buffers(self, site: Site) -> dict[str, Tensor]:
        """Constant tensors at *site*, made anew from options which are not baked."""
        return {}

    def start(self, w: Tensor, p: Tensors, site: Site) -> None:
        """Sets, in place, what depends on the base parameter *w*; ``p`` is filled otherwise."""
        return None

    def finished(self) -> Method:
        """The method without what only makes its tensors, as a finished training leaves it."""
        return self

    def finish(self, p: Tensors, site: Site) -> Tensors:
        """The tensors of :meth:`finished`, of those of this method."""
        return p

    def calibration(self, site: Site) -> Calibration | None:
        """What chooses tensors at *site* from data, where the options ask for that."""
        return None

    def positional(self) -> bool:
        """Whether :meth:`apply` asks which tokens are which: ``p`` then has :data:`RANKS`."""
        return False

    # -- its math --------------------------------------------------------------------------------

    def draws(self, training: bool) -> bool:
        """Whether :meth:`apply` needs a seed."""
        return False

    def apply(self, y: Tensor | None, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor:
        """The reference math, in plain torch functions, traceable with proxies for tensors.

        ``p`` holds the site's tensors, buffers and what ``reads`` names. They may have another
        dtype than the activations: the result has that of ``y`` (of ``x`` where ``y`` is None).
        """
        raise PlanError(f"method {self.name!r} has no local form")

    def front(self, p: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Keys ``[N, P, D]`` and values that an attention call sees in front of its own.

        The form of methods that act there; traceable with proxies, as :meth:`apply` is.
        """
        raise PlanError(f"method {self.name!r} does not act at attention calls")

    def opened(self, x: Tensor, p: Mapping[str, Tensor], call: Call) -> Tensor | None:
        """How far its front is let through: ``[B, S, 1]`` by query, or ``[B, 1, 1]``.

        Keys and values are multiplied by it; None is wholly. ``x`` is what queries are made of.
        """
        return None

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
        """One method with tensors that acts as the weighted sum of *parts* do.

        The tensors of each part have the site's base parameter beside them, as ``base``.
        """
        raise MergeError(f"adapters of method {self.name!r} cannot be mixed", site=site.name)

    # -- in training -----------------------------------------------------------------------------

    def lr_ratio(self, name: str) -> float:
        """What the learning rate of the tensor *name* is multiplied by."""
        return 1.0

    def penalty(self, sites: Sequence[tuple[Site, Tensors]]) -> Tensor | None:
        """What the rule adds to the loss, given the tensors of all its sites; None for nothing."""
        return None

    def advance(
        self, step: int, sites: Sequence[tuple[Site, Tensors]], memory: dict[str, Tensor]
    ) -> None:
        """After optimizer step *step* (the first is 1): changes tensors in place, by a schedule.

        Gradients are still there. *memory* is the rule's own; ``peftfx.Schedule`` keeps it.
        """
        return None

    # -- the key of a mark ---------------------------------------------------------------------

    def reads_at(self, site: Site) -> tuple[str, ...]:
        """What :attr:`reads` names of the module at *site*, as ``p`` has it."""
        return tuple(OF_BASE + n for n in self.reads if n == "weight" or site.bias is not None)

    def key(self, site: Site, acts: Acts | None = None, strict: bool = False) -> str:
        """Everything of the method that a graph bakes in, as a string that guards can compare.

        It holds nothing of the site's name: instances of one class share their graph.
        """
        content: dict[str, Any] = {
            "method": self.name,
            "acts": acts or self.acts_at(site),
            "kind": site.kind,
            "shape": list(site.shape),
            "names": [
                *self.params(site), *self.buffers(site), *self.reads_at(site),
                *([RANKS] if self.positional() else []),
            ],
        }  # fmt: skip
        options = {n: getattr(self, n) for n in self.baked}
        optional = {"options": options, "attrs": dict(site.attrs), "strict": strict}
        content |= {name: value for name, value in optional.items() if value}
        return json.dumps(content, separators=(",", ":"))


# -- the table of methods ------------------------------------------------------------------------

_TABLE: dict[str, str | type[Method]] = {
    "lora": "peftfx.methods.lora:LoRA",
    "dora": "peftfx.methods.dora:DoRA",
    "adalora": "peftfx.methods.adalora:AdaLoRA",
    "vera": "peftfx.methods.vera:VeRA",
    "loha": "peftfx.methods.loha:LoHa",
    "lokr": "peftfx.methods.lokr:LoKr",
    "ia3": "peftfx.methods.ia3:IA3",
    "oft": "peftfx.methods.oft:OFT",
    "hra": "peftfx.methods.hra:HRA",
    "norm": "peftfx.methods.norm:Norm",
    "tokens": "peftfx.methods.tokens:Tokens",
    "sparse": "peftfx.methods.sparse:Sparse",
    "said": "peftfx.methods.said:Said",
    "bottleneck": "peftfx.methods.bottleneck:Bottleneck",
    "compacter": "peftfx.methods.compacter:Compacter",
    "reft": "peftfx.methods.reft:ReFT",
    "fusion": "peftfx.methods.fusion:Fusion",
    "ladder": "peftfx.methods.ladder:Ladder",
    "bitfit": "peftfx.methods.bitfit:BitFit",
    "train": "peftfx.methods.train:Train",
    "freeze": "peftfx.methods.freeze:Freeze",
    "prompt": "peftfx.methods.prompt:Prompt",
    "ptuning": "peftfx.methods.ptuning:PTuning",
    "prefix": "peftfx.methods.prefix:Prefix",
}


def register(method: type[Method]) -> type[Method]:
    """Adds a method to the table; usable as a decorator. A name can be taken only once."""
    known = _TABLE.get(method.name)
    if known is not None and known is not method:
        raise SpecError(f"a method named {method.name!r} exists already")
    if not dataclasses.is_dataclass(method):
        raise SpecError(f"method {method.name!r} is not a dataclass")
    taken = method.acts != "parameter" and hasattr(torch.nn.Module(), method.name)
    if taken or not method.name.isidentifier():
        raise SpecError(f"{method.name!r} cannot name the module that holds a method's tensors")
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
