"""``peftfx::bottleneck``: a narrow feed-forward with a residual.

    out = y + s·(U·f(D·h + d) + u)      h = y, or another input

Houlsby et al., 2019 (arXiv 1902.00751). ``y [..., N]``, ``h [..., K]`` (None: y), ``D [C, K]``,
``d [C]``, ``U [N, C]``, ``u [N]``, ``s [1]``. Products are in the dtype of y; parameters are cast
to it, and their gradients come back in their own dtypes.

Saved for the backward, besides parameters: h. What is inside is made again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.definition import define

aten = torch.ops.aten
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "identity": lambda h: h,
}
GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {  # of f's input, from its result's
    "relu": lambda g, x: aten.threshold_backward(g, x, 0),
    "gelu": aten.gelu_backward,
    "gelu_tanh": functools.partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
    "tanh": lambda g, x: aten.tanh_backward(g, x.tanh()),
    "sigmoid": lambda g, x: aten.sigmoid_backward(g, x.sigmoid()),
    "leaky_relu": lambda g, x: aten.leaky_relu_backward(g, x, 0.01, False),
    "elu": lambda g, x: aten.elu_backward(g, 1.0, 1.0, 1.0, False, x),
    "mish": aten.mish_backward,
    "softplus": lambda g, x: aten.softplus_backward(g, x, 1.0, 20.0),
    "identity": lambda g, x: g,
}
_INNER = "Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor scale, str activation"
SCHEMAS = {
    "bottleneck": f"(Tensor y, Tensor? h, {_INNER}) -> Tensor",
    "bottleneck_backward": f"(Tensor dy, Tensor h, {_INNER}, bool serial, bool[] mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}
_library = torch.library.Library("peftfx", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def bottleneck(
    y: Tensor,
    h: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    activation: str,
) -> Tensor:
    """``y + s·(U·f(D·h + d) + u)``; as a function, not as an op, with any s that broadcasts."""
    d, db, u, ub, s = (t.to(y.dtype) for t in (down, down_bias, up, up_bias, scale))
    given = y if h is None else h.to(y.dtype)
    inner = ACTIVATIONS[activation](F.linear(given, d, db))
    return y + s * F.linear(inner, u, ub)


def bottleneck_backward(
    dy: Tensor,
    h: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    activation: str,
    serial: bool,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dH (with dY in it where h is y), dD, dd, dU, du, ds. What is not wanted comes back empty.

    Args:
        mask: whether dH is wanted, the four of D, d, U and u, and ds.
    """
    need_h, need_weights, need_scale = mask
    dtype = dy.dtype
    d, db, u, ub, s = (t.to(dtype) for t in (down, down_bias, up, up_bias, scale))
    wide, given = rows(dy), rows(h.to(dtype))  # [M, N], [M, K]
    pre = F.linear(given, d, db)
    low = wide @ u  # [M, C]
    found = [h.new_empty(0), *(t.new_empty(0) for t in (down, down_bias, up, up_bias, scale))]
    total = wide.sum(0)
    dpre = GRADIENTS[activation](low * s, pre)
    if need_h:
        dh = torch.addmm(wide, dpre, d) if serial else dpre @ d
        found[0] = dh.reshape(h.shape).to(h.dtype)
    if need_weights:
        inner = ACTIVATIONS[activation](pre) * s
        found[1:5] = dpre.t() @ given, dpre.sum(0), wide.t() @ inner, total * s
        found[1:5] = [g.to(t.dtype) for g, t in zip(found[1:5], (down, down_bias, up, up_bias))]
    if need_scale:
        sums = (low * ACTIVATIONS[activation](pre)).sum() + (total * ub).sum()
        found[5] = sums.to(scale.dtype).reshape(scale.shape)
    return found[0], found[1], found[2], found[3], found[4], found[5]


def work(op: str, args: Sequence[Any], processors: int) -> dict[str, list[tuple[int, int]]]:
    """Operations and bytes of each launch, by form; the kernel's as if it filled the device."""
    from peftfx.kernels.bottleneck.launch import tile

    backward = op == "bottleneck_backward"
    y, h, down = args[:3]
    serial = args[8] if backward else h is None
    m, n = dynamo.hint(y.numel() // y.shape[-1]), int(y.shape[-1])
    c, k = map(int, down.shape)
    e = y.element_size()
    reads, gives, thin, weights = m * k * e, m * n * e, m * c * e, c * (n + k) * e
    low, high = (2 * m * k * c, reads + thin + c * k * e), (2 * m * n * c, gives + thin + c * n * e)
    idle = max(processors / max(-(-m // tile(m, y.dtype, processors)), 1), 1.0)

    def launch(flops: int, size: int) -> tuple[int, int]:
        return int(flops * idle), int(size * idle)

    if not backward:
        once = launch(low[0] + high[0], (gives if serial else gives + reads) + gives + weights)
        return {"definition": [low, (0, 2 * thin), high, (0, 3 * gives)], "triton": [once]}
    gradients = [low, high]  # dD, dU
    dh = (low[0], low[1] + (gives if serial else 0))
    return {
        "definition": [low, high, (0, 4 * thin), dh, *gradients, (0, gives)],
        "triton": [
            launch(2 * low[0] + high[0], 2 * reads + gives + 2 * thin + 2 * weights), *gradients,
        ],
    }  # fmt: skip


# -- fake kernels, autograd ----------------------------------------------------------------------


def _fake(y: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(y)


def _fake_backward(dy: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, mask = rest
    wanted = [mask[0], *[mask[1]] * 4, mask[2]]
    return tuple(
        t.new_empty(t.shape if needed else 0)
        for t, needed in zip([h, *parameters], wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, h, *parameters, ctx.activation = inputs
    ctx.serial = h is None
    ctx.save_for_backward(y if h is None else h, *parameters)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    h, *parameters = ctx.saved_tensors
    need_y, need_other, *needs, need_scale, _ = ctx.needs_input_grad
    mask = [need_y if ctx.serial else need_other, any(needs), need_scale]
    dh, *found = torch.ops.peftfx.bottleneck_backward(
        dy, h, *parameters, ctx.activation, ctx.serial, mask
    )
    grads = [g if n else None for g, n in zip(found, [*needs, need_scale], strict=True)]
    made = dh if mask[0] else None
    return (made, None, *grads, None) if ctx.serial else (dy, made, *grads, None)


DEFINITIONS: dict[str, Any] = {
    "bottleneck": bottleneck, "bottleneck_backward": bottleneck_backward,
}  # fmt: skip
for _name, _definition in DEFINITIONS.items():
    define(_library, _name, _definition)
torch.library.register_fake("peftfx::bottleneck", _fake, lib=_library)
torch.library.register_fake("peftfx::bottleneck_backward", _fake_backward, lib=_library)
torch.library.register_autograd("peftfx::bottleneck", _backward, setup_context=_setup, lib=_library)
