"""Holds the graph to the plan: what it freezes gets no gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from peftfx.engine import VALUE, Context
from peftfx.errors import NotAdaptedError


@dataclass(frozen=True)
class Freeze:
    """A frozen parameter that requires a gradient would train behind the plan's back: refused.

    In a graph module that owns its parameters (``peftfx.rewrite``) they are frozen here.
    """

    name: str = "freeze"
    optional: bool = False

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        count = 0
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr") or not context.frozen(node):
                continue
            value = node.meta.get(VALUE)
            owned = _owned(gm, node)
            if owned is not None and owned.requires_grad:
                owned.requires_grad_(False)
                count += 1
            elif owned is None and isinstance(value, Tensor) and value.requires_grad:
                raise NotAdaptedError(
                    f"the plan freezes a parameter that requires a gradient ({node.name})",
                    remedy="call requires_grad_(False) on it, or add a `train` rule for it",
                )
        return count

    def check(self, gm: fx.GraphModule) -> str | None:
        return None


def _owned(gm: fx.GraphModule, node: fx.Node) -> nn.Parameter | None:
    if node.op != "get_attr":
        return None
    path, _, leaf = str(node.target).rpartition(".")
    return gm.get_submodule(path)._parameters.get(leaf)
