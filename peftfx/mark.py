"""Marks: how a model stays adapted whatever runs it.

A mark is a forward hook on the module that owns a site. It hands the site's adapter tensors to one
op, ``peftfx::site``, whose eager kernel is the method's reference math: a run that bypasses the
backend is adapted all the same, merely unfused. Only :mod:`peftfx.passes.insert` replaces the op.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peftfx import attention, dynamo
from peftfx.errors import NotAdaptedError, PlanError
from peftfx.kernels.definition import Defined
from peftfx.methods.key import decode
from peftfx.methods.method import OF_BASE, Acts, Method
from peftfx.places import Places
from peftfx.rungs import Rungs
from peftfx.sequence import State
from peftfx.site import SLOT, Site

SCHEMA = "(Tensor? y, Tensor x, Tensor[] tensors, Tensor? seed, str key, bool training) -> Tensor"

_library = torch.library.Library("peftfx", "FRAGMENT")
_library.define("site" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


class Entry(nn.Module):
    """The tensors of one method at one site, under fixed names.

    ``key`` is what a graph bakes in of the method (see :meth:`Method.key`); it is empty while the
    entry is off, so that the off state is a graph of its own, free of the adapter's nodes.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.key = ""
        self.site = site.name
        self.kind = site.kind
        self.parameter = site.parameter
        self.shift = site.bias
        self.inputs = site.inputs
        self.acts: Acts = "output"
        self.names: tuple[str, ...] = ()  # in the order of the key
        self.reads: tuple[str, ...] = ()  # of the base: weight, bias
        self.drops = False  # whether the method needs a seed when it trains
        self.method: Method | None = None
        self.state = State()  # of the call at hand, for acts `tokens`
        self.positional = False  # whether the method asks which tokens are which
        self.places = Places()  # which they are
        self.rung: tuple[int, int] | None = None  # which of how many sites that act as one
        self.rungs = Rungs()  # what they gave

    def fill(
        self,
        method: Method,
        tensors: Mapping[str, Tensor],
        kept: Container[str] = (),
        reads: tuple[str, ...] = (),
    ) -> None:
        """Puts *tensors*, made for *method*, into the entry; the objects themselves, no copies.

        Those whose names are *kept* are part of the state dict; others are made anew from options.
        """
        for name in self.names:
            delattr(self, name)
        for name, tensor in tensors.items():
            if hasattr(self, name):
                raise PlanError(
                    f"a tensor of {method.name} is named {name!r}, and marks have that for "
                    "themselves",
                    site=self.site,
                    remedy="give it another name in the method's `params`",
                )
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=name in kept)
        self.names = tuple(tensors)
        self.method = method
        self.reads = tuple(name.removeprefix(OF_BASE) for name in reads)
        self.drops = method.draws(True)
        self.positional = method.positional()

    def empty(self) -> None:
        """Takes the tensors out and switches the entry off."""
        self.key = ""
        for name in self.names:
            delattr(self, name)
        self.names = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without what the method reads of the base."""
        return {name: getattr(self, name) for name in self.names}

    def of_base(self, owner: nn.Module) -> list[Tensor]:
        """What the method reads of the base, past any mark; *owner* is the site's module."""
        found: list[Tensor] = []
        for name in self.reads:
            whole = (self.parameter, 0, 0)
            own, start, stop = (self.shift or whole) if name == "bias" else whole
            value = owner._parameters[own]
            assert value is not None
            found.append(value[start:stop] if 0 < stop - start < len(value) else value)
        return found


class Slot(nn.Module):
    """All entries of a module: a child of fixed name, :data:`peftfx.site.SLOT`."""

    def entries(self) -> Iterator[Entry]:
        for entry in self.children():
            assert isinstance(entry, Entry)
            yield entry


_NONE: Mapping[str, Tensor] = {}

# Set while a model is run to prove its marks: site names that fired are added.
_fired: ContextVar[set[str] | None] = ContextVar("peftfx_fired", default=None)


@contextmanager
def proof() -> Iterator[set[str]]:
    """Collects the names of the sites whose marks fire inside the block; nothing refuses there."""
    fired: set[str] = set()
    token = _fired.set(fired)
    try:
        yield fired
    finally:
        _fired.reset(token)


def fire(
    owner: nn.Module,
    entry: Entry,
    y: Tensor | None,
    x: Tensor,
    state: str = "",
    given: Mapping[str, Tensor] = _NONE,
) -> Tensor:
    outside = not torch.compiler.is_compiling()
    if outside:
        fired = _fired.get()
        if fired is not None:
            fired.add(entry.site)
    tensors = [getattr(entry, name) for name in entry.names]
    tensors += entry.of_base(owner)
    if entry.positional:
        assert y is not None
        tensors.append(entry.places.of(y))
    for name, value in given.items():
        tensors.append(value)
        state += f"+{name}"
    seed = None
    if entry.drops and owner.training:
        # drawn here and not in the op: a recomputed region replays it, and the op stays pure
        seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
    if outside and dynamo.transforming():
        return _plain(y, x, tensors, seed, state + entry.key, owner.training)
    return torch.ops.peftfx.site(y, x, tensors, seed, state + entry.key, owner.training)


def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    """Forward hook: methods that change the module's output. It must stay at module level."""
    slot: Any = module._modules[SLOT]
    for entry in slot._modules.values():
        if not entry.key or entry.acts not in ("output", "tokens", "attention"):
            continue
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if entry.acts == "attention" and not torch.compiler.is_dynamo_compiling():
            attention.arm(entry, x)
            continue
        state = entry.places.state if entry.positional else ""
        if entry.acts == "tokens":
            state = _STATES[entry.state.now]
        given = _given(entry, args, kwargs) if entry.inputs else _NONE
        if entry.rung is not None:
            number, of = entry.rung
            if number + 1 < of:
                entry.rungs.add(number, y[0] if type(y) is tuple else y)
                continue
            given = entry.rungs.take(number)
        if type(y) is tuple:  # an attention that gives its probabilities too
            y = (fire(module, entry, y[0], x, state, given), *y[1:])
        else:
            y = fire(module, entry, y, x, state, given)
    return y


