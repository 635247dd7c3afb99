"""Host side of the kernels: tiles, and the order of the launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.bottleneck.op import rows
from peftfx.kernels.low_rank_linear.runner import Runner, block_r, cdiv, precision

MOST_C = 128  # the width that fits on the chip, of 16-bit operands: two tiles of it in fp32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsuited(y: Tensor, h: Tensor | None, down: Tensor, *rest: Any) -> str | None:
    """Why the kernels cannot take a call, if they cannot."""
    if y.dtype not in DTYPES:
        return f"there is no kernel for {y.dtype}"
    most = MOST_C * 2 // y.dtype.itemsize
    if down.shape[0] > most:
        return f"the bottleneck is {down.shape[0]} wide, and {most} fit on the chip"
    if not y.is_contiguous():
        return "the y that is added to is not contiguous"
    return None


def unsuited_backward(dy: Tensor, *rest: Any) -> str | None:
    reason = unsuited(dy, *rest)
    return None if reason is not None and "contiguous" in reason else reason


def tile(m: int, dtype: torch.dtype, processors: int) -> int:
    """Rows of a program: as many as leave a program for each processor."""
    most = 64 if dtype.itemsize == 2 else 32
    return next((b for b in (64, 32) if b <= most and m // b >= processors), 16)


def _common(run: Runner, y: Tensor, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """What both launches are given; parameters in the dtype of y, for every program reads them."""
    down, down_bias, up = (t.to(y.dtype).contiguous() for t in parameters[:3])
    C = down.shape[0]
    block_m = tile(dynamo.hint(y.shape[0]), y.dtype, run.device.processors)
    half = y.element_size() == 2
    step = 64 if half else 32
    return {
        "down": down, "down_bias": down_bias, "up": up, "scale": parameters[4], "M": y.shape[0],
        "N": up.shape[0], "K": down.shape[1], "C": C, "BLOCK_M": block_m, "BLOCK_N": step,
        "BLOCK_K": step, "BLOCK_C": block_r([C], MOST_C), "num_stages": 3 if half else 2,
        "PRECISION": precision(y.dtype, run.device),
        "num_warps": 4 if half and block_m <= 32 else 8,
    }  # fmt: skip


def bottleneck(
    run: Runner, y: Tensor, h: Tensor | None, down: Tensor, down_bias: Tensor, up: Tensor,
    up_bias: Tensor, scale: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """``y + s·(U·f(D·h + d) + u)`` in one launch."""
    from peftfx.kernels.bottleneck.triton import bottleneck_fwd_kernel as kernel

    wide = run.matrix(y)
    given = wide if h is None else run.matrix(h.to(y.dtype))
    out = torch.empty_like(y)
    common = _common(run, wide, (down, down_bias, up, up_bias, scale))
    run(
        kernel, (cdiv(wide.shape[0], common["BLOCK_M"]),),
        y=wide, h=given, up_bias=up_bias.to(y.dtype), out=out, y_row=wide.stride(0),
        h_row=given.stride(0), ACT=activation, **common,
    )  # fmt: skip
    return out


def bottleneck_backward(
    run: Runner, dy: Tensor, h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor,
    up_bias: Tensor, scale: Tensor, activation: str, serial: bool, mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """One launch, and two thin products of the library for dD and dU. See the definition."""
    from peftfx.kernels.bottleneck.triton import bottleneck_bwd_kernel as kernel

    need_h, need_weights, need_scale = mask
    wide, given = run.matrix(dy), run.matrix(h.to(dy.dtype))
    common = _common(run, wide, (down, down_bias, up, up_bias, scale))
    M, N, C = wide.shape[0], wide.shape[1], down.shape[0]
    parts, needs = cdiv(M, common["BLOCK_M"]), need_weights or need_scale
    dh = h.new_empty(h.shape if need_h else 0)
    dpre, inner = (wide.new_empty((M, C) if needs else 1) for _ in range(2))
    sums = wide.new_empty((parts, N) if needs else 1, dtype=torch.float32)
    products = wide.new_empty(parts if needs else 1, dtype=torch.float32)
    run(
        kernel, (parts,),
        dy=wide, h=given, dh=dh, dpre=dpre, inner=inner, sums=sums, products=products,
        dy_row=wide.stride(0), h_row=given.stride(0), ACT=activation, SERIAL=serial,
        NEEDS_H=need_h, NEEDS_P=needs, **common,
    )  # fmt: skip
    parameters = (down, down_bias, up, up_bias, scale)
    found = [t.new_empty(0) for t in parameters]
    total = sums.sum(0) if needs else sums
    if need_weights:
        made = dpre.t() @ given, dpre.sum(0), rows(wide).t() @ inner, total * scale.float()
        found[:4] = [g.to(t.dtype) for g, t in zip(made, parameters)]
    if need_scale:
        both = products.sum() + (total * up_bias.float()).sum()
        found[4] = both.to(scale.dtype).reshape(scale.shape)
    return dh, *found
