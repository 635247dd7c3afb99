"""What the backend asks about a graph: where its marks are and which rules they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from peftfx.binding import Binding
from peftfx.registry import owner_of

if TYPE_CHECKING:
    from peftfx.engine import Provenance


def marks(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every mark in *gm* and the graphs nested in it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.find_nodes(
                op="call_function", target=torch.ops.peftfx.site.default
            )
            yield from module.graph.find_nodes(op="call_function", target=torch.ops.peftfx.site)


def frozen(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[fx.Node], bool]:
    """Tells of a placeholder of *gm* whether it is a parameter that the plan freezes."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False))

    def of(node: fx.Node) -> bool:
        value = values.get(node)
        owner = owner_of(value) if isinstance(value, torch.Tensor) else None
        return owner is not None and owner.site is None

    return of


def provenance(
    gm: fx.GraphModule, inputs: Sequence[Any], binding: Binding
) -> Callable[[fx.Node], Provenance | None]:
    """Tells of a mark in *gm* which rule it comes from, by the tensors that it carries."""
    from peftfx.engine import Provenance

    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    values = dict(zip(placeholders, inputs, strict=False))
    placed = {(p.site.name, m.name): p for p, m in binding.installed}

    def of(node: fx.Node) -> Provenance | None:
        if len(node.args) < 3 or not isinstance(node.args[2], (list, tuple)):
            return None
        for arg in node.args[2]:
            value = values.get(arg)  # type: ignore[arg-type]
            owner = owner_of(value) if isinstance(value, torch.Tensor) else None
            if owner is None or owner.site is None:
                continue
            for (site, method), p in placed.items():
                if site == owner.site and f'"{method}"' in str(node.args[4]):
                    return Provenance(rule=p.rule, where=p.where, method=method, site=site)
        return None

    return of
