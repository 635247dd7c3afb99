"""Feed-forwards: a linear of a pointwise function of one linear, or of two that are multiplied.

``down(act(up(x)))`` with a residual around it, and ``down(act(gate(x)) * up(x))``, in which gate
and up may be parts of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peftfx.roles import slices
from peftfx.roles.flow import ACTIVATIONS, MULS, POINTWISE, SHAPES, Flow
from peftfx.roles.sublayer import Made, Projection, Sublayer, Unclear

CUTS = {"chunk", "split", "tensor_split", "unbind", "narrow", "__getitem__"}


@dataclass
class _Region:
    """The pointwise ops between ``down`` and the linears before it, whose results are the ends.

    An end that is cut out of a linear's result has that linear as its value.
    """

    ops: set[int] = field(default_factory=set)
    ends: dict[Made, int] = field(default_factory=dict)


def feed_forwards(flow: Flow, taken: set[int]) -> Iterator[Sublayer | Unclear]:
    """Every feed-forward of a trace, in order.

    Args:
        taken: ops that compute with the weights of attention.
    """
    for at, op in flow.ops.items():
        if at in taken or not flow.linear(at):
            continue
        start = next((v.made for v in op.values if v.made is not None), None)
        region = _region(flow, start) if start is not None else None
        if region is None or start is None or taken & set(region.ends.values()):
            continue
        if len(region.ends) == 1:
            found = _plain(flow, at, region)
        else:
            found = _gated(flow, at, region, start[0])
        if found is not None:
            yield found


def _region(flow: Flow, start: Made) -> _Region | None:
    """What is behind a value, None where that does not begin with one or two linears."""
    region = _Region()
    queue = [start]
    while queue:
        made = queue.pop()
        at = made[0]
        end = _end(flow, made)
        if end is not None:
            region.ends[made] = end
            if len(region.ends) > 2:
                return None
        elif at in region.ops:
            continue
        elif at in flow.normalised:
            region.ops.add(at)
            queue.append((flow.normalised[at], 0))
        elif at >= 0 and (flow.ops[at].name in POINTWISE | SHAPES or flow.depthwise(at)):
            region.ops.add(at)
            queue += [v.made for v in flow.ops[at].values if v.made is not None]
        else:
            return None
    return region if region.ends else None


def _end(flow: Flow, made: Made) -> int | None:
    """The linear that a value is the result of, or is cut out of."""
    at, slot = made
    if flow.linear(at):
        return at
    op = flow.ops.get(at)
    if op is None or op.name not in CUTS:
        return None
    whole = flow.through(at, norms=False)
    cut = flow.linear(whole) and op.shapes[slot][-1] < flow.shape(whole)[-1]
    return whole if cut else None


def _plain(flow: Flow, down: int, region: _Region) -> Sublayer | Unclear | None:
    ((_, up),) = region.ends.items()
    if not any(flow.ops[at].name in ACTIVATIONS for at in region.ops):
        return None
    source = flow.ops[up].args[0]
    if not flow.residual(down, source):
        return Unclear("mlp", flow.ops[up], "an activation follows, but there is no residual")
    parts = {"up": Projection((up,), flow.owned(up)), "down": _down(flow, down)}
    return Sublayer("mlp", parts, source, down)


def _down(flow: Flow, down: int) -> Projection:
    return Projection((down,), flow.owned(down))


def _gated(flow: Flow, down: int, region: _Region, start: int) -> Sublayer | None:
    behind: dict[int, set[Made]] = {}  # of each op the ends, and whether an activation is on them
    active: dict[int, bool] = {}
    gate = up = None
    for at in sorted(region.ops):
        op = flow.ops[at]
        values = [v.made for v in op.values if v.made is not None]
        sides = [{m} if m in region.ends else behind.get(m[0], set()) for m in values]
        behind[at] = set().union(*sides)
        active[at] = op.name in ACTIVATIONS or any(active.get(m[0], False) for m in values)
        if len(behind[at]) == 2 and all(len(s) == 1 for s in sides):  # here the two meet
            on = [active.get(m[0], False) for m in values]
            if op.name not in MULS or len(sides) != 2 or on[0] == on[1] or gate is not None:
                return None
            gate, up = (next(iter(s)) for s in (sides if on[0] else reversed(sides)))
    if gate is None or up is None:
        return None
    ends = region.ends
    sources = [flow.ops[ends[m]].args[0] for m in (gate, up)]
    if flow.through(sources[0]) != flow.through(sources[1]):
        return None
    fused = ends[gate] == ends[up]
    parts = {}
    for name, made in (("gate", gate), ("up", up)):
        params = flow.owned(ends[made])
        rows = dict.fromkeys(params, slices.rows(flow, ends[made], made)) if fused else {}
        parts[name] = Projection((ends[made],), params, rows)
    return Sublayer("mlp", {**parts, "down": _down(flow, down)}, sources[1], down)
