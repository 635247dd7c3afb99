"""The low-rank ops as launches of kernels: by themselves, and as ops that a compiler leaves alone.

``triton_<op>`` has the schema of ``<op>`` and runs its kernels. Where a compiler can see through
launches it is given :func:`compute` under a trace instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.errors import GraphError
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.configs import Shape
from peftfx.kernels.low_rank_linear.launch import backward, forward
from peftfx.kernels.low_rank_linear.op import DEFINITIONS, SCHEMAS
from peftfx.kernels.low_rank_linear.runner import Drop, Runner

OPAQUE = "triton_"


def _add(run: Runner, y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    a, b, lora_bias, scale, *drop = rest
    ys, s = forward(
        run, x.to(y.dtype), [], [None], [a], [b], [lora_bias], [scale], Drop(*drop), base=y
    )
    return ys[0], s


def _linear(
    run: Runner, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    a, b, lora_bias, scale, *drop = rest
    ys, s = forward(run, x, [weight], [bias], [a], [b], [lora_bias], [scale], Drop(*drop))
    return ys[0], s


def _expand(
    run: Runner, x: Tensor, S: Tensor, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    biases, B, lora_biases, scales = rest
    base = None if weights else x
    ys, _ = forward(run, x, weights, biases, [], B, lora_biases, scales, base=base, S=S)
    return ys


def _backward(
    run: Runner, dy: Tensor, x: Tensor, S: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scale, seed, p, site, mask = rest
    weights = [] if weight is None else [weight]
    dx, das, dbs = backward(run, [dy], x, S, weights, [a], [b], [scale], mask, Drop(seed, p, site))
    return dx, das[0], dbs[0]


FORMS: dict[str, Callable[..., Any]] = {
    "low_rank_add": _add,
    "low_rank_linear": _linear,
    "low_rank_linear_group": forward,
    "low_rank_expand": _expand,
    "low_rank_backward": _backward,
    "low_rank_group_backward": backward,
}


def compute(name: str, args: Sequence[Any], **how: Any) -> Any:
    """Runs the kernels of op *name*, or records their launches in the trace that is going on.

    Args:
        how: what a :class:`Runner` takes beside the device.
    """
    first = tensors(args)[0]
    device = describe(first.device)
    if device is None:
        raise GraphError(f"there is no kernel of peftfx::{name} for {first.device}")
    return FORMS[name](Runner(device, **how), *args)


def tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors of a call, those in lists too."""
    flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a])]
    return [t for t in flat if isinstance(t, Tensor)]


def shape_of(name: str, args: Sequence[Any]) -> Shape:
    """The sizes of a call of op *name*."""
    where = {"low_rank_add": (1, 2, 6), "low_rank_linear": (0, 3, 7)}
    if name in where:
        x, a, seed = (args[i] for i in where[name])
        A, B = [a], [args[where[name][1] + 1]]
    elif name == "low_rank_linear_group":
        x, A, B, seed = args[0], args[3], args[4], None
    elif name == "low_rank_expand":
        x, A, B, seed = args[0], [b.t() for b in args[4]], args[4], None  # for A's ranks alone
    elif name == "low_rank_backward":
        x, A, B, seed = args[1], [args[4]], [args[5]], args[7]
    else:
        x, A, B, seed = args[1], args[4], args[5], None
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    dtype = args[0].dtype if name in ("low_rank_add", "low_rank_backward") else x.dtype
    return Shape(
        dynamo.hint(rows), int(x.shape[-1]), sum(int(b.shape[0]) for b in B),
        sum(int(a.shape[0]) for a in A), dtype, len(A), seed is not None,
    )  # fmt: skip


_library = torch.library.Library("peftfx", "FRAGMENT")


def _define(name: str) -> None:
    def launch(*args: Any) -> Any:
        with torch.cuda.device_of(tensors(args)[0]):
            return compute(name, args)

    _library.define(OPAQUE + name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(OPAQUE + name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftfx::{OPAQUE}{name}", DEFINITIONS[name], lib=_library)


for _name in FORMS:
    _define(_name)