def _given(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Tensor]:
    """The inputs of a call beside the first, by name."""
    found = {**dict(zip(entry.inputs, args[1:], strict=False)), **kwargs}
    found = {name: found[name] for name in entry.inputs if found.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise NotAdaptedError(
                f"the module is called with {name}={value!r}, which its adapter does not follow",
                site=entry.site,
                remedy=f"leave {name} out of the call, and set it in the module",
            )
    return found


_STATES = {"write": "", "skip": "skip", None: "unarmed"}


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: methods that change the module's first input."""
    slot: Any = module._modules[SLOT]
    for entry in slot._modules.values():
        if entry.key and entry.acts == "input":
            if args:
                args = (fire(module, entry, None, args[0]), *args[1:])
            else:
                name, x = next(iter(kwargs.items()))
                kwargs = {**kwargs, name: fire(module, entry, None, x)}
    return args, kwargs


# -- the op --------------------------------------------------------------------------------------


def reference(
    y: Tensor | None,
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    key: str,
    training: bool,
) -> Tensor:
    """What a mark computes: the method's own math, outside autocast (its dtypes are explicit)."""
    decoded = decode(key)
    with torch.autocast(x.device.type, enabled=False):
        out = decoded.apply(y, x, list(tensors), training=training, seed=seed)
    like = x if y is None else y
    if out.shape != like.shape or out.dtype != like.dtype:
        raise NotAdaptedError(
            f"method {decoded.method.name!r} changed {tuple(like.shape)} {like.dtype} into "
            f"{tuple(out.shape)} {out.dtype}"
        )
    return out


def _kernel(
    y: Tensor | None,
    x: Tensor,
    tensors: list[Tensor],
    seed: Tensor | None,
    key: str,
    training: bool,
) -> Tensor:
    _admit(key)
    out = reference(y, x, tensors, seed, key, training)
    like = torch.empty_like(x if y is None else y)
    if out.stride() == like.stride() and out is not y and out is not x:
        return out
    return like.copy_(out)


def _admit(key: str) -> None:
    if decode(key).strict and _fired.get() is None:
        raise NotAdaptedError(
            "the spec says `strict: true`, and this run goes around the backend: eagerly, under "
            "another backend, or in a frame that Dynamo skipped",
            remedy="compile the model with backend=peftfx.backend(spec), or drop `strict`",
        )


def _plain(
    y: Tensor | None,
    x: Tensor,
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    key: str,
    training: bool,
) -> Tensor:
    """The same in plain torch, for transforms of ``torch.func``, of which an op takes no part."""
    _admit(key)
    with Defined():
        return reference(y, x, tensors, seed, key, training)


def _fake(
    y: Tensor | None,
    x: Tensor,
    tensors: list[Tensor],
    seed: Tensor | None,
    key: str,
    training: bool,
) -> Tensor:
    return torch.empty_like(x if y is None else y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, x, tensors, seed, ctx.key, ctx.training = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(y, x, seed, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Backward of every method: recompute the reference, differentiate it.

    Where gradients of gradients are asked for (``create_graph``), all of it stays in the graph.
    """
    y, x, seed, *tensors = ctx.saved_tensors
    needs_y, needs_x, needs_t = ctx.needs_input_grad[:3]
    flags = needs_t if isinstance(needs_t, (list, tuple)) else [needs_t] * ctx.count
    again = torch.is_grad_enabled()
    with torch.enable_grad(), Defined() if again else contextlib.nullcontext():
        y_ = None if y is None else _leaf(y, needs_y, again)
        x_ = _leaf(x, needs_x, again)
        leaves = [_leaf(t, f, again) for t, f in zip(tensors, flags, strict=True)]
        out = reference(y_, x_, leaves, seed, ctx.key, ctx.training)
        wanted = [t for t in (y_, x_, *leaves) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again, allow_unused=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in (y_, x_, *leaves)]
    return grads[0], grads[1], grads[2:], None, None, None


def _leaf(t: Tensor, needs: bool, again: bool) -> Tensor:
    """What the reference is differentiated by: *t* cut off, or a view of it that stays attached."""
    if not (needs and t.is_floating_point()):
        return t.detach()
    return t.view_as(t) if again else t.detach().requires_grad_()


_library.impl("site", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("peftfx::site", _fake, lib=_library)
torch.library.register_autograd(
    "peftfx::site", _backward, setup_context=_setup_context, lib=_library
)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """Batching in a graph that another backend runs; eagerly, marks are plain torch there."""
    return torch.vmap(_plain, in_dims, randomness=info.randomness)(*args), 0


torch.library.register_vmap("peftfx::site", _vmap, lib=_library)


@functools.cache
def refuse_sharded_activations() -> None:
    """Makes marks on ``DTensor`` activations refuse by name; binding calls it.

    FSDP2's weights are whole and plain when a module runs; tensor-parallel modules hand over
    shards.
    """
    from torch.distributed.tensor import DTensor

    def refuse(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotAdaptedError(
            "the module runs on DTensors: an adapter is not split along with its weight",
            remedy="leave adapted modules out of the parallel plan, or shard with FSDP2",
        )

    torch.library.register_torch_dispatch("peftfx::site", DTensor, refuse, lib=_library)
