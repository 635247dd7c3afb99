"""Lets what makes an adapter's x make S too: norms and activations in front of low-rank ops."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from peftfx import dynamo
from peftfx.engine import Step
from peftfx.passes.claims import cost, shrink
from peftfx.passes.producers import Producer, producer, uncast

OPS, aten = torch.ops.peftfx, torch.ops.aten
KEPT = ("stack_trace", "nn_module_stack", "partitioner_tag")  # of a node that is replaced
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.alias.default, aten.detach.default,
}  # fmt: skip
LOOPS = {  # of Inductor's, beside what is computed element by element
    aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.cat.default,
    aten.clone.default, aten._to_copy.default, aten.expand.default, aten.full.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip


@dataclass(frozen=True)
class Absorb:
    """``norm → low_rank_linear`` becomes ``norm_shrink → low_rank_expand``, forward graphs only.

    S = x·Aᵀ is then made of the x that is on the chip, and not by a pass that reads it again. Any
    norm or activation that is one by what it computes (:mod:`.producers`), where the claim of the
    kernels finds that it pays (:mod:`.claims.shrink`).

    Args:
        claim: who says whether.
    """

    claim: shrink.Shrink = field(default_factory=shrink.Shrink)
    name: str = "absorb"
    optional: bool = True

    def __call__(self, graph: fx.Graph, step: Step) -> int:
        """Rewrites *graph* in place; gives the number of rewrites."""
        count = 0
        for node in list(graph.nodes):
            site = _site(node)
            if site is None:
                continue
            reason = self._absorb(graph, site)
            if reason is None:
                count += 1
            else:
                step.refuse(node, reason)
        return count

    def _absorb(self, graph: fx.Graph, site: _Site) -> str | None:
        """Rewrites one call; why not, where it is left."""
        x = site.x
        if site.drops:
            return "dropout lies between it and A"
        if cost.forced(site.op) != shrink.ABSORBED:  # then it may be by its definition
            reason = self.claim.suits(dynamo.fake_value(x), site.ranks)
            if reason is not None:
                return reason
        found = producer(x)
        if isinstance(found, str):
            return found
        order = {n: i for i, n in enumerate(graph.nodes)}
        made = _Made.of(found, x)
        reason = made.refusal(site, order)
        if reason is not None:
            return reason
        reason = shrink.pays(
            (site.op, _values(site.node.args)), _values(site.rest()),
            (found.op, _values(made.arguments(site.A))), made.looped,
        )  # fmt: skip
        if reason is None:
            _rewrite(graph, site, made)
        return reason


@dataclass(frozen=True)
class _Site:
    """A call of a low-rank op whose S could come from elsewhere, with lists for its sites."""

    node: fx.Node
    op: str
    x: fx.Node
    base: fx.Node | None  # the y that is added to, where no weight is seen
    weights: Sequence[Any]
    biases: Sequence[Any]
    A: Sequence[fx.Node]
    B: Sequence[fx.Node]
    lora_biases: Sequence[Any]
    scales: Sequence[fx.Node]
    drops: bool

    @property
    def ranks(self) -> int:
        return sum(int(dynamo.fake_value(a).shape[0]) for a in self.A)

    def rest(self, x: Any = None, S: Any = None) -> tuple[Any, ...]:
        """Arguments of ``low_rank_expand``. Without S: those that it is priced by."""
        first = self.base if self.base is not None else self.x if x is None else x
        args = (self.weights, self.biases, self.B, self.lora_biases, self.scales)
        return (first, S, *(list(a) for a in args))


def _site(node: fx.Node) -> _Site | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    op, args = target._schema.name.removeprefix("peftfx::"), list[Any](node.args)
    if op == "low_rank_linear_group":
        x, weights, biases, a, b, shifts, scales = args
        return _Site(node, op, x, None, weights, biases, a, b, shifts, scales, drops=False)
    if op == "low_rank_linear":
        x, weight, bias, a, b, shift, scale, seed, *_ = args
        base, weights, biases = None, [weight], [bias]
    elif op == "low_rank_add":
        base, x, a, b, shift, scale, seed, *_ = args
        weights, biases = [], [None]
    else:
        return None
    drops = seed is not None
    return _Site(node, op, x, base, weights, biases, [a], [b], [shift], [scale], drops)


@dataclass(frozen=True)
class _Made:
    """A producer in its graph: with the sum in front of a norm, where that is to be made too."""

    found: Producer
    x: fx.Node
    sources: tuple[fx.Node, ...]
    total: fx.Node | None = None
    looped: bool = False  # whether a loop of its own makes the source, which x's was part of

    @classmethod
    def of(cls, found: Producer, x: fx.Node) -> _Made:
        if found.op == "gate_shrink":
            return cls(found, x, found.sources, looped=not all(map(stored, found.sources)))
        source = found.sources[0]
        if stored(source):
            return cls(found, x, found.sources)
        if source.target is aten.add.Tensor and not source.kwargs:
            parts = [uncast(n) for n in source.args[:2] if isinstance(n, fx.Node)]
            fit = [_alike(n, source) and (stored(n) or len(n.users) > 1) for n in parts]
            if fit == [True, True]:
                return cls(found, x, tuple(parts), total=source)
        return cls(found, x, found.sources, looped=True)

    def refusal(self, site: _Site, order: dict[fx.Node, int]) -> str | None:
        """Why it cannot be made by one op, if it cannot."""
        value, at = dynamo.fake_value(self.x), order[self.x]
        if any(dynamo.fake_value(n).shape != value.shape for n in self.sources):
            return "it has another shape than what it is made of"
        if any(order[a] > at for a in site.A):
            return "an A is computed behind it"
        for node in self.found.inner:
            outside = [u for u in node.users if u not in self.found.inner and u is not self.x]
            if outside and self.result(node) is None:
                return f"{node.name}, a part of what makes it, is used elsewhere"
            if any(order[u] < at for u in outside):
                return f"{node.name}, a part of what makes it, is used before it is made"
        if self.total is not None and any(order[u] < at for u in self._outside(self.total)):
            return f"{self.total.name}, which is normed, is used before that"
        return None

    def _outside(self, node: fx.Node) -> list[fx.Node]:
        """Users that are not there for the norm, and not for copies of what is normed."""
        return [u for u in node.users if u not in self.found.inner and u not in self.found.copies]

    def result(self, node: fx.Node) -> str | None:
        """The name of the op's result that *node* may be replaced by."""
        name = self.found.statistics.get(node)
        if name is None:
            return None
        value, like = dynamo.fake_value(node), dynamo.fake_value(self.x)
        wide = torch.promote_types(dynamo.fake_value(self.sources[0]).dtype, torch.float32)
        return name if value.dtype == wide and value.shape == (*like.shape[:-1], 1) else None

    def arguments(self, A: Sequence[fx.Node]) -> tuple[Any, ...]:
        """Of the op."""
        dtype = dynamo.fake_value(self.x).dtype
        if self.found.op == "gate_shrink":
            up = self.sources[1] if len(self.sources) > 1 else None
            return (self.sources[0], up, list(A), *self.found.arguments, dtype)
        weight, shift, *rest = self.found.arguments
        more = self.sources[1] if self.total is not None else None
        return (self.sources[0], more, weight, shift, list(A), *rest, dtype)


