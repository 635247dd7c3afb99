"""Claims for GPUs: Triton kernels, and the library's products accumulated in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx.kernels.sum_of_products.op
from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear import op as low_rank
from peftfx.kernels.low_rank_linear.forms import FORMS, OPAQUE, compute, tensors
from peftfx.kernels.low_rank_linear.runner import SITES
from peftfx.passes import cost

assert peftfx.kernels.sum_of_products.op
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Triton:
    """The kernels of :mod:`peftfx.kernels.low_rank_linear`.

    Their launches are traced into the graph, so that Inductor plans memory around them and launches
    them itself. ``PEFTFX_TRITON=opaque`` keeps them in ops that it leaves alone: these can use
    tensor descriptors, and cost a call into Python each.

    Args:
        anywhere: on any device for which kernels run, Triton's interpreter included.
    """

    anywhere: bool = False
    name: str = "triton"
    ops: tuple[str, ...] = tuple(FORMS)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        return _unable(args, self.anywhere) or _unsuited(op, args) or _dearer(self, op, args)

    def emit(self, op: str, *args: Any) -> Any:
        first = tensors(args)[0]
        if first.is_cuda and os.environ.get("PEFTFX_TRITON") != "opaque":
            return compute(op, args, traced=True)
        opaque: Any = getattr(torch.ops.peftfx, OPAQUE + op)
        return opaque(*args)


@dataclass(frozen=True)
class Accumulate:
    """The library's products, the thin ones first and the wide one added to them in place."""

    anywhere: bool = False
    name: str = "accumulate"
    ops: tuple[str, ...] = tuple(op for op in FORMS if op != "low_rank_add")

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        return _unable(args, self.anywhere) or _unaddable(op, args) or _dearer(self, op, args)

    def emit(self, op: str, *args: Any) -> Any:
        product: Any = _PRODUCTS[op]
        return product(*args)


def _unable(args: Sequence[Any], anywhere: bool) -> str | None:
    first = tensors(args)[0]
    if not anywhere and not first.is_cuda:
        return f"it is for GPUs, and this is on {first.device.type}"
    if describe(first.device) is None:
        return "no GPU is at hand"
    return None


def _dearer(claim: Triton | Accumulate, op: str, args: Sequence[Any]) -> str | None:
    return None if claim.anywhere else cost.verdict(claim.name, op, args)


def _unaddable(op: str, args: Sequence[Any]) -> str | None:
    """Why there is nothing to add to in place, if there is not."""
    if op != "low_rank_backward":
        return None
    if args[3] is None:
        return "no weight is seen"
    return None if args[7] is None else "dropout masks the thin part of dX"


def _unsuited(op: str, args: Sequence[Any]) -> str | None:
    """Why the kernels cannot take a call, if they cannot."""
    dtype = args[0].dtype if isinstance(args[0], Tensor) else args[0][0].dtype
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    if op.endswith(("group", "group_backward")):
        lists = [a for a in args if isinstance(a, (list, tuple)) and len(a) and _all_tensors(a)]
        if len(lists[0]) > SITES:
            return f"{len(lists[0])} sites share x, one launch joins {SITES}"
        for values in lists:
            if len({t.dtype for t in values}) > 1:
                return "sites of one launch differ in dtype"
        weights = args[1] if op == "low_rank_linear_group" else args[3]
        if any(w.dtype != dtype for w in weights):
            return f"a weight is not {dtype}, as the input is"
        if len({w.stride() for w in weights}) > 1:
            return "weights of one launch differ in strides"
    elif op == "low_rank_add" and not args[0].is_contiguous():
        return "the y that is added to is not contiguous"
    weight = {"low_rank_linear": 1, "low_rank_backward": 3}.get(op)
    if weight is not None and args[weight] is not None and args[weight].dtype != dtype:
        return f"the weight is {args[weight].dtype}, the input {dtype}"
    return None


def _all_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(v, Tensor) for v in values)


# -- the library's products ----------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _sum(left: list[Tensor], right: list[Tensor], bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.peftfx.sum_of_products(left, right, bias)
    return out


def _shift(
    bias: Tensor | None, lora_bias: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if lora_bias is None:
        return bias
    low = (lora_bias * scale).to(dtype)
    return low if bias is None else bias + low


def _group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    *drop: Any,
) -> tuple[list[Tensor], Tensor]:
    dtype = x.dtype
    kept = low_rank.dropped(x, *drop) if drop else x
    S = F.linear(kept, torch.cat([a.to(dtype) for a in A]) if len(A) > 1 else A[0].to(dtype))
    ys = []
    for w, bias, low, up, extra, scale in zip(
        weights, biases, S.split([a.shape[0] for a in A], dim=-1), B, lora_biases, scales,
        strict=True,
    ):  # fmt: skip
        left = [_rows(low * scale.to(dtype)), _rows(x)]
        y = _sum(left, [up.to(dtype).t(), w.t()], _shift(bias, extra, scale, dtype))
        ys.append(y.reshape(*x.shape[:-1], w.shape[0]))
    return ys, S


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    a, b, lora_bias, scale, *drop = rest
    ys, S = _group(x, [weight], [bias], [a], [b], [lora_bias], [scale], *drop)
    return ys[0], S


def _group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    S: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[Tensor],
    mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    need_x, need_a, need_b = mask
    dtype, ranks = dys[0].dtype, [a.shape[0] for a in A]
    rows, low = [_rows(dy) for dy in dys], _rows(S).split(ranks, dim=1)
    factors = [s.to(dtype) for s in scales]
    ds = torch.cat(
        [(r @ b.to(dtype)) * s for r, b, s in zip(rows, B, factors, strict=True)], dim=1
    )  # [M, ΣR]
    dx, das, dbs = x.new_empty(0), [a.new_empty(0) for a in A], [b.new_empty(0) for b in B]
    if need_a:
        joined = (ds.t() @ _rows(x.to(dtype))).split(ranks)
        das = [d.to(a.dtype, copy=len(A) > 1) for d, a in zip(joined, A, strict=True)]
    if need_b:
        dbs = [
            (r.t() @ (s * f)).to(b.dtype) for r, s, f, b in zip(rows, low, factors, B, strict=True)
        ]
    if need_x:
        down = torch.cat([a.to(dtype) for a in A])
        dx = _sum([ds, *rows], [down, *weights]).reshape(x.shape).to(x.dtype)
    return dx, das, dbs


def _backward(
    dy: Tensor, x: Tensor, S: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scale, *_, mask = rest
    dx, das, dbs = _group_backward([dy], x, S, [weight], [a], [b], [scale], mask)
    return dx, das[0], dbs[0]


_PRODUCTS = {
    "low_rank_linear": _linear,
    "low_rank_linear_group": _group,
    "low_rank_backward": _backward,
    "low_rank_group_backward": _group_backward,
}
