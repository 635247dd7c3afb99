"""What situations work with: a small adapted model in three forms, and arithmetic beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from tests.helpers import fill

Form = Literal["eager", "in place", "wrapper"]
FORMS: tuple[Form, ...] = ("eager", "in place", "wrapper")
LORA = {"method": "lora", "name": ["up", "down"], "rank": 2, "alpha": 3}
TRAIN = {"method": "train", "name": "head"}
SPEC: dict[str, Any] = {"rules": [LORA, TRAIN]}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))


class Net(nn.Module):
    """Two linears that LoRA adapts, in a residual, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.up(x))))


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def formula(weights: dict[str, Tensor], adapter: dict[str, Tensor], x: Tensor = X) -> Tensor:
    """The adapted model by arithmetic: *weights* of a base, *adapter* as ``peftfx.state_dict``."""

    def linear(name: str, x: Tensor) -> Tensor:
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        w = adapter.get(f"{name}.weight:train.value", w)
        b = adapter.get(f"{name}.bias:train.value", b)
        if f"{name}.weight:lora.A" in adapter:
            up, down = adapter[f"{name}.weight:lora.B"], adapter[f"{name}.weight:lora.A"]
            w = w + 1.5 * up @ down  # alpha / rank
        return F.linear(x, w, b)

    return linear("head", x + linear("down", torch.tanh(linear("up", x))))


@dataclass
class Bench:
    """One form: ``eager``, compiled ``in place``, or in a ``torch.compile`` ``wrapper``."""

    form: Form
    model: nn.Module = field(default_factory=base)
    spec: Any = field(default_factory=lambda: SPEC)
    example: Any = (X,)
    lower: Any = "aot_eager"

    def run(self) -> Any:
        """Binds the model, fills its adapter, and gives what is called."""
        self.backend = Backend(self.spec, self.lower)
        self.backend.bind(self.model, self.example)
        fill(peftfx.parameters(self.model))
        return self.formed()

    def formed(self, model: nn.Module | None = None) -> Any:
        """*model*, or the bench's own, in the bench's form."""
        model = self.model if model is None else model
        if self.form == "in place":
            model.compile(backend=self.backend)
        return torch.compile(model, backend=self.backend) if self.form == "wrapper" else model

    @property
    def prefix(self) -> str:
        """What precedes names in the state dict of what is called."""
        return "_orig_mod." if self.form == "wrapper" else ""

    def expected(self, seed: int = 0) -> Tensor:
        """The result by arithmetic, of the adapter's values at this moment."""
        return formula(base(seed).state_dict(), adapter(self.model))


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """Copies of an adapter's tensors."""
    return {name: t.clone() for name, t in peftfx.state_dict(model).items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@dataclass(frozen=True)
class Situation:
    """``run`` gives what came out and what should have; or it raises ``refused``."""

    name: str
    run: Callable[[Bench], tuple[Tensor, Tensor]]
    refused: type[BaseException] | None = None
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


SITUATIONS: list[Situation] = []


def situation(
    name: str, refused: type[BaseException] | None = None, tolerance: float = 1e-5
) -> Callable[[Any], Any]:
    """Adds a situation to the table."""

    def add(run: Any) -> Any:
        SITUATIONS.append(Situation(name, run, refused, tolerance))
        return run

    return add
