"""Plain modules of torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tests.architectures.architecture import Architecture, both, fused, joined, noise


class Packed(nn.Module):
    """A plain encoder layer around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.out(x)


class Flex(nn.Module):
    """Causal attention by ``flex_attention``, its heads interleaved in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (2, 3, 8)).transpose(1, 2)  # [B, H, S, 3, D]
        q, k, v = heads.unbind(-2)
        y = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i < j, -1e9, s))
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Tables(nn.Module):
    """An MLP over embedding tables, as recommenders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(11, 6)
        self.item = nn.Embedding(13, 5)
        self.up = nn.Linear(11, 17)
        self.out = nn.Linear(17, 3)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        joined = torch.cat([self.user(user), self.item(item)], dim=-1)
        return self.out(torch.relu(self.up(joined)))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


PLAIN = (
    Architecture(
        "packed", _seeded(Packed), noise("x", 2, 7, 12),
        {
            "attention.query": ("mha.in_proj_*",), "attention.key": ("mha.in_proj_*",),
            "attention.value": ("mha.in_proj_*",), "attention.output": ("mha.out_proj",),
            "mlp.up": ("up",), "mlp.down": ("down",), "head": ("out",),
        },
        joined(both("mha", "attention"), {"residual.mlp": ("down",)}),
        rows={"mha.in_proj_*": fused(step=1, query=12, key=12, value=12)},
        targets=("mha", "up", "down"),
    ),
    Architecture(
        "flex", _seeded(Flex), noise("x", 2, 7, 12),
        {
            "attention.query": ("qkv",), "attention.key": ("qkv",), "attention.value": ("qkv",),
            "attention.output": ("out",), "norm": ("norm",),
        },
        {"residual.attention": ("out",)}, rows={"qkv": fused(step=2, query=8, key=8, value=8)},
    ),
    Architecture(
        "sequential",
        _seeded(
            lambda: nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5), nn.Tanh(),
                                  nn.Linear(5, 3))
        ),
        noise("input", 4, 7), {"head": ("4",)}, targets=("0", "2"),
    ),
    Architecture(
        "tables", _seeded(Tables),
        lambda: {"user": torch.tensor([1, 4, 9, 2]), "item": torch.tensor([3, 12, 0, 7])},
        {"head": ("out",)}, targets=("user", "item", "up"),
    ),
)  # fmt: skip
