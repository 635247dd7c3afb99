"""Situations: copies of the model, graphs shared between models, surgery on a bound one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from peftfx.backends import Backend
from peftfx.bind import release
from peftfx.bypass.bench import LAST, SPEC, Bench, Model, Result, situation, values
from peftfx.merging import merge, unmerge
from peftfx.operations import activate, add, disabled

# -- copies --------------------------------------------------------------------------------------


@situation("deepcopy of the model compiled in place")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.compile(backend=backend, fullgraph=b.fullgraph)
    model(b.x)
    return copy.deepcopy(model)(b.x)


@situation("deepcopy, then compiled")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(copy.deepcopy(model), backend)(b.x)


@situation("pickled and back")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(pickle.loads(pickle.dumps(model)), backend)(b.x)


@situation("torch.save of the model and back")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(b.x)  # type: ignore[no-any-return]


@situation("base state dict loaded into the bound model")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.load_state_dict(b.model().state_dict())
    return b.compile(model, backend)(b.x)


@situation("converted to float64")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model.double(), backend)(b.x.double())


@situation("converted to bfloat16")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model.bfloat16(), backend)(b.x.bfloat16())


# -- graphs shared between instances, blocks and adapters ----------------------------------------


@situation("a released instance compiled first")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    compiled(b.x)
    release(model)
    b.compile(model, "eager")(b.x)
    other, again = b.bound()
    return b.compile(other, again)(b.x)


@situation("released: the base, not the adapter")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.compile(backend=backend)
    model(b.x)
    release(model)
    model._compiled_call_impl = None
    return model(b.x), b.model()(b.x).detach()


@situation("an instance with fewer sites first")
def _(b: Bench) -> Result:
    few, backend = b.bound(LAST)
    b.compile(few, backend)(b.x)
    model, other = b.bound()
    return b.compile(model, other)(b.x)


@situation("an instance with more sites first")
def _(b: Bench) -> Result:
    more, backend = b.bound()
    b.compile(more, backend)(b.x)
    model, other = b.bound(LAST)
    return b.compile(model, other)(b.x), b.expected(LAST)


@situation("each block compiled, adapter in the last one only")
def _(b: Bench) -> Result:
    model, backend = b.bound(LAST)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=b.fullgraph)
    return model(b.x), b.expected(LAST)


@situation("each block compiled")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=b.fullgraph)
    return model(b.x)


@situation("one block compiled, never bound")
def _(b: Bench) -> Result:
    model = b.model()
    model.blocks[0].compile(backend=Backend({"rules": [{"method": "lora", "name": "nothing"}]}))
    return model(b.x)


@situation("two models, one backend")
def _(b: Bench) -> Result:
    backend = Backend(SPEC, "eager")
    first, second = b.model(), b.model()
    for model, seed in ((first, 2), (second, 1)):
        backend.bind(model, (b.x,))
        values(model, seed)
    b.compile(first, backend)(b.x)
    return b.compile(second, backend)(b.x)


@situation("another spec's backend on a bound model")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return b.compile(model, Backend(LAST, "eager"))(b.x)


@situation("sites added after the first call")
def _(b: Bench) -> Result:
    model, backend = b.bound(LAST, seed=3)
    compiled = b.compile(model, backend)
    compiled(b.x)
    add(model, SPEC, "more", (b.x,))
    activate(model, "more")
    values(model, 1)
    return compiled(b.x)


@situation("another adapter and back")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    compiled(b.x)
    add(model, SPEC, "other")
    activate(model, "other")
    values(model, 5)
    compiled(b.x)
    activate(model, "default")
    return compiled(b.x)


@situation("off and on again")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with disabled(model):
        compiled(b.x)
    return compiled(b.x)


@situation("off: the base")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    compiled(b.x)
    with disabled(model):
        return compiled(b.x), b.model()(b.x).detach()


@situation("merged")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    compiled(b.x)
    merge(model)
    return compiled(b.x)


@situation("merged and unmerged")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    merge(model)
    compiled(b.x)
    unmerge(model)
    return compiled(b.x)


# -- surgery -------------------------------------------------------------------------------------


def _surgery(b: Bench, cut: Any, eager: bool = False, before: bool = True) -> Result:
    model, backend = b.bound()
    compiled = model if eager else b.compile(model, backend)
    if before:
        compiled(b.x)
    cut(model)
    return compiled(b.x)


def _replace(model: Model) -> None:
    old = model.blocks[1].up
    assert isinstance(old, nn.Linear)
    new = nn.Linear(6, 10)
    new.weight, new.bias = old.weight, old.bias
    model.blocks[1].up = new


def _unhook(model: Model) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


@situation("a module replaced after the first call")
def _(b: Bench) -> Result:
    return _surgery(b, _replace)


@situation("a module replaced before the first call")
def _(b: Bench) -> Result:
    return _surgery(b, _replace, before=False)


@situation("a module replaced, run eagerly")
def _(b: Bench) -> Result:
    return _surgery(b, _replace, eager=True)


@situation("hooks cleared after the first call")
def _(b: Bench) -> Result:
    return _surgery(b, _unhook)


@situation("hooks cleared, run eagerly")
def _(b: Bench) -> Result:
    return _surgery(b, _unhook, eager=True)


@situation("a slot deleted")
def _(b: Bench) -> Result:
    return _surgery(b, lambda m: m.blocks[0].down._modules.pop("peftfx"))


@situation("a block replaced by a bare one")
def _(b: Bench) -> Result:
    return _surgery(b, lambda m: m.blocks.__setitem__(2, type(m.blocks[2])()))


@situation("base parameters made trainable")
def _(b: Bench) -> Result:
    return _surgery(b, lambda m: m.requires_grad_(True))


@situation("strict: true, run eagerly")
def _(b: Bench) -> Result:
    model, _ = b.bound({**SPEC, "strict": True})
    return model(b.x)


@situation("strict: true, compiled")
def _(b: Bench) -> Result:
    model, backend = b.bound({**SPEC, "strict": True})
    return b.compile(model, backend)(b.x)
