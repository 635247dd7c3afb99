"""The dataflow of a trace: where a value comes from, what it passes, where it goes to."""

from __future__ import annotations

from collections.abc import Iterator

from peftfx.trace import CONVS, MATRIX, NORMS, Call, Op, Trace, Value

ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MULS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
ACTIVATIONS = {
    "silu", "gelu", "relu", "relu_", "relu6", "tanh", "sigmoid", "leaky_relu", "elu", "selu",
    "mish", "hardswish", "softplus", "square", "erf", "logsigmoid",
}  # fmt: skip
DROPOUTS = {"dropout", "_dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d"}
SHAPES = DROPOUTS | {
    "view", "reshape", "view_as", "transpose", "swapaxes", "permute", "movedim", "t", "contiguous",
    "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "chunk", "split", "tensor_split",
    "unbind", "narrow", "__getitem__", "__get__", "to", "type", "type_as", "float", "half",
    "bfloat16", "double", "clone", "detach", "roll", "pad", "repeat", "repeat_interleave",
    "index_select",
}  # fmt: skip
TURNS = {"transpose", "swapaxes", "permute", "movedim", "t", "__get__"}
JOINS = {"cat", "concat", "stack", "__setitem__", "copy_", "where"}
ARITHMETIC = ADDS | MULS | {
    "sub", "sub_", "__sub__", "__rsub__", "rsub", "div", "div_", "__truediv__", "__rtruediv__",
    "true_divide", "pow", "__pow__", "neg", "__neg__", "exp", "clamp", "clamp_", "abs", "sqrt",
    "rsqrt", "reciprocal",
}  # fmt: skip
POINTWISE = ARITHMETIC | ACTIVATIONS | DROPOUTS
_ROOTS = {"rsqrt", "sqrt", "std"}
_STATISTICS = ARITHMETIC | SHAPES | _ROOTS | {"mean", "var", "square"}
PRODUCTS = {"bmm", "matmul", "mm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"}
FUSED = {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}


