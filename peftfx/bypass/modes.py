"""Situations: other modes and compilers around the model, frames that Dynamo splits or skips."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.backends import Backend
from peftfx.bypass.bench import SPEC, Bench, Result, situation, values

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
