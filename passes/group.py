"""Joins sites that share an input: one product with all their A's."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from peftfx.engine import META, VALUE, Context, Recorder, is_op


@dataclass(frozen=True)
class Group:
    """``low_rank_linear`` calls on one x become one ``low_rank_linear_group``.

    With dropout every site has a mask of its own, so that there is no shared product: left alone.
    """

    name: str = "group"
    optional: bool = True

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        by_input: dict[tuple[fx.Node, object], list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if is_op(node, "low_rank_linear") and isinstance(node.args[0], fx.Node):
                value = node.meta.get(VALUE)
                dtype = value[0].dtype if value is not None else None
                by_input.setdefault((node.args[0], dtype), []).append(node)
        count = 0
        for members in by_input.values():
            if len(members) < 2:
                continue
            joinable = []
            for node in members:
                reason = _refusal(node, members[0], order)
                if reason is None:
                    joinable.append(node)
                else:
                    context.refuse(node, reason)
            if len(joinable) > 1:
                self._join(gm, joinable)
                count += 1
        return count

    def _join(self, gm: fx.GraphModule, members: list[fx.Node]) -> None:
        x = members[0].args[0]
        columns = list(zip(*(n.args[1:7] for n in members), strict=True))
        provenance = members[0].meta.get(META, (None, None))[1]
        recorder = Recorder(gm.graph, self.name, provenance)
        with gm.graph.inserting_before(members[0]):
            out = torch.ops.peftfx.low_rank_linear_group.default(
                *recorder.wrap((x, *(list(c) for c in columns)))
            )
            ys = out[0]
            results = [ys[i].node for i in range(len(members))]
        for member, result in zip(members, results, strict=True):
            for user in list(member.users):
                user.replace_all_uses_with(result)  # the getitem of the member's y
                gm.graph.erase_node(user)
            gm.graph.erase_node(member)

    def check(self, gm: fx.GraphModule) -> str | None:
        return None


def _refusal(node: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> str | None:
    _, _, bias, _, _, lora_bias, _, seed, *_ = node.args
    if seed is not None:
        return "dropout: each site has a mask of its own"
    for shift in (bias, lora_bias):
        value = shift.meta.get(VALUE) if isinstance(shift, fx.Node) else None
        if isinstance(value, Tensor) and value.requires_grad:
            return "a bias trains"
    if any(order[a] > order[first] for a in node.all_input_nodes):
        return "an operand is computed after the first of the group"
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
        return "more than its result is used"
    return None
