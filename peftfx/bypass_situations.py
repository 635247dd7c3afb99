"""The situations of the bypass table, each as small as it can be."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.backends import Backend, adapt
from peftfx.bind import release
from peftfx.bypass import LAST, SPEC, Bench, Model, situation, values
from peftfx.merging import merge, unmerge
from peftfx.operations import activate, add, disabled

Result = Tensor | tuple[Tensor, Tensor]


def _config(**patches: Any) -> Any:
    return torch._dynamo.config.patch(**patches)


# -- the ordinary ways, which must simply work ---------------------------------------------------


@situation("bound, then compiled")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model, backend)(b.x)


@situation("compiled, bound by its first call")
def _(b: Bench) -> Result:
    model = b.model()
    compiled = b.compile(model, Backend(SPEC, "eager"))
    compiled(b.x)
    values(model, 1)
    return compiled(b.x)


@situation("adapted in place")
def _(b: Bench) -> Result:
    model = adapt(b.model(), SPEC, (b.x,), lower="eager", fullgraph=b.fullgraph)
    values(model, 1)
    return model(b.x)


@situation("compiled in place by hand")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.compile(backend=backend, fullgraph=b.fullgraph)
    return model(b.x)


@situation("entry point backend='peftfx'")
def _(b: Bench) -> Result:
    model = b.model()
    compiled = torch.compile(
        model, backend="peftfx", fullgraph=b.fullgraph, options={"spec": SPEC, "lower": "eager"}
    )
    compiled(b.x)
    values(model, 1)
    return compiled(b.x)


@situation("aot_eager below")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return b.compile(model, Backend(SPEC, "aot_eager"))(b.x)


@situation("dynamic=True, two lengths")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend, dynamic=True)
    compiled(torch.randn(3, 9, 6))
    return compiled(b.x)


@situation("bound, never compiled")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return model(b.x)


@situation("bound without an example, never compiled")
def _(b: Bench) -> Result:
    model = b.model()
    Backend(SPEC, "eager").bind(model)
    values(model, 1)
    return model(b.x)


@situation("model.forward called directly")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.compile(backend=backend, fullgraph=b.fullgraph)
    return model.forward(b.x)


@situation("model.forward compiled as a method")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model.forward, backend)(b.x)


@situation("a function around the bound model")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(lambda x: model(x) * 1.0, backend)(b.x)


@situation("a function around an unbound model")
def _(b: Bench) -> Result:
    model = b.model()
    return b.compile(lambda x: model(x) * 1.0, Backend(SPEC, "eager"))(b.x)


@situation("generate() of the compiled model")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model, backend).generate(b.x)


@situation("generate() of the model compiled in place")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    model.compile(backend=backend, fullgraph=b.fullgraph)
    return model.generate(b.x)


# -- Dynamo told to stay away --------------------------------------------------------------------


def _stance(b: Bench, stance: str = "default", twice: bool = False, **options: Any) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with torch.compiler.set_stance(stance, **options):
        if twice:
            compiled(torch.randn(2, 3, 6))
        return compiled(b.x)


@situation("stance force_eager")
def _(b: Bench) -> Result:
    return _stance(b, "force_eager")


@situation("stance eager_on_recompile")
def _(b: Bench) -> Result:
    return _stance(b, "eager_on_recompile", twice=True)


@situation("stance eager_then_compile")
def _(b: Bench) -> Result:
    return _stance(b, "eager_then_compile")


@situation("stance eager_then_compile, second call")
def _(b: Bench) -> Result:
    return _stance(b, "eager_then_compile", twice=True)


@situation("stance fail_on_recompile")
def _(b: Bench) -> Result:
    return _stance(b, "fail_on_recompile", twice=True)


@situation("stance force_backend=eager")
def _(b: Bench) -> Result:
    return _stance(b, force_backend="eager")


@situation("stance force_backend=aot_eager")
def _(b: Bench) -> Result:
    return _stance(b, force_backend="aot_eager")


def _environment(b: Bench, name: str, value: str) -> Result:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        model, backend = b.bound()
        return b.compile(model, backend)(b.x)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@situation("TORCH_COMPILE_DISABLE=1")
def _(b: Bench) -> Result:
    return _environment(b, "TORCH_COMPILE_DISABLE", "1")


@situation("TORCHDYNAMO_DISABLE=1")
def _(b: Bench) -> Result:
    return _environment(b, "TORCHDYNAMO_DISABLE", "1")


@situation("TORCH_COMPILE_OVERRIDE_BACKENDS")
def _(b: Bench) -> Result:
    return _environment(b, "TORCH_COMPILE_OVERRIDE_BACKENDS", ">=0:eager")


@situation("compile(disable=True)")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return b.compile(model, backend, disable=True)(b.x)


@situation("dynamo.config.disable")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with _config(disable=True):
        return compiled(b.x)


@situation("recompile limit reached")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend, dynamic=False)
    with _config(recompile_limit=1):
        compiled(torch.randn(2, 3, 6))
        return compiled(b.x)


@situation("the tenth instance of one class")
def _(b: Bench) -> Result:
    for seed in range(2, 11):
        model, backend = b.bound(seed=seed)
        b.compile(model, backend)(b.x)
    model, backend = b.bound()
    return b.compile(model, backend)(b.x)


@situation("the tenth instance, one backend for all")
def _(b: Bench) -> Result:
    backend = Backend(SPEC, "eager")
    for seed in range(1, 11):
        model = b.model()
        backend.bind(model, (b.x,))
        values(model, 11 - seed)
        out = b.compile(model, backend)(b.x)
    return out


def _failing(b: Bench, error: Exception, suppress: bool) -> Result:
    def fails(gm: Any, inputs: Any) -> Any:
        raise error

    model, _ = b.bound()
    with _config(suppress_errors=suppress):
        return b.compile(model, Backend(SPEC, fails))(b.x)


@situation("inner compiler fails, suppress_errors")
def _(b: Bench) -> Result:
    return _failing(b, RuntimeError("no"), suppress=True)


@situation("inner compiler fails")
def _(b: Bench) -> Result:
    return _failing(b, RuntimeError("no"), suppress=False)


@situation("inner compiler raises SkipFrame")
def _(b: Bench) -> Result:
    from torch._dynamo.exc import SkipFrame

    return _failing(b, SkipFrame(), suppress=False)


@situation("inner compiler raises a fake-tensor error")
def _(b: Bench) -> Result:
    from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

    return _failing(b, UnsupportedFakeTensorException("no"), suppress=False)


# -- other modes and compilers -------------------------------------------------------------------


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@situation("under a TorchDispatchMode")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with _Dispatch():
        return compiled(b.x)


@situation("after a call under FlopCounterMode")
def _(b: Bench) -> Result:
    from torch.utils.flop_counter import FlopCounterMode

    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with FlopCounterMode(display=False):
        compiled(b.x)
    return compiled(b.x)


@situation("under a TorchFunctionMode")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with _Function():
        return compiled(b.x)


@situation("inside an outer compile with another backend")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    inner = b.compile(model, backend)
    return b.compile(lambda x: inner(x) + 0.0, "eager")(b.x)


@situation("compiled again with another backend")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    b.compile(model, backend)(b.x)
    return b.compile(model, "aot_eager")(b.x)


@situation("compiled by another backend before it was bound")
def _(b: Bench) -> Result:
    model = b.model()
    compiled = b.compile(model, "eager")
    compiled(b.x)
    Backend(SPEC, "eager").bind(model, (b.x,))
    values(model, 1)
    return compiled(b.x)


@situation("torch.export, strict")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.export.export(model, (b.x,), strict=True).module()(b.x)


@situation("torch.export, not strict")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.export.export(model, (b.x,), strict=False).module()(b.x)


@situation("torch.fx.symbolic_trace")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.fx.symbolic_trace(model)(b.x)


@situation("torch.jit.trace")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.jit.trace(model, (b.x,))(b.x)  # type: ignore[no-untyped-call]


@situation("vmap")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.vmap(model)(b.x)


@situation("compiled, inside vmap")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    return torch.vmap(b.compile(model, backend))(b.x)


@situation("func.functional_call")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.func.functional_call(model, dict(model.named_parameters()), (b.x,))


@situation("func.vjp")
def _(b: Bench) -> Result:
    model, _ = b.bound()
    return torch.func.vjp(model, b.x)[0]


@situation("autocast to bfloat16")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return b.compile(model, backend)(b.x)


@situation("inference_mode")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    with torch.inference_mode():
        return b.compile(model, backend)(b.x).clone()


@situation("no_grad, then with gradients")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    with torch.no_grad():
        compiled(b.x)
    return compiled(b.x)


# -- frames that Dynamo splits or skips ----------------------------------------------------------


def _style(b: Bench, style: str) -> Result:
    model, backend = b.bound()
    model.style = style
    return b.compile(model, backend)(b.x)


@situation("a graph break in a loop")
def _(b: Bench) -> Result:
    return _style(b, "break")


@situation("a graph break in a loop, bound by the first call")
def _(b: Bench) -> Result:
    model = b.model()
    model.style = "break"
    compiled = b.compile(model, Backend(SPEC, "eager"))
    compiled(b.x)
    values(model, 1)
    return compiled(b.x)


@situation("a graph break in a try")
def _(b: Bench) -> Result:
    return _style(b, "try")


@situation("blocks under torch.compiler.disable")
def _(b: Bench) -> Result:
    return _style(b, "disabled")


@situation("non-reentrant checkpoints")
def _(b: Bench) -> Result:
    return _style(b, "checkpoint")


@situation("reentrant checkpoints")
def _(b: Bench) -> Result:
    return _style(b, "reentrant")


@situation("in a worker thread")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend)
    out: list[Any] = []

    def work() -> None:
        try:
            out.append(compiled(b.x))
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(out[0], Exception):
        raise out[0]
    return out[0]


@situation("in a generator")
def _(b: Bench) -> Result:
    model, backend = b.bound()

    def steps(x: Tensor) -> Any:
        yield model(x)

    return next(iter(b.compile(steps, backend)(b.x)))


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