def _rewrite(graph: fx.Graph, site: _Site, made: _Made) -> None:
    mode: Any = getattr(dynamo.fake_value(made.x), "fake_mode", None)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta.update({k: v for k, v in site.node.meta.items() if k in KEPT})
        with mode or contextlib.nullcontext():
            node.meta["val"] = target(*_values(args))
        return node

    with graph.inserting_after(made.x):
        op = call(getattr(OPS, made.found.op).default, *made.arguments(site.A))
    names = ("total", "y", "S", "mean", "rstd") if made.found.op == "norm_shrink" else ("y", "S")
    results: dict[str, fx.Node] = {}
    last = op
    for number, name in enumerate(names):
        with graph.inserting_after(last):
            results[name] = last = call(operator.getitem, op, number)

    made.x.replace_all_uses_with(results["y"])
    before = {op, made.x, *made.found.inner, *made.found.copies}
    given = {made.total: "total"} if made.total is not None else {}
    given |= {n: r for n in made.found.statistics if (r := made.result(n)) is not None}
    for node, name in given.items():
        node.replace_all_uses_with(results[name], delete_user_cb=lambda u: u not in before)
    with graph.inserting_before(site.node):
        ys = call(OPS.low_rank_expand.default, *site.rest(results["y"], results["S"]))
        parts = [call(operator.getitem, ys, i) for i in range(len(site.B))]
    first: Any = parts if site.op == "low_rank_linear_group" else parts[0]
    replace(graph, site.node, (first, results["S"]))
    graph.eliminate_dead_code()


def replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    """Puts *result*, a node or nested sequences of nodes, in the place of *node*."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # getitem of a tuple or a list
            replace(graph, user, result[user.args[1]])
    graph.erase_node(node)


def stored(node: fx.Node) -> bool:
    """Whether *node* lies in memory, whatever is fused: an input, or what no loop makes."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.all_input_nodes[0]
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return True
    return torch.Tag.pointwise not in target.tags and target not in LOOPS


def _alike(node: fx.Node, other: fx.Node) -> bool:
    one, two = dynamo.fake_value(node), dynamo.fake_value(other)
    return isinstance(one, Tensor) and one.shape == two.shape and one.dtype == two.dtype


def _values(args: Any) -> Any:
    return fx.node.map_arg(args, dynamo.fake_value)
