"""The bypass table: every known way to lose a compiled adapter, tried.

Each situation runs an adapted model in a way that goes around a backend, or confuses it. What comes
out has to be the adapted result, or an error; never the base's result, and never another adapter's.
``peftfx doctor --bypass`` prints the table and the tests hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.backends import Backend
from peftfx.binding import binding_of, entry_of
from peftfx.operations import parameters

Result = Tensor | tuple[Tensor, Tensor]

SPEC: dict[str, Any] = {
    "rules": [{"method": "lora", "name": ["*.up", "*.down", "head"], "rank": 2, "alpha": 3}]
}
LAST: dict[str, Any] = {
    "rules": [{"method": "lora", "name": "*.up", "layers": "last 1", "rank": 2, "alpha": 3}]
}


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Three blocks and a head, with the switches that situations need."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(6, 4)
        self.style = "plain"

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self._step(block, x)
        return self.head(x)

    def _step(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.style == "break":
            torch._dynamo.graph_break()
        if self.style == "try":
            try:
                torch._dynamo.graph_break()
                return block(x)
            finally:
                self.ran = True
        if self.style == "disabled":
            return _uncompiled(block, x)
        if self.style in ("reentrant", "checkpoint"):
            from torch.utils.checkpoint import checkpoint

            return checkpoint(block, x, use_reentrant=self.style == "reentrant")
        return block(x)

    def generate(self, x: Tensor) -> Tensor:
        """Runs the model as ``generate`` of a compiled HF model does: past the compiled call."""
        return self(x)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def values(model: nn.Module, seed: int) -> None:
    """Fills the active adapter with numbers that depend on *seed* alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.5)


@dataclass
class Bench:
    """What a situation works with. ``run`` compiles by the situation's fullgraph."""

    fullgraph: bool
    x: Tensor

    def model(self) -> Model:
        torch.manual_seed(0)
        return Model()

    def bound(self, spec: Any = None, seed: int = 1) -> tuple[Model, Backend]:
        model, backend = self.model(), Backend(spec or SPEC, "eager")
        backend.bind(model, (self.x,))
        values(model, seed)
        return model, backend

    def compile(self, target: Any, backend: Any, **options: Any) -> Any:
        return torch.compile(target, backend=backend, fullgraph=self.fullgraph, **options)

    def expected(self, spec: Any = None, seed: int = 1) -> Tensor:
        """The adapted result by plain arithmetic on the weights."""
        model, _ = self.bound(spec, seed)
        binding = binding_of(model)
        assert binding is not None
        found: dict[str, Tensor] = {}
        for p, _m in binding.installed:
            entry = entry_of(model, p).tensors()
            found[p.site.name] = (entry["B"] @ entry["A"] * 1.5).detach()  # alpha / rank
        plain = self.model()
        with torch.no_grad():
            for name, delta in found.items():
                plain.get_parameter(name).add_(delta)
        return plain(self.x).detach()


Situation = Callable[[Bench], "Tensor | tuple[Tensor, Tensor]"]
SITUATIONS: dict[str, Situation] = {}


def situation(name: str) -> Callable[[Situation], Situation]:
    """Adds a situation to the table. It gives its result, or result and what is expected."""

    def add_to_table(run: Situation) -> Situation:
        SITUATIONS[name] = run
        return run

    return add_to_table


def config(**patches: Any) -> Any:
    """Dynamo's configuration with *patches*, inside the block."""
    return torch._dynamo.config.patch(**patches)
