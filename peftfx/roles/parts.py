"""What is not in a sublayer: embeddings, norms, convolutions, the head."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from peftfx.roles.flow import ADDS, MULS, SHAPES, Flow
from peftfx.roles.sublayer import Unclear
from peftfx.trace import CONVS, NORMS, Op

COUNTS = {"arange", "cumsum"}
DIFFERENCES = {"sub", "sub_", "__sub__", "__rsub__", "rsub"}
_CAPS = {"tanh", "div", "div_", "__truediv__", "clamp", "softmax", "log_softmax", "sigmoid"}
_PICKS = {"gather", "__getitem__", "index_select", "take_along_dim"}
Found = tuple[str, tuple[str, ...]]  # a role and parameters


def norms(flow: Flow) -> Iterator[Found]:
    """Scales and shifts of normalisations."""
    for at, op in flow.ops.items():
        shifts = op.name in ADDS and len(op.args) == 1 and op.args[0] in flow.normalised
        if shifts and any(op.module != flow.ops[a].module for a in op.args):
            continue
        if op.params and (op.name in NORMS or at in flow.normalised or shifts):
            yield "norm", flow.owned(at)


def convolutions(flow: Flow) -> Iterator[Found]:
    for at, op in flow.ops.items():
        if op.name in CONVS and op.params:
            yield "conv", flow.owned(at)


# -- embeddings ----------------------------------------------------------------------------------


def embeddings(flow: Flow) -> Iterator[Found | Unclear]:
    """Tables that are read by token ids or by position, and the projection of patches."""
    by_sum: dict[int, list[Op]] = {}
    for op in flow.ops.values():
        if _reads_table(flow, op):
            what = _read_by(flow, op)
            if what == "position":
                yield "embedding.position", flow.owned(op.index)
            elif what == "ids" and len(op.shapes[0]) == 3:
                by_sum.setdefault(_joined(flow, op.index), []).append(op)
        elif op.name in ADDS and _adds_table(flow, op):
            yield "embedding.position", flow.owned(op.index)
        elif op.name in ("conv2d", "conv3d") and _patches(flow, op):
            yield "embedding.patch", flow.owned(op.index)
    for tables in by_sum.values():
        yield from _largest(flow, tables)


def _reads_table(flow: Flow, op: Op) -> bool:
    """Whether rows ``[V, D]`` of a parameter are looked up."""
    if op.name == "embedding":
        return bool(op.params)
    return op.name in _PICKS and len(op.values[0].params) > 0 and len(op.values[0].shape) == 2


def _read_by(flow: Flow, op: Op) -> str | None:
    """What a table is read by: ``ids``, ``position``, or something else."""
    ids = next((v.made for v in op.values if not v.params), None)
    if ids is None:
        return None
    above, queue = {ids[0]}, [ids[0]]
    while queue:
        op_above = flow.ops.get(queue.pop())
        if op_above is None:
            continue
        picks = op_above.name in _PICKS  # its values are not those of its indices
        values = op_above.values[:1] if picks else op_above.values
        fresh = {v.made[0] for v in values if v.made is not None} - above
        above |= fresh
        queue += fresh
    names = {flow.ops[a].name for a in above if a in flow.ops}
    inputs = [flow.trace.inputs[-1 - a] for a in above if a < 0]
    if any(t.is_floating_point() for t in inputs):
        return None
    if names & COUNTS:
        apart = any(len(flow.ops[a].args) == 2 for a in above if a in flow.ops
                    and flow.ops[a].name in DIFFERENCES)  # fmt: skip
        return None if apart else "position"
    return "ids" if inputs else None


def _joined(flow: Flow, at: int) -> int:
    """The last of the sums that a table's rows go into, one after another."""
    for _ in range(8):
        after = [n for n in flow.graph.successors(at) if flow.sums(n) or flow.passes(at, n)]
        if not after:
            return at
        at = min(after)
    return at


def _largest(flow: Flow, tables: list[Op]) -> Iterator[Found | Unclear]:
    """Of tables whose rows are added, the ids of the tokens are read by the one with most rows."""
    rows = {op.index: flow.trace.shapes[op.params[0]][0] for op in tables}
    names = {op.index: flow.owned(op.index) for op in tables}
    most = [op for op in tables if rows[op.index] == max(rows.values())]
    if len({names[op.index] for op in most}) > 1:
        for op in most:
            yield Unclear("embedding.token", op, "several tables of one size are added")
        return
    yield "embedding.token", names[most[0].index]


def _adds_table(flow: Flow, op: Op) -> bool:
    """Whether a sum adds rows of a parameter ``[…, S, D]`` to a sequence."""
    if len(op.args) != 1 or len(op.values) != 2:
        return False
    table = next((v for v in op.values if v.params), None)
    if table is None or table.gathered or len(table.shape) < 2 or len(op.shapes[0]) != 3:
        return False
    whole = flow.trace.shapes[table.params[0]]
    rows, width = op.shapes[0][-2:]
    return table.shape[-2:] == (rows, width) and rows > 1 and whole[-1] == width


def _patches(flow: Flow, op: Op) -> bool:
    """Whether a convolution projects the patches of the model's input.

    They do not overlap, or what becomes of them is a sequence.
    """
    source = flow.through(op.args[0])
    if source >= 0 or not flow.trace.inputs[-1 - source].is_floating_point():
        return False
    kernel = next(s for p in op.params if len(s := flow.trace.shapes[p]) > 2)[2:]
    stride = op.given(3, "stride", 1)
    stride = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,) * len(kernel)
    if stride == kernel and max(kernel) > 1:
        return True
    queue = [op.index]
    while queue:
        at = queue.pop()
        if len(flow.shape(at)) == 3:
            return True
        queue += [n for n in flow.graph.successors(at) if flow.ops[n].name in SHAPES]
    return False


# -- the head ------------------------------------------------------------------------------------


def heads(flow: Flow) -> Iterator[Found | Unclear]:
    """The projections to the model's outputs; those may be scaled, shifted and capped."""
    given = {flow.through(at) for at in flow.trace.outputs}
    for at in dict.fromkeys(flow.trace.outputs):
        while (op := flow.ops.get(at)) is not None and not flow.single(at):
            if op.name not in SHAPES | ADDS | MULS | _CAPS or len(set(op.args)) != 1:
                break
            at = op.args[0]
        if op is None or not flow.single(at):
            continue
        if flow.through(op.args[0]) in given:  # as a pooler is
            yield Unclear("head", op, "what it projects is an output of the model too")
        elif _goes_on(flow, at):
            yield Unclear("head", op, "the model computes on with what it gives")
        else:
            yield "head", flow.owned(at)


def _goes_on(flow: Flow, start: int) -> bool:
    """Whether a value is projected again, or multiplied with another one."""
    after = nx.descendants(flow.graph, start)
    return any(flow.weighs(at) or flow.multiplies(at) for at in after)
