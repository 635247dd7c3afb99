"""Claims that compute the low-rank ops by products of the library, in another order or form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.kernels.low_rank_linear import op as low_rank

OPS = (
    "low_rank_linear", "low_rank_linear_group", "low_rank_backward", "low_rank_group_backward",
)  # fmt: skip
EXPAND = "low_rank_expand"


def _seed(op: str, args: Sequence[Any]) -> Any:
    return args[{"low_rank_linear": 7, "low_rank_backward": 7}[op]] if "group" not in op else None


# -- accumulated in place ------------------------------------------------------------------------


@dataclass(frozen=True)
class Accumulate:
    """The thin and the wide products added up in one tensor, in place, by the library.

    Out of place, a pass over [M, N] of its own adds the update. That a graph is functional holds
    until AOTAutograd is done with it; what is added to is made here and seen by nobody else.
    """

    name: str = "accumulate"
    ops: tuple[str, ...] = (*OPS, EXPAND)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        weight = {"low_rank_backward": 3, EXPAND: 2}.get(op)
        return "no weight is seen" if weight is not None and not _there(args[weight]) else None

    def emit(self, op: str, *args: Any) -> Any:
        return _ACCUMULATED[op](*args)


def _there(weight: Tensor | Sequence[Tensor] | None) -> bool:
    return isinstance(weight, Tensor) or bool(weight)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _sum(thin: tuple[Tensor, Tensor], wide: list[tuple[Tensor, Tensor]], bias: Any) -> Tensor:
    """``thin₀·thin₁ + Σ wide₀·wide₁ + bias``.

    The wide product reads what it adds to beside its multiplications; a thin one would wait for it.
    """
    out = torch.mm(*thin) if bias is None else torch.addmm(bias, *thin)
    for a, b in wide:
        out = out.addmm_(a, b)
    return out


def _shift(bias: Tensor | None, lora_bias: Tensor | None, scale: Tensor) -> Tensor | None:
    if lora_bias is None:
        return bias
    update = lora_bias * scale
    return update if bias is None else bias + update.to(bias.dtype)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([p.to(dtype) for p in parts]) if len(parts) > 1 else parts[0].to(dtype)


def _group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    seed: Tensor | None = None,
    p: float = 0.0,
    site: int = 0,
) -> tuple[list[Tensor], Tensor]:
    S = _rows(low_rank.dropped(x, seed, p, site)) @ _joined(A, x.dtype).t()  # [M, ΣR]
    ys = _expand(x, S, weights, biases, B, lora_biases, scales)
    return ys, S.reshape(*x.shape[:-1], S.shape[1])


def _expand(
    x: Tensor,
    S: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    B: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scales: Sequence[Tensor],
) -> list[Tensor]:
    dtype, rows, ys = x.dtype, _rows(x), []  # [M, K]
    for w, bias, low, up, extra, scale in zip(
        weights, biases, _rows(S).split([b.shape[1] for b in B], dim=1), B, lora_biases, scales,
        strict=True,
    ):  # fmt: skip
        shift = _shift(bias, extra, scale)
        thin = low, _scaled(up, scale, dtype).t()
        y = _sum(thin, [(rows, w.t())], None if shift is None else shift.to(dtype))
        ys.append(y.reshape(*x.shape[:-1], w.shape[0]))
    return ys


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
    seed: Tensor | None = None,
    p: float = 0.0,
    site: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    need_x, need_a, need_b = mask
    dtype, ranks = dys[0].dtype, [a.shape[0] for a in A]
    rows = [_rows(dy) for dy in dys]  # [M, N]
    ds = [r @ _scaled(b, s, dtype) for r, b, s in zip(rows, B, scales, strict=True)]
    dS = torch.cat(ds, dim=1) if len(ds) > 1 else ds[0]  # [M, ΣR]
    dx, das, dbs = x.new_empty(0), [a.new_empty(0) for a in A], [b.new_empty(0) for b in B]
    if need_a:
        kept = low_rank.dropped(x.to(dtype), seed, p, site)
        parts = (dS.t() @ _rows(kept)).split(ranks)
        das = [d.to(a.dtype, copy=len(A) > 1) for d, a in zip(parts, A, strict=True)]
    if need_b:
        low = _rows(S).split(ranks, dim=1)
        dbs = [_db(r, s, f, b) for r, s, f, b in zip(rows, low, scales, B, strict=True)]
    if need_x:
        down, wide = _joined(A, dtype), [(r, w.to(dtype)) for r, w in zip(rows, weights)]
        if seed is None:
            dx = _sum((dS, down), wide, None)
        else:  # the mask lies between the thin product and the sum
            thin = low_rank.dropped((dS @ down).reshape(x.shape), seed, p, site)
            dx = _rows(thin).addmm_(*wide[0])
        dx = dx.reshape(x.shape).to(x.dtype)
    return dx, das, dbs


def _scaled(b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s·B: the same few values in both directions, where s·S would be a loop for every site."""
    return (b * scale).to(dtype)


