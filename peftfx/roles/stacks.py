"""Stacks of layers, where a model has several: encoder and decoder, or vision, audio and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import networkx as nx

from peftfx.roles.flow import Flow
from peftfx.roles.sublayer import Sublayer


def stacks(flow: Flow, sublayers: Sequence[Sublayer]) -> Mapping[str, str]:
    """The stack of what is under a module, by the module's path.

    A list of layers with cross-attention is a decoder, and the one that it attends to an encoder.
    Any other is named for the input of the model that it works on.
    """
    lists: dict[str, list[Sublayer]] = {}
    for sublayer in sorted(sublayers, key=lambda s: min(s.ops)):
        whole = flow.ops[min(sublayer.ops)].module.split(".")
        outer = list(takewhile(lambda part: not part.isdigit(), whole))
        if len(outer) < len(whole):
            lists.setdefault(".".join(outer), []).append(sublayer)
    if len(lists) < 2:
        return {}
    names: dict[str, str] = {}
    for path, layers in lists.items():
        crossing = next((s for s in layers if s.kind == "cross_attention"), None)
        if crossing is None:
            names.setdefault(path, _input(flow, layers[0]))
            continue
        names[path] = "decoder"
        key = crossing.projections["key"].ops[0]
        memory = nx.ancestors(flow.graph, key)
        for other, below in lists.items():
            if other != path and any(s.result in memory for s in below):
                names[other] = "encoder"
    return {_root(path, lists): name for path, name in names.items()}


def _input(flow: Flow, sublayer: Sublayer) -> str:
    above = nx.ancestors(flow.graph, sublayer.source) | {sublayer.source}
    inputs = [flow.trace.inputs[-1 - a] for a in above if a < 0]
    if any(not t.is_floating_point() for t in inputs):
        return "text"
    return "vision" if any(t.ndim > 3 for t in inputs) else "audio"


def _root(path: str, lists: Mapping[str, object]) -> str:
    """The outermost module around a list of layers that no other list is in."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        root = ".".join(parts[:depth])
        if not any(other != path and f"{other}.".startswith(f"{root}.") for other in lists):
            return root
    return path
