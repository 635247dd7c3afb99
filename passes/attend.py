"""Puts trained keys and values in front of the attention calls that marked queries go to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from peftfx import attention
from peftfx.engine import VALUE, Context, Recorder, is_op
from peftfx.errors import NotAdaptedError
from peftfx.methods.key import decode
from peftfx.passes.insert import arguments

CALLS = (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
HIDES = ("where", "masked_fill", "add")  # what may hide columns of a mask of numbers


@dataclass(frozen=True)
class Attend:
    """A mark of ``acts: attention`` gives way to the query that it marks.

    What a query's projection makes flows into its own attention call and nowhere else. So the mark
    of a call is found by walking back from its query, past no other call; not from its key, which
    may be a cache's, and not forward from the mark.
    """

    name: str = "attend"
    optional: bool = False

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        marks = list(_marks(gm))
        calls = [n for n in gm.graph.nodes if marks and n.target in CALLS]
        owned = {call: mark for call in calls if (mark := _mark_of(call, marks)) is not None}
        for mark in marks:
            if mark not in owned.values():
                raise NotAdaptedError(
                    "the queries go to no attention call that is known",
                    site=getattr(context.provenance(mark), "site", None),
                    remedy="an HF model takes attn_implementation='sdpa'",
                )
        for call, mark in owned.items():
            self._answer(gm, call, mark, context)
        for mark in marks:
            mark.replace_all_uses_with(arguments(mark)[0])
            gm.graph.erase_node(mark)
        return len(marks)

    def _answer(self, gm: fx.GraphModule, call: fx.Node, mark: fx.Node, context: Context) -> None:
        _, x, tensors, _, key, _ = arguments(mark)
        decoded = decode(key)
        given = attention.operands(call.args, call.kwargs)
        known = {name: _value(v) for name, v in given.items()}
        recorder = Recorder(gm.graph, self.name, context.provenance(mark))
        with gm.graph.inserting_before(call):
            front: Any = decoded.front(recorder.wrap(x), recorder.wrap(list(tensors)))
            values: Any = tuple(None if f is None else _value(f.node) for f in front)
            attention.check(known, values, decoded.attrs)
            why = attention.why_joined(known, values)
            bias = None
            if decoded.attrs.get("relative"):
                bias = _Distances(recorder, front[0].shape[1]).columns(given["attn_mask"])
            wrapped = {name: recorder.wrap(v) for name, v in given.items()}
            out = attention.answer(wrapped, front, bias, known["query"].shape[-1], why)
        if why is not None:
            context.refuse(call, f"the prefix is joined: {why}")
        call.replace_all_uses_with(out.node)
        gm.graph.erase_node(call)

    def check(self, gm: fx.GraphModule) -> str | None:
        left = [mark.name for mark in _marks(gm)]
        return f"marks are left: {', '.join(left)}" if left else None


def _marks(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for node in gm.graph.nodes:
        if is_op(node, "site") and decode(arguments(node)[4]).acts == "attention":
            yield node


def _value(given: Any) -> Any:
    return given.meta[VALUE] if isinstance(given, fx.Node) else given


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _mark_of(call: fx.Node, marks: list[fx.Node]) -> fx.Node | None:
    """The mark that the call's query comes from."""
    query = attention.operands(call.args, call.kwargs)["query"]
    for node in _upstream(query, past=lambda n: n not in marks and not _attends(n)):
        if node in marks:
            return node
    return None


def _attends(node: fx.Node) -> bool:
    return node.target in CALLS or _name(node).endswith(("softmax", "attention"))


def _upstream(node: fx.Node, past: Any = lambda n: True) -> Iterator[fx.Node]:
    """What *node* is made of, nearest first, beginning with itself; only past nodes that allow."""
    queue, seen = [node], {node}
    while queue:
        at = queue.pop(0)
        yield at
        fresh = [n for n in at.all_input_nodes if n not in seen] if past(at) else []
        seen.update(fresh)
        queue += fresh


class _Distances:
    """Values that attention adds for distances, written out once more for those to the prefix.

    They are a function of ``memory - context``, two ranges. The slice of the graph from that
    difference to the mask is repeated with ``memory = -P … -1``; what hides tokens hides none of
    the prefix.
    """

    def __init__(self, recorder: Recorder, length: int) -> None:
        self.recorder, self.length = recorder, length
        self.made: dict[fx.Node, Any] = {}

    def columns(self, mask: Any) -> Any:
        """What stands in the mask's place for the prefix, ``[…, S, P]``."""
        found = []
        if isinstance(mask, fx.Node):
            found = [n for n in _upstream(mask) if _name(n) == "sub" and self._of_ranges(n)]
        if len(found) != 1:
            raise NotAdaptedError(
                "attention adds learned values for distances, and the graph does not show how they "
                "come from positions",
                remedy="run without gradient checkpointing, so that both are in one graph",
            )
        context = self.recorder.wrap(found[0].args[1])  # [S, 1]
        ones = torch.ones_like(context[:1, :1]).expand(1, self.length)
        self.made[found[0]] = ones.cumsum(-1) - (self.length + 1) - context  # -P … -1
        columns = self._again(mask)
        if columns.shape[-1] != self.length:
            raise NotAdaptedError(
                f"values for {columns.shape[-1]} distances came out for {self.length} keys"
            )
        return columns

    def _of_ranges(self, node: fx.Node) -> bool:
        """Whether *node* is a range along the last axis minus one along the axis before."""
        sides = node.args[:2]
        return (
            len(sides) == 2
            and all(isinstance(s, fx.Node) and _range(s) for s in sides)
            and _value(sides[1]).ndim >= 2
            and _value(sides[1]).shape[-1] == 1
        )

    def _again(self, node: fx.Node) -> Any:
        """A proxy of *node* for the distances to the prefix."""
        if node in self.made:
            return self.made[node]
        (start,) = [n for n in self.made if n.op != "placeholder"][:1]
        moved = [n for n in node.all_input_nodes if start in set(_upstream(n))]
        valued = [n for n in moved if _value(n).is_floating_point()]
        if (
            _name(node) in HIDES
            and len(valued) == len(moved) == 1
            and len(node.all_input_nodes) > 1
        ):
            self.made[node] = self._again(valued[0])
            return self.made[node]
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: self._again(n).node if n in moved else n,
        )
        self.made[node] = self.recorder.proxy(
            self.recorder.create_node(node.op, node.target, args, kwargs)
        )
        return self.made[node]


def _range(node: fx.Node) -> bool:
    return any(n.target is torch.arange for n in _upstream(node))
