"""The pass engine: runs passes over a graph and the graphs nested in it, and holds them to rules.

A pass only rewrites. The engine lints, recompiles, gives values to new nodes, checks that outputs
kept their shapes and that the phase's graph is legal, times, and snapshots.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from peftfx import dynamo
from peftfx.errors import GraphError, PeftfxError, SpecError, nearest
from peftfx.log import logger

VALUE = "example_value"  # where Dynamo keeps a node's fake value
META = "peftfx"  # where a node's provenance is kept
UNMADE = "peftfx_unmade"  # marks an output that stands in for one that is left out


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from: the rule, its line in the spec, the method and the site."""

    rule: int
    where: str | None
    method: str
    site: str

    def __str__(self) -> str:
        return f"rule={self.rule} {self.where or ''} method={self.method} site={self.site}"


@dataclass(frozen=True)
class Refusal:
    """A place where a pass could have acted and did not."""

    node: str
    reason: str


@dataclass
class Step:
    """What one pass did to one graph and those nested in it."""

    name: str
    rewrites: int = 0
    seconds: float = 0.0
    skipped: bool = False
    refusals: list[Refusal] = field(default_factory=list)
    snapshot: str | None = None

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Tells that *node* was left alone, and why."""
        self.refusals.append(Refusal(node.name, reason))


@dataclass
class Report:
    """What all passes did. ``str(report)`` is a table."""

    steps: list[Step] = field(default_factory=list)
    choices: list[Any] = field(default_factory=list)  # of the lowering: node, form, reason

    def __str__(self) -> str:
        lines = [f"{'pass':<10}{'rewrites':>9}{'ms':>9}"]
        for step in self.steps:
            done = "skipped" if step.skipped else str(step.rewrites)
            lines.append(f"{step.name:<10}{done:>9}{step.seconds * 1e3:>9.1f}")
            lines += [f"  not {r.node}: {r.reason}" for r in step.refusals]
        lines += [f"  {choice}" for choice in self.choices]
        return "\n".join(lines)


@dataclass
class Context:
    """What passes may ask about a graph, and where they tell what they left alone."""

    provenance: Callable[[fx.Node], Provenance | None] = lambda node: None
    skip: frozenset[str] = frozenset()
    snapshots: bool = False
    frozen: Callable[[fx.Node], bool] = lambda node: False
    autocast: bool = False  # whether the graph, or a part of it, runs under autocast
    chunked: bool = False  # whether logits are left out of the outputs of training
    nested: bool = False  # whether the graph at hand lies in another one
    step: Step = field(default_factory=lambda: Step(""))

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Tells that *node* was left alone, and why."""
        self.step.refuse(node, reason)


class Named(Protocol):
    """A pass of any phase; ``optional`` ones may be skipped."""

    @property
    def name(self) -> str: ...

    @property
    def optional(self) -> bool: ...


class Pass(Named, Protocol):
    """A rewrite of one graph that Dynamo traced; ``check`` is its phase's law."""

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        """Rewrites *gm* in place; gives the number of rewrites."""
        ...

    def check(self, gm: fx.GraphModule) -> str | None:
        """None if *gm* is legal after this pass, else what is wrong."""
        ...


class GraphPass(Named, Protocol):
    """A pass over a graph of AOTAutograd's: the joint one, or one of the two made of it."""

    def __call__(self, graph: fx.Graph, step: Step) -> int:
        """Changes *graph* in place, tells *step* what it left alone; gives how many changes."""
        ...


@dataclass(frozen=True)
class GraphPasses:
    """Runs passes over such a graph; ``uuid`` identifies to a compiler's cache what they do."""

    passes: tuple[GraphPass, ...]
    report: Report

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            start = time.perf_counter()
            step = Step(one.name)
            step.rewrites = one(graph, step)
            graph.lint()
            step.seconds = time.perf_counter() - start
            self.report.steps.append(step)

    def uuid(self) -> str:
        return f"{sources()} {[one.name for one in self.passes]}"


