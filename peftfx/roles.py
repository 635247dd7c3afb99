"""Roles: what a parameter is for, read off the model's dataflow.

Attention is found by its core (a fused call, or product, softmax, product); its projections are
the weights that its operands come from and that its result goes to. A feed-forward block is found
by what lies between two linears and by the residual around it. No names are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import networkx as nx

from peftfx.select import ROLES
from peftfx.trace import Op, Trace

ACTIVATIONS = {
    "silu", "gelu", "relu", "relu6", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "mish",
    "hardswish", "softplus", "square", "pow", "erf",
}  # fmt: skip
MATRIX = {"linear", "addmm", "matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__"}
CONVS = {"conv1d", "conv2d", "conv3d"}
NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MULS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
SHAPES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze",
    "unsqueeze", "expand", "chunk", "split", "__getitem__", "to", "float", "type_as", "dropout",
    "clone", "narrow", "unbind", "tensor_split", "t", "movedim", "detach", "half", "bfloat16",
    "_dropout", "alpha_dropout",
}  # fmt: skip


@dataclass
class Roles:
    """Roles by parameter name. A fused projection has several."""

    found: dict[str, set[str]] = field(default_factory=dict)
    unclear: list[tuple[str, str]] = field(default_factory=list)  # parameter, reason

    def of(self, name: str) -> frozenset[str]:
        """The roles of a parameter; none where the dataflow does not tell."""
        return frozenset(self.found.get(name, ()))

    def explain(self, role: str) -> str:
        """What was found instead of *role*."""
        have = sorted({r for roles in self.found.values() for r in roles})
        text = f"the model shows {', '.join(have)}" if have else "the model shows no roles"
        near = [f"{name} ({reason})" for name, reason in self.unclear[:3]]
        return text + (f"; not told: {'; '.join(near)}" if near else "") + f"; not {role}."

    def add(self, op: Op, role: str) -> None:
        assert role in ROLES, role
        for name in op.params:
            self.found.setdefault(name, set()).add(role)


def roles(trace: Trace) -> Roles:
    """The roles of a traced model's parameters."""
    return _Finder(trace).run()


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.graph = trace.graph
        self.ops = trace.ops
        self.roles = Roles()

    def run(self) -> Roles:
        for op in self.ops.values():
            if op.name == "scaled_dot_product_attention":
                self._attention(op.args[:3], op.index)
            elif op.name == "multi_head_attention_forward":
                self._packed(op)
            elif op.name in ("softmax", "_softmax", "_safe_softmax"):
                self._written_out(op)
        for op in self.ops.values():
            if op.name in MULS and len(op.args) == 2:
                self._gated(op)
        for op in self.ops.values():
            if op.name in ACTIVATIONS:
                self._plain(op)
        for op in self.ops.values():
            self._local(op)
        for out in self.trace.outputs:
            self._head(out)
        return self.roles

    # -- walking ---------------------------------------------------------------------------------

    def _weighs(self, op: Op) -> bool:
        """Whether *op* computes with a matrix of the model."""
        return (op.name in MATRIX or op.name in CONVS) and any(
            len(self.trace.shapes[p]) > 1 for p in op.params
        )

    def _back(self, start: int, stop_at_norms: bool = False) -> Iterator[Op]:
        """The weight ops that *start* comes from, nearest first; none beyond another."""
        yield from self._walk(start, self.graph.predecessors, stop_at_norms)

    def _walk(self, start: int, step: object, stop_at_norms: bool) -> Iterator[Op]:
        queue, seen = [start], {start}
        while queue:
            at = queue.pop(0)
            op = self.ops.get(at)
            if op is not None and at != start and self._weighs(op):
                yield op
                continue
            backwards = at == start and step == self.graph.predecessors
            if op is not None and backwards and self._weighs(op):
                yield op
                continue
            if op is not None and op.name == "embedding":
                continue
            for other in step(at):  # type: ignore[operator]
                if other not in seen:
                    seen.add(other)
                    queue.append(other)

    def _through(self, start: int, names: Iterable[str]) -> int:
        """Where *start* comes from, past ops of one input whose names are given."""
        at = start
        while (op := self.ops.get(at)) is not None:
            if op.name not in names or not op.args or self._weighs(op):
                return at
            at = op.args[0]
        return at

    def _source(self, op: Op) -> int:
        """The value that a projection is applied to, past shapes and norms."""
        return self._through(op.args[0], SHAPES | NORMS) if op.args else op.index

    # -- attention -------------------------------------------------------------------------------

    def _attention(self, operands: tuple[int, ...], result: int) -> None:
        if len(operands) < 3:
            return
        found = [next(self._back(value), None) for value in operands]
        query, key, value = found
        if query is None or key is None or value is None:
            return
        cross = self._source(query) != self._source(key)
        prefix = "cross_attention" if cross else "attention"
        for op, name in ((query, "query"), (key, "key"), (value, "value")):
            self.roles.add(op, f"{prefix}.{name}")
        output = next(self._walk(result, self.graph.successors, False), None)
        if output is not None:
            self.roles.add(output, f"{prefix}.output")

    def _packed(self, op: Op) -> None:
        prefix = "attention" if len(set(op.args[:2])) == 1 else "cross_attention"
        for name in op.params:
            if name.endswith(("bias_k", "bias_v")):
                continue
            shape = self.trace.shapes[name]
            packed = (len(shape) == 2 and shape[0] == 3 * shape[1]) or name.endswith("in_proj_bias")
            for role in ("query", "key", "value") if packed else ("output",):
                self.roles.found.setdefault(name, set()).add(f"{prefix}.{role}")

    def _written_out(self, softmax: Op) -> None:
        """Attention as product, softmax, product."""
        after = self._next_product(softmax.index)
        if after is None or len(after.args) < 2:
            return
        probabilities = self._reaches(softmax.index, after)
        values = [a for a in after.args if a not in probabilities]
        scores = [op for op in self._products_before(softmax.index) if len(op.args) >= 2]
        if not values or not scores:
            return
        first = min(scores, key=lambda op: op.index)
        self._attention((first.args[0], first.args[1], values[0]), after.index)

    def _next_product(self, start: int) -> Op | None:
        queue = [start]
        seen = set(queue)
        while queue:
            at = queue.pop(0)
            op = self.ops[at]
            if at != start and op.name in MATRIX:
                return None if self._weighs(op) else op
            for other in self.graph.successors(at):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return None

    def _reaches(self, start: int, product: Op) -> set[int]:
        return {a for a in product.args if a == start or nx.has_path(self.graph, start, a)}

    def _products_before(self, start: int) -> list[Op]:
        found, queue, seen = [], [start], {start}
        while queue:
            at = queue.pop(0)
            op = self.ops.get(at)
            if op is None:
                continue
            if at != start and op.name in MATRIX:
                if not self._weighs(op):
                    found.append(op)
                continue
            for other in self.graph.predecessors(at):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return found

    # -- feed-forward ----------------------------------------------------------------------------

    def _gated(self, product: Op) -> None:
        """``down(act(gate(x)) * up(x))``."""
        left, right = product.args
        sides = [(self._branch(left), left), (self._branch(right), right)]
        (a, a_active), (b, b_active) = sides[0][0], sides[1][0]
        if a is None or b is None or a_active == b_active:
            return
        gate, up = (a, b) if a_active else (b, a)
        if self._source(gate) != self._source(up) or self._taken(gate) or self._taken(up):
            return
        down = next(self._walk(product.index, self.graph.successors, False), None)
        if down is None:
            return
        self.roles.add(gate, "mlp.gate")
        self.roles.add(up, "mlp.up")
        self.roles.add(down, "mlp.down")

    def _branch(self, start: int) -> tuple[Op | None, bool]:
        """The linear that a branch starts with, and whether an activation is on it."""
        at, active = start, False
        while (op := self.ops.get(at)) is not None:
            if self._weighs(op):
                return (op if op.name in MATRIX else None), active
            if op.name in ACTIVATIONS:
                active = True
            elif op.name in MULS and len(set(op.args)) == 2 and self._is_activation(op):
                active = True  # x * sigmoid(x) and the like, written out
            elif op.name not in SHAPES:
                return None, active
            if not op.args:
                return None, active
            at = op.args[0]
        return None, active

    def _is_activation(self, product: Op) -> bool:
        left, right = product.args
        for x, fx in ((left, right), (right, left)):
            op = self.ops.get(fx)
            if op is not None and op.name in ACTIVATIONS and x in op.args:
                return True
        return False

    def _plain(self, activation: Op) -> None:
        """``down(act(up(x)))``, with a residual around it."""
        if not activation.args:
            return
        up = self.ops.get(self._through(activation.args[0], SHAPES | MULS | ADDS | ACTIVATIONS))
        if up is None or not self._weighs(up) or up.name not in MATRIX or self._taken(up):
            return
        if any("mlp" in r for name in up.params for r in self.roles.of(name)):
            return  # the gate of a gated block
        down = next(self._walk(activation.index, self.graph.successors, False), None)
        if down is None or down.name not in MATRIX or self._taken(down):
            return
        if not self._residual(up, down):
            for name in up.params:
                self.roles.unclear.append((name, "an activation follows, but there is no residual"))
            return
        self.roles.add(up, "mlp.up")
        self.roles.add(down, "mlp.down")

    def _residual(self, up: Op, down: Op) -> bool:
        """Whether what goes into *up* is added to what comes out of *down*."""
        source = self._source(up)
        at = down.index
        for _ in range(12):
            following = sorted(self.graph.successors(at))
            if not following:
                return False
            for n in following:
                op = self.ops[n]
                if op.name in ADDS and len(op.args) == 2:
                    other = op.args[0] if op.args[1] == at else op.args[1]
                    if self._through(other, SHAPES | NORMS) == source or other == up.args[0]:
                        return True
                    below = self._through(other, SHAPES | NORMS)
                    return nx.has_path(self.graph, below, source)
            at = following[0]
        return False

    def _taken(self, op: Op) -> bool:
        return any(
            role.rpartition(".")[0] in ("attention", "cross_attention")
            for name in op.params
            for role in self.roles.of(name)
        )

    # -- the rest --------------------------------------------------------------------------------

    def _local(self, op: Op) -> None:
        if op.name == "embedding":
            role = "embedding.token" if self._from_ids(op) else "embedding.position"
            if role == "embedding.position" and not self._from_range(op):
                return
            self.roles.add(op, role)
        elif op.name in NORMS:
            self.roles.add(op, "norm")
        elif op.name in CONVS:
            self.roles.add(op, "conv")
        elif op.name in MULS and op.params and not self._weighs(op) and self._normalises(op):
            self.roles.add(op, "norm")

    def _normalises(self, op: Op) -> bool:
        """Whether a vector scales what was divided by its root mean square."""
        queue = [(a, 0) for a in op.args]
        while queue:
            at, depth = queue.pop()
            made = self.ops.get(at)
            if made is None or depth > 3 or self._weighs(made):
                continue
            if made.name == "rsqrt":
                return True
            queue += [(a, depth + 1) for a in made.args]
        return False

    def _from_ids(self, op: Op) -> bool:
        return any(
            n < 0 and not self.trace.inputs[-1 - n].is_floating_point() and n == self._first_ids()
            for a in op.args
            for n in (*nx.ancestors(self.graph, a), a)
        ) and not self._from_range(op)

    def _first_ids(self) -> int:
        for number, t in enumerate(self.trace.inputs):
            if not t.is_floating_point():
                return -1 - number
        return 0

    def _from_range(self, op: Op) -> bool:
        return any(
            (o := self.ops.get(n)) is not None and o.name in ("arange", "cumsum")
            for a in op.args
            for n in (*nx.ancestors(self.graph, a), a)
        )

    def _head(self, out: int) -> None:
        op = self.ops.get(self._through(out, SHAPES))
        if op is None or not self._weighs(op) or op.name not in MATRIX:
            return
        if not any(self.roles.of(n) - {"embedding.token"} for n in op.params):
            self.roles.add(op, "head")
