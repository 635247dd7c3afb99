"""Models to measure, in plain torch: linears on one input, a Llama's layer, a Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.registry import Setting


class Sites(nn.Module):
    """Linears on one x: a tuple of their outputs."""

    def __init__(self, k: int, *outs: int) -> None:
        super().__init__()
        self.sizes = k, outs
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for n in outs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama. ``head``: width of an attention head."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int = 1
    vocabulary: int = 128256

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def linear(self) -> int:
        """Elements of one layer's linears."""
        kv = self.kv_heads * self.head
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.inner)


TINY = Llama(32, 48, 4, 2, 2, 64)
LLAMA_1B = Llama(2048, 8192, 32, 8, 16)
LLAMA_8B = Llama(4096, 14336, 32, 8, 32)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; x [B, S, H, D], cos and sin [S, 1, D]."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Layer(nn.Module):
    """A Llama's layer; ``pieces``: its norms, rotations and gates, which may be compiled alone."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Llama, length: int) -> None:
        super().__init__()
        kv = sizes.kv_heads * sizes.head
        self.width = sizes.head
        self.pieces: dict[str, Callable[..., Any]] = {
            "norm": norm, "rotate": rotate, "gated": gated,
        }  # fmt: skip
        self.norms = nn.ParameterList(torch.ones(sizes.hidden) for _ in range(2))
        self.qkv, self.o = Sites(sizes.hidden, sizes.hidden, kv, kv), Sites(*2 * (sizes.hidden,))
        self.up = Sites(sizes.hidden, sizes.inner, sizes.inner)
        self.down = Sites(sizes.inner, sizes.hidden)
        turns = 5e5 ** -(torch.arange(0, sizes.head, 2) / sizes.head)
        angles = torch.arange(length)[:, None] * turns.repeat(2)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        call, length = self.pieces, x.shape[1]
        q, k, v = (
            t.unflatten(-1, (-1, self.width)) for t in self.qkv(call["norm"](x, self.norms[0]))
        )
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = (call["rotate"](t, cos, sin).transpose(1, 2) for t in (q, k))
        seen = F.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), is_causal=length > 1, enable_gqa=True
        )
        x = x + self.o(seen.transpose(1, 2).flatten(2))[0]
        gate, up = self.up(call["norm"](x, self.norms[1]))
        out: Tensor = x + self.down(call["gated"](gate, up))[0]
        return out


class Whole(nn.Module):
    """A Llama that gives its loss; ``checkpoints``: the backward runs its layers again."""

    def __init__(self, sizes: Llama, length: int) -> None:
        super().__init__()
        self.checkpoints = False
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, length) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden))
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        logits = self.head(norm(x, self.norm))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def drawn(make: Callable[[], nn.Module], setting: Setting, dtype: torch.dtype) -> nn.Module:
    """The model that *make* makes, on the device at once, normal weights, nothing trained."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = make().to(dtype)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model