@functools.cache
def sources() -> str:
    """A digest of what compiled graphs depend on: passes, kernels, their tables."""
    digest = hashlib.sha256()
    for directory in ("passes", "kernels"):
        root = Path(__file__).parent / directory
        for file in sorted(f for kind in ("*.py", "*.c", "*.json") for f in root.rglob(kind)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def skipped_by_user(passes: Sequence[Named]) -> frozenset[str]:
    """Names in ``PEFTFX_SKIP``, checked."""
    names = [n.strip() for n in os.environ.get("PEFTFX_SKIP", "").split(",") if n.strip()]
    return check_skip(passes, names)


def check_skip(passes: Sequence[Named], names: Sequence[str]) -> frozenset[str]:
    """*names* as a set, or :class:`SpecError` where one is no optional pass."""
    optional = [p.name for p in passes if p.optional]
    for name in names:
        if name not in optional:
            raise SpecError(f"pass {name!r} cannot be skipped", remedy=nearest(name, optional))
    return frozenset(names)


def run(gm: fx.GraphModule, passes: Sequence[Pass], context: Context | None = None) -> Report:
    """Runs *passes* over *gm* and its nested graphs, in order.

    Raises:
        GraphError: a pass left an illegal graph; the message names pass and node.
    """
    context = context or Context()
    skip = context.skip
    report = Report()
    for one in passes:
        step = context.step = Step(one.name, skipped=one.name in skip)
        report.steps.append(step)
        if step.skipped:
            continue
        start = time.perf_counter()
        for graph in graphs(gm):
            context.nested = graph is not gm
            step.rewrites += _apply(one, graph, context)
        step.seconds = time.perf_counter() - start
        if context.snapshots or logger.isEnabledFor(10):
            step.snapshot = snapshot(gm)
    return report


def graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """*gm* and the graphs nested in it, each once, the innermost first."""
    seen: set[int] = set()

    def visit(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
        if id(module) in seen:
            return
        seen.add(id(module))
        for child in module.children():
            if isinstance(child, fx.GraphModule):
                yield from visit(child)
        yield module

    yield from visit(gm)


def _apply(one: Pass, gm: fx.GraphModule, context: Context) -> int:
    before = _outputs(gm)
    try:
        count = one(gm, context)
    except PeftfxError:
        raise
    except Exception as error:
        raise GraphError(f"pass {one.name} failed: {error}") from error
    if count:
        try:
            gm.graph.lint()
        except RuntimeError as error:
            raise GraphError(f"pass {one.name} left an illegal graph: {error}") from error
        gm.recompile()
        after = _outputs(gm)
        if not _same(before, after):
            raise GraphError(f"pass {one.name} changed the outputs from {before} to {after}")
    wrong = one.check(gm)
    if wrong is not None:
        raise GraphError(f"after pass {one.name}: {wrong}")
    return count


def _outputs(gm: fx.GraphModule) -> list[Any]:
    return [
        arg.meta.get(VALUE)
        for node in gm.graph.find_nodes(op="output")
        for arg in node.all_input_nodes
    ]


def _same(before: list[Any], after: list[Any]) -> bool:
    """Whether the outputs agree in number, dtype and shape; what is not known agrees."""
    if len(before) != len(after):
        return False
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or a.ndim != b.ndim:
                return False
            if not all(dynamo.surely_equal(m, n) for m, n in zip(a.shape, b.shape, strict=True)):
                return False
    return True


def snapshot(gm: fx.GraphModule) -> str:
    """The graphs as Python, each line that a pass made with where it comes from."""
    parts = []
    for graph in graphs(gm):
        marks = {
            n.name: f"pass={n.meta[META][0]} {n.meta[META][1] or ''}".rstrip()
            for n in graph.graph.nodes
            if META in n.meta
        }
        lines = []
        for line in graph.code.strip().splitlines():
            name = line.strip().split(" ", 1)[0].split(":")[0]
            lines.append(f"{line}  # {marks[name]}" if name in marks else line)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def bisect(works: Callable[[frozenset[str]], bool], passes: Sequence[Named]) -> str | None:
    """The optional pass that makes *works* fail, None where skipping all does not help.

    Args:
        works: compiles and tests, with the passes of these names skipped.
    """
    optional = [p.name for p in passes if p.optional]
    if works(frozenset()) or not works(frozenset(optional)):
        return None
    low, high = 0, len(optional)  # the first `low` passes on: works; the first `high` on: fails
    while high - low > 1:
        middle = (low + high) // 2
        if works(frozenset(optional[middle:])):
            low = middle
        else:
            high = middle
    return optional[low]


# -- recording new nodes -------------------------------------------------------------------------


class _Value(fx.Proxy):
    """A proxy that knows the dtype, shape and device of its fake value."""

    def _known(self, name: str) -> Any:
        value = self.node.meta.get(VALUE)
        if isinstance(value, Tensor):
            return getattr(value, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def dtype(self) -> Any:
        return self._known("dtype")

    @property
    def shape(self) -> Any:
        return self._known("shape")

    @property
    def device(self) -> Any:
        return self._known("device")

    @property
    def ndim(self) -> Any:
        return self._known("ndim")


class Recorder(GraphAppendingTracer):
    """Records torch calls on proxies as nodes of a graph, with values and provenance."""

    def __init__(self, graph: fx.Graph, name: str, provenance: Provenance | None = None) -> None:
        super().__init__(graph)
        self.made = (name, provenance)
        self.nodes: list[fx.Node] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[META] = self.made
        self.nodes.append(node)
        give_value(node)
        return node

    def wrap(self, value: Any) -> Any:
        """Proxies for the nodes in *value*."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.wrap(v) for v in value)
        return self.proxy(value) if isinstance(value, fx.Node) else value


def give_value(node: fx.Node) -> None:
    """Computes the fake value of a node from those of its arguments, where they have one."""
    known = True

    def value_of(arg: fx.Node) -> Any:
        nonlocal known
        known = known and VALUE in arg.meta
        return arg.meta.get(VALUE)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    if not known or node.op not in ("call_function", "call_method"):
        return
    mode = next((v.fake_mode for v in _tensors((args, kwargs)) if hasattr(v, "fake_mode")), None)
    if mode is None:
        return
    with mode, torch.no_grad():
        if node.op == "call_function":
            node.meta[VALUE] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            node.meta[VALUE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def unmade(gm: fx.GraphModule) -> list[int]:
    """Which outputs of *gm* stand in for what was left out."""
    (output,) = gm.graph.find_nodes(op="output")
    found = output.args[0] if isinstance(output.args[0], (list, tuple)) else ()
    return [i for i, n in enumerate(found) if isinstance(n, fx.Node) and n.meta.get(UNMADE)]


def is_op(node: fx.Node, name: str) -> bool:
    """Whether *node* calls the op ``peftfx::name``."""
    # by name: the op need not have been defined in this process
    return node.op == "call_function" and str(node.target) in (
        f"peftfx.{name}",
        f"peftfx.{name}.default",
    )
