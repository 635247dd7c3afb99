"""Losses of a frozen head, a chunk of rows at a time, so that logits are never whole.

::

    hidden = model.model(**inputs).last_hidden_state
    loss = peftfx.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import peftfx.kernels.linear_cross_entropy.op  # noqa: F401 - defines the ops used below
from peftfx.errors import LossError


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: int | Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 0,
) -> Tensor:
    """``F.cross_entropy`` of the logits ``scale·(hidden·Wᵀ + b)`` of a frozen head.

    Args:
        hidden: ``[..., K]``; alone gets a gradient, which the forward makes.
        weight, bias: the head's, ``[V, K]`` and ``[V]``.
        labels: ``[...]``, classes or *ignore_index*. Nothing is shifted here.
        num_items: what the sum of losses is divided by, instead of the rows that count: those of a
            whole step where gradients are accumulated (HF's ``num_items_in_batch``).
        softcap: c of ``c·tanh(logits / c)``, where the model has it (Gemma 2).
        chunk: rows at a time; 0: at least 1024, and more where there are few classes.

    Returns:
        A scalar in float32 at least; ``[...]`` for the reduction ``none``.

    Raises:
        LossError: the head requires a gradient, or labels are no classes of these rows.
    """
    if reduction not in ("mean", "sum", "none"):
        raise LossError(f"reduction={reduction!r}", remedy="mean, sum or none")
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
        raise LossError(
            f"labels {tuple(labels.shape)} in {labels.dtype} for rows {tuple(hidden.shape[:-1])}",
            remedy="give one class for each row; soft labels are `peftfx.linear_kl`'s",
        )
    target = labels.reshape(-1).to(hidden.device, torch.int64)
    losses, _ = torch.ops.peftfx.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, target, ignore_index, label_smoothing,
        scale, softcap or 0.0, chunk, _trains(hidden),
    )  # fmt: skip
    if reduction == "none" and num_items is None:
        return losses.reshape(labels.shape)  # type: ignore[no-any-return]
    total = losses.sum()
    if num_items is not None:
        return total / num_items  # type: ignore[no-any-return]
    return total if reduction == "sum" else total / (target != ignore_index).sum()  # type: ignore


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    counts: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    """T²·KL(teacher ‖ student) of softened logits, the mean over the rows that count.

    Hinton et al., 2015 (arXiv 1503.02531).

    Args:
        hidden, weight, bias: of the student, ``[..., K]``, ``[V, K]``, ``[V]``; *hidden* alone
            gets a gradient, which the forward makes.
        teacher: its logits ``[..., V]``, or, with *teacher_weight* and *teacher_bias*, what its
            head is to be given, so that its logits are never whole either.
        counts: which rows count, ``[...]``; None: all.
        chunk: rows at a time; 0: at least 1024, and more where there are few classes.

    Raises:
        LossError: a head or the teacher requires a gradient, or rows do not go together.
    """
    if teacher.shape[:-1] != hidden.shape[:-1]:
        raise LossError(
            f"{tuple(teacher.shape[:-1])} rows of the teacher's, {tuple(hidden.shape[:-1])} of the "
            "student's",
            remedy="both need the same tokens",
        )
    count = hidden.shape[:-1].numel() if counts is None else counts.sum().clamp(min=1)
    if counts is None:
        counts = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    losses, _ = torch.ops.peftfx.linear_kl(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias,
        teacher.reshape(-1, teacher.shape[-1]).to(hidden.device), teacher_weight, teacher_bias,
        counts.reshape(-1), temperature, chunk, _trains(hidden),
    )  # fmt: skip
    return losses.sum() / count  # type: ignore[no-any-return]


def _trains(hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and hidden.requires_grad
