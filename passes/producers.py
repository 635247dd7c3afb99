"""Recognises what makes a tensor: a norm of rows, or an activation, however it is written.

The loops in front of a value are run on a few random numbers in fp64, and what comes out is
compared with the formulas that there are kernels of (:mod:`peftfx.kernels.shrink`). Names,
modules and the order of operations do not matter; conversions between dtypes are left out.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from peftfx import dynamo
from peftfx.kernels.shrink.op import ACTS, normed

aten = torch.ops.aten
CASTS = {
    aten.clone.default, aten._to_copy.default, aten.alias.default, aten.detach.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip
SHAPES = {  # which leave the numbers of a row where they are, as long as rows stay rows
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
}  # fmt: skip
STATISTICS = {aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction, aten.var.correction}
WHOLE = {  # norms that are one op, and what they give
    aten.native_layer_norm.default: ("y", "mean", "rstd"),
    aten._fused_rms_norm.default: ("y", "rstd"),
}
LONGEST = 48  # nodes that a norm or an activation may be written in


@dataclass(frozen=True)
class Producer:
    """What makes a tensor.

    Args:
        op: ``norm_shrink`` or ``gate_shrink``.
        sources: x, or gate and up: the wide tensors that it is made of.
        arguments: what else the op is told but A and the result's dtype: for a norm weight, shift,
            eps, offset and whether it is centred, for a gate the activation.
        inner: the nodes in between which depend on them, beside ``copies`` in other shapes or
            dtypes, which are still read as they are.
        statistics: those of them that are the rows' mean or 1/deviation: node → ``mean``, ``rstd``.
    """

    op: str
    sources: tuple[fx.Node, ...]
    arguments: tuple[Any, ...]
    inner: frozenset[fx.Node] = frozenset()
    statistics: Mapping[fx.Node, str] = field(default_factory=dict)
    copies: frozenset[fx.Node] = frozenset()


def producer(x: fx.Node) -> Producer | str:
    """What makes *x* [..., K], or why that is nothing which there is a kernel of."""
    value = dynamo.fake_value(x)
    if not isinstance(value, Tensor) or value.ndim < 2 or not isinstance(value.shape[-1], int):
        return "it is no tensor of rows"
    if not _loop(x):
        return f"{_name(x)} makes it, which no loop over elements does"
    reasons = []
    for cone in _cones(x):
        with dynamo.real_tensors():
            found = _as_norm(cone) if cone.reduces else _as_gate(cone)
        if found is not None:
            return found
        reasons.append(", ".join(n.name for n in cone.sources))
    return "what makes it is neither a norm nor an activation that there is a kernel of" + (
        f" (seen from {' and from '.join(reasons[:3])})" if reasons else ""
    )


# -- what lies in front of a value -----------------------------------------------------------------


@dataclass(frozen=True)
class _Cone:
    """The loops between wide *sources* and *x*, in order, and the *vectors* [K] that they read."""

    x: fx.Node
    sources: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def width(self) -> int:
        return int(dynamo.fake_value(self.x).shape[-1])

    @property
    def reduces(self) -> bool:
        return any(n.target in STATISTICS or n.target in WHOLE for n in self.nodes)

    def run(self, given: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
        """What every node is where the leaves are *given*: rows [P, K] and vectors [K]."""
        values: dict[fx.Node, Any] = dict(given)
        for node in self.nodes:
            values[node] = _evaluate(node, fx.node.map_arg(node.args, lambda n: values[n]))
        return values


def _cones(x: fx.Node) -> Iterator[_Cone]:
    """The cone of all loops in front of *x*, and those that rest on one wide value of it, the
    farthest first: what is a layer norm of one value is an RMS norm of another behind it."""
    width, rows = _sizes(x)
    order = {n: i for i, n in enumerate(x.graph.nodes)}
    members = _members(x, set())
    if members is None:
        return
    inside, leaves = members
    wide = [n for n in inside if n is not x and _kind(n, width, rows) == "wide"]
    cuts = [{n} for n in sorted(wide, key=lambda n: order[n])]
    for cut in [set[fx.Node](), *cuts]:
        members = _members(x, cut)
        if members is None:
            continue
        inside, leaves = members
        kinds = {n: _kind(n, width, rows) for n in leaves}
        sources = [n for n in leaves if kinds[n] == "wide"]
        vectors = [n for n in leaves if kinds[n] == "vector"]
        if len(vectors) + len(sources) != len(leaves) or len(sources) > (1 if cut else 2):
            continue
        if sources and len(vectors) <= 2:
            nodes = tuple(sorted(inside, key=order.__getitem__))
            yield _Cone(x, tuple(sources), tuple(vectors), nodes)


def _members(x: fx.Node, cut: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The loops in front of *x* down to *cut*, *x* among them, and what they read."""
    inside, leaves, queue = [x], [], list(x.all_input_nodes)
    seen = {x, *queue}
    while queue:
        node = queue.pop(0)
        if node in cut or not _loop(node):
            leaves.append(node)
            continue
        inside.append(node)
        if len(inside) > LONGEST:
            return None
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return inside, leaves


