"""Takes the cross entropy of a frozen head in chunks of rows: logits are never whole."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import peftfx.kernels.linear_cross_entropy.op  # noqa: F401 - defines the op used below
from peftfx.dynamo import surely_equal
from peftfx.engine import META, UNMADE, VALUE, Context, Recorder
from peftfx.errors import LossError
from peftfx.passes.fuse import LINEARS, operands, unfit

NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
         "label_smoothing")  # fmt: skip
CASTS, SHAPES = ("float", "to", "type_as", "contiguous"), ("view", "reshape", "flatten")


class _No(Exception):
    """Why a loss is left as it is."""


@dataclass
class _Found:
    """What lies between a linear and its loss: ``cap·tanh(scale·(x·Wᵀ + b) / cap)``, then rows."""

    linear: fx.Node
    chain: list[fx.Node] = field(default_factory=list)  # from the loss up to the linear
    scale: float = 1.0
    cap: float = 0.0
    cuts: list[fx.Node] = field(default_factory=list)  # slices of rows, from the linear down


@dataclass(frozen=True)
class Chunk:
    """``cross_entropy(rows(linear(x, W, b)))`` becomes ``linear_cross_entropy(rows(x), W, b, …)``.

    Where nothing else reads the logits; or where they are an output that was ordered to be left
    out. By dataflow: between the two may lie casts, reshapes, slices of rows, factors and a tanh.
    """

    name: str = "chunk"
    optional: bool = True

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        count = 0
        for loss in list(gm.graph.find_nodes(op="call_function", target=F.cross_entropy)):
            try:
                self._take(gm.graph, loss, context)
                count += 1
            except _No as reason:
                if context.chunked and torch.is_grad_enabled():
                    raise LossError(
                        f"`loss='chunked'` is asked for, and cannot be: {reason}",
                        remedy="freeze the head and leave it unadapted, or leave the option out",
                    ) from None
                context.refuse(loss, str(reason))
        return count

    def check(self, gm: fx.GraphModule) -> str | None:
        return None

    def _take(self, graph: fx.Graph, loss: fx.Node, context: Context) -> None:
        given: dict[str, Any] = dict(zip(NAMES, loss.args, strict=False)) | dict(loss.kwargs)
        _check_options(given)
        found = _path(given["input"])
        weight, bias = operands(found.linear)
        _check_head(weight, bias)
        read = _outputs(found, loss)
        if read and not (context.chunked and torch.is_grad_enabled() and not context.nested):
            raise _No("the logits are an output too; `loss='chunked'` leaves them out in training")
        recorder = Recorder(graph, self.name)
        with graph.inserting_before(loss):
            x = recorder.wrap(found.linear.args[0])
            stands = {found.linear: x}
            for node in reversed(found.chain):
                if node in found.cuts:
                    call, cut = ("call_function", operator.getitem), (x.node, node.args[1])
                    x = recorder.proxy(recorder.create_node(*call, cut, {}))
                stands[node] = x
            result = _loss(recorder, x, weight, bias, given, found)
            for node, logits in read:
                _leave_out(node, stands[logits])
        loss.replace_all_uses_with(result.node)
        casts = [node for node, logits in read if node is not logits]
        for node in (*casts, loss, *found.chain, found.linear):
            if not node.users:
                graph.erase_node(node)


def _leave_out(node: fx.Node, x: Any) -> None:
    """Puts zeros that take no room in the place of the output *node*, made of rows ``x``.

    Whoever runs the graph puts something that refuses there.
    """
    value = node.meta[VALUE]
    one: Any = torch.zeros_like(x.detach()[..., :1], dtype=value.dtype)
    stand = one.expand(*[-1] * (value.ndim - 1), value.shape[-1]).node
    stand.meta[UNMADE] = True
    node.replace_all_uses_with(stand, lambda user: user.op == "output")


def _check_options(given: dict[str, Any]) -> None:
    target = given["target"].meta.get(VALUE) if isinstance(given["target"], fx.Node) else None
    if given.get("weight") is not None:
        raise _No("classes have weights")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        raise _No("it is reduced by arguments that torch has given up")
    if not isinstance(target, Tensor) or target.is_floating_point() or target.ndim != 1:
        raise _No("its labels are not one class for each row")


def _path(node: Any) -> _Found:
    """Walks from the loss's input up to the linear that makes the logits."""
    found, scale = _Found(node), 1.0
    classes = node.meta[VALUE].shape[-1] if isinstance(node, fx.Node) else None
    while node.target not in LINEARS:
        name, args = _name(node), node.args
        if META in node.meta:
            raise _No("the head is adapted")
        above = args[0] if args and isinstance(args[0], fx.Node) else None
        value = None if above is None else above.meta.get(VALUE)
        if above is None or not isinstance(value, Tensor):
            raise _No(f"its logits come from {node.name}, not from a linear")
        if not surely_equal(value.shape[-1], classes):
            raise _No(f"{node.name} changes which classes there are")
        number = args[1] if len(args) == 2 and isinstance(args[1], (int, float)) else None
        if name in SHAPES and not found.cuts:
            pass
        elif name == "getitem" and _of_rows(args[1], value.ndim):
            found.cuts.insert(0, node)
        elif name in ("mul", "truediv", "div") and number:
            scale *= number if name == "mul" else 1 / number
        elif name == "tanh" and not found.cap and scale > 0:
            found.cap, scale = scale, scale
        elif name not in CASTS:
            raise _No(f"{node.name} lies between the head and its loss")
        found.chain.append(node)
        node = above
    found.linear, found.scale = node, scale
    return found


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _of_rows(index: Any, dims: int) -> bool:
    """Whether *index* takes slices of rows, and all classes."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(p, slice) or p is Ellipsis for p in parts):
        return False
    last = len(parts) == dims and Ellipsis not in parts
    behind = Ellipsis in parts and parts[-1] is not Ellipsis
    return parts[-1] == slice(None) if last or behind else True


def _check_head(weight: Any, bias: Any) -> None:
    reason = unfit(weight)
    if reason is None and weight.op not in ("placeholder", "get_attr"):
        reason = "the weight is computed in the graph"
    if reason is None and bias is not None and bias.meta[VALUE].requires_grad:
        reason = "its bias trains"
    if reason is not None:
        raise _No(f"the head: {reason}")


def _outputs(found: _Found, loss: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Outputs, and the logits that they are, or are in another dtype; raises where anything else
    reads some."""
    read, below, rows = [], loss, [*found.chain, found.linear]
    for i, node in enumerate(rows):
        queue = [(node, [u for u in node.users if u is not below])]
        while queue:
            at, users = queue.pop()
            if any(u.op == "output" for u in users):
                read.append((at, node))
            inner = [u for u in users if u.op != "output"]
            if any(_name(u) not in CASTS for u in inner):
                raise _No(f"{inner[0].name} reads the logits too")
            queue += [(u, list(u.users)) for u in inner]
        if read and read[-1][1] is node and any(_name(n) in SHAPES for n in rows[i:]):
            raise _No("logits in another shape are an output")
        below = node
    return read


def _loss(
    recorder: Recorder, x: Any, weight: fx.Node, bias: Any, given: dict[str, Any], found: _Found
) -> Any:
    width = weight.meta[VALUE].shape[1]
    ignore, reduction = given.get("ignore_index", -100), given.get("reduction", "mean")
    target = recorder.proxy(given["target"]).to(torch.int64)
    losses = torch.ops.peftfx.linear_cross_entropy.default(
        x.reshape(-1, width), *recorder.wrap((weight, bias)), target, ignore,
        float(given.get("label_smoothing", 0.0)), found.scale, found.cap, 0,
        torch.is_grad_enabled(),
    )[0]  # fmt: skip
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore).sum()
    return losses.to(given["input"].meta[VALUE].dtype)
