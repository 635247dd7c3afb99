"""``peftfx::prefix_attention``: attention that sees trained keys and values in front of its own.

    out = softmax([q·pkᵀ·s + bias, q·kᵀ·s + mask])·[pv; v]

Li & Liang, 2021 (arXiv 2101.00190). ``q [B, H, S, D]``, ``k [B, K, T, D]``, ``v [B, K, T, D]``,
``pk [N, P, D]``, ``pv [N, P, D]``, ``mask`` broadcast to ``[B, H, S, T]``, ``bias`` to
``[B, H, S, P]``; K and N divide H. Every query sees the whole prefix.

Two forms. *Merged*, the op: attention over the own keys as if there were no prefix, a small dense
product with the prefix, and the two results weighed by their log-sum-exp. *Joined*, plain torch:
the prefix is put in front of keys, values and mask, which copies all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.kernels.definition import define
from peftfx.kernels.prefix_attention import own as own_part

_library = torch.library.Library("peftfx", "FRAGMENT")
_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor? mask, Tensor? bias,"
    " bool causal, float scale"
)
SCHEMAS = {
    "prefix_attention": f"({_OPERANDS}) -> (Tensor, Tensor)",
    "prefix_attention_backward": f"(Tensor grad, Tensor out, Tensor lse, {_OPERANDS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# -- the merged form -------------------------------------------------------------------------------


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None,
    bias: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out [B, H, S, D]`` in q's dtype, and the log-sum-exp of its scores ``[B, H, S]``."""
    own, own_lse = own_part.attend(q, k, v, mask, causal, scale)
    scores = _scores(q, pk, bias, scale).to(own_lse.dtype)  # [B, H, S, P]
    lse = torch.logaddexp(own_lse, scores.logsumexp(-1))
    weights = (scores - lse[..., None]).exp()
    kept = own.to(lse.dtype) * (own_lse - lse).exp()[..., None]
    out = kept + _by_group(weights, pv.to(lse.dtype))
    return out.to(q.dtype).contiguous(), lse.contiguous()


def prefix_attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor,
    pv: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dpk, dpv.

    The backward of the own part is plain attention's, given the merged ``out`` and ``lse``: its
    probabilities are then those of the whole, and ``Σ grad·out`` is the whole's too.
    """
    dq, dk, dv = own_part.backward(grad, q, k, v, out, lse, mask, causal, scale)
    wide = lse.dtype
    do, values, keys = grad.to(wide), pv.to(wide), pk.to(wide)
    p = (_scores(q, pk, bias, scale).to(wide) - lse[..., None]).exp()  # [B, H, S, P]
    delta = (do * out.to(wide)).sum(-1, keepdim=True)
    ds = p * (_by_group(do, values.transpose(1, 2)) - delta) * scale
    dq = dq.to(wide) + _by_group(ds, keys)
    dpk, dpv = _per_group(ds, q.to(wide), pk), _per_group(p, do, pv)
    return (
        dq.to(q.dtype).contiguous(), dk.contiguous(), dv.contiguous(),
        dpk.to(pk.dtype), dpv.to(pv.dtype),
    )  # fmt: skip


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Heads that share a key head side by side: ``[B, H, S, X] -> [N, B, H/N, S, X]``."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1)


def _by_group(x: Tensor, m: Tensor) -> Tensor:
    """``x·m`` with ``x [B, H, S, X]`` and one ``m [N, X, Y]`` for each group of heads, whose rows
    are one matrix ``[H/N·S, X]``."""
    rows = x.reshape(x.shape[0], m.shape[0], -1, x.shape[-1])
    return (rows @ m).reshape(*x.shape[:-1], m.shape[-1])


def _per_group(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``Σ aᵀ·b`` over batch, heads of a group, and queries: ``[N, P, D]``."""
    groups = like.shape[0]
    left, right = (_grouped(t, groups).flatten(1, 3) for t in (a, b))
    return left.transpose(1, 2) @ right


def _scores(q: Tensor, pk: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _by_group(q.to(wide), pk.to(wide).transpose(1, 2)) * scale  # [B, H, S, P]
    return scores if bias is None else scores + bias


DEFINITIONS: dict[str, Any] = {
    "prefix_attention": prefix_attention,
    "prefix_attention_backward": prefix_attention_backward,
}


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)