def _loop(node: fx.Node) -> bool:
    """Whether *node* can be part of a cone: it works on rows, always with the same result."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target in {*STATISTICS, *WHOLE}
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if target in STATISTICS:
        return _of_rows(node)
    return target in {*CASTS, *SHAPES, *WHOLE} or torch.Tag.pointwise in target.tags


def _of_rows(node: fx.Node) -> bool:
    """Whether a reduction is over the last dimension alone, which is kept."""
    source = node.all_input_nodes[0]
    dims = node.args[1] if len(node.args) > 1 else None
    last = dynamo.fake_value(source).ndim - 1
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    return isinstance(dims, (list, tuple)) and list(dims) in ([-1], [last]) and bool(keeps)


def _sizes(x: fx.Node) -> tuple[int, int]:
    value = dynamo.fake_value(x)
    width = int(value.shape[-1])
    return width, _count(value) // max(width, 1)


def _kind(node: fx.Node, width: int, rows: int) -> str:
    """``wide`` [..., K], ``vector`` [K], or something else."""
    value = dynamo.fake_value(node)
    if not isinstance(value, Tensor) or not value.ndim or value.shape[-1] != width:
        return ""
    if value.ndim == 1:
        return "vector"
    return "wide" if _count(value) == width * rows else ""


def _count(value: Tensor) -> int:
    count = 1
    for size in value.shape:
        count *= dynamo.hint(size)
    return count


def _name(node: fx.Node) -> str:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.name


def _evaluate(node: fx.Node, args: Sequence[Any]) -> Any:
    """*node* on probes: rows are [P, K], whatever shape they have in the graph."""
    target: Any = node.target
    if target in CASTS or target in SHAPES:
        return args[0]
    if target in WHOLE:
        *vectors, eps = args[2:]
        if eps is None:
            raise TypeError("eps that goes by the dtype")
        return target(args[0], list(args[0].shape[-1:]), *vectors, eps)
    if target in (aten.mean.dim, aten.sum.dim_IntList):
        return target(args[0], [-1], True)
    if target in STATISTICS:
        return target(args[0], [-1], correction=node.kwargs.get("correction"), keepdim=True)
    return target(*args, **node.kwargs)


# -- formulas --------------------------------------------------------------------------------------


def _as_norm(cone: _Cone) -> Producer | None:
    """*cone* as a norm of the rows of its source."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([[1.0], [1e-2], [1e-4]], dtype=torch.float64)  # so small that eps is seen
    x = (torch.randn(3, cone.width, generator=generator, dtype=torch.float64) + 0.7) * size
    vectors = [torch.randn(cone.width, generator=generator).double() for _ in cone.vectors]
    try:
        values = cone.run({cone.sources[0]: x, **dict(zip(cone.vectors, vectors))})
    except (RuntimeError, TypeError, KeyError):  # probes have other shapes than the graph's tensors
        return None
    numbers = {a for n in cone.nodes for a in n.args if isinstance(a, float) and 0 < a < 0.1}
    choices = itertools.product(
        (False, True), (*sorted(numbers), 0.0), _pairs(len(vectors)), (0.0, 1.0)
    )
    for centred, eps, (weight, shift), offset in choices:
        scale, bias = (None if i is None else vectors[i] for i in (weight, shift))
        _, y, mean, rstd = normed(x, None, scale, bias, eps, offset, centred)
        if _same(values[cone.x], y):
            nodes = [None if i is None else cone.vectors[i] for i in (weight, shift)]
            known = {"rstd": rstd, **({"mean": mean} if centred else {})}
            given = (*nodes, eps, offset, centred)
            return _made("norm_shrink", cone, given, values, known, cone.sources)
    return None


