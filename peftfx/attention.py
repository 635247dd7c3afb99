"""Attention calls: how trained keys and values come in front of a model's own.

A mark sits where queries are made. Under Dynamo it goes into the graph, and the pass ``attend``
follows it to the call that the queries go to. Without Dynamo the module that attends is a *scope*:
while it runs, a torch-function mode waits for the call, and the query's mark says what to put in
front. A scope whose queries reached no call, and a mark outside of its scope, refuse.

Positions: tokens stand behind the prefix. Where rows of a table are read by position, the table is
read from row P on; where angles are made of positions, P is added to them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfx import dynamo
from peftfx.errors import BindError, NotAdaptedError
from peftfx.hooks import hooked, unhook
from peftfx.kernels.prefix_attention import op
from peftfx.methods.key import decode
from peftfx.standing import stand_in

_SCOPE = "_peftfx_scope"
_MOVED = "_peftfx_moved"
_PLAIN = "_peftfx_plain_table"

Front = tuple[Any, Any, Any]  # keys [N, P, D], values, and a gate [B, S or 1, 1] or None


# -- one attention call ----------------------------------------------------------------------------


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``scaled_dot_product_attention`` by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def check(given: Mapping[str, Any], front: Front, attrs: Mapping[str, Any]) -> None:
    """Raises :class:`NotAdaptedError` where nothing can be put in front of a call.

    Args:
        given: :func:`operands`, with tensors, real or fake.
        attrs: what the key of the mark says of the site.
    """
    q, k, mask, keys = given["query"], given["key"], given["attn_mask"], front[0]
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] % keys.shape[0] or k.shape[1] % keys.shape[0]:
        raise NotAdaptedError(
            f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not go with a prefix of "
            f"{keys.shape[0]} heads"
        )
    if mask is not None and mask.shape[-1] != k.shape[2]:
        raise NotAdaptedError(f"a mask of {mask.shape[-1]} columns over {k.shape[2]} keys")
    gate = front[2]
    if gate is not None and (gate.ndim != 3 or gate.shape[1] not in (1, q.shape[2])):
        raise NotAdaptedError(
            f"a prefix's gate {tuple(gate.shape)} does not go with queries {tuple(q.shape)}"
        )
    window = attrs.get("window")
    if window and k.shape[2] + keys.shape[1] > window:
        raise NotAdaptedError(
            f"{k.shape[2]} tokens and the prefix of {keys.shape[1]} are more than the window of "
            f"{window}, and how much of the prefix is in it is not known here",
            remedy="use shorter sequences, or leave layers with a window out of the rule",
        )


def answer(given: Mapping[str, Any], front: Front, bias: Any, width: int, why: str | None) -> Any:
    """The call's result with *front* in front. Traceable with proxies.

    Args:
        width: of a head.
        why: None for the merged form, or the reason for the joined one.
    """
    q, k, v, mask = (given[n] for n in ("query", "key", "value", "attn_mask"))
    keys, values, gate = front
    scale = given["scale"] if given["scale"] is not None else width**-0.5
    causal = bool(given["is_causal"])
    if why is not None:
        dropout = given["dropout_p"]
        return op.joined(q, k, v, keys, values, mask, bias, causal, scale, dropout, gate)
    return torch.ops.peftfx.prefix_attention.default(
        q, k, v, keys, values, mask, bias, causal, scale
    )[0]


def why_joined(given: Mapping[str, Any], front: Front) -> str | None:
    """The reason for the joined form, None where the merged one is taken; of tensors."""
    q, k, v, mask = (given[n] for n in ("query", "key", "value", "attn_mask"))
    if front[2] is not None:
        return "the prefix has a gate"
    return op.why_joined(q, k, v, mask, bool(given["is_causal"]), float(given["dropout_p"]))


# -- without Dynamo --------------------------------------------------------------------------------


@dataclass
class _Run:
    """One run of a module that attends: the marks that fired and reached no call yet."""

    mode: TorchFunctionMode
    waiting: list[tuple[Any, Tensor]] = field(default_factory=list)  # and what queries are of


class _Runs(threading.local):
    def __init__(self) -> None:
        self.open: list[_Run] = []


_runs = _Runs()


class _Attending(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = _runs.open[-1]
        if func is not F.scaled_dot_product_attention or not run.waiting:
            return func(*args, **kwargs)
        if len(run.waiting) > 1:
            raise NotAdaptedError("several queries are made before the first attention call")
        entry, x = run.waiting.pop()
        key = decode(entry.key)
        if key.attrs.get("relative"):
            raise NotAdaptedError(
                "attention here adds learned values for distances, and eagerly there is no telling "
                "which those of the prefix are",
                site=entry.site,
                remedy="compile the model with backend=peftfx.backend(spec)",
            )
        given = operands(args, kwargs)
        front = key.front(x, [getattr(entry, name) for name in entry.names])
        check(given, front, key.attrs)
        why = why_joined(given, front)
        if dynamo.transforming():
            why = "torch.func takes no part in ops"
        return answer(given, front, None, given["query"].shape[-1], why)


def arm(entry: Any, x: Tensor) -> None:
    """A mark fires without Dynamo: the next attention call of its scope is answered with it.

    Queries are made of *x* ``[B, S, K]``.
    """
    if decode(entry.key).strict:
        raise NotAdaptedError(
            "the spec says `strict: true`, and this run goes around the backend",
            site=entry.site,
            remedy="compile the model with backend=peftfx.backend(spec), or drop `strict`",
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise NotAdaptedError(
            "torch.jit.trace turns the lengths at hand into constants",
            site=entry.site,
            remedy="use torch.export",
        )
    if not _runs.open:
        raise NotAdaptedError(
            "queries are made outside of the module that attends with them",
            site=entry.site,
            remedy="call the model, not a part of its attention",
        )
    _runs.open[-1].waiting.append((entry, x))


def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a module that attends."""
    if torch.compiler.is_dynamo_compiling() or not any(e.key for e in module.__dict__[_SCOPE]):
        return
    run = _Run(_Attending())
    _runs.open.append(run)
    run.mode.__enter__()


