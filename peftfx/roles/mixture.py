"""Mixtures of experts: a router, which picks, and stacks of weights ``[E, …]`` to pick from."""

from __future__ import annotations

from collections.abc import Iterator

from peftfx.roles.flow import FUSED, Flow
from peftfx.roles.sublayer import Projection, Sublayer, Unclear


def mixtures(flow: Flow) -> Iterator[Sublayer | Unclear]:
    """Every mixture of a trace, in order; its result is that of the module around it."""
    known: set[int] = set()
    for op in flow.ops.values():
        if op.name != "topk":
            continue
        router = _scored_by(flow, op.index)
        if router is None or router in known:
            continue
        experts = _picked(flow, op.index, flow.shape(router)[-1])
        if not experts:
            continue
        known.add(router)
        around = flow.smallest({router, *experts})
        if around is None or around.output is None:
            yield Unclear("mlp", flow.ops[router], "no module holds the router and its experts")
            continue
        yield Sublayer(
            "mlp",
            {
                "router": Projection((router,), flow.owned(router)),
                "experts": Projection(tuple(experts), _of_experts(flow, experts)),
            },
            flow.ops[router].args[0],
            around.output,
        )


def _scored_by(flow: Flow, start: int) -> int | None:
    """The linear that gives the scores which are picked by."""
    queue, seen = [start], {start}
    while queue:
        for a in flow.graph.predecessors(queue.pop(0)):
            if flow.linear(a):
                return a
            if a in flow.ops and a not in seen and not _ends(flow, a):
                seen.add(a)
                queue.append(a)
    return None


def _picked(flow: Flow, start: int, count: int) -> list[int]:
    """The products with stacks of *count* weights that what is picked leads to."""
    found, queue, seen = [], [start], {start}
    while queue:
        for n in flow.graph.successors(queue.pop(0)):
            if n in seen or flow.single(n) or flow.sums(n):
                continue
            seen.add(n)
            if flow.weighs(n):
                if not any(flow.trace.shapes[p][0] == count for p in flow.ops[n].params):
                    continue
                found.append(n)
            if not _ends(flow, n):
                queue.append(n)
    return sorted(found)


def _ends(flow: Flow, at: int) -> bool:
    return flow.ops[at].name in FUSED or flow.multiplies(at)


def _of_experts(flow: Flow, ops: list[int]) -> tuple[str, ...]:
    """The stacks, and what lies beside them for each expert: their biases."""
    shapes = flow.trace.shapes
    stacks = [n for at in ops for n in flow.owned(at) if len(shapes[n]) == 3]
    owners = {(n.rpartition(".")[0], shapes[n][0]) for n in stacks}
    return tuple(
        n for n, s in shapes.items() if s and len(s) > 1 and (n.rpartition(".")[0], s[0]) in owners
    )
