"""Situations: the ordinary ways to run a model, and Dynamo told to stay away."""

from __future__ import annotations

import os
from typing import Any

import torch

from peftfx.backends import Backend, adapt
from peftfx.bypass.bench import SPEC, Bench, Result, config, situation, values

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
    options: dict[str, Any] = {"spec": SPEC, "lower": "eager"}
    compiled = torch.compile(model, backend="peftfx", fullgraph=b.fullgraph, options=options)
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
    with config(disable=True):
        return compiled(b.x)


@situation("recompile limit reached")
def _(b: Bench) -> Result:
    model, backend = b.bound()
    compiled = b.compile(model, backend, dynamic=False)
    with config(recompile_limit=1):
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
    with config(suppress_errors=suppress):
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
