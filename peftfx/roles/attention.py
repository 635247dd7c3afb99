"""Attention: found by its core, a fused call or product, softmax, product.

Its projections are the weights that its operands are laid out of, and the one that its result goes
into next.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch.nn.functional as F

from peftfx.roles import slices
from peftfx.roles.flow import JOINS, POINTWISE, SHAPES, TURNS, Flow
from peftfx.roles.sublayer import Projection, Sublayer, Unclear
from peftfx.site import Rows
from peftfx.trace import Op, Value

SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
CALLS = {"scaled_dot_product_attention", "flex_attention"}
_OPERANDS = ("query", "key", "value")
_BETWEEN = POINTWISE | SHAPES | JOINS | {
    "masked_fill", "masked_fill_", "minimum", "maximum", "nan_to_num",
}  # fmt: skip


def attentions(flow: Flow) -> Iterator[Sublayer | Unclear]:
    """Every attention of a trace, in order."""
    for op in flow.ops.values():
        found = _found(flow, op)
        if found is None:
            continue
        yield found
        if isinstance(found, Sublayer) and "output" not in found.projections:
            reason = "what it gives goes into no weight, or into several"
            yield Unclear(f"{found.kind}.output", op, reason)


def _found(flow: Flow, op: Op) -> Sublayer | Unclear | None:
    if op.name in CALLS:
        given = [op.given(i, name) for i, name in enumerate(_OPERANDS)]
        return _attention(flow, op, given, op.index)
    if op.name == "multi_head_attention_forward":
        return _packed(flow, op)
    written = _written_out(flow, op) if op.name in SOFTMAX else None
    if written is None or isinstance(written, Unclear):
        return written
    return _attention(flow, op, *written)


def _attention(flow: Flow, core: Op, given: list[Value], result: int) -> Sublayer | Unclear:
    found: dict[str, tuple[int, ...]] = {}
    for name, value in zip(_OPERANDS, given, strict=True):
        made = flow.weights(value.made[0]) if value.made is not None else frozenset()
        if not made:
            told = "is made of several weights" if made is None else "is made of no weight"
            return Unclear("attention", core, f"its {name} {told}")
        found[name] = tuple(sorted(made))
    if not all(flow.single(at) for ats in found.values() for at in ats):
        return Unclear("attention", core, "its operands are made of experts")
    source = flow.ops[found["query"][0]].args[0]
    memory = flow.ops[found["key"][0]].args[0]
    kind = "attention" if flow.related(source, memory) else "cross_attention"
    parts = {
        name: _projection(flow, ats, value.made or (0, 0), found)
        for (name, ats), value in zip(found.items(), given, strict=True)
    }
    after = flow.onward(result)
    if len(after) == 1 and flow.single(after[0]):
        parts["output"] = Projection(tuple(after), flow.owned(after[0]))
        result = after[0]
    return Sublayer(kind, parts, source, result)


def _projection(
    flow: Flow, ops: tuple[int, ...], made: tuple[int, int], all_ops: dict[str, tuple[int, ...]]
) -> Projection:
    rows: dict[str, Rows] = {}
    for at in ops:
        shared = sum(at in ats for ats in all_ops.values()) > 1
        if shared or slices.leaks(flow, at, made[0]):
            told = slices.rows(flow, at, made)
            if shared or told != ((0, flow.shape(at)[-1]),):
                rows |= dict.fromkeys(flow.owned(at), told)
    return Projection(ops, tuple(n for at in ops for n in flow.owned(at)), rows)


# -- nn.MultiheadAttention -----------------------------------------------------------------------


def _packed(flow: Flow, op: Op) -> Sublayer:
    given = inspect.signature(F.multi_head_attention_forward).bind(
        *op.arguments[0], **op.arguments[1]
    )
    values = {n: v for n, v in given.arguments.items() if isinstance(v, Value)}
    query, key = (values[n].made for n in ("query", "key"))
    alike = query is not None and key is not None and flow.related(query[0], key[0])
    width = values["query"].shape[-1]
    parts = {}
    for i, name in enumerate(_OPERANDS):
        span = ((i * width, (i + 1) * width),)
        separate, packed = values.get(f"{name[0]}_proj_weight"), values.get("in_proj_weight")
        weight, bias = separate or packed, values.get("in_proj_bias")
        assert weight is not None
        sliced = [v for v in (bias, packed if separate is None else None) if v is not None]
        rows = {n: span for v in sliced for n in v.params}
        params = (*weight.params, *(bias.params if bias is not None else ()))
        parts[name] = Projection((op.index,), params, rows)
    last = [values[n] for n in ("out_proj_weight", "out_proj_bias") if n in values]
    parts["output"] = Projection((op.index,), tuple(n for v in last for n in v.params))
    kind = "attention" if alike else "cross_attention"
    return Sublayer(kind, parts, op.args[0], op.index)


# -- written out ---------------------------------------------------------------------------------


def _written_out(flow: Flow, softmax: Op) -> tuple[list[Value], int] | Unclear | None:
    """The operands of attention around a softmax, and its result; None where there is none."""
    after = _product_after(flow, softmax.index)
    scores = _product_before(flow, softmax.index)
    if after is None or scores is None:
        return None
    axis = softmax.given(1, "dim")
    if axis is None:
        return None
    axis = axis % len(flow.shape(softmax.index)) - len(flow.shape(softmax.index))  # from the end
    (before, turned), (product, side, turned_after) = scores, after
    if turned or turned_after:
        return Unclear("attention", softmax, "scores are transposed around the softmax")
    key = _side(before, axis)
    if key is None or not _contracts(product, side, axis):
        return Unclear("attention", softmax, "the softmax is not over the keys")
    factors, ends = before.factors, product.factors
    return [factors[1 - key], factors[key], ends[1 - side]], product.index


def _product_after(flow: Flow, start: int) -> tuple[Op, int, bool] | None:
    """The product that probabilities go into, which factor they are, whether they were turned."""
    queue, seen = [(start, False)], {start}
    while queue:
        at, turned = queue.pop(0)
        for n in sorted(flow.graph.successors(at)):
            op = flow.ops[n]
            if flow.multiplies(n):
                sides = [i for i, v in enumerate(op.factors) if v.made and v.made[0] == at]
                return (op, sides[0], turned) if len(sides) == 1 else None
            if n not in seen and op.name in _BETWEEN:
                seen.add(n)
                queue.append((n, turned or op.name in TURNS))
    return None


def _product_before(flow: Flow, start: int) -> tuple[Op, bool] | None:
    """The first product among those that scores are summed of, and if they were turned since."""
    found: list[tuple[Op, bool]] = []
    queue, seen = [(start, False)], {start}
    while queue:
        at, turned = queue.pop(0)
        if at != start and flow.multiplies(at):
            found.append((flow.ops[at], turned))
            continue
        op = flow.ops.get(at)
        if op is None or (at != start and op.name not in _BETWEEN):
            continue
        fresh = [a for a in dict.fromkeys(op.args) if a not in seen]
        seen.update(fresh)
        queue += [(a, turned or op.name in TURNS) for a in fresh]
    return min(found, key=lambda f: f[0].index, default=None)


def _side(product: Op, axis: int) -> int | None:
    """Which factor of a product an axis of its result (-1 is the last) comes from."""
    if product.name == "einsum":
        terms, result = _equation(product)
        sides = [i for i, term in enumerate(terms) if result[axis] in term]
        return sides[0] if len(sides) == 1 else None
    return {-1: 1, -2: 0}.get(axis)


def _contracts(product: Op, side: int, axis: int) -> bool:
    """Whether a product sums over that axis of that factor."""
    if product.name == "einsum":
        terms, result = _equation(product)
        return terms[side][axis] not in result
    return axis == (-1 if side == 0 else -2)


def _equation(product: Op) -> tuple[list[str], str]:
    left, _, right = str(product.given(0, "equation")).replace(" ", "").partition("->")
    return left.split(","), right
