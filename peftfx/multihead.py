"""``nn.MultiheadAttention`` written out: projections, attention, output projection.

Torch's own is one opaque call that reads its weights by itself, so that no mark can come between
them. An adapted one has this ``forward`` instead, compiled or not; while all its marks are off it
has torch's. It computes the same: masks, appended keys, dropout and weights are torch's semantics.

Torch's fast paths (of this module and of ``nn.TransformerEncoderLayer``) read the weights past all
marks. They ask for hooks first, and an adapted module has one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx import mark
from peftfx.errors import NotAdaptedError
from peftfx.hooks import hooked, unhook
from peftfx.plans import Plan
from peftfx.site import BASE, PACKED, PROJECTIONS, SLOT, Site
from peftfx.standing import stand_in

_NESTS = "_peftfx_nests"  # of an nn.TransformerEncoder: that it made nested tensors before


def forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` with the marks of its projections."""
    if not _on(self) or (is_causal and attn_mask is None):  # torch refuses the second itself
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask,
            average_attn_weights, is_causal,
        )  # fmt: skip
    batched = query.ndim == 3
    hint = is_causal and key_padding_mask is None and not need_weights
    masks = (None if hint else _added(attn_mask, query), _added(key_padding_mask, query))
    q, k, v = (_heads(self, x, batched) for x in _projections(self, query, key, value))
    k, v, mask = _appended(self, k, v, *masks)
    dropout = self.dropout if self.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)  # [B, H, L, S]
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        causal = hint and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    if not batched:
        out = out.squeeze(0).transpose(0, 1)  # [L, H, D]
    else:
        out = out.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3))
    return self.out_proj(out.flatten(-2)), weights


def _on(module: Any) -> bool:
    slots = (module._modules.get(SLOT), module.out_proj._modules.get(SLOT))
    return any(entry.key for slot in slots if slot is not None for entry in slot._modules.values())


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to scores; True in it hides."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _projections(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values. The packed weight makes all three of each input that differs."""
    if module.in_proj_weight is None:
        given = zip(PROJECTIONS, (query, key, value), strict=True)
        return tuple(_linear(module, name, x) for name, x in given)
    q = _linear(module, PACKED, query)
    k = q if key is query else _linear(module, PACKED, key)
    v = k if value is key else q if value is query else _linear(module, PACKED, value)
    return tuple(x.chunk(3, -1)[i] for i, x in enumerate((q, k, v)))


def _linear(module: Any, name: str, x: Tensor) -> Tensor:
    """The product of *x* with one of the weights, between its marks."""
    slot = module._modules.get(SLOT)
    entries = [] if slot is None else [e for e in slot._modules.values() if e.parameter == name]
    for entry in entries:
        if entry.key and entry.acts == "input":
            x = mark.fire(module, entry, None, x)
    bias = module.in_proj_bias
    if bias is not None and name in PROJECTIONS:
        bias = bias.chunk(3)[PROJECTIONS.index(name)]
    y = F.linear(x, getattr(module, name), bias)
    for entry in entries:
        if entry.key and entry.acts == "output":
            y = mark.fire(module, entry, y, x)
    return y


def _heads(module: Any, x: Tensor, batched: bool) -> Tensor:
    """``[B, H, L, D]``"""
    if not batched:
        x = x.unsqueeze(0)
    elif not module.batch_first:
        x = x.transpose(0, 1)
    return x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _appended(
    module: Any, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with those that the module appends, and all that hides any of them."""
    more = 0
    if module.bias_k is not None:
        own = (_heads(module, b[0], False) for b in (module.bias_k, module.bias_v))
        k, v = (torch.cat([t, b.expand(len(t), -1, -1, -1)], 2) for t, b in zip((k, v), own))
        more += 1
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        more += 1
    if mask is not None:
        mask = F.pad(mask, (0, more)) if more else mask
        mask = mask.view(-1, module.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
    if padding is None:
        return k, v, mask
    padding = F.pad(padding, (0, more)) if more else padding
    hidden = padding.view(len(k), 1, 1, -1)
    return k, v, hidden if mask is None else mask + hidden


# -- setting up ------------------------------------------------------------------------------------


@functools.cache
def _expanded(cls: Any) -> type[nn.Module]:
    return stand_in(cls, _expanded, forward=forward, **{BASE: cls})


def refuse_nested(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook; that there is one keeps torch's fast paths away. At module level."""
    if any(isinstance(t, Tensor) and t.is_nested for t in (*args, *kwargs.values())):
        raise NotAdaptedError(
            "nn.MultiheadAttention takes nested tensors in its fast path alone, which knows of no "
            "adapter",
            remedy="pad them: tensor.to_padded_tensor(0.0), with a key_padding_mask",
        )


def expand(model: nn.Module, plan: Plan) -> None:
    """Writes out every ``nn.MultiheadAttention`` that *plan* acts in."""
    marked = [p.site for p in plan if p.method.acts != "parameter"]
    for site in marked:
        path = _attends(site)
        module: Any = None if path is None else model.get_submodule(path)
        if module is not None and not _is_expanded(module):
            kind: Any = type(module)
            module.__class__ = _expanded(kind)
            module.register_forward_pre_hook(refuse_nested, with_kwargs=True)
    for path, encoder in _encoders(model):
        inside = any(s.module.startswith(f"{path}.".lstrip(".")) for s in marked)
        if encoder.use_nested_tensor and inside:
            encoder.__dict__[_NESTS], encoder.use_nested_tensor = True, False


def _attends(site: Site) -> str | None:
    """The ``nn.MultiheadAttention`` that marks at *site* need written out."""
    return site.module if site.kind == "attention" else site.caller


def _is_expanded(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is forward


def _encoders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            yield path, module


def armed(model: nn.Module, site: Site) -> bool:
    """Whether what :func:`expand` did for the marks of *site* is still in place."""
    path = _attends(site)
    if path is None:
        return True
    module = model.get_submodule(path)
    whole = _is_expanded(module) and "forward" not in module.__dict__
    return whole and hooked(module, refuse_nested)


def tidy(model: nn.Module) -> None:
    """Gives modules in which no marks are left what they were."""
    for module in list(model.modules()):
        if not _is_expanded(module):
            continue
        if any(SLOT in m._modules for m in (module, module.get_submodule("out_proj"))):
            continue
        module.__class__ = getattr(type(module), BASE)
        unhook(module, refuse_nested)
    for _, encoder in _encoders(model):
        if SLOT not in {m for p, _ in encoder.named_modules() for m in p.split(".")}:
            encoder.use_nested_tensor |= encoder.__dict__.pop(_NESTS, False)