def leave(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
    """Forward hook of a module that attends; it is called when the module fails too."""
    if torch.compiler.is_dynamo_compiling() or not any(e.key for e in module.__dict__[_SCOPE]):
        return
    run = _runs.open.pop()
    run.mode.__exit__(None, None, None)
    if run.waiting and y is not None:
        raise NotAdaptedError(
            "the queries went to no attention call that is known",
            site=run.waiting[0][0].site,
            remedy="an HF model takes attn_implementation='sdpa'",
        )


# -- positions -------------------------------------------------------------------------------------


def _length(module: nn.Module) -> int:
    """Virtual tokens that the positions which *module* reads stand behind."""
    for entry in module.__dict__[_MOVED]:
        if entry.key:
            return entry.method.length  # type: ignore[no-any-return]
    return 0


def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a module that makes angles of positions."""
    length = _length(module)
    if not length:
        return None
    given = (*args, *kwargs.values())
    if not any(_counts(a) for a in given):
        raise NotAdaptedError("the module that makes angles of positions is given none")
    return tuple(a + length if _counts(a) else a for a in args), {
        name: a + length if _counts(a) else a for name, a in kwargs.items()
    }


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _rows(module: nn.Module) -> Tensor:
    table: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    length = _length(module)
    return table[length:] if length else table


@functools.cache
def _moving(cls: Any) -> type[nn.Module]:
    """A subclass of *cls*, a table that is read by position, which is read from row P on."""
    return stand_in(cls, _moving, weight=property(_rows), **{_PLAIN: cls})


# -- setting up ------------------------------------------------------------------------------------


def scope(model: nn.Module, entry: Any, around: Mapping[str, Any]) -> None:
    """Sets up what the mark of *entry* needs beside it; ``around`` is :attr:`Site.around`."""
    owner = model.get_submodule(around["scope"])
    if _note(owner, _SCOPE, entry):
        owner.register_forward_pre_hook(enter, with_kwargs=True)
        owner.register_forward_hook(leave, with_kwargs=True, always_call=True)
    for path, kind in around["positions"]:
        module = model.get_submodule(path)
        first = _note(module, _MOVED, entry)
        if first and kind == "rotary":
            module.register_forward_pre_hook(move, with_kwargs=True)
        elif first:
            if hasattr(type(module), _PLAIN):
                raise BindError("the table of positions is adapted already", site=path)
            table: Any = type(module)
            module.__class__ = _moving(table)


def _note(module: nn.Module, name: str, entry: Any) -> bool:
    """Adds *entry* to those of *module*; True for the first."""
    entries = module.__dict__.setdefault(name, [])
    if not any(e is entry for e in entries):
        entries.append(entry)
    return len(entries) == 1


def scoped(model: nn.Module, around: Mapping[str, Any]) -> bool:
    """Whether what :func:`scope` did is still in place."""
    owner = model.get_submodule(around["scope"])
    if not (hooked(owner, enter) and hooked(owner, leave)):
        return False
    moved = [(model.get_submodule(path), kind) for path, kind in around["positions"]]
    return all(
        hooked(m, move) if kind == "rotary" else hasattr(type(m), _PLAIN) for m, kind in moved
    )


def tidy(model: nn.Module) -> None:
    """Takes off what :func:`scope` did for entries that are not in the model any more."""
    alive = {id(m) for m in model.modules()}
    for module in model.modules():
        for name in (_SCOPE, _MOVED):
            entries = module.__dict__.get(name)
            if entries is None:
                continue
            entries[:] = [e for e in entries if id(e) in alive]
            if not entries:
                del module.__dict__[name]
                _clear(module, name)


def _clear(module: nn.Module, name: str) -> None:
    unhook(module, *((move,) if name == _MOVED else (enter, leave)))
    if name == _MOVED and hasattr(type(module), _PLAIN):
        module.__class__ = getattr(type(module), _PLAIN)
