"""Host side of the kernels, and the ops that hold them where a compiler is to leave them alone.

Sizes may be symbolic; nothing here asks for their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.errors import GraphError
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.configs import Shape
from peftfx.kernels.low_rank_linear.forms import OPAQUE, tensors
from peftfx.kernels.low_rank_linear.runner import (
    Runner,
    block_r,
    cdiv,
    joined,
    precision,
)
from peftfx.kernels.shrink.op import DEFINITIONS, SCHEMAS

MOST_R = 128  # ranks of all sites, which a program holds at once


@functools.cache
def kernels() -> Any:
    """The kernels by their short names; imports Triton."""
    from peftfx.kernels.shrink import triton as made

    return SimpleNamespace(norm_shrink=made.norm_shrink_kernel, gate_shrink=made.gate_shrink_kernel)


def norm_shrink(
    run: Runner,
    x: Tensor,
    more: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    A: Sequence[Tensor],
    eps: float,
    offset: float,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op's definition."""
    rows, shape = run.matrix(x), shape_of("norm_shrink", x, A, dtype)
    lead, wide = x.shape[:-1], torch.float32
    total = x.new_empty(0 if more is None else x.shape)
    y = x.new_empty(x.shape, dtype=dtype)
    s = x.new_empty((*lead, shape.r), dtype=dtype)
    mean = x.new_empty((*lead, 1) if centred else 0, dtype=wide)
    rstd = x.new_empty((*lead, 1), dtype=wide)
    added = rows if more is None else run.matrix(more)
    grid, tile = _tile(run, "norm_shrink", rows, shape)
    run(
        kernels().norm_shrink, grid, **tile, x=rows, more=added,
        weight=_vector(weight, rows), shift=_vector(shift, rows),
        a=joined(A, dtype).to(dtype), total=total, y=y, s=s, mean=mean, rstd=rstd, R=shape.r,
        x_row=rows.stride(0), more_row=added.stride(0), eps=eps, offset=offset,
        ADDS=more is not None, CENTRED=centred, HAS_WEIGHT=weight is not None,
        HAS_SHIFT=shift is not None,
    )  # fmt: skip
    return total, y, s, mean, rstd


def gate_shrink(
    run: Runner, gate: Tensor, up: Tensor | None, A: Sequence[Tensor], act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the op's definition."""
    rows, shape = run.matrix(gate), shape_of("gate_shrink", gate, A, dtype)
    other = rows if up is None else run.matrix(up)
    y = gate.new_empty(gate.shape, dtype=dtype)
    s = gate.new_empty((*gate.shape[:-1], shape.r), dtype=dtype)
    grid, tile = _tile(run, "gate_shrink", rows, shape)
    run(
        kernels().gate_shrink, grid, **tile, gate=rows, up=other,
        a=joined(A, dtype).to(dtype), y=y, s=s, R=shape.r,
        gate_row=rows.stride(0), up_row=other.stride(0), ACT=act, GATED=up is not None,
    )  # fmt: skip
    return y, s


def shape_of(op: str, x: Tensor, A: Sequence[Tensor], dtype: torch.dtype) -> Shape:
    """The sizes of a call whose first argument is *x*."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    k = int(x.shape[-1])
    return Shape(dynamo.hint(rows), k, k, sum(int(a.shape[0]) for a in A), dtype, len(A))


def _tile(run: Runner, kernel: str, rows: Tensor, shape: Shape) -> tuple[Any, dict[str, Any]]:
    """The grid, and the arguments that both kernels have."""
    M, K = rows.shape[0], rows.shape[1]
    chosen = run.config(kernel, shape)
    return (cdiv(M, chosen.block_m),), {
        "M": M, "K": K, "BLOCK_M": chosen.block_m, "BLOCK_K": chosen.block_k,
        "BLOCK_R": block_r([shape.r], MOST_R), "EVEN": K % chosen.block_k == 0,
        "PRECISION": precision(shape.dtype, run.device), **chosen.run,
    }  # fmt: skip


def _vector(given: Tensor | None, other: Tensor) -> Tensor:
    return other if given is None else given.contiguous()


FORMS: dict[str, Callable[..., Any]] = {"norm_shrink": norm_shrink, "gate_shrink": gate_shrink}


def compute(name: str, args: Sequence[Any], **how: Any) -> Any:
    """Runs the kernel of op *name*, or records its launch in the trace that is going on.

    Args:
        how: what a :class:`Runner` takes beside the device.
    """
    device = describe(args[0].device)
    if device is None:
        raise GraphError(f"there is no kernel of peftfx::{name} for {args[0].device}")
    return FORMS[name](Runner(device, **how), *args)


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
