"""Claims of kernels: Triton's, and ops that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfx.kernels.devices import describe, why_plain
from peftfx.kernels.low_rank_linear.forms import FORMS, OPAQUE, compute, tensors
from peftfx.kernels.low_rank_linear.runner import SITES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Triton:
    """The kernels of :mod:`peftfx.kernels.low_rank_linear`.

    ``triton``: their launches are traced into the graph, so that Inductor plans memory around them
    and launches them itself. ``opaque``: they stay in ops that it leaves alone. These can use
    tensor descriptors and cost a call into Python each, so that they are taken where they were
    measured to be the best, or ordered.

    Args:
        anywhere: on any device for which kernels run, Triton's interpreter included.
    """

    name: str = "triton"
    anywhere: bool = False
    ops: tuple[str, ...] = tuple(FORMS)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        device = tensors(args)[0].device
        if device.type != "cuda" and not self.anywhere:
            return f"it is for GPUs, and this is on {device.type}"
        if describe(device) is None:
            return "no GPU is at hand for which there are kernels"
        return _unsuited(op, args)

    def emit(self, op: str, *args: Any) -> Any:
        if self.name == "triton" and tensors(args)[0].is_cuda:
            return compute(op, args, traced=True)
        opaque: Any = getattr(torch.ops.peftfx, OPAQUE + op)
        return opaque(*args)


def _unsuited(op: str, args: Sequence[Any]) -> str | None:
    """Why the kernels cannot take a call, if they cannot."""
    dtype = args[0].dtype if isinstance(args[0], Tensor) else args[0][0].dtype
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    if op.endswith(("group", "expand", "group_backward")):
        lists = [a for a in args if isinstance(a, (list, tuple)) and len(a) and _all_tensors(a)]
        if len(lists[0]) > SITES:
            return f"{len(lists[0])} sites share x, one launch joins {SITES}"
        for values in lists:
            if len({t.dtype for t in values}) > 1:
                return "sites of one launch differ in dtype"
        weights = args[{"low_rank_linear_group": 1, "low_rank_expand": 2}.get(op, 3)]
        if any(w.dtype != dtype for w in weights):
            return f"a weight is not {dtype}, as the input is"
        if len({w.stride() for w in weights}) > 1:
            return "weights of one launch differ in strides"
    alone = op == "low_rank_add" or (op == "low_rank_expand" and not args[2])
    if alone and not args[0].is_contiguous():
        return "the y that is added to is not contiguous"
    weight = {"low_rank_linear": 1, "low_rank_backward": 3}.get(op)
    if weight is not None and args[weight] is not None and args[weight].dtype != dtype:
        return f"the weight is {args[weight].dtype}, the input {dtype}"
    return None


def _all_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(v, Tensor) for v in values)


@dataclass(frozen=True)
class Kept:
    """An op that stays as it is, with Triton's kernels where there are some, else without.

    A loop over chunks, written out, would be as long as the batch; and no compiler makes sparse
    products anything else.
    """

    name: str
    ops: tuple[str, ...]
    kernels: bool = False
    emit: None = None

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        why = why_plain(args[0])
        if self.kernels:
            return why
        return None if why else "the op takes its kernels where it can"
