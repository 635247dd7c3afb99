"""``peftfx::norm_shrink`` and ``peftfx::gate_shrink``: what makes an adapter's x makes its S too.

    y = norm(x + more)·(weight + offset) + shift        S = y·Aᵀ
    y = act(gate)·up                                    S = y·Aᵀ

``x [..., K]``, ``A [R, K]`` of each site that reads y, ``S [..., ΣR]``. RMS norm (Zhang and
Sennrich, 2019, arXiv 1910.07467) or layer norm (Ba et al., 2016, arXiv 1607.06450); SwiGLU and its
relatives (Shazeer, 2020, arXiv 2002.05202). What is normed or activated is computed in fp32 at
least and rounded once; A is cast to y's dtype.

The functions below are the ops' definitions. They are put into graphs that AOTAutograd has derived
already, and have no derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.kernels.definition import define

_library = torch.library.Library("peftfx", "FRAGMENT")
SCHEMAS = {
    "norm_shrink": "(Tensor x, Tensor? more, Tensor? weight, Tensor? shift, Tensor[] A, float eps,"
    " float offset, bool centred, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gate_shrink": "(Tensor gate, Tensor? up, Tensor[] A, str act, ScalarType dtype)"
    " -> (Tensor, Tensor)",
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "relu": F.relu,
    "relu_squared": lambda t: F.relu(t).square(),
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def normed(
    x: Tensor,
    more: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + more`` in x's dtype, and unrounded: its norm, mean and 1/deviation [..., 1]."""
    total = x if more is None else x + more
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True) if centred else wide.new_zeros(())
    wide = wide - mean
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return total, y if shift is None else y + shift.to(y.dtype), mean, rstd


def norm_shrink(
    x: Tensor,
    more: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    A: list[Tensor],
    eps: float,
    offset: float,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x + more``, y in *dtype*, S, the mean and 1/deviation [..., 1] of rows.

    The first is empty without *more*, the mean where the norm is not *centred*.
    """
    total, wide, mean, rstd = normed(x, more, weight, shift, eps, offset, centred)
    y = wide.to(dtype)
    empty = rstd.new_empty(0)
    return (
        x.new_empty(0) if more is None else total,
        y, _shrunk(y, A), mean if centred else empty, rstd,
    )  # fmt: skip


def gate_shrink(
    gate: Tensor, up: Tensor | None, A: list[Tensor], act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``act(gate)·up`` in *dtype*, and S."""
    y = ACTS[act](gate.to(torch.promote_types(gate.dtype, torch.float32)))
    y = (y if up is None else y * up).to(dtype)
    return y, _shrunk(y, A)


def _shrunk(y: Tensor, A: list[Tensor]) -> Tensor:
    return F.linear(y, torch.cat([a.to(y.dtype) for a in A]))


DEFINITIONS: dict[str, Any] = {"norm_shrink": norm_shrink, "gate_shrink": gate_shrink}
for _name, _definition in DEFINITIONS.items():
    define(_library, _name, _definition)


# -- fake kernels: every result is contiguous ------------------------------------------------------


def _fake_norm(
    x: Tensor, more: Tensor | None, weight: Any, shift: Any, A: list[Tensor], eps: float,
    offset: float, centred: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    lead, wide = x.shape[:-1], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(0 if more is None else x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*lead, sum(a.shape[0] for a in A)), dtype=dtype),
        x.new_empty((*lead, 1) if centred else 0, dtype=wide),
        x.new_empty((*lead, 1), dtype=wide),
    )


def _fake_gate(
    gate: Tensor, up: Tensor | None, A: list[Tensor], act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rank = sum(a.shape[0] for a in A)
    return (
        gate.new_empty(gate.shape, dtype=dtype),
        gate.new_empty((*gate.shape[:-1], rank), dtype=dtype),
    )


for _name, _fake in (("norm_shrink", _fake_norm), ("gate_shrink", _fake_gate)):
    torch.library.register_fake(f"peftfx::{_name}", _fake, lib=_library)
