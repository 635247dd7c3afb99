"""Chooses what the backward makes again instead of keeping: the activation memory of training.

An adapter's gradient needs its site's input x, which a frozen linear's does not. x mostly is a norm
of the residual stream, or an activation of what the backward holds for its own sake: with the
residual and 1/rms, or gate and up, it is made again by one loop. The partitioner does not do so by
itself, for a product wants x as a whole, and loops that are not fused away count as dear to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from peftfx import dynamo
from peftfx.engine import Step, is_op

aten = torch.ops.aten
LAYOUT = {  # what moves or copies values, and computes none
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.clone.default,
    aten._to_copy.default, aten.alias.default, aten.detach.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip
LONGEST = 24  # nodes that are made again for one value
SMALL = 8  # a value this many times smaller than the one it saves is kept without asking


@dataclass(frozen=True)
class Recompute:
    """Marks forward nodes of AOTAutograd's joint graph to be computed again in the backward.

    A value that a product, an attention or one of our ops reads in the backward is made again

    - from values which are in the backward anyway, from small ones, and from inputs, or
    - where it is a copy of a smaller one, spread out: from that one.

    And what a loop reads, as a norm's derivative does what is normed, where it was widened: from
    the one value of half its size that it is made of, and small ones.

    What the user checkpointed is left as it is, but for lengths of a weight's rows: they are N
    numbers, and to make them again reads the weight.
    """

    name: str = "recompute"
    optional: bool = True

    def __call__(self, graph: fx.Graph, step: Step) -> int:
        """Marks nodes; gives the number of values that are made again, or kept, by its doing."""
        if any("recompute" in n.meta for n in graph.nodes):
            return _keep_norms(graph)
        backward = _backward(graph)
        found = 0
        for value in _read_whole(graph, backward):
            chain = _from_kept(value, backward) or _from_smaller(value)
            for node in chain:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            found += bool(chain)
        for value in _read_in_loops(graph, backward):
            chain = _from_narrow(value)
            for node in chain:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            found += bool(chain)
        return found


def _keep_norms(graph: fx.Graph) -> int:
    """Has lengths of rows kept where a checkpoint would have them made again."""
    found = [n for n in graph.nodes if "recompute" in n.meta and is_op(n, "low_rank_norms")]
    for node in found:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(found)


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the gradients of the outputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:  # in topological order
        if (node.op == "placeholder" and "tangents" in str(node.target)) or any(
            n in found for n in node.all_input_nodes
        ):
            found.add(node)
    return found


def _read_whole(graph: fx.Graph, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """Forward values that a backward node reads which no loop is fused into."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node not in backward or _cheap(node):
            continue
        for value in node.all_input_nodes:
            if value not in backward and value not in seen and _bytes(value):
                seen.add(value)
                yield value


def _read_in_loops(graph: fx.Graph, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """Forward values that loops of the backward read and that would be kept as they are."""
    for node in graph.nodes:
        if node in backward or "recompute" in node.meta or not _bytes(node) or not _cheap(node):
            continue
        if any(user in backward for user in node.users):
            yield node


def _from_narrow(value: fx.Node) -> list[fx.Node]:
    """The nodes between *value* and one narrow value that it is made of; none if there are more."""
    chain, queue, narrow = [value], list(value.all_input_nodes), set[fx.Node]()
    seen = {value, *queue}
    while queue:
        node = queue.pop()
        if SMALL * _bytes(node) <= _bytes(value):
            continue
        if 2 * _bytes(node) <= _bytes(value):
            narrow.add(node)
            continue
        if not _cheap(node) or len(chain) == LONGEST:
            return []
        chain.append(node)
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return chain if len(narrow) == 1 else []


def _from_kept(value: fx.Node, backward: set[fx.Node]) -> list[fx.Node]:
    """The nodes between *value* and what is in the backward anyway; none if that is not so."""
    chain, queue = [value], list(value.all_input_nodes)
    if not _cheap(value):
        return []
    seen = {value, *queue}
    while queue:
        node = queue.pop()
        if node.op in ("placeholder", "get_attr") or SMALL * _bytes(node) <= _bytes(value):
            continue
        if _needed(node, backward, seen):
            continue
        if not _cheap(node) or len(chain) == LONGEST:
            return []
        chain.append(node)
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return chain


def _needed(node: fx.Node, backward: set[fx.Node], chain: set[fx.Node]) -> bool:
    """Whether the backward reads *node*, itself or in another layout or dtype, for its own sake."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user in backward:
                return True
            if user in seen or user in chain or user.target not in LAYOUT:
                continue
            seen.add(user)
            queue.append(user)
    return False


def _from_smaller(value: fx.Node) -> list[fx.Node]:
    """The nodes between *value* and the smaller one that it is copies of; none if it is not."""
    chain, node = [], value
    while node.op == "call_function" and node.target in LAYOUT:
        chain.append(node)
        node = node.all_input_nodes[0]
        if 2 * _bytes(node) <= _bytes(value):
            return chain
    return []


def _cheap(node: fx.Node) -> bool:
    """Whether a loop over elements computes *node*, always with the same result."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return target in LAYOUT or torch.Tag.pointwise in target.tags


def _bytes(node: fx.Node) -> int:
    """Size of a node's tensor as it was seen; 0 for what is none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= dynamo.hint(size)
    return count * value.element_size()