class Flow:
    """A trace to walk in. Values are numbers, see :class:`peftfx.trace.Op`."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.ops, self.graph = trace, trace.ops, trace.graph
        self.normalised = {at: x for at in self.ops if (x := self._normalises(at)) is not None}
        self.norms_of: dict[int, int] = {}  # a value -> the op that gives it normalised
        for at, x in self.normalised.items():
            self.norms_of.setdefault(x, at)

    # -- what an op is ---------------------------------------------------------------------------

    def weighs(self, at: int) -> bool:
        """Whether the op computes with a matrix of the model."""
        op = self.ops.get(at)
        return op is not None and (op.name in MATRIX or op.name in CONVS) and self._rank(op) > 1

    def linear(self, at: int) -> bool:
        """Whether the op is a product with one matrix ``[N, K]`` or ``[K, N]`` of the model."""
        op = self.ops.get(at)
        return op is not None and op.name in MATRIX and self._rank(op) == 2

    def single(self, at: int) -> bool:
        """Whether the op computes with one weight: a matrix or a kernel, not those of experts."""
        op = self.ops.get(at)
        return op is not None and (self.linear(at) or (op.name in CONVS and self._rank(op) > 1))

    def _rank(self, op: Op) -> int:
        return max((len(self.trace.shapes[p]) for p in op.params), default=0)

    def owned(self, at: int) -> tuple[str, ...]:
        """The parameters that an op reads; of tied ones those of the module that calls it."""
        op = self.ops[at]
        return tuple(dict.fromkeys(n for v in op.values for n in self._placed(op, v)))

    def _placed(self, op: Op, value: Value) -> tuple[str, ...]:
        own = tuple(n for n in value.params if n.rpartition(".")[0] == op.module)
        return own or value.params

    def multiplies(self, at: int) -> bool:
        """Whether the op is a product of two values."""
        op = self.ops.get(at)
        return op is not None and op.name in PRODUCTS and not self.weighs(at) and len(op.args) > 1

    def sums(self, at: int) -> bool:
        """Whether the op adds two values."""
        op = self.ops.get(at)
        return op is not None and op.name in ADDS and len(set(op.args)) == 2

    def depthwise(self, at: int) -> bool:
        """Whether the op is a convolution of each channel by itself."""
        op = self.ops.get(at)
        if op is None or op.name not in CONVS:
            return False
        kernels = [s for p in op.params if len(s := self.trace.shapes[p]) > 2]
        return any(s[1] == 1 < s[0] for s in kernels)

    def turns_last(self, at: int) -> bool:
        """Whether the op moves the last axis elsewhere."""
        op = self.ops[at]
        if op.name not in TURNS:
            return False
        rank = len(op.shapes[0])
        axes = [a for a in op.leaves if isinstance(a, int)]
        if op.name == "permute":
            return not axes or axes[-1] % rank != rank - 1
        return len(axes) != 2 or any(a % rank == rank - 1 for a in axes)

    def shape(self, at: int) -> tuple[int, ...]:
        """The shape of a value; of the first result where an op has several."""
        if at < 0:
            return tuple(self.trace.inputs[-1 - at].shape)
        return self.ops[at].shapes[0]

    def _normalises(self, at: int) -> int | None:
        """What an op gives normalised, if it does: one call, or the last multiplication of several.

        ``w * (x * rsqrt(mean(x²) + ε))``: all that is multiplied comes from one value, by way of
        its statistics.
        """
        op = self.ops[at]
        if op.name in NORMS:
            return op.args[0] if op.args else None
        if op.name not in MULS or any(len(self.trace.shapes[p]) > 1 for p in op.params):
            return None
        if not op.params:
            return None
        front, rooted = set(op.args), False
        for _ in range(16):
            if not front:
                return None
            last = max(front)
            if len(front) == 1 and rooted:
                return last
            made = self.ops.get(last)
            if made is None or made.name not in _STATISTICS or self.weighs(last):
                return None
            rooted |= made.name in _ROOTS or (made.name == "pow" and made.given(1, "", 0) == -0.5)
            front.remove(last)
            front |= set(made.args)
        return None

    # -- backwards -------------------------------------------------------------------------------

    def through(self, at: int, norms: bool = True) -> int:
        """Where a value comes from, past ops that only reshape it, and past norms."""
        while (op := self.ops.get(at)) is not None:
            if norms and at in self.normalised:
                at = self.normalised[at]
            elif op.name in SHAPES and op.args:
                at = op.args[0]
            else:
                return at
        return at

    def origins(self, at: int) -> list[int]:
        """The values that *at* is made of by shapes, norms and weights, one after another.

        They end with the first that two values are joined in, as a residual stream is.
        """
        found = [at := self.through(at)]
        while self.weighs(at) and len(found) < 8:
            args = self.ops[at].args
            if not args:
                break
            found.append(at := self.through(args[0]))
        return found

    def related(self, a: int, b: int) -> bool:
        """Whether two values are made of the same one."""
        of_a = [self._as_made(v) for v in self.origins(a)]
        return any(self._as_made(v) in of_a for v in self.origins(b))

    def _as_made(self, at: int) -> object:
        """A value by what makes it: the same sum, computed twice, is one."""
        if not self.sums(at):
            return at
        op = self.ops[at]
        return (op.name, *sorted(self.through(a, norms=False) for a in op.args))

    def weights(self, start: int) -> frozenset[int] | None:
        """The weights whose results *start* is laid out of; none beyond another.

        None where two of them are multiplied or added: then it is neither's.
        """
        known: dict[int, frozenset[int] | None] = {}
        stack = [start]
        while stack:
            at = stack[-1]
            if at in known:
                stack.pop()
                continue
            op = self.ops.get(at)
            if len(known) > 400:
                return None
            if op is None or op.name == "embedding" or op.name in FUSED:
                known[at] = frozenset()
            elif self.weighs(at):
                known[at] = frozenset({at})
            else:
                missing = [a for a in op.args if a not in known]
                if missing:
                    stack += missing
                    continue
                known[at] = self._united(op, [known[a] for a in dict.fromkeys(op.args)])
            stack.pop()
        return known[start]

    def _united(self, op: Op, parts: list[frozenset[int] | None]) -> frozenset[int] | None:
        if any(p is None for p in parts):
            return None
        sets = [p for p in parts if p]
        if len(set(sets)) > 1 and op.name not in JOINS:
            return None
        return frozenset().union(*sets) if sets else frozenset()

    # -- modules ---------------------------------------------------------------------------------

    def around(self, ops: set[int]) -> list[Call]:
        """The calls of modules in which all of *ops* are, the innermost first."""
        low, high = min(ops), max(ops)
        found = [c for c in self.trace.calls if c.start <= low and high < c.stop]
        return sorted(found, key=lambda c: c.stop - c.start)

    def smallest(self, ops: set[int]) -> Call | None:
        """The innermost of :meth:`around`."""
        return next(iter(self.around(ops)), None)

    # -- forwards --------------------------------------------------------------------------------

    def onward(self, start: int) -> list[int]:
        """The weights that a value goes into next, not past a sum of two values."""
        found, queue, seen = [], [start], {start}
        while queue:
            for n in sorted(self.graph.successors(queue.pop(0))):
                if n in seen:
                    continue
                seen.add(n)
                if self.weighs(n):
                    found.append(n)
                elif not (self.sums(n) or self.multiplies(n) or self.ops[n].name in FUSED):
                    queue.append(n)
        return found

    def to_sum(self, start: int) -> tuple[list[int], int] | None:
        """The values from *start* to a sum with another one, and the sum.

        In between a value may be reshaped, scaled, dropped from and normalised.
        """
        paths = [[start]]
        while paths:
            path = paths.pop(0)
            at = path[-1]
            after = sorted(self.graph.successors(at))
            sums = [n for n in after if self.sums(n)]
            if sums:
                return path, sums[0]
            if len(path) > 24:
                continue
            if at in self.norms_of:
                paths.append([*path, self.norms_of[at]])
            paths += [[*path, n] for n in after if self.passes(at, n)]
        return None

    def passes(self, at: int, after: int) -> bool:
        """Whether an op hands a value on, but for shape, scale and what is dropped."""
        op = self.ops[after]
        if op.name in SHAPES or after in self.normalised:
            return op.args[0] == at
        scales = op.name in MULS or op.name in ("div", "div_", "__truediv__")
        return scales and len(set(op.args)) == 1

    def sums_after(self, start: int) -> Iterator[tuple[int, int]]:
        """The sums that *start* goes into one after another: each with what it is added to."""
        for _ in range(3):
            found = self.to_sum(start)
            if found is None:
                return
            path, total = found
            yield total, next(a for a in self.ops[total].args if a != path[-1])
            start = total

    def residual(self, result: int, source: int) -> bool:
        """Whether *result* is added to what *source* is made of, or to a sum with that."""
        for _, other in self.sums_after(result):
            total = self.through(other)
            terms = self.ops[total].args if self.sums(total) else ()
            if any(self.related(term, source) for term in (other, *terms)):
                return True
        return False