def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor,
    pv: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (q, k, v, pk, pv))


for _name, _shapes in (
    ("prefix_attention", _fake), ("prefix_attention_backward", _fake_backward)
):  # fmt: skip
    define(_library, _name, DEFINITIONS[_name])
    torch.library.register_fake(f"peftfx::{_name}", _shapes, lib=_library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    *tensors, out, lse = ctx.saved_tensors
    grads = torch.ops.peftfx.prefix_attention_backward(
        grad, out, lse, *tensors, ctx.causal, ctx.scale
    )
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*needed, None, None, None, None)


torch.library.register_autograd("peftfx::prefix_attention", _backward, setup_context=_setup,
                                lib=_library)  # fmt: skip


def _vmap(info: Any, dims: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """Another axis of batches, folded into the batch."""
    if any(d is not None for d in dims[3:7]):
        raise RuntimeError("peftfx::prefix_attention: only q, k and v may have another batch axis")
    size = info.batch_size
    moved = [
        (t.expand(size, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        for t, d in zip((q, k, v), dims, strict=False)
    ]
    found = torch.ops.peftfx.prefix_attention(*moved, *rest)
    return tuple(t.unflatten(0, (size, -1)) for t in found), (0, 0)


torch.library.register_vmap("peftfx::prefix_attention", _vmap, lib=_library)


def _register_autocast(device: str) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = [t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v)]
        with torch.autocast(device, enabled=False):
            return torch.ops.peftfx.prefix_attention(*given, *rest)

    _library.impl("prefix_attention", kernel, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    _register_autocast(_device)


# -- the joined form, and which is taken ----------------------------------------------------------


def joined(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None,
    bias: Tensor | None, causal: bool, scale: float, dropout: float = 0.0,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same by ``scaled_dot_product_attention`` over joined keys. Traceable with proxies.

    A bias comes with a mask of numbers, whose other columns it was cut from. A gate ``[B, S or 1,
    1]`` multiplies the prefix's keys and values. One for each query cannot go into keys that all
    queries see: then heads are twice as wide, ``[q, g·q]·[k, 0; 0, pk]ᵀ`` and ``[0, pv; v, 0]``.
    """
    factor = None if gate is None else gate.to(q.dtype).unsqueeze(1)  # [B, 1, S or 1, 1]
    queries = q
    if factor is not None and factor.shape[2] != 1:
        queries = torch.cat([q, q * factor], dim=3)

    def in_front(own: Tensor, front: Tensor) -> Tensor:  # [B, K, P + T, D]
        front = front.to(own.dtype).repeat_interleave(own.shape[1] // front.shape[0], 0)
        front = front + torch.zeros_like(own[:, :, :1])
        if queries is not q:
            own = torch.cat([own, torch.zeros_like(own)], dim=3)
            front = torch.cat([torch.zeros_like(front), front], dim=3)
        elif factor is not None:
            front = front * factor
        return torch.cat([front, own], dim=2)

    if causal:
        rows, columns = torch.ones_like(q[0, 0, :, :1]), torch.ones_like(k[0, 0, :, 0])
        mask = (rows * columns).tril() > 0  # [S, T]
    if mask is not None and bias is not None:
        front = bias.to(mask.dtype) + torch.zeros_like(mask[..., :1])
        mask = torch.cat([front, mask + torch.zeros_like(front[..., :1])], dim=-1)
    elif mask is not None:
        mask = F.pad(mask, (pk.shape[1], 0), value=1 if mask.dtype == torch.bool else 0)
    out = F.scaled_dot_product_attention(
        queries, in_front(k, pk), in_front(v, pv), attn_mask=mask, dropout_p=dropout, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    if factor is None or queries is q:
        return out
    return out[..., : v.shape[3]] + factor * out[..., v.shape[3] :]


def why_joined(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> str | None:
    """None where the merged form is taken, else the reason why the joined one is.

    Merging pays where the own part can run as it did, with the log-sum-exp given beside.
    """
    if dropout > 0:
        return "attention drops probabilities out of the whole softmax"
    if mask is not None and mask.requires_grad:
        return "the mask trains"
    return own_part.kernel(q, k, v, mask is not None, causal)[1] or None
