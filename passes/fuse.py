"""Joins a frozen linear with the low-rank update of its output into one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from peftfx.engine import META, VALUE, Context, Recorder, is_op

LINEARS = (torch.nn.functional.linear, torch._C._nn.linear)


@dataclass(frozen=True)
class Fuse:
    """``low_rank_add(linear(x, W, b), x, …)`` becomes ``low_rank_linear(x, W, b, …)``."""

    name: str = "fuse"
    optional: bool = True

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        count = 0
        for node in list(gm.graph.nodes):
            if not is_op(node, "low_rank_add"):
                continue
            reason = _refusal(node)
            if reason is not None:
                context.refuse(node, reason)
                continue
            linear, x, *rest = node.args
            weight, bias = operands(linear)
            made = node.meta.get(META, (None, None))
            recorder = Recorder(gm.graph, self.name, made[1])
            with gm.graph.inserting_before(node):
                out = torch.ops.peftfx.low_rank_linear.default(
                    *recorder.wrap((x, weight, bias, *rest))
                )
            node.replace_all_uses_with(out.node)
            gm.graph.erase_node(node)
            gm.graph.erase_node(linear)
            count += 1
        return count

    def check(self, gm: fx.GraphModule) -> str | None:
        return None


def operands(linear: fx.Node) -> tuple[Any, Any]:
    """Weight and bias of a linear; None for a bias that it has not."""
    given = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | linear.kwargs
    return given["weight"], given.get("bias")


def _refusal(node: fx.Node) -> str | None:
    linear, x = node.args[0], node.args[1]
    if not isinstance(linear, fx.Node) or linear.target not in LINEARS:
        return "what it adds to is no plain linear"
    if linear.args[0] is not x:
        return "the linear has another input"
    if set(linear.users) != {node}:
        return "the linear's own result is used too"
    return unfit(operands(linear)[0])


def unfit(weight: fx.Node) -> str | None:
    """Why *weight* is no frozen matrix that an op of ours can take, None where it is."""
    value = weight.meta.get(VALUE)
    if not isinstance(value, Tensor):
        return "the weight's value is not known"
    if value.requires_grad:
        return "the weight trains"
    if value.ndim != 2 or not value.dtype.is_floating_point:
        return f"the weight is {value.dtype} of {value.ndim} dimensions"
    kind = type(value)
    plain = (Tensor, torch.nn.Parameter)
    if kind not in plain and kind.__name__ != "FakeTensor":
        return f"the weight is a {kind.__name__}"
    return None
