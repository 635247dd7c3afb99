"""A small adapted model, run as it is used: compiled, against the marks' own math."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx import dynamo
from peftfx.backends import Backend
from peftfx.passes.claims import Claim
from peftfx.passes.lower import LowerPass
from tests.helpers import fill

WIDTH = 32


class Block(nn.Module):
    """Three linears on one input, one behind them, two on what is left, one behind those."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.gate = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        out: Tensor = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return out


class Net(nn.Module):
    """Blocks, each recomputed in the backward where that is asked for."""

    def __init__(self, blocks: int, checkpoints: bool) -> None:
        super().__init__()
        self.blocks, self.checkpoints = nn.ModuleList(Block() for _ in range(blocks)), checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def adapted(
    lower: Any = "auto",
    device: str = "cpu",
    dropout: float = 0.0,
    checkpoints: bool = False,
    blocks: int = 2,
    **options: Any,
) -> tuple[Any, Backend]:
    """The compiled model with non-zero adapters, and its backend; one graph or an error."""
    torch.manual_seed(0)
    model = Net(blocks, checkpoints).to(device)
    rule = {"method": "lora", "name": "*", "rank": 3, "alpha": 3, "dropout": dropout}
    backend = Backend({"rules": [rule]}, lower)
    backend.snapshots = True  # nothing from a cache
    backend.bind(model, (torch.randn(5, WIDTH, device=device),))
    fill(peftfx.parameters(model), scale=0.3)
    return torch.compile(model, backend=backend, fullgraph=True, **options), backend


def interpreted(claims: Sequence[Claim], choices: list[Any]) -> Callable[..., Any]:
    """A lowering that runs graphs eagerly, in the forms of *claims*."""

    def lower(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return dynamo.compile_aot(gm, inputs, LowerPass(claims, choices))

    return lower


def step(run: Callable[[Tensor], Tensor], model: Any, x: Tensor, seed: int = 0) -> list[Tensor]:
    """The output, and the gradients of x and of all adapters."""
    torch.manual_seed(seed)
    given = x.clone().requires_grad_()
    y = run(given)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [given, *trained(model)])]


def trained(model: Any) -> list[nn.Parameter]:
    return list(peftfx.parameters(model))