def _db(dy: Tensor, S: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """s·dYᵀ·S. A CPU's fp32 product takes half the time as (Sᵀ·dY)ᵀ, which reads dY row by row."""
    if dy.device.type == "cpu" and dy.dtype == torch.float32:
        product = (S.t() @ dy).t().contiguous()
    else:
        product = dy.t() @ S
    return (product * scale).to(b.dtype)


def _backward(
    dy: Tensor, x: Tensor, S: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scale, *drop, mask = rest
    dx, das, dbs = _group_backward([dy], x, S, [weight], [a], [b], [scale], mask, *drop)
    return dx, das[0], dbs[0]


_ACCUMULATED: dict[str, Callable[..., Any]] = {
    "low_rank_linear": _linear,
    "low_rank_linear_group": _group,
    EXPAND: _expand,
    "low_rank_backward": _backward,
    "low_rank_group_backward": _group_backward,
}


# -- folded into the weight ----------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """``x·(W + s·B·A)ᵀ`` instead of ``x·Wᵀ + s·(x·Aᵀ)·Bᵀ``: fewer products where M is large.

    An order by cost, as in RunLoRA (Cherniuk et al., 2023, arXiv 2312.03415). The update of y makes
    and adds M·N numbers, folding it into W makes and adds N·K: a matter of M against K, and of M
    against N for dX. Not in half precision, where W would round a small update away.
    """

    name: str = "folded"
    ops: tuple[str, ...] = OPS

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        backward = op.endswith("backward")
        x, weights = (args[1], args[3]) if backward else (args[0], args[1])
        weights = weights if isinstance(weights, (list, tuple)) else [weights]
        if x.device.type != "cpu":
            return "it is for the CPU"
        if x.dtype not in (torch.float32, torch.float64):
            return f"a weight in {x.dtype} would round a small update away"
        if _seed(op, args) is not None:
            return "dropout: the update has another input than the base"
        if weights[0] is None:
            return "there is no weight to fold into"
        return "no dX is wanted" if backward and not args[-1][0] else None

    def emit(self, op: str, *args: Any) -> Any:
        return _FOLDED[op](*args)


def _fold(w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.addmm(w, (b * scale).to(w.dtype), a.to(w.dtype))


def _folded_linear(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, lora_bias: Any, scale: Tensor,
    *drop: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ys, S = _folded_group(x, [weight], [bias], [A], [B], [lora_bias], [scale])
    return ys[0], S


def _folded_group(
    x: Tensor, weights: Any, biases: Any, A: Any, B: Any, lora_biases: Any, scales: Any
) -> tuple[list[Tensor], Tensor]:
    ys = [
        F.linear(x, _fold(w, a, b, s), _shift(bias, shift, s))
        for w, bias, a, b, shift, s in zip(weights, biases, A, B, lora_biases, scales, strict=True)
    ]
    return ys, F.linear(x, _joined(A, x.dtype))


def _folded_backward(
    dy: Tensor, x: Tensor, S: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, das, dbs = _folded_group_backward([dy], x, S, [weight], [A], [B], [scale], rest[-1])
    return dx, das[0], dbs[0]


def _folded_group_backward(
    dys: Any, x: Tensor, S: Tensor, weights: Any, A: Any, B: Any, scales: Any, mask: list[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _, das, dbs = _group_backward(dys, x, S, weights, A, B, scales, [False, *mask[1:]])
    rows = [_rows(dy) for dy in dys]
    folded = [_fold(w, a, b, s) for w, a, b, s in zip(weights, A, B, scales, strict=True)]
    dx = rows[0] @ folded[0]
    for row, w in zip(rows[1:], folded[1:], strict=True):
        dx = dx.addmm_(row, w)
    return dx.reshape(x.shape), das, dbs


_FOLDED: dict[str, Callable[..., Any]] = {
    "low_rank_linear": _folded_linear,
    "low_rank_linear_group": _folded_group,
    "low_rank_backward": _folded_backward,
    "low_rank_group_backward": _folded_group_backward,
}
