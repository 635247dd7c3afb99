"""``peftfx::low_rank_linear``: a frozen linear plus a low-rank update, and its relatives.

    y = x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ

Hu et al., 2021 (arXiv 2106.09685). The functions below are the ops' definitions; a lowering may
put anything in their place that agrees with them. ``x [..., K]``, ``W [N, K]``, ``A [R, K]``,
``B [N, R]``, ``scale [1]``, ``S [..., R]``. All products are in the dtype of x (``low_rank_add``:
of y); A and B are cast to it, and their gradients come back in their own.

Saved for the backward, besides parameters: x and S; where A is frozen (LoRA-FA), S alone. Dropout
is regenerated from its seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx.kernels.philox.op  # the op peftfx::dropout
from peftfx.errors import NotAdaptedError
from peftfx.kernels.definition import define

assert peftfx.kernels.philox.op
_library = torch.library.Library("peftfx", "FRAGMENT")
_LOW_RANK = "Tensor A, Tensor B, Tensor? lora_bias, Tensor scale, Tensor? seed, float p, int site"
SCHEMAS = {
    "low_rank_add": f"(Tensor y, Tensor x, {_LOW_RANK}) -> (Tensor, Tensor)",
    "low_rank_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_LOW_RANK}) -> (Tensor, Tensor)",
    "low_rank_linear_group": "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] A,"
    " Tensor[] B, Tensor?[] lora_biases, Tensor[] scales) -> (Tensor[], Tensor)",
    "low_rank_expand": "(Tensor x, Tensor S, Tensor[] weights, Tensor?[] biases, Tensor[] B,"
    " Tensor?[] lora_biases, Tensor[] scales) -> Tensor[]",
    "low_rank_backward": "(Tensor dy, Tensor x, Tensor S, Tensor? weight, Tensor A, Tensor B,"
    " Tensor scale, Tensor? seed, float p, int site, bool[] mask)"
    " -> (Tensor, Tensor, Tensor)",
    "low_rank_group_backward": "(Tensor[] dys, Tensor x, Tensor S, Tensor[] weights, Tensor[] A,"
    " Tensor[] B, Tensor[] scales, bool[] mask) -> (Tensor, Tensor[], Tensor[])",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# -- definitions ---------------------------------------------------------------------------------


def dropped(x: Tensor, seed: Tensor | None, p: float, site: int) -> Tensor:
    """x with dropout's mask and scale; x itself where there is no seed."""
    return x if seed is None else torch.ops.peftfx.dropout(x, seed, p, site)


def low_rank_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    lora_bias: Tensor | None,
    scale: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    """``y + s·(drop(x)·Aᵀ)·Bᵀ`` and S; without W, so any kind of base weight will do."""
    dtype = y.dtype
    S = F.linear(dropped(x.to(dtype), seed, p, site), A.to(dtype))
    update = F.linear(S * scale.to(dtype), B.to(dtype))
    if lora_bias is not None:
        update = update + (lora_bias * scale).to(dtype)
    return y + update, S


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lora_bias: Tensor | None,
    scale: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    """``x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ`` and S."""
    y = F.linear(x, weight, bias)
    return low_rank_add(y, x, A, B, lora_bias, scale, seed, p, site)


