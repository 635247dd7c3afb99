"""``peftfx::linear_cross_entropy`` and ``peftfx::linear_kl``: losses without whole logits.

    cross entropy   lse(z) - (1 - ε)·z[label] - ε·mean(z),   z = capped(scale·(x·Wᵀ + b))
    divergence      T²·Σ pₜ·(log pₜ - log pₛ),                p = softmax(z / T)

``x [M, K]``, ``W [V, K]`` and ``b [V]`` frozen, ``labels [M]`` int64; ``losses [M]`` in float32 at
least, 0 where the label is *ignore*. A chunk of rows at a time: its logits ``[C, V]``, in x's dtype
and in one buffer for all chunks, become the loss, then, in place, their own gradient, and that
times W is dX. So the forward gives the losses *and* dX, and the backward scales rows of dX: neither
logits nor x are kept. Losses by rows, so that any reduction over them is plain torch.

``scale``, and ``cap``, which is ``cap·tanh(z / cap)`` and none where it is 0, are what models do to
logits (Gemma 2, arXiv 2408.00118; Cohere). The teacher of a divergence (Hinton et al., 2015, arXiv
1503.02531) is given by its logits, or by hidden rows and a head, whose logits are made in the same
chunks. Rows count where ``counts [M]`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.errors import LossError
from peftfx.kernels.definition import define
from peftfx.kernels.devices import why_plain

_library = torch.library.Library("peftfx", "FRAGMENT")
SCHEMAS = {
    "linear_cross_entropy": "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore,"
    " float smoothing, float scale, float cap, int chunk, bool grad) -> (Tensor, Tensor)",
    "linear_kl": "(Tensor x, Tensor weight, Tensor? bias, Tensor teacher, Tensor? teacher_weight,"
    " Tensor? teacher_bias, Tensor counts, float temperature, int chunk, bool grad)"
    " -> (Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

LEAST = 1024  # rows of a chunk: fewer, and reading W is what the products cost
BUFFER = 2**26  # elements of logits that a chunk has at most, beyond that many rows
PART = 2**21  # elements that plain torch works on at once, in float32


def rows_of(chunk: int, classes: int) -> int:
    """Rows of a chunk: as ordered, or at least 1024, and more where there are few classes."""
    return chunk or max(LEAST, BUFFER // max(classes, 1))


# -- definitions -----------------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int, smoothing: float,
    scale: float, cap: float, chunk: int, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses ``[M]``, and dX of their sum ``[M, K]``, which is empty without *grad*."""
    step = _kernels().cross_entropy if why_plain(x) is None else cross_entropy_rows

    def rows(at: slice, z: Tensor, losses: Tensor) -> None:
        step(z, labels[at], losses, ignore, smoothing, scale, cap, grad)

    return _by_chunk(x, weight, bias, rows_of(chunk, weight.shape[0]), grad, rows)


