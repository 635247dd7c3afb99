"""The passes without ``torch.compile``: on a ``torch.fx`` graph module or an exported program."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import ExportedProgram

from peftfx import engine, slots
from peftfx.bind import bind
from peftfx.binding import Binding, entry_of
from peftfx.errors import BindError
from peftfx.install import set_keys
from peftfx.methods.additive import CONV, TRANSPOSED
from peftfx.methods.method import Acts
from peftfx.passes import PIPELINE
from peftfx.plans import Placement
from peftfx.site import SLOT, attrs_of, kind_of
from peftfx.spec import Spec


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
        if placement.method.positional():
            raise BindError(
                "positions are counted by a module that is given the mask, and a graph has none",
                where=placement.where,
                site=placement.site.name,
                remedy="act at all positions, or compile the model",
            )
    for path, adapters in placed.items():
        calls = list(gm.graph.find_nodes(op="call_module", target=path))
        if not calls:
            _by_weight(gm, binding, adapters)
        for call in calls:
            origins |= _marked(gm, call, adapters)
        origins |= _read(gm, adapters)
        slots.unread(gm.get_submodule(path))  # what reads the weight is in the graph
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


def _by_weight(gm: fx.GraphModule, binding: Binding, adapters: list[Placement]) -> None:
    """Moves marks to where a weight is read, of a module that the graph does not call."""
    for p in adapters:
        reason = p.method.weight_form(p.site)
        read = any(True for _ in gm.graph.find_nodes(op="get_attr", target=p.site.name))
        if reason is not None or not read:
            raise BindError(
                f"the graph does not call this module{f': {reason}' if reason else ''}",
                site=p.site.name,
            )
        binding.acts[p.site.name, p.method.name] = "weight"
    set_keys(gm, binding)


def _read(gm: fx.GraphModule, adapters: list[Placement]) -> dict[fx.Node, engine.Provenance]:
    """Marks each read of a weight that adapters act on."""
    origins: dict[fx.Node, engine.Provenance] = {}
    by_weight = [p for p in adapters if entry_of(gm, p).acts == "weight"]
    for name in dict.fromkeys(p.site.name for p in by_weight):
        for read in list(gm.graph.find_nodes(op="get_attr", target=name)):
            users = [u for u in read.users if not engine.is_op(u, "site")]  # marks read the base's
            value, following = read, read.next
            for p in by_weight if users else ():
                if p.site.name == name:
                    with gm.graph.inserting_before(following):
                        value = _mark(gm, p, None, value, {}, origins)
            for user in users:
                user.replace_input_with(read, value)
    return origins


def _mark(
    gm: fx.GraphModule,
    p: Placement,
    y: Any,
    x: Any,
    given: Mapping[str, Any],
    origins: dict[fx.Node, engine.Provenance],
) -> fx.Node:
    """The mark of a placement, as a node."""
    entry, owner = entry_of(gm, p), gm.get_submodule(p.site.module)
    at = f"{p.site.module}." if p.site.module else ""
    stem = f"{at}{SLOT}.{slots.entry_name(p.site, p.method)}"
    own = {"weight": entry.parameter, "bias": "bias"}
    tensors = [_attr(gm, f"{stem}.{n}") for n in entry.names]
    tensors += [_attr(gm, at + own[name]) for name in entry.reads]
    seed = None
    if entry.drops and owner.training:
        seed = gm.graph.call_function(torch.randint, (0, 2**62, ()), {"dtype": torch.int64})
    key = "".join(f"+{name}" for name in given) + entry.key
    node = gm.graph.call_function(
        torch.ops.peftfx.site.default,
        (y, x, [*tensors, *given.values()], seed, key, owner.training),
    )
    origins[node] = engine.Provenance(p.rule, p.where, p.method.name, p.site.name)
    return node


def _marked(
    gm: fx.GraphModule, call: fx.Node, adapters: list[Placement]
) -> dict[fx.Node, engine.Provenance]:
    """Writes out the module that *call* calls, with the marks of its sites around it."""
    path = str(call.target)
    module = gm.get_submodule(path)
    origins: dict[fx.Node, engine.Provenance] = {}
    names = adapters[0].site.inputs
    inputs = {**dict(zip(names, call.args[1:], strict=False)), **call.kwargs}
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}

    def through(acts: Acts, value: Any, x: Any = None) -> Any:
        for p in adapters:
            if entry_of(gm, p).acts == acts:
                y, x_, more = (value, x, given) if acts == "output" else (None, value, {})
                value = _mark(gm, p, y, x_, more, origins)
        return value

    first = call.args[0] if call.args else next(iter(call.kwargs.values()))
    with gm.graph.inserting_before(call):
        x = through("input", first)
        y = through("output", _written_out(gm, path, module, x, given), x)
    call.replace_all_uses_with(y)
    gm.graph.erase_node(call)
    return origins


def _attr(gm: fx.GraphModule, path: str) -> fx.Node:
    """A tensor of *gm*, read at the graph's start, so that any group of its users can be joined."""
    outer, _, leaf = path.rpartition(".")
    owner = gm.get_submodule(outer)
    value = owner._parameters.get(leaf)  # past what marks the reads of others
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.create_node("get_attr", path)
    node.meta[engine.VALUE] = getattr(owner, leaf) if value is None else value
    return node


