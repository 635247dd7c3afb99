"""The divergence of softened logits, a chunk of rows at a time. Hinton et al., 2015 (1503.02531).

T² · mean Σ pₜ (log pₜ - log pₛ),   p = softmax(logits / T)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def kl(
    student: Tensor, teacher: Tensor, rows: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """T²·KL(teacher ‖ student), a scalar: the mean over the rows that count.

    Of the logits, *chunk* rows are in float32 at a time, forward and backward; nothing but the
    logits themselves is kept between the two. The teacher's get no gradient.

    Args:
        student, teacher: logits ``[..., V]``.
        rows: which of them count, ``[...]``.
    """
    found: Tensor = _KL.apply(student, teacher, rows, temperature, chunk)
    return found


def wide(t: Tensor) -> Tensor:
    """*t* in float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class _KL(torch.autograd.Function):
    """See :func:`kl`."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, rows)
        ctx.temperature, ctx.chunk = temperature, chunk
        total = wide(student.new_zeros(()))
        for _, log_p, log_t, counts in _chunks(student, teacher, rows, temperature, chunk):
            each = (log_t.exp() * log_t.sub_(log_p)).sum(-1)
            total += each.masked_fill(~counts, 0).sum()
        return temperature**2 * total / rows.sum().clamp(min=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        student, teacher, rows = ctx.saved_tensors
        scale = grad * ctx.temperature / rows.sum().clamp(min=1)
        found = torch.empty_like(student, memory_format=torch.contiguous_format)
        flat = found.view(-1, found.shape[-1])
        for at, log_p, log_t, counts in _chunks(student, teacher, rows, ctx.temperature, ctx.chunk):
            moved = log_p.exp_().sub_(log_t.exp_()).mul_(scale)
            flat[at] = moved.masked_fill_(~counts.unsqueeze(-1), 0)
        return found, None, None, None, None


def _chunks(
    student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Log-probabilities ``[C, V]`` of both, and which rows count ``[C]``, a chunk at a time."""
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    counts = rows.reshape(-1)
    for start in range(0, len(s), chunk):
        at = slice(start, start + chunk)
        logs = [(wide(x[at]) / temperature).log_softmax(-1) for x in (s, t.to(s.device))]
        yield at, logs[0], logs[1], counts[at]
