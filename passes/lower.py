"""Chooses what computes each op, in the forward and backward graphs that AOTAutograd partitioned.

Every claim says whether it can; of those that can the cheapest gives its form, or the one that
``PEFTFX_FORMS`` orders. What nobody else claims is replaced by its definition, so that the inner
compiler fuses what it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from peftfx import dynamo
from peftfx.engine import GraphPasses, sources
from peftfx.passes.absorb import replace
from peftfx.passes.claims import CLAIMS, Claim, cost


@dataclass(frozen=True)
class Choice:
    """What was chosen for one node, and why not the others."""

    node: str
    op: str
    claim: str
    refusals: tuple[tuple[str, str], ...] = ()
    cost: str = ""  # operations, bytes and time as predicted

    def __str__(self) -> str:
        price = f", {self.cost}" if self.cost else ""
        why = "".join(f"; not {name}: {reason}" for name, reason in self.refusals)
        return f"{self.node} ({self.op}): {self.claim}{price}{why}"


@dataclass
class LowerPass:
    """A callable on graphs; ``uuid`` identifies to a compiler's cache what it would do.

    Args:
        before: passes that are run first.
    """

    claims: Sequence[Claim] = CLAIMS
    choices: list[Choice] = field(default_factory=list)
    before: GraphPasses | None = None
    _traced: dict[str, fx.Graph] = field(default_factory=dict)  # forms of one graph, see `_form`

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        kept: set[fx.Node] = set()
        self._traced.clear()
        while found := [n for n in graph.nodes if n not in kept and _op_name(n) is not None]:
            for node in found:  # forms may use ops of ours: another round lowers those
                if not self._lower(graph, node):
                    kept.add(node)
        _share_masks(graph)
        graph.lint()

    def uuid(self) -> str:
        """Identifies the lowering to Inductor's cache: its sources and claims."""
        before = "" if self.before is None else self.before.uuid()
        return f"{sources()} {[c.name for c in self.claims]} {cost.settings()} {before}"

    def _lower(self, graph: fx.Graph, node: fx.Node) -> bool:
        """Puts the chosen form in the node's place; False if the node stays."""
        name = _op_name(node)
        assert name is not None
        args = fx.node.map_arg(node.args, dynamo.fake_value)
        choice = chosen(self.claims, name, args, node.name)
        self.choices.append(choice)
        claim = next(c for c in self.claims if c.name == choice.claim and name in c.ops)
        emit = claim.emit
        if emit is None:
            return False
        splice(graph, node, self._form(node, claim.name, lambda *given: emit(name, *given)))
        return True

    def _form(self, node: fx.Node, claim: str, form: Callable[..., Any]) -> fx.Graph:
        """The aten graph of *form* at *node*; layers of one shape have one between them."""
        values = [dynamo.fake_value(n) for n in operands(node)]
        constants = fx.node.map_arg(node.args, lambda n: "?")
        facts = [(v.shape, v.stride(), v.dtype, v.device) for v in values]
        key = repr((claim, node.target, constants, facts))
        if key not in self._traced:
            self._traced[key] = _trace(node, form, values)
        return self._traced[key]


def chosen(claims: Sequence[Claim], op: str, args: Sequence[Any], node: str = "") -> Choice:
    """Which of *claims* computes a call of *op*, with fake tensors for tensors in *args*."""
    reasons = {c.name: c.check(op, args) for c in claims if op in c.ops}
    able = [name for name, reason in reasons.items() if reason is None]
    verdict = cost.choose(op, args, able)
    refused = [(name, reason) for name, reason in reasons.items() if reason is not None]
    return Choice(node, op, verdict.form, (*refused, *verdict.refusals), verdict.price)


def _op_name(node: fx.Node) -> str | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    if not name.startswith("peftfx::"):
        return None
    name = name.removeprefix("peftfx::")
    return name if name in {o for c in CLAIMS for o in c.ops} else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of *node*: every occurrence, in order."""
    flat: list[fx.Node] = []

    def note(arg: fx.Node) -> fx.Node:
        flat.append(arg)
        return arg

    fx.node.map_arg(node.args, note)
    return flat


def _trace(node: fx.Node, form: Callable[..., Any], values: Sequence[Tensor]) -> fx.Graph:
    """The aten graph of *form* on the arguments of *node*, whose tensors are *values*."""

    def on_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return form(*fx.node.map_arg(node.args, lambda _: next(given)))

    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    with mode or contextlib.nullcontext():  # what a form makes itself is fake too
        return make_fx(on_tensors, decomposition_table=dynamo.decompositions())(*values).graph


def splice(graph: fx.Graph, node: fx.Node, form: fx.Graph) -> None:
    """Puts *form*, a graph on the operands of *node*, in the node's place."""
    mapping: dict[fx.Node, Any] = {}
    inputs = iter(operands(node))
    with graph.inserting_before(node):
        for inner in form.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: mapping[n])
            else:
                copy = graph.node_copy(inner, lambda n: mapping[n])
                copy.meta.update(inner.meta)
                for key in ("stack_trace", "nn_module_stack", "partitioner_tag", "recompute"):
                    if key in node.meta:
                        copy.meta[key] = node.meta[key]
                mutated = _in_place(inner)
                mapping[inner] = copy if mutated is None else mapping[mutated]
    replace(graph, node, result)


def _share_masks(graph: fx.Graph) -> None:
    """Makes a mask that a graph wants several times once: dX and dA of a site have the same."""
    made: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftfx.keep_mask.default):
        shape = str(dynamo.fake_value(node).shape)
        first = made.setdefault((shape, *node.args[1:]), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _in_place(node: fx.Node) -> fx.Node | None:
    """The operand that *node* changes and gives back, if it does.

    Inductor takes what such an op gives for a tensor of its own, and lends the operand's memory to
    others; so what comes after reads the operand, which it knows to be changed.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    mutated = node.args[0]
    assert isinstance(mutated, fx.Node)
    return mutated
