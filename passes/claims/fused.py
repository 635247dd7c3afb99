"""Claims of kernels that are one launch each: row norms and bottlenecks; and what those cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftfx.kernels.devices import describe
from peftfx.kernels.fused import FORMS, compute
from peftfx.kernels.low_rank_linear.forms import OPAQUE, tensors

DEFINITIONS: dict[str, Callable[..., Any]] = {n: form.definition for n, form in FORMS.items()}


@dataclass(frozen=True)
class Fused:
    """The kernels of :mod:`peftfx.kernels.fused`, their launches traced into the graph.

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
        return FORMS[op].unsuited(*args)

    def emit(self, op: str, *args: Any) -> Any:
        if args[0].is_cuda:
            return compute(op, args, traced=True)
        return getattr(torch.ops.peftfx, OPAQUE + op)(*args)
