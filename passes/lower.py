"""Chooses what computes each op, in the forward and backward graphs that AOTAutograd partitioned.

Claims are asked in order; the first that says yes gives its form. What nobody claims is replaced
by its definition, so that the inner compiler fuses what it can.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from peftfx import dynamo
from peftfx.kernels.low_rank_linear import op as low_rank
from peftfx.kernels.philox import op as philox
from peftfx.kernels.prefix_attention import op as prefix
from peftfx.passes import cost
from peftfx.passes.cpu import Compiled, Folded
from peftfx.passes.gpu import Accumulate, Triton


class Claim(Protocol):
    """Something that can compute an op: a kernel, or another form of its products."""

    @property
    def name(self) -> str: ...

    @property
    def ops(self) -> tuple[str, ...]: ...

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        """None if the claim takes this call (fake tensors for tensors), else the reason."""
        ...

    @property
    def emit(self) -> Callable[..., Any] | None:
        """The form, called with the op's name and arguments, traceable. None: the op stays as it
        is, and its own kernel is called."""
        ...


@dataclass(frozen=True)
class Definition:
    """The op's own definition: always right, never refused."""

    name: str = "definition"
    ops: tuple[str, ...] = (*low_rank.DEFINITIONS, *prefix.DEFINITIONS, "dropout")

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        return None

    def emit(self, op: str, *args: Any) -> Any:
        definitions = {**low_rank.DEFINITIONS, **prefix.DEFINITIONS, "dropout": philox.dropout}
        return definitions[op](*args)


@dataclass(frozen=True)
class InductorRandom:
    """Masks by Inductor's own generator, which is the same Philox, inside the fused loop.

    Written out, ten rounds of integer arithmetic would be inlined again and again.
    """

    name: str = "inductor's random"
    ops: tuple[str, ...] = ("dropout",)

    def check(self, op: str, args: Sequence[Any]) -> str | None:
        if dynamo.hint(args[0].numel()) >= 2**31:
            return "an index has more than 31 bits"
        return None

    def emit(self, op: str, *args: Any) -> Any:
        x, seed, p, site = args
        numbers = dynamo.inductor_random(list(x.shape), philox.stream(seed, site))
        return torch.where(numbers >= p, x * (1.0 / (1.0 - p)), torch.zeros_like(x))


CLAIMS: list[Claim] = [Compiled(), Folded(), Triton(), Accumulate(), Definition()]
INDUCTOR_CLAIMS: list[Claim] = [Compiled(), InductorRandom(), *CLAIMS[1:]]


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
    """A callable on graphs; ``uuid`` identifies to a compiler's cache what it would do."""

    claims: Sequence[Claim] = field(default_factory=lambda: list(CLAIMS))
    choices: list[Choice] = field(default_factory=list)

    def __call__(self, graph: fx.Graph | fx.GraphModule) -> None:
        graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
        kept: set[fx.Node] = set()
        while found := [n for n in graph.nodes if n not in kept and _op_name(n) is not None]:
            for node in found:  # forms may use ops of ours: another round lowers those
                if not self._lower(graph, node):
                    kept.add(node)
        graph.lint()

    def uuid(self) -> Any:
        """Identifies the lowering to Inductor's cache: its sources and claims."""
        digest = hashlib.sha256(_sources())
        digest.update(",".join(c.name for c in self.claims).encode())
        digest.update(repr(cost.settings()).encode())
        return digest.hexdigest()

    def _lower(self, graph: fx.Graph, node: fx.Node) -> bool:
        """Puts the chosen form in the node's place; False if the node stays."""
        name = _op_name(node)
        assert name is not None
        args = fx.node.map_arg(node.args, dynamo.fake_value)
        refusals = []
        for claim in self.claims:
            if name not in claim.ops:
                continue
            reason = claim.check(name, args)
            if reason is None:
                break
            refusals.append((claim.name, reason))
        price = cost.predict(name, args, claim.name)
        self.choices.append(Choice(node.name, name, claim.name, tuple(refusals), price))
        emit = claim.emit
        if emit is None:
            return False
        splice(graph, node, lambda *given: emit(name, *given), args)
        return True


@functools.cache
def _sources() -> bytes:
    """A digest of what lowering is made of: passes, kernels, their tables."""
    digest = hashlib.sha256()
    for directory in (Path(__file__).parent, Path(str(low_rank.__file__)).parents[1]):
        for file in sorted(f for kind in ("*.py", "*.c", "*.json") for f in directory.rglob(kind)):
            digest.update(file.read_bytes())
    return digest.digest()


def _op_name(node: fx.Node) -> str | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    if not name.startswith("peftfx::"):
        return None
    name = name.removeprefix("peftfx::")
    return name if name in {o for c in CLAIMS for o in c.ops} else None


def splice(graph: fx.Graph, node: fx.Node, form: Callable[..., Any], args: Any) -> None:
    """Puts the aten graph of *form* in the place of *node*."""
    flat: list[fx.Node] = []  # every occurrence, in order

    def note(arg: fx.Node) -> fx.Node:
        flat.append(arg)
        return arg

    fx.node.map_arg(node.args, note)
    values: list[Tensor] = [dynamo.fake_value(n) for n in flat]

    def on_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return form(*fx.node.map_arg(node.args, lambda _: next(given)))

    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    with mode or contextlib.nullcontext():  # what a form makes itself is fake too
        traced = make_fx(on_tensors, decomposition_table=dynamo.decompositions())(*values)
    mapping: dict[fx.Node, Any] = {}
    inputs = iter(flat)
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: mapping[n])
            else:
                copy = graph.node_copy(inner, lambda n: mapping[n])
                copy.meta.update(inner.meta)
                for key in ("stack_trace", "nn_module_stack", "partitioner_tag", "recompute"):
                    if key in node.meta:
                        copy.meta[key] = node.meta[key]
                mapping[inner] = copy
    _replace(graph, node, result)


def _replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # getitem of a tuple or a list
            _replace(graph, user, result[user.args[1]])
    graph.erase_node(node)