def _as_gate(cone: _Cone) -> Producer | None:
    """*cone* as an activation of its source, or of one of two times the other."""
    if cone.vectors:
        return None
    generator = torch.Generator().manual_seed(0)
    probes = [
        3 * torch.randn(3, cone.width, generator=generator, dtype=torch.float64)
        for _ in cone.sources
    ]
    try:
        values = cone.run(dict(zip(cone.sources, probes, strict=True)))
    except (RuntimeError, TypeError, KeyError):
        return None
    for order in ((0, 1), (1, 0))[: len(probes)]:
        gate, *up = (probes[i] for i in order[: len(probes)])
        for act, function in ACTS.items():
            y = function(gate) * up[0] if up else function(gate)
            if _same(values[cone.x], y):
                sources = tuple(cone.sources[i] for i in order[: len(probes)])
                return _made("gate_shrink", cone, (act,), values, {}, sources)
    return None


def _made(
    op: str,
    cone: _Cone,
    arguments: tuple[Any, ...],
    values: Mapping[fx.Node, Any],
    known: Mapping[str, Tensor],
    sources: tuple[fx.Node, ...],
) -> Producer:
    inner = [n for n in cone.nodes if n is not cone.x]
    statistics = {n: name for n in inner for name, v in known.items() if _same(values[n], v)}
    for node in inner:
        if node.target in WHOLE:  # gives its statistics behind the result
            for user in (n for n in node.users if n.target is operator.getitem and n.args[1]):
                statistics[user] = WHOLE[node.target][int(str(user.args[1]))]
                inner.append(user)
    given = tuple(uncast(_shaped(n, cone)) for n in sources)
    copies = {n for n in inner if _moves(n) and any(values[n] is values[s] for s in sources)}
    copies |= {n for s in sources for n in _above(s, given)}
    made = set(sources)
    for node in inner:  # in order
        if made.intersection(node.all_input_nodes):
            made.add(node)
    rest = frozenset(made) - copies - set(sources)
    return Producer(op, given, arguments, rest, statistics, frozenset(copies))


def _shaped(source: fx.Node, cone: _Cone) -> fx.Node:
    """*source* in the shape of the cone's result, where a view below or above it has that."""
    shape, below, above = dynamo.fake_value(cone.x).shape, source, source
    while dynamo.fake_value(below).shape != shape and _moves(below):
        below = below.all_input_nodes[0]
    while dynamo.fake_value(above).shape != shape:
        users = [n for n in above.users if n in cone.nodes and _moves(n)]
        if not users:
            break
        above = users[0]
    fit = [n for n in (below, above) if dynamo.fake_value(n).shape == shape]
    return fit[0] if fit else source


def _moves(node: fx.Node) -> bool:
    return node.target in CASTS or node.target in SHAPES


def _above(node: fx.Node, given: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """*node* and what lies between it and the one of *given* that it is a copy of."""
    while node not in given and node.op == "call_function" and node.target in CASTS:
        yield node
        node = node.all_input_nodes[0]


def uncast(node: fx.Node) -> fx.Node:
    """*node* as it lies in memory, before it was widened."""
    while node.op == "call_function" and node.target in CASTS:
        below = node.all_input_nodes[0]
        if dynamo.fake_value(below).itemsize > dynamo.fake_value(node).itemsize:
            break  # it was rounded
        node = below
    return node


def _pairs(count: int) -> tuple[tuple[int | None, int | None], ...]:
    """Which of so many vectors may be weight and shift."""
    return (((None, None),), ((0, None), (None, 0)), ((0, 1), (1, 0)))[count]


def _same(got: Any, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    return bool(torch.allclose(got.double(), expected, rtol=1e-7, atol=1e-12))
