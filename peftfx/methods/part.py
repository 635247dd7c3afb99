"""Methods at a part of a module's output features: one projection of a fused one, for example.

The site of such a rule is the rows of the weight that make them. A method is given that part of
everything and knows nothing of the rest; here it is cut out and put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftfx.site import Site

if TYPE_CHECKING:
    from peftfx.methods.method import Call, Method

KINDS = ("linear", "hf_conv1d", "attention", "parameter")
Tensors = Mapping[str, Tensor]


def cut(whole: Tensor, site: Site, axis: int) -> Tensor:
    """The rows of *site* out of *whole*, in which they lie along *axis*; all of it without any."""
    if not site.part:
        return whole
    parts = [whole.narrow(axis, start, stop - start) for start, stop in site.part]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def put(whole: Tensor, new: Tensor, site: Site, axis: int) -> Tensor:
    """*whole* with *new* in the place of the rows of *site*; a new tensor."""
    if not site.part:
        return new
    size = int(site.attrs["width"])
    pieces, at, taken = [], 0, 0
    for start, stop in (*site.part, (size, size)):
        if start > at:
            pieces.append(whole.narrow(axis, at, start - at))
        if stop > start:
            pieces.append(new.narrow(axis, taken, stop - start))
        at, taken = stop, taken + stop - start
    return torch.cat(pieces, axis)


def _base(p: Tensors, site: Site) -> Tensors:
    """The tensors that a method is given, those of the base cut."""
    axes = {"base.weight": site.axes[0], "base.bias": -1}
    return {n: cut(t, site, axes[n]) if n in axes else t for n, t in p.items()}


def apply(method: Method, y: Tensor | None, x: Tensor, p: Tensors, call: Call) -> Tensor:
    """:meth:`Method.apply` at the rows of the call's site."""
    if not call.weight.part:
        return method.apply(y, x, p, call)
    assert y is not None
    new = method.apply(cut(y, call.weight, -1), x, _base(p, call.weight), call)
    return put(y, new, call.weight, -1)


def merge(method: Method, w: Tensor, p: Tensors, site: Site) -> Tensor:
    """:meth:`Method.merge` at the rows of *site*."""
    if not site.part:
        return method.merge(w, p, site)
    axis = site.axes[0]
    return put(w, method.merge(cut(w, site, axis), _base(p, site), site), site, axis)


def merge_bias(method: Method, bias: Tensor | None, p: Tensors, site: Site) -> Tensor | None:
    """:meth:`Method.merge_bias` at the rows of *site*; *bias* itself where it is left alone."""
    if bias is None or not site.part:
        return method.merge_bias(bias, p, site)
    before = cut(bias, site, 0)
    after = method.merge_bias(before, _base(p, site), site)
    return bias if after is None or after is before else put(bias, after, site, 0)
