"""Removes what no result depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from peftfx.engine import META, Context


@dataclass(frozen=True)
class Clean:
    """Dead nodes that passes left behind. The model's own dead code is not peftfx's to judge."""

    name: str = "clean"
    optional: bool = True

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        count = 0
        for node in reversed(list(gm.graph.nodes)):
            if META in node.meta and not node.users and not node.is_impure():
                gm.graph.erase_node(node)
                count += 1
        return count

    def check(self, gm: fx.GraphModule) -> str | None:
        return None
