"""Replaces every mark by the nodes of its method's math."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from peftfx import dynamo
from peftfx.engine import VALUE, Context, Recorder, is_op
from peftfx.methods.key import decode


@dataclass(frozen=True)
class Insert:
    """``peftfx::site(y, x, tensors, seed, key, training)`` becomes what the key's method says.

    All marks of a graph draw from its first seed; what keeps them apart is their ordinal.
    """

    name: str = "insert"
    optional: bool = False

    def __call__(self, gm: fx.GraphModule, context: Context) -> int:
        marks = [n for n in gm.graph.nodes if is_op(n, "site")]
        shared: fx.Node | None = None
        seeds: list[fx.Node] = []
        draws = 0
        for mark in marks:
            y, x, tensors, seed, key, training = arguments(mark)
            if isinstance(seed, fx.Node):
                draws += 1
                shared = shared or seed
                seeds.append(seed)
            provenance = context.provenance(mark)
            recorder = Recorder(gm.graph, self.name, provenance)
            with gm.graph.inserting_before(mark):
                out: Any = decode(key).apply(
                    recorder.wrap(y),
                    recorder.wrap(x),
                    recorder.wrap(list(tensors)),
                    training=training,
                    seed=recorder.wrap(shared) if seed is not None else None,
                    site=max(draws - 1, 0),
                )
            if context.autocast and isinstance(value := x.meta.get(VALUE), Tensor):
                _apart(recorder.nodes, value.device.type)
            mark.replace_all_uses_with(out.node)
            gm.graph.erase_node(mark)
        for seed in dict.fromkeys(seeds):
            if not seed.users and seed.target is torch.randint:  # a mark's own draw
                gm.graph.erase_node(seed)
        return len(marks)

    def check(self, gm: fx.GraphModule) -> str | None:
        left = [n.name for n in gm.graph.nodes if is_op(n, "site")]
        return f"marks are left: {', '.join(left)}" if left else None


def _apart(nodes: list[fx.Node], device: str) -> None:
    """Keeps autocast off a method's math, whose dtypes are explicit, as its reference does.

    Our own ops stay outside: they know of autocast, and may yet be joined with what is around them.
    """
    run: list[fx.Node] = []
    for node in nodes:
        if str(node.target).startswith("peftfx."):
            if run:
                dynamo.without_autocast(run, device)
            run = []
        else:
            run.append(node)
    if run:
        dynamo.without_autocast(run, device)


def arguments(mark: fx.Node) -> tuple[Any, ...]:
    """What a mark is given: y, x, tensors, seed, key, training."""
    names = ("y", "x", "tensors", "seed", "key", "training")
    given = dict(zip(names, mark.args, strict=False)) | dict(mark.kwargs)
    return tuple(given[n] for n in names)
