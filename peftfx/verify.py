"""Checks that a bound model still carries every mark, made again at every compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from peftfx import mark
from peftfx.bind import Binding, entry_of
from peftfx.errors import NotAdaptedError
from peftfx.registry import owner_of

if TYPE_CHECKING:
    from peftfx.engine import Provenance

SURGERY = "release the model before changing its modules, and bind it again afterwards"


def check_bound(model: nn.Module, binding: Binding) -> None:
    """Raises :class:`NotAdaptedError` where a planned mark is gone or a frozen parameter trains."""
    for placement, method in binding.installed:
        site = placement.site
        try:
            owner = model.get_submodule(site.module)
        except AttributeError:
            raise NotAdaptedError(
                "the module is gone", site=site.name, remedy=SURGERY
            ) from None
        if placement.method.acts == "parameter":
            continue
        entry = entry_of(model, placement)
        if not mark.armed(owner, entry.acts):
            raise NotAdaptedError(
                "the hook that carried the adapter is gone", site=site.name, remedy=SURGERY
            )
        if bool(entry.key) != (binding.enabled and not binding.merged):
            raise NotAdaptedError(
                "the adapter was switched behind peftfx's back", site=site.name, remedy=SURGERY
            )
        assert method is not None


def marks(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every mark in *gm* and the graphs nested in it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.find_nodes(
                op="call_function", target=torch.ops.peftfx.site.default
            )
            yield from module.graph.find_nodes(op="call_function", target=torch.ops.peftfx.site)


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
                    return Provenance(
                        rule=p.rule, where=p.where, method=method, site=site
                    )
        return None

    return of
