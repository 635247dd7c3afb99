"""Which rows of a fused weight make which part: query, key and value, or gate and up.

What lies between a weight and the part is run again on random numbers, and differentiated: the
output features with a gradient are the part's. So views, splits, interleaved heads, rotations and
norms need no rules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from peftfx.log import logger
from peftfx.roles.flow import Flow
from peftfx.roles.sublayer import Made
from peftfx.site import Rows
from peftfx.trace import Op, Value


def _above(flow: Flow, weight: int, end: int) -> list[int]:
    """What *end* is made of since a weight was computed with, *end* included; no other weights."""
    found, queue = {end}, [end]
    while queue:
        fresh = [a for a in flow.graph.predecessors(queue.pop()) if a > weight and a not in found]
        fresh = [a for a in fresh if not flow.weighs(a)]
        found.update(fresh)
        queue += fresh
    return sorted(found)


def leaks(flow: Flow, weight: int, end: int) -> bool:
    """Whether some of what a weight makes goes elsewhere than to *end*."""
    above, reached = _above(flow, weight, end), {weight}
    for at in above:
        if reached & set(flow.ops[at].args):
            reached.add(at)
    inside = set(above)
    return any(n not in inside for at in reached - {end} for n in flow.graph.successors(at))


def rows(flow: Flow, weight: int, part: Made) -> Rows:
    """The output features of a linear that *part* is made of; none where they can't be told."""
    ops = [flow.ops[at] for at in _above(flow, weight, part[0])]
    try:
        gradient = _gradient(flow.shape(weight), weight, ops, part)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        logger.info("the rows of %s are not told: %s", flow.ops[weight].params, error)
        return ()
    if gradient is None:
        return ()
    touched = gradient.flatten(0, -2).abs().sum(0) > 0  # [N]
    return _ranges(touched.tolist())


def _gradient(shape: tuple[int, ...], weight: int, ops: list[Op], part: Made) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaf = torch.randn(shape, generator=generator).requires_grad_()
        made: dict[Made, Tensor] = {(weight, 0): leaf * 1}
        for op in ops:
            leaves = [_tensor(v, made, generator) if isinstance(v, Value) else v for v in op.leaves]
            args, kwargs = tree_unflatten(leaves, op.structure)
            out = op.func(*args, **kwargs)
            results = [t for t in tree_leaves(out) if isinstance(t, Tensor)] or [args[0]]
            made.update({(op.index, slot): t for slot, t in enumerate(results)})
        end = made[part]
        if not end.requires_grad:
            return None
        weights = torch.randn(end.shape, generator=generator, dtype=end.dtype)
        return torch.autograd.grad((end * weights).sum(), leaf)[0]


def _tensor(value: Value, made: dict[Made, Tensor], generator: torch.Generator) -> Any:
    if value.made in made:
        return made[value.made]
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator) < 0.5
    if not value.dtype.is_floating_point:
        return torch.zeros(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, generator=generator).to(value.dtype)


def _ranges(touched: list[bool]) -> Rows:
    edges = [i for i, (a, b) in enumerate(zip([False, *touched], [*touched, False])) if a != b]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
