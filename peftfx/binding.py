"""The record of a bound model: which adapters it has, which are active, what they replaced.

A :class:`Binding` hangs on the model and goes with it through ``deepcopy`` and pickling.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from peftfx import mark, slots
from peftfx.errors import AdapterError, BindError, NotAdaptedError, nearest
from peftfx.methods.method import Acts, Method
from peftfx.methods.train import VALUE
from peftfx.plans import Placement, Plan
from peftfx.site import SLOT
from peftfx.spec import Spec

ATTRIBUTE = "_peftfx"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

SURGERY = "release the model before changing its modules, and bind it again afterwards"

Tensors = dict[str, Tensor]
# for peftfx.calibrate, or, made on the meta device, for the base's values
Waits = Literal["", "data", "values"]
Place = tuple[str, str]  # names of a site and of a method there


@dataclass
class Adapter:
    """One named adapter of a bound model.

    ``stored`` has the tensors of each placement while they are not in the model's slots.
    """

    name: str
    spec: Spec
    plan: Plan
    trainable: bool = True
    stored: list[Tensors] | None = None
    waits: Waits = ""  # what it computes means nothing yet

    def __post_init__(self) -> None:
        self.flag(self.stored or [])

    def flag(self, values: list[Tensors]) -> None:
        """Makes those of its tensors train that are to."""
        for p, tensors in zip(self.plan, values, strict=False):
            for name, param in p.params.items():
                if param.trains:
                    tensors[name].requires_grad_(self.trainable)


@dataclass
class Binding:
    """The record of a bound model. ``active`` maps adapter names to weights."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    acts: dict[Place, Acts] = field(default_factory=dict)  # where a mark really sits
    base: dict[str, nn.Parameter] = field(default_factory=dict)  # kept aside, by qualified name
    flags: dict[str, bool] = field(default_factory=dict)  # requires_grad before
    installed: list[tuple[Placement, Method]] = field(default_factory=list)
    aside: dict[str, nn.Parameter] = field(default_factory=dict)  # trained values while disabled
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)  # originals while merged
    statistics: dict[str, Tensor] = field(default_factory=dict)  # the base's, see peftfx.install
    enabled: bool = True
    fixed: bool = False  # the graph has its adapter built in: nothing can be switched
    proven: bool = False
    owned: bool = False  # the registry knows whose its tensors are, and `homes` has been filled
    homes: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict)  # of what is trained
    arrived: bool = False  # the state dict that is being loaded has the adapter

    def __getstate__(self) -> dict[str, Any]:  # a copy's tensors are others
        return {**self.__dict__, "owned": False, "homes": {}}

    def acts_of(self, placement: Placement, method: Method) -> Acts:
        """Where the mark of *method* sits at a placement."""
        where = (placement.site.name, placement.method.name)
        return self.acts.get(where) or method.acts_at(placement.site)

    @property
    def merged(self) -> bool:
        """Whether the adapters are merged into the weights."""
        return bool(self.unmerged)

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, or :class:`AdapterError`."""
        if name not in self.adapters:
            raise AdapterError(f"no adapter {name!r}", remedy=nearest(name, self.adapters))
        return self.adapters[name]


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside what ``torch.compile``, DDP or accelerate put around it."""
    if not isinstance(model, nn.Module):
        raise BindError(
            f"a {type(model).__name__} is no torch.nn.Module",  # type: ignore[unreachable]
            remedy="pass the module itself, or what torch.compile made of it",
        )
    while True:
        inner = model._modules.get("_orig_mod") or (
            model._modules.get("module") if hasattr(model, "require_backward_grad_sync") else None
        )
        if inner is None:
            return model
        model = inner


def binding_of(model: nn.Module) -> Binding | None:
    """The binding of *model*, None where it is not bound."""
    found = unwrap(model).__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Binding) else None


def bound(model: nn.Module) -> tuple[nn.Module, Binding]:
    """The plain model and its binding, or :class:`BindError`."""
    model = unwrap(model)
    binding = binding_of(model)
    if binding is None:
        raise BindError(
            f"this {type(model).__name__} is not adapted",
            remedy="call peftfx.adapt(model, spec) or backend.bind(model) first",
        )
    return model, binding


def check_name(name: str) -> None:
    """Adapter names become file and parameter names: anything else is refused."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} cannot name an adapter",
            remedy="use 1 to 64 letters, digits, '_' and '-'",
        )


def refuse_fixed(binding: Binding) -> None:
    """Raises :class:`BindError` where the adapter is built into a rewritten graph."""
    if binding.fixed:
        raise BindError(
            "this graph has its adapter built in: it cannot be switched, mixed or merged",
            remedy="do so on the model, and rewrite it again",
        )


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that qualified name, past any mark."""
    path, _, leaf = name.rpartition(".")
    try:
        found = model.get_submodule(path)._parameters.get(leaf)
    except AttributeError:
        found = None
    if found is None:
        raise BindError("the parameter is gone", site=name, remedy=SURGERY)
    return found


def entry_of(model: nn.Module, placement: Placement) -> mark.Entry:
    """The slot entry of a placement."""
    try:
        slot = model.get_submodule(placement.site.module)._modules.get(SLOT)
    except AttributeError:
        slot = None
    name = slots.entry_name(placement.site, placement.method)
    entry = slot._modules.get(name) if slot is not None else None
    if not isinstance(entry, mark.Entry):
        raise NotAdaptedError(
            "the module that carried the adapter here was replaced",
            site=placement.site.name,
            remedy=SURGERY,
        )
    return entry


def tensors_of(model: nn.Module, binding: Binding, name: str) -> list[Tensors]:
    """The tensors of an adapter, one mapping for each placement of its plan."""
    adapter = binding.adapter(name)
    if adapter.stored is not None:
        return adapter.stored
    found: list[Tensors] = []
    for p in adapter.plan:
        if not p.method.trains:
            found.append({})
        elif p.method.acts == "parameter":
            aside = binding.aside.get(p.site.name)
            live = parameter(model, p.site.name) if aside is None else aside
            found.append({VALUE: live})
        else:
            found.append(entry_of(model, p).tensors())
    return found
