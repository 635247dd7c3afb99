"""Chooses what computes each op, in the forward and backward graphs that AOTAutograd partitioned.

Every claim says whether it can; of those that can the cheapest gives its form, or the one that
``PEFTFX_FORMS`` orders. What nobody else claims is replaced by its definition, so that the inner
compiler fuses what it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from peftfx import dynamo
from peftfx.engine import GraphPasses, sources
from peftfx.kernels.low_rank_linear.runner import COUNTERS
from peftfx.passes.absorb import replace, stored
from peftfx.passes.claims import CLAIMS, Claim, cost

aten = torch.ops.aten
VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.alias.default, aten.detach.default,
)  # fmt: skip


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
        inductor: whether it is Inductor's graph.
    """

    claims: Sequence[Claim] = CLAIMS
    choices: list[Choice] = field(default_factory=list)
    before: GraphPasses | None = None
    inductor: bool = False
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
        join_counters(graph)
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
        form = self._form(node, claim.name, lambda *given: emit(name, *given))
        splice(graph, node, form, self.inductor)
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
        # layers of one form share its fake values, and make_fx tells its inputs apart by identity
        apart = [value.detach() for value in values]
        return make_fx(on_tensors, decomposition_table=dynamo.decompositions())(*apart).graph


def splice(graph: fx.Graph, node: fx.Node, form: fx.Graph, inductor: bool = False) -> None:
    """Puts *form*, a graph on the operands of *node*, in the node's place."""
    mapping: dict[fx.Node, Any] = {}
    inputs = iter(operands(node))
    with graph.inserting_before(node):
        for inner in form.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: mapping[n])
            elif inner.target is aten.alias.default:
                value = mapping[inner.all_input_nodes[0]]
                mapping[inner] = _in_memory(graph, value) if inductor else value
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


def _in_memory(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """*value*, which Inductor then writes once.

    What a loop makes it would write for each argument of each launch by itself, and once more for
    whoever else reads it: so that all are to read what is written, or, where its strides are not
    known, the launches of one op at least.
    """
    base = value
    while base.target in VIEWS:
        base = base.all_input_nodes[0]
    known = [] if stored(base) else [n for n in (base, value) if _strides(n)]
    if not known:
        return value
    written = _written(graph, known[0])
    return written if known[0] is value else value


def _written(graph: fx.Graph, value: fx.Node) -> fx.Node:
    found = next((user for user in value.users if user.target is dynamo.in_memory()), None)
    if found is not None:
        return found
    with graph.inserting_after(value):
        written = graph.call_function(dynamo.in_memory(), (value, _strides(value)))
    written.meta.update(value.meta)
    value.replace_all_uses_with(written, delete_user_cb=lambda user: user is not written)
    return written


def _strides(node: fx.Node) -> list[int]:
    """The strides of a node's value; none where they are symbolic."""
    strides = dynamo.fake_value(node).stride()
    return list(strides) if all(isinstance(s, int) for s in strides) else []


def join_counters(graph: fx.Graph) -> None:
    """One fill for the counters of all launches in *graph*: each by itself would be a launch."""
    found: dict[torch.device, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_counter(node):
            found.setdefault(dynamo.fake_value(node).device, []).append(node)
    for counters in found.values():
        first, size = counters[0], COUNTERS * len(counters)
        parts = []
        with graph.inserting_before(first), dynamo.fake_value(first).fake_mode:
            like: dict[str, Any] = {k: first.kwargs[k] for k in ("dtype", "device")}
            whole = graph.call_function(aten.empty.memory_format, ([size],), like)
            whole.meta.update(first.meta, val=torch.empty(size, **like))
            filled = graph.call_function(aten.fill_.Scalar, (whole, 0))  # of real memory: a view
            filled.meta.update(whole.meta)  # of a full is made anew, and what is changed copied
            for start in range(0, size, COUNTERS):
                cut = (0, start, start + COUNTERS)
                parts.append(graph.call_function(aten.slice.Tensor, (whole, *cut)))
                parts[-1].meta.update(first.meta, val=aten.slice.Tensor(whole.meta["val"], *cut))
        for counter, part in zip(counters, parts, strict=True):
            counter.replace_all_uses_with(part)
            graph.erase_node(counter)


def _is_counter(node: fx.Node) -> bool:
    """Whether *node* is what :meth:`Runner.counter` makes, for a launch."""
    if node.target is not aten.full.default or list(node.args) != [[COUNTERS], 0]:
        return False
    users = list(node.users)
    launch: Any = users[0].kwargs.get("kwargs") if len(users) == 1 else None
    return isinstance(launch, Mapping) and launch.get("count") is node


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
