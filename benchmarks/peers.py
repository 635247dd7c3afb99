"""How others compute ``x·Wᵀ + s·(x·Aᵀ)·Bᵀ``: PEFT itself, and orders of products written anew.

Of Unsloth and Axolotl the products and their order are kept, in plain torch, dropout 0; not their
kernels for other things, and not that dX is written into x.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDERS = ("unsloth's order", "axolotl's order")


class _Products(torch.autograd.Function):
    """Sites that share x; ``tensors``: their W's, A's and B's. Saves x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: str, scale: float, *tensors: Tensor) -> Any:
        count = len(tensors) // 3
        rows, dtype, ys = x.reshape(-1, x.shape[-1]), x.dtype, []
        for w, a, b in zip(tensors, tensors[count:], tensors[2 * count :]):
            a, b = a.to(dtype), b.to(dtype)
            y = rows @ w.t()
            if order == "unsloth's order":
                y.addmm_(rows @ a.t(), b.t(), alpha=scale)
            else:
                y += scale * rows @ a.t() @ b.t()
            ys.append(y.view(*x.shape[:-1], w.shape[0]))
        ctx.order, ctx.scale, ctx.count = order, scale, count
        ctx.save_for_backward(x, *tensors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        count, s = ctx.count, ctx.scale
        rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
        weights, dx = tensors[:count], None
        das, dbs, thin = [], [], []
        for dy, a, b in zip(dys, tensors[count:], tensors[2 * count :]):
            dy, low, up = dy.reshape(-1, dy.shape[-1]), a.to(dtype), b.to(dtype)
            made = dy @ up  # [M, R]
            da, db = low.new_empty(low.shape[::-1]), up.new_empty(up.shape[::-1])
            das.append(da.addmm_(rows.t(), made, alpha=s, beta=0).t().to(a.dtype))
            dbs.append(db.addmm_(low @ rows.t(), dy, alpha=s, beta=0).t().to(b.dtype))
            thin.append((dy, low, up, made))
        for (dy, low, up, made), w in zip(thin, weights):
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if ctx.order == "unsloth's order":  # makes dY·B again
                made = dy @ up
            dx.addmm_(made, low, alpha=s)
        assert dx is not None
        return dx.view(x.shape), None, None, *[None] * count, *das, *dbs


class Ordered(nn.Module):
    """The linears of *sites* by one of :data:`ORDERS`."""

    def __init__(self, sites: Any, order: str, rank: int, scale: float) -> None:
        super().__init__()
        self.order, self.scale, self.frozen = order, scale, [m.weight for m in sites.linears]
        shapes, device = [w.shape for w in self.frozen], self.frozen[0].device
        self.A = nn.ParameterList(torch.empty(rank, k, device=device) for _, k in shapes)
        self.B = nn.ParameterList(torch.empty(n, rank, device=device) for n, _ in shapes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _Products.apply(
            x, self.order, self.scale, *self.frozen, *self.A, *self.B
        )
        return found


class Plain(nn.Module):
    """LoRAFusion's baseline: plain torch, factors in x's dtype, dropout."""

    def __init__(self, sites: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.frozen = [m.weight for m in sites.linears]
        self.A = nn.ParameterList(w.new_empty(rank, w.shape[1]) for w in self.frozen)
        self.B = nn.ParameterList(w.new_empty(w.shape[0], rank) for w in self.frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = F.dropout(x, self.dropout, self.training)
        return tuple(
            x @ w.t() + (kept @ a.t() @ b.t()) * self.scale
            for w, a, b in zip(self.frozen, self.A, self.B)
        )


def why_no_peft() -> str | None:
    """Why PEFT cannot be compared with, if it cannot."""
    missing = [n for n in ("peft", "transformers") if importlib.util.find_spec(n) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def with_peft(
    model: nn.Module, targets: list[str], rank: int, scale: float, dropout: float, wide: bool
) -> nn.Module:
    """HF PEFT's LoRA on *model*, changed in place; ``wide``: its default, adapters in fp32."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=scale * rank,  # type: ignore[arg-type]  # a number, whatever it says
        lora_dropout=dropout, target_modules=targets,
    )  # fmt: skip
    made: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    return made
