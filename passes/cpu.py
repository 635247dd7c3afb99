"""Claims for the CPU: compiled loops, and the order of the low-rank products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.low_rank_linear import op as low_rank


@dataclass(frozen=True)
class Compiled:
    """The op's own kernel on the CPU, called as it is (``cpu.py`` in the op's folder)."""

    name: str = "compiled C"
    ops: tuple[str, ...] = ("dropout",)
    emit: None = None

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        return None if args[0].device.type == "cpu" else "it is for the CPU"


@dataclass(frozen=True)
class Folded:
    """``x·(W + s·B·A)ᵀ`` instead of ``x·Wᵀ + s·(x·Aᵀ)·Bᵀ``: fewer products where M is large.

    An order by cost, as in RunLoRA (Cherniuk et al., 2023, arXiv 2312.03415). The update of y costs
    M·N·(R + 1) multiply-adds, folding it into W costs N·K·(R + 1): a matter of M against K, and of
    M against N for dX. Not in half precision, where W would round a small update away.
    """

    name: str = "folded"
    ops: tuple[str, ...] = (
        "low_rank_linear", "low_rank_linear_group", "low_rank_backward", "low_rank_group_backward",
    )  # fmt: skip

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        backward = op.endswith("backward")
        x, weights = (args[1], args[3]) if backward else (args[0], args[1])
        weights = weights if isinstance(weights, (list, tuple)) else [weights]
        if x.device.type != "cpu":
            return "it is for the CPU"
        if x.dtype not in (torch.float32, torch.float64):
            return f"a weight in {x.dtype} would round a small update away"
        if "group" not in op and args[-4 if backward else 7] is not None:
            return "dropout: the update has another input than the base"
        if weights[0] is None:
            return "there is no weight to fold into"
        if backward and not args[-1][0]:
            return "no dX is wanted"
        m = math.prod(dynamo.hint(size) for size in x.shape[:-1])
        other, axis = (max(int(w.shape[0]) for w in weights), "N") if backward else (
            int(x.shape[-1]), "K")  # fmt: skip
        if m <= MARGIN * other:
            return f"M {m} is not above {MARGIN:g}·{axis} {other}"
        return None

    def emit(self, op: str, *args: Any) -> Any:
        return _FORMS[op](*args)


MARGIN = 1.25  # folding reads and writes W once more


def _fold(w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.addmm(w, (b * scale).to(w.dtype), a.to(w.dtype))


def _shift(bias: Tensor | None, lora_bias: Tensor | None, scale: Tensor) -> Tensor | None:
    if lora_bias is None:
        return bias
    update = lora_bias * scale
    return update if bias is None else bias + update.to(bias.dtype)


def _linear(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, lora_bias: Any, scale: Tensor,
    seed: None, p: float, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = F.linear(x, _fold(weight, A, B, scale), _shift(bias, lora_bias, scale))
    return y, F.linear(x, A.to(x.dtype))


def _linear_group(
    x: Tensor, weights: Any, biases: Any, A: Any, B: Any, lora_biases: Any, scales: Any
) -> tuple[list[Tensor], Tensor]:
    ys = [
        F.linear(x, _fold(w, a, b, s), _shift(bias, shift, s))
        for w, bias, a, b, shift, s in zip(weights, biases, A, B, lora_biases, scales, strict=True)
    ]
    return ys, F.linear(x, torch.cat([a.to(x.dtype) for a in A]))


def _backward(
    dy: Tensor, x: Tensor, S: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor,
    seed: None, p: float, site: int, mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rest = [False, *mask[1:]]
    _, da, db = low_rank.low_rank_backward(dy, x, S, weight, A, B, scale, None, p, site, rest)
    dx = dy.reshape(-1, dy.shape[-1]) @ _fold(weight, A, B, scale)
    return dx.reshape(x.shape), da, db


def _group_backward(
    dys: Any, x: Tensor, S: Tensor, weights: Any, A: Any, B: Any, scales: Any, mask: list[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rest = [False, *mask[1:]]
    _, das, dbs = low_rank.low_rank_group_backward(dys, x, S, weights, A, B, scales, rest)
    rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    folded = [_fold(w, a, b, s) for w, a, b, s in zip(weights, A, B, scales, strict=True)]
    dx = rows[0] @ folded[0]
    for row, w in zip(rows[1:], folded[1:], strict=True):
        dx = torch.addmm(dx, row, w)
    return dx.reshape(x.shape), das, dbs


_FORMS: dict[str, Callable[..., Any]] = {
    "low_rank_linear": _linear,
    "low_rank_linear_group": _linear_group,
    "low_rank_backward": _backward,
    "low_rank_group_backward": _group_backward,
}