def low_rank_linear_group(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    A: list[Tensor],
    B: list[Tensor],
    lora_biases: list[Tensor | None],
    scales: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The outputs of linears that share x, and their S joined along the last axis."""
    S = F.linear(x, torch.cat([a.to(x.dtype) for a in A]))  # one skinny product for all
    return low_rank_expand(x, S, weights, biases, B, lora_biases, scales), S


def low_rank_expand(
    x: Tensor,
    S: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    B: list[Tensor],
    lora_biases: list[Tensor | None],
    scales: list[Tensor],
) -> list[Tensor]:
    """The outputs of sites whose S is there already (:mod:`peftfx.kernels.shrink`).

    Without weights *x* is the y [..., N] of one site, which the update is added to.
    """
    ys = []
    parts = S.split([b.shape[1] for b in B], dim=-1)
    for i, (part, up, shift, s) in enumerate(zip(parts, B, lora_biases, scales, strict=True)):
        update = F.linear(part * s.to(x.dtype), up.to(x.dtype))
        if shift is not None:
            update = update + (shift * s).to(x.dtype)
        ys.append((F.linear(x, weights[i], biases[i]) if weights else x) + update)
    return ys


def low_rank_backward(
    dy: Tensor,
    x: Tensor,
    S: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dX (with dY·W where W is given), dA, dB. What *mask* leaves out comes back empty."""
    need_x, need_a, need_b = mask
    dtype = dy.dtype
    dx, da, db = dy.new_empty(0), A.new_empty(0), B.new_empty(0)
    rows = _rows(dy)  # [M, N]
    ds = (rows @ B.to(dtype)) * scale.to(dtype)  # [M, R]
    if need_b:
        db = (rows.t() @ (_rows(S) * scale.to(dtype))).to(B.dtype)
    if need_a:
        kept = dropped(x.to(dtype), seed, p, site)
        da = (ds.t() @ _rows(kept)).to(A.dtype)
    if need_x:
        low = dropped((ds @ A.to(dtype)).reshape(x.shape), seed, p, site)
        dx = low if weight is None else (rows @ weight.to(dtype)).reshape(x.shape) + low
        dx = dx.to(x.dtype)
    return dx, da, db


def low_rank_group_backward(
    dys: list[Tensor],
    x: Tensor,
    S: Tensor,
    weights: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    scales: list[Tensor],
    mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One dX for all, and the dA and dB of each."""
    need_x, need_a, need_b = mask
    rows = [_rows(dy) for dy in dys]
    dtype = x.dtype
    ds = torch.cat(
        [(r @ b.to(dtype)) * s.to(dtype) for r, b, s in zip(rows, B, scales, strict=True)], dim=1
    )
    ranks = [a.shape[0] for a in A]
    das, dbs, dx = [a.new_empty(0) for a in A], [b.new_empty(0) for b in B], x.new_empty(0)
    if need_a:
        joined = ds.t() @ _rows(x)
        das = [part.to(a.dtype, copy=True) for part, a in zip(joined.split(ranks), A, strict=True)]
    if need_b:
        parts = _rows(S).split(ranks, dim=1)
        dbs = [
            (r.t() @ (p * s.to(dtype))).to(b.dtype)
            for r, p, s, b in zip(rows, parts, scales, B, strict=True)
        ]
    if need_x:
        dx = ds @ torch.cat([a.to(dtype) for a in A])
        for r, w in zip(rows, weights, strict=True):
            dx = torch.addmm(dx, r, w)
        dx = dx.reshape(x.shape)
    return dx, das, dbs


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


DEFINITIONS: dict[str, Any] = {
    "low_rank_add": low_rank_add,
    "low_rank_linear": low_rank_linear,
    "low_rank_linear_group": low_rank_linear_group,
    "low_rank_expand": low_rank_expand,
    "low_rank_backward": low_rank_backward,
    "low_rank_group_backward": low_rank_group_backward,
}
for _name, _definition in DEFINITIONS.items():
    define(_library, _name, _definition)


# -- fake kernels: every result is contiguous, but that of an addition, which follows y ----------


def _fake_add(y: Tensor, x: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty((*x.shape[:-1], A.shape[0]))


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    ys, S = _fake_group(x, [weight], [bias], [A])
    return ys[0], S


def _fake_group(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], A: list[Tensor], *rest: Any
) -> tuple[list[Tensor], Tensor]:
    rows = x.shape[:-1]
    ys = [x.new_empty((*rows, w.shape[0])) for w in weights]
    return ys, x.new_empty((*rows, sum(a.shape[0] for a in A)))


def _fake_expand(x: Tensor, S: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    if not weights:
        return [torch.empty_like(x)]
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


def _fake_backward(
    dy: Tensor, x: Tensor, S: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db = _fake_group_backward([dy], x, S, [], [A], [B], [], rest[-1])
    return dx if rest[-1][0] else dy.new_empty(0), da[0], db[0]


def _fake_group_backward(
    dys: list[Tensor], x: Tensor, S: Tensor, weights: list[Tensor], A: list[Tensor],
    B: list[Tensor], scales: list[Tensor], mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    need_x, need_a, need_b = mask
    return (
        x.new_empty(x.shape if need_x else 0),
        [a.new_empty(a.shape if need_a else 0) for a in A],
        [b.new_empty(b.shape if need_b else 0) for b in B],
    )


for _name, _fake in (
    ("low_rank_add", _fake_add),
    ("low_rank_linear", _fake_linear),
    ("low_rank_linear_group", _fake_group),
    ("low_rank_expand", _fake_expand),
    ("low_rank_backward", _fake_backward),
    ("low_rank_group_backward", _fake_group_backward),
):
    torch.library.register_fake(f"peftfx::{_name}", _fake, lib=_library)


# -- autograd ------------------------------------------------------------------------------------


def _save(ctx: Any, output: Any, x: Tensor, weight: Tensor | None, rest: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    a, b, _, scale, seed, ctx.p, ctx.site = rest
    ctx.save_for_backward(_kept(x, a.requires_grad), output[1], weight, a, b, scale, seed)


def _kept(x: Tensor, needed: bool) -> Tensor:
    """x for the backward; where no A trains, one element that has its shape and dtype."""
    return x if needed else x.new_empty(()).expand(x.shape)


def _grads(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor, need_x: bool, need_a: bool, need_b: bool
) -> list[Tensor | None]:
    x, s, weight, a, b, scale, seed = saved
    mask = [need_x, need_a, need_b]
    found = torch.ops.peftfx.low_rank_backward(
        dy, x, s, weight, a, b, scale, seed, ctx.p, ctx.site, mask
    )
    return [g if wanted else None for g, wanted in zip(found, mask, strict=True)]


def _bias_grad(needed: bool, dy: Tensor, scale: Tensor | None) -> Tensor | None:
    if not needed:
        return None
    total = _rows(dy).sum(0)
    return total if scale is None else total.to(scale.dtype) * scale


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, *rest = inputs
    _save(ctx, output, x, None, tuple(rest))


def _add_backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    _, need_x, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: a checkpoint recomputes them for each asking
    dx, da, db = _grads(ctx, saved, dy, need_x, need_a, need_b)
    shift = _bias_grad(need_bias, dy, saved[5])
    return dy, dx, da, db, shift, None, None, None, None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *rest = inputs
    if weight.requires_grad:
        raise NotAdaptedError(
            "the frozen weight of an adapted linear requires a gradient, and would get none",
            remedy="call requires_grad_(False) on it, or add a `train` rule for it",
        )
    _save(ctx, output, x, weight, tuple(rest))


def _linear_backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 10
    need_x, _, need_bias, need_a, need_b, need_lora_bias, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    dx, da, db = _grads(ctx, saved, dy, need_x, need_a, need_b)
    bias = _bias_grad(need_bias, dy, None)
    shift = _bias_grad(need_lora_bias, dy, saved[5])
    return dx, None, bias, da, db, shift, None, None, None, None


def _group_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, a, b, lora_biases, scales = inputs
    if any(t is not None and t.requires_grad for t in (*weights, *biases, *lora_biases)):
        raise NotAdaptedError("low_rank_linear_group gives gradients to x, A and B alone")
    ctx.count = len(weights)
    # autograd takes a list of optional tensors for one leaf as soon as one of them is missing
    ctx.leaves = [any(t is None for t in biases), any(t is None for t in lora_biases)]
    ctx.a_needs = any(t.requires_grad for t in a)
    ctx.b_needs = any(t.requires_grad for t in b)
    held = _kept(x, ctx.a_needs)
    ctx.save_for_backward(held, output[1], *weights, *a, *b, *scales)


def _group_backward(ctx: Any, dys: list[Tensor | None], ds: Tensor | None) -> tuple[Any, ...]:
    x, s, *rest = ctx.saved_tensors
    n = ctx.count
    weights, a, b, scales = (rest[i * n : (i + 1) * n] for i in range(4))
    full = [
        x.new_zeros((*x.shape[:-1], w.shape[0])) if dy is None else dy
        for dy, w in zip(dys, weights, strict=True)
    ]
    mask = [bool(ctx.needs_input_grad[0]), ctx.a_needs, ctx.b_needs]
    dx, da, db = torch.ops.peftfx.low_rank_group_backward(full, x, s, weights, a, b, scales, mask)
    none = [None] * n
    return (
        dx if mask[0] else None,
        none,
        None if ctx.leaves[0] else none,
        da if mask[1] else none,
        db if mask[2] else none,
        None if ctx.leaves[1] else none,
        none,
    )


for _name, _formula, _setup in (
    ("low_rank_add", _add_backward, _add_setup),
    ("low_rank_linear", _linear_backward, _linear_setup),
    ("low_rank_linear_group", _group_backward, _group_setup),
):
    torch.library.register_autograd(
        f"peftfx::{_name}", _formula, setup_context=_setup, lib=_library
    )


# -- autocast: x, W and biases go to the dtype that is current, as for a plain linear -----------


def _lowered(device: str) -> Any:
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return [cast(u) for u in t]
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    return cast


def _register_autocast(name: str, device: str, casts: int) -> None:
    op = getattr(torch.ops.peftfx, name)

    def kernel(*args: Any) -> Any:
        cast = _lowered(device)
        with torch.autocast(device, enabled=False):
            return op(*(cast(t) for t in args[:casts]), *args[casts:])

    _library.impl(name, kernel, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    for _name in ("low_rank_linear", "low_rank_linear_group"):
        _register_autocast(_name, _device, casts=3)