def linear_kl(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, counts: Tensor, temperature: float,
    chunk: int, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The divergence of each row ``[M]``, and dX of their sum, which is empty without *grad*."""
    step = _kernels().kl if why_plain(x) is None else kl_rows

    def rows(at: slice, z: Tensor, losses: Tensor) -> None:
        t = teacher[at]
        t = t if teacher_weight is None else F.linear(t, teacher_weight, teacher_bias)
        step(z, t, counts[at], losses, temperature, grad)

    return _by_chunk(x, weight, bias, rows_of(chunk, weight.shape[0]), grad, rows)


def _by_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: int, grad: bool,
    rows: Callable[[slice, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls *rows*, which turns logits into losses and into their own gradient, on each chunk."""
    m = x.shape[0]
    losses = x.new_empty(m, dtype=torch.promote_types(x.dtype, torch.float32))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if grad else x.new_empty(0)
    buffer = x.new_empty(min(size, m), weight.shape[0])  # [C, V]
    for start in range(0, m, size):
        at = slice(start, min(start + size, m))
        z = buffer[: at.stop - start]
        if bias is None:
            torch.mm(x[at], weight.t(), out=z)
        else:
            torch.addmm(bias, x[at], weight.t(), out=z)
        rows(at, z, losses[at])
        if grad:
            torch.mm(z, weight, out=dx[at])
    return losses, dx


def _kernels() -> Any:
    from peftfx.kernels.linear_cross_entropy import triton

    return triton


# -- what is done to a chunk's logits, in plain torch ----------------------------------------------


def cross_entropy_rows(
    z: Tensor, labels: Tensor, losses: Tensor, ignore: int, smoothing: float, scale: float,
    cap: float, grad: bool,
) -> None:  # fmt: skip
    """Losses of logits ``z [C, V]``, which become their own gradient where that is wanted."""
    step = max(PART // z.shape[1], 1)
    for part, label, out in zip(z.split(step), labels.split(step), losses.split(step), strict=True):
        counts = label != ignore
        at = torch.where(counts, label, 0)[:, None]
        wide = part.to(out.dtype) * scale
        bent = (wide / cap).tanh_() if cap else None
        log_p = (wide if bent is None else bent * cap).log_softmax(-1)
        found = log_p.gather(1, at).squeeze(1).mul_(smoothing - 1)
        if smoothing:
            found -= smoothing * log_p.mean(-1)
        out.copy_(found.masked_fill_(~counts, 0))
        if not grad:
            continue
        d = log_p.exp_()
        d.scatter_add_(1, at, d.new_full(at.shape, smoothing - 1))
        if smoothing:
            d -= smoothing / z.shape[1]
        if bent is not None:
            d *= 1 - bent.square_()
        part.copy_(d.mul_(scale).masked_fill_(~counts[:, None], 0))


def kl_rows(
    z: Tensor, teacher: Tensor, counts: Tensor, losses: Tensor, temperature: float, grad: bool
) -> None:
    """The divergence of each row of logits ``z [C, V]`` from *teacher* ``[C, V]``."""
    step = max(PART // z.shape[1], 1)
    given = (z, teacher, counts, losses)
    for part, t, count, out in zip(*(x.split(step) for x in given), strict=True):
        log_s = (part.to(out.dtype) / temperature).log_softmax(-1)
        log_t = (t.to(out.dtype) / temperature).log_softmax(-1)
        p_t = log_t.exp()
        each = (p_t * (log_t - log_s).masked_fill_(p_t == 0, 0)).sum(-1)
        out.copy_((temperature**2 * each).masked_fill_(~count, 0))
        if grad:
            part.copy_((log_s.exp_() - p_t).mul_(temperature).masked_fill_(~count[:, None], 0))


# -- registration ----------------------------------------------------------------------------------


def plain_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int, smoothing: float,
    scale: float, cap: float, chunk: int, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses at once, by what torch can transform and differentiate; no dX beside them."""
    z = F.linear(x, weight, bias)
    z = z.to(torch.promote_types(x.dtype, torch.float32)) * scale
    z = (z / cap).tanh() * cap if cap else z
    losses = F.cross_entropy(
        z, labels, ignore_index=ignore, reduction="none", label_smoothing=smoothing
    )
    return losses, x.new_empty(0)


def plain_kl(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, counts: Tensor, temperature: float,
    chunk: int, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for the divergence."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x, weight, bias)
    t = teacher if teacher_weight is None else F.linear(teacher, teacher_weight, teacher_bias)
    log_s, log_t = ((a.to(wide) / temperature).log_softmax(-1) for a in (z, t))
    each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return (temperature**2 * each).where(counts, 0), x.new_empty(0)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))
    return losses, x.new_empty(x.shape if rest[-1] else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *rest = inputs
    if any(isinstance(t, Tensor) and t.requires_grad for t in rest):
        raise LossError(
            "a head, labels or a teacher that require a gradient would get none from this loss",
            remedy="freeze them, or take the loss of logits",
        )
    if x.requires_grad and not rest[-1]:
        raise LossError("the loss was asked for without its gradient", remedy="pass grad=True")
    ctx.count = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * ctx.count
    (dx,) = ctx.saved_tensors
    return (_Scaled.apply(dx, grad), *(None,) * (ctx.count - 1))


class _Scaled(torch.autograd.Function):
    """Rows of dX times what flows back into their losses. dX itself has no derivative."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, grad: Tensor) -> Tensor:
        return (dx * grad[:, None]).to(dx.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise LossError(
            "this loss has a first derivative alone",
            remedy="take a loss of logits where you differentiate twice",
        )


PLAIN: dict[str, Any] = {"linear_cross_entropy": plain_cross_entropy, "linear_kl": plain_kl}
DEFINITIONS: dict[str, Any] = {
    "linear_cross_entropy": linear_cross_entropy, "linear_kl": linear_kl,
}  # fmt: skip
for _name, _definition in DEFINITIONS.items():
    define(_library, _name, _definition, plain=PLAIN[_name])
    torch.library.register_fake(f"peftfx::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"peftfx::{_name}", _backward, setup_context=_setup, lib=_library
    )


def _register_autocast(name: str, device: str) -> None:
    """Products in the dtype that is current, as a linear's would be; losses in float32."""

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args
        ]
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.peftfx, name)(*cast)

    _library.impl(name, kernel, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    for _name in SCHEMAS:
        _register_autocast(_name, _device)
