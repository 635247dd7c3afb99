"""The passes without ``torch.compile``: on a ``torch.fx`` graph module or an exported program."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from peftfx import engine, mark
from peftfx.bind import bind
from peftfx.binding import entry_of
from peftfx.errors import BindError
from peftfx.methods.method import Acts
from peftfx.passes import PIPELINE
from peftfx.plans import Placement
from peftfx.site import SLOT, attrs_of, kind_of
from peftfx.spec import Spec

CONVS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


def rewrite(
    target: fx.GraphModule | ExportedProgram,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    adapter: str = "default",
) -> fx.GraphModule:
    """A graph module with the adapter's nodes built in; *target* is left as it is.

    Its trainable parameters are exactly the plan's, and ``peftfx.save`` works on it. What switches
    adapters does not: the graph is fixed.

    Raises:
        BindError: a site that the graph does not call as a module or a plain op.
    """
    spec = Spec.of(spec)
    if isinstance(target, ExportedProgram):
        gm = target.module()
        assert isinstance(gm, fx.GraphModule)
        _raise_modules(gm)
    else:
        gm = copy.deepcopy(target)
    binding = bind(gm, spec, adapter=adapter)
    origins: dict[fx.Node, engine.Provenance] = {}
    placed: dict[str, list[Placement]] = {}
    for placement, _ in binding.installed:
        if placement.method.acts != "parameter":
            placed.setdefault(placement.site.module, []).append(placement)
    for path, adapters in placed.items():
        calls = list(gm.graph.find_nodes(op="call_module", target=path))
        if not calls:
            raise BindError("the graph does not call this module", site=adapters[0].site.name)
        for call in calls:
            origins |= _marked(gm, call, adapters)
    planned = {id(p) for p in gm.parameters() if p.requires_grad}
    context = engine.Context(
        skip=engine.skipped_by_user(PIPELINE),
        provenance=origins.get,
        frozen=lambda n: id(_parameter(gm, n)) not in planned,
    )
    engine.run(gm, PIPELINE, context)
    binding.proven = binding.fixed = True
    return gm


def _parameter(gm: fx.GraphModule, node: fx.Node) -> nn.Parameter | None:
    if node.op != "get_attr":
        return None
    path, _, leaf = str(node.target).rpartition(".")
    return gm.get_submodule(path)._parameters.get(leaf)


def _marked(
    gm: fx.GraphModule, call: fx.Node, adapters: list[Placement]
) -> dict[fx.Node, engine.Provenance]:
    """Writes out the module that *call* calls, with the marks of its sites around it."""
    path, graph = str(call.target), gm.graph
    module = gm.get_submodule(path)
    mark.unread(module)
    origins: dict[fx.Node, engine.Provenance] = {}

    def through(acts: Acts, value: Any, x: Any = None) -> Any:
        for p in adapters:
            entry = entry_of(gm, p)
            if entry.acts != acts:
                continue
            stem = f"{path}.{SLOT}.{p.method.name}"
            tensors = [_attr(gm, f"{stem}.{n}") for n in entry.names]
            tensors += [_attr(gm, f"{path}.{name}") for name in entry.reads]
            seed = None
            if entry.drops and module.training:
                seed = graph.call_function(torch.randint, (0, 2**62, ()), {"dtype": torch.int64})
            pair = (None, value) if acts != "output" else (value, x)
            value = graph.call_function(
                torch.ops.peftfx.site.default, (*pair, tensors, seed, entry.key, module.training)
            )
            origins[value] = engine.Provenance(p.rule, p.where, p.method.name, p.site.name)
        return value

    given = call.args[0] if call.args else next(iter(call.kwargs.values()))
    with graph.inserting_before(call):
        x = through("input", given)
        weight = through("weight", _attr(gm, f"{path}.weight"))
        y = through("output", _written_out(gm, path, module, x, weight), x)
    call.replace_all_uses_with(y)
    graph.erase_node(call)
    return origins


def _attr(gm: fx.GraphModule, path: str) -> fx.Node:
    """A tensor of *gm*, read at the graph's start, so that any group of its users can be joined."""
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.get_attr(path)
    owner, _, leaf = path.rpartition(".")
    node.meta[engine.VALUE] = getattr(gm.get_submodule(owner), leaf)
    return node


def _written_out(
    gm: fx.GraphModule, path: str, module: nn.Module, x: Any, weight: fx.Node
) -> fx.Node:
    graph, kind = gm.graph, kind_of(module)
    bias = _attr(gm, f"{path}.bias") if getattr(module, "bias", None) is not None else None
    if kind == "linear":
        return graph.call_function(F.linear, (x, weight, bias))
    attrs = attrs_of(module, kind)
    if kind == "embedding":
        return graph.call_function(F.embedding, (x, weight, attrs["padding_idx"]))
    if kind in CONVS:
        given = tuple(attrs[n] for n in ("stride", "padding", "dilation", "groups"))
        return graph.call_function(CONVS[kind], (x, weight, bias, *given))
    raise BindError(f"a {kind} cannot be written out", site=path)


# -- exported programs ---------------------------------------------------------------------------


def _raise_modules(gm: fx.GraphModule) -> None:
    """Turns the aten calls of an exported program back into the modules that own their weights."""
    aten = torch.ops.aten
    makers: dict[Any, tuple[int, Callable[..., nn.Module]]] = {
        aten.linear.default: (1, _linear),
        aten.embedding.default: (0, _embedding),
        aten.conv1d.default: (1, _conv(nn.Conv1d)),
        aten.conv2d.default: (1, _conv(nn.Conv2d)),
        aten.conv3d.default: (1, _conv(nn.Conv3d)),
    }
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in makers:
            continue
        position, make = makers[node.target]
        weight = node.args[position]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        path, _, leaf = str(weight.target).rpartition(".")
        owner = gm.get_submodule(path)
        if leaf != "weight" or not path:
            continue
        if kind_of(owner) == "parameter":
            made = make(owner, node.args)
            made.train(owner.training)
            gm.set_submodule(path, made)
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, (node.args[1 - position],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()


def _with_own(made: nn.Module, owner: nn.Module) -> nn.Module:
    made._parameters.update({n: p for n, p in owner._parameters.items() if n in made._parameters})
    return made


def _linear(owner: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    out, width = owner.weight.shape  # type: ignore[union-attr, misc]
    made = nn.Linear(width, out, bias="bias" in owner._parameters, device="meta")
    return _with_own(made, owner)


def _embedding(owner: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    rows, width = owner.weight.shape  # type: ignore[union-attr, misc]
    padding = args[2] if len(args) > 2 and args[2] >= 0 else None
    return _with_own(nn.Embedding(rows, width, padding_idx=padding, device="meta"), owner)


def _conv(kind: Any) -> Callable[..., nn.Module]:
    def make(owner: nn.Module, args: tuple[Any, ...]) -> nn.Module:
        weight = owner.weight
        assert isinstance(weight, Tensor)
        n = weight.ndim - 2
        defaults = ([1] * n, [0] * n, [1] * n, 1)
        given: tuple[Any, ...] = (*args[3:7], *defaults[len(args[3:7]) :])
        stride, padding, dilation, groups = given
        made = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(stride),
            tuple(padding), tuple(dilation), groups, bias="bias" in owner._parameters,
            device="meta",
        )  # fmt: skip
        return _with_own(made, owner)

    return make