def _written_out(
    gm: fx.GraphModule, path: str, module: nn.Module, x: Any, given: Mapping[str, Any]
) -> fx.Node:
    graph, kind = gm.graph, kind_of(module)
    weight = _attr(gm, f"{path}.weight") if "weight" in module._parameters else None
    bias = _attr(gm, f"{path}.bias") if getattr(module, "bias", None) is not None else None
    if kind == "linear":
        return graph.call_function(F.linear, (x, weight, bias))
    attrs = attrs_of(module, kind)
    if kind == "embedding":
        return graph.call_function(F.embedding, (x, weight, attrs["padding_idx"]))
    if kind == "embedding_bag":
        said = {n: attrs[n] for n in ("mode", "include_last_offset", "padding_idx")}
        options = {**said, **given}
        return graph.call_function(F.embedding_bag, (x, weight), options)
    calls: dict[str, Callable[..., Any]] = {**CONV, **TRANSPOSED}
    if kind in calls:
        names = ("stride", "padding", "output_padding", "dilation", "groups")
        said = {n: attrs[n] for n in names if n in attrs}
        return graph.call_function(calls[kind], (x, weight, bias), said)
    raise BindError(
        f"of an fx graph, a module of kind {kind} cannot be written out",
        site=path,
        remedy="use torch.export, which writes it out itself, or torch.compile",
    )


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
        aten.conv1d.padding: (1, _conv(nn.Conv1d)),
        aten.conv2d.padding: (1, _conv(nn.Conv2d)),
        aten.conv3d.padding: (1, _conv(nn.Conv3d)),
        aten.conv_transpose1d.default: (1, _transposed(nn.ConvTranspose1d)),
        aten.conv_transpose2d.input: (1, _transposed(nn.ConvTranspose2d)),
        aten.conv_transpose3d.input: (1, _transposed(nn.ConvTranspose3d)),
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


def _said(given: tuple[Any, ...], axes: int, defaults: tuple[int, ...]) -> list[Any]:
    """The arguments of a convolution after its bias: one number for each axis, but groups."""
    found = [*given, *([d] * axes for d in defaults[len(given) :])]
    return [tuple(v * axes if len(v) == 1 else v) if isinstance(v, list) else v for v in found]


def _conv(kind: Any) -> Callable[..., nn.Module]:
    def make(owner: nn.Module, args: tuple[Any, ...]) -> nn.Module:
        w: Any = owner.weight
        stride, padding, dilation = _said(args[3:6], w.ndim - 2, (1, 0, 1))
        groups = args[6] if len(args) > 6 else 1
        made = kind(
            w.shape[1] * groups, w.shape[0], tuple(w.shape[2:]), stride, padding, dilation, groups,
            bias="bias" in owner._parameters, device="meta",
        )  # fmt: skip
        return _with_own(made, owner)

    return make


def _transposed(kind: Any) -> Callable[..., nn.Module]:
    def make(owner: nn.Module, args: tuple[Any, ...]) -> nn.Module:
        w: Any = owner.weight
        stride, padding, spare = _said(args[3:6], w.ndim - 2, (1, 0, 0))
        groups = args[6] if len(args) > 6 else 1
        (dilation,) = _said(args[7:8], w.ndim - 2, (1,))
        made = kind(
            w.shape[0], w.shape[1] * groups, tuple(w.shape[2:]), stride, padding, spare, groups,
            "bias" in owner._parameters, dilation, device="meta",
        )  # fmt: skip
        return _with_own(made, owner)

    return make
