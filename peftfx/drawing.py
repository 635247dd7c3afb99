"""The dataflow of one layer as a picture: its nodes, their roles, and what a plan adapts."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch import nn

from peftfx.errors import PlanError
from peftfx.plans import Plan
from peftfx.roles import Roles
from peftfx.roles.attention import SOFTMAX
from peftfx.roles.flow import ACTIVATIONS, FUSED, MULS, Flow
from peftfx.select import ROLES
from peftfx.site import OUTPUT, sites
from peftfx.svg import Box, svg
from peftfx.trace import Call, Op, Trace

_NAMES = {"scaled_dot_product_attention": "attention", "flex_attention": "attention",
          "multi_head_attention_forward": "attention"}  # fmt: skip


def draw(
    model: nn.Module,
    plan: Plan,
    trace: Trace,
    roles: Roles,
    layer: int | None = None,
    stack: str | None = None,
) -> str:
    """One layer of *model* as SVG: what computes in it, with roles; what *plan* adapts is filled.

    Args:
        layer: its number; by default the first that *plan* adapts.
        stack: the stack that it is in, where the model has several.

    Raises:
        PlanError: the model has no such layer.
    """
    block = _block(model, plan, roles, layer, stack)
    call = next((c for c in trace.calls if c.path == block), None)
    if call is None:
        raise PlanError(f"{block} is never called", remedy="choose another layer")
    return _Drawer(Flow(trace), plan, roles, call).draw(type(model.get_submodule(block)).__name__)


def _block(model: nn.Module, plan: Plan, roles: Roles, layer: int | None, stack: str | None) -> str:
    """The path of the block to draw; the whole model where there are none."""
    known = [s for s in sites(model) if s.layer is not None]
    if not known and layer is None and stack is None:
        return ""
    adapted = {(_outer(p.site.module), p.site.layer) for p in plan}
    places = dict.fromkeys((_outer(s.module), s.layer) for s in known)
    wanted = [
        (path, number)
        for path, number in places
        if layer in (None, number) and stack in (None, roles.stack(path))
    ]
    if not wanted:
        have = ", ".join(f"{path}.{number}" for path, number in places)
        asked = [f"layer {layer}"] * (layer is not None) + [f"stack {stack}"] * (stack is not None)
        raise PlanError(
            f"the model has no {' in '.join(asked)}", remedy=f"it has {have or 'no layers'}"
        )
    path, number = next((w for w in wanted if w in adapted), wanted[0])
    return f"{path}.{number}"


def _outer(path: str) -> str:
    """The list of blocks that a module is in."""
    parts = path.split(".")
    return ".".join(parts[: next((i for i, p in enumerate(parts) if p.isdigit()), 0)])


@dataclass
class _Drawer:
    flow: Flow
    plan: Plan
    roles: Roles
    call: Call
    boxes: dict[int, Box] = field(default_factory=dict)

    def draw(self, name: str) -> str:
        inside = [at for at in self.flow.ops if self.call.start <= at < self.call.stop]
        end = max(self.flow.ops, default=0) + 1
        adapted = self._at_outputs()
        graph: nx.DiGraph[int] = nx.DiGraph()
        sources: dict[int, set[int]] = {}  # of each value the boxes that it comes from
        for at in inside:
            above = set().union(*(self._from(a, at, sources) for a in self.flow.ops[at].args))
            if self._shown(self.flow.ops[at]):
                self.boxes[at] = self._box(self.flow.ops[at])
                graph.add_edges_from((a, at) for a in above)
                above = {at}
            for box in adapted.get(at, ()):
                after = end + 1 + len(self.boxes)
                self.boxes[after] = box
                graph.add_edges_from((a, after) for a in above)
                above = {after}
            sources[at] = above
        if self.call.output is not None:
            graph.add_edges_from((a, end) for a in sources.get(self.call.output, ()))
            self.boxes[end] = Box(("output",), self._shape(self.call.output), plain=True)
        useful = nx.ancestors(graph, end) | {end} if end in graph else set(graph)
        if not graph:
            raise PlanError(f"nothing is computed in {self.call.path or 'the model'}")
        title = f"{self.call.path or 'the model'} ({name})"
        return svg(title, graph.subgraph(useful), self.boxes)

    def _from(self, value: int, user: int, sources: dict[int, set[int]]) -> set[int]:
        """The boxes that a value comes from; of those outside only streams have one."""
        if value in sources:
            return sources[value]
        if value >= self.call.start:
            return set()
        origin = self.flow.through(value, norms=False)
        stream = origin == self.flow.through(self.call.input or 0, norms=False)
        if not stream and not self.flow.weighs(user):
            return set()  # a mask, positions
        if origin not in self.boxes:
            made = self.flow.ops.get(origin)
            told = "input" if stream or made is None else f"from {made.module}"
            self.boxes[origin] = Box((told,), self._shape(value), plain=True)
        return {origin}

    def _shown(self, op: Op) -> bool:
        at = op.index
        if self.flow.weighs(at) or op.name in FUSED | SOFTMAX or at in self.flow.normalised:
            return True
        if op.name in ACTIVATIONS or op.name == "topk":
            return True
        shapes = {self.flow.shape(a) for a in op.args}
        if len(set(op.args)) != 2 or len(shapes) != 1:
            return False
        if op.name in MULS:
            return len(op.shapes[0]) < 4  # a gate; no angles of positions
        ends = [self.flow.shape(v) for v in (self.call.input, self.call.output) if v is not None]
        return self.flow.sums(at) and op.shapes[0] in ends

    def _box(self, op: Op) -> Box:
        told = sorted({r for n in op.params for r in self.roles.of(n)}, key=ROLES.index)
        name = _NAMES.get(op.name, op.name.strip("_"))
        if not told and self.flow.sums(op.index):
            name = "+"
        elif not told and op.name in MULS:
            name = "×"
        lines = [self._inner(op.module)] if op.params or told else []
        shapes = sorted((self.flow.trace.shapes[n] for n in self.flow.owned(op.index)), key=len)
        if shapes:
            lines.append("×".join(map(str, shapes[-1])))
        acting = [p for p in self.plan if p.site.name in op.params or
                  set(p.site.aliases) & set(op.params)]  # fmt: skip
        note = tuple(dict.fromkeys(f"{p.method.name} (rule {p.rule})" for p in acting))
        return Box(tuple(told) or (name,), tuple(lines), note)

    def _at_outputs(self) -> dict[int, list[Box]]:
        """What the plan does at outputs of modules in this layer, by the value that they give."""
        found: dict[int, list[Box]] = {}
        for c in self.flow.trace.calls:
            if c.output is None or not self.call.start <= c.start <= c.stop <= self.call.stop:
                continue
            for p in self.plan:
                if p.site.module == c.path and p.site.kind == OUTPUT:
                    roles = sorted(p.site.roles, key=ROLES.index)
                    lines = (self._inner(c.path), *roles)
                    box = Box((p.method.name,), lines, (f"rule {p.rule}",))
                    found.setdefault(c.output, []).append(box)
        return found

    def _inner(self, path: str) -> str:
        return path.removeprefix(self.call.path).strip(".")

    def _shape(self, value: int) -> tuple[str, ...]:
        return ("×".join(map(str, self.flow.shape(value))),)
