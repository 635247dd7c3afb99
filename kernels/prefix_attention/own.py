"""Attention over the own keys by a kernel of torch's that gives its log-sum-exp, else written out.

On the CPU flash attention, with or without a mask. On NVIDIA's GPUs flash attention in half
precision without a mask (Dao, 2023, arXiv 2307.08691), and the memory-efficient one (Rabe & Staats,
2021, arXiv 2112.05682) for the rest: masks, float32, causal rows over a longer cache. That one
knows no grouped heads, so that keys and values are copied to as many heads as queries have.

Given the merged ``out`` and ``lse`` in the place of their own, the kernels' backward is that of the
own part of the whole: its probabilities are ``exp(scores - lse)``, and ``Σ grad·out`` the whole's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx import dynamo
from peftfx.kernels.devices import describe

HALF = (torch.bfloat16, torch.float16)
ROWS = 32  # the memory-efficient kernel's log-sum-exp has rows padded to a multiple of these
ALIGNED = 16  # its mask, columns
aten: Any = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


def kernel(q: Tensor, k: Tensor, v: Tensor, masked: bool, causal: bool) -> tuple[str, str]:
    """The kernel that takes the own part: "cpu", "flash", "efficient"; or "", and why none does."""
    if q.shape[-1] != v.shape[-1]:
        return "", "keys and values have different widths"
    if q.device.type == "cpu":
        return "cpu", ""
    if q.device.type != "cuda" or torch.version.hip:
        kind = "AMD's GPUs" if torch.version.hip else q.device.type
        return "", f"no attention on {kind} that gives its log-sum-exp is used yet"
    return on_gpu(q, k, v, masked, causal)


def on_gpu(q: Tensor, k: Tensor, v: Tensor, masked: bool, causal: bool) -> tuple[str, str]:
    """The same of NVIDIA's."""
    width = q.shape[-1]
    if q.dtype not in (*HALF, torch.float32) or (width * q.element_size()) % 16 or width > 256:
        return "", f"torch's kernels for GPUs take no heads of {width} in {q.dtype}"
    square = not causal or dynamo.surely_equal(q.shape[2], k.shape[2])
    if not masked and square and q.dtype in HALF and width % 8 == 0 and describe(q.device):
        return "flash", ""
    return "efficient", ""


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """``out [B, H, S, D]`` and the log-sum-exp ``[B, H, S]`` of attention without a prefix."""
    added = additive(q, mask)
    name = kernel(q, k, v, mask is not None, causal)[0] if q.numel() else ""
    if name == "cpu":
        found: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=added, scale=scale
        )
        return found
    if name == "flash":
        q, k, v = (_dense(t) for t in (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse
    if name == "efficient":
        q, k, v, bias = _efficient(q, k, v, added)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]
    scores = _scores(q, k, added, causal, scale)
    lse = scores.logsumexp(-1)
    values = _spread(v, q.shape[1]).to(lse.dtype)
    return ((scores - lse[..., None]).exp() @ values).to(q.dtype), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    """dq, dk, dv of the own part, from the whole's ``out`` and ``lse``."""
    added = additive(q, mask)
    name = kernel(q, k, v, mask is not None, causal)[0] if q.numel() else ""
    if name == "cpu":
        found: Grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale
        )
        return found
    if name == "flash":  # nothing is dropped: what its random numbers start from is not read
        q, k, v, grad, out = (_dense(t) for t in (q, k, v, grad, out))
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
        return found
    if name == "efficient":
        groups = k.shape[1]
        q, k, v, bias = _efficient(q, k, v, added)
        none = torch.zeros((), dtype=torch.int64, device=q.device)
        lse = F.pad(lse, (0, -q.shape[2] % ROWS), value=torch.inf)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            _dense(grad), q, k, v, bias, _dense(out), lse, none, none, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return dq, _gathered(dk, groups), _gathered(dv, groups)
    return _written_out(grad, q, k, v, out, lse, added, causal, scale)


def additive(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask to be added. A row that sees nothing of its own lives on the prefix, so that what
    is not seen gets a number that is low enough instead of -inf, which would make NaN of the row;
    half of the least, since kernels multiply it by log₂e."""
    if mask is None:
        return None
    least = torch.finfo(q.dtype).min / 2
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, least)
    return mask.to(q.dtype).clamp_min(least)


def _dense(t: Tensor) -> Tensor:
    """*t* with heads' elements side by side, as kernels want them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the memory-efficient kernel takes: all heads, and rows of the mask that are aligned.

    The mask is copied as it is, for one head where it is the same for all, and only then spread.
    """
    heads, t = q.shape[1], k.shape[2]
    q, k, v = _dense(q), _dense(_spread(k, heads)), _dense(_spread(v, heads))
    if added is None:
        return q, k, v, None
    rows = F.pad(added.expand(*added.shape[:-1], t), (0, -t % ALIGNED))
    return q, k, v, rows[..., :t].expand(*q.shape[:-1], t)


def _spread(t: Tensor, heads: int) -> Tensor:
    """Keys or values for every query head: ``[B, K, T, D] -> [B, H, T, D]``."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _gathered(grad: Tensor, groups: int) -> Tensor:
    """The gradient of what :func:`_spread` spread, ``[B, K, T, D]``."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


# -- written out -----------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, added: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = _spread(k, q.shape[1]).to(wide)
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale  # [B, H, S, T]
    if added is not None:
        scores = scores + added
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, torch.finfo(wide).min)
    return scores


def _written_out(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    added: Tensor | None, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    wide, groups, heads = lse.dtype, k.shape[1], q.shape[1]
    p = (_scores(q, k, added, causal, scale) - lse[..., None]).exp()
    do = grad.to(wide)
    keys, values = (_spread(t, heads).to(wide) for t in (k, v))
    delta = (do * out.to(wide)).sum(-1, keepdim=True)
    ds = p * (do @ values.transpose(-1, -2) - delta) * scale
    dk, dv = ds.transpose(-1, -2) @ q.to(wide), p.transpose(-1, -2) @ do
    dk, dv = (_gathered(t, groups).to(k.dtype) for t in (dk, dv))
    return (ds @ keys).to(q.dtype), dk, dv
