"""What a row of the table says, and how its model and inputs are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Roles = dict[str, tuple[str, ...]]
Rows = dict[str, dict[str, tuple[tuple[int, int], ...]]]


@dataclass(frozen=True)
class Architecture:
    """A model to build, inputs for it, and what is true of it.

    Attributes:
        roles: all roles of its parameters: globs of modules or parameters, by role.
        outputs: all roles of its modules' outputs: globs of modules, by role.
        rows: which output features of a fused weight have which role.
        stacks: the stack of what is under a module.
        targets: names of linears, as PEFT's ``target_modules`` has them.
        attention: the ways in which its attention can be written, beside the usual one.
    """

    name: str
    build: Callable[..., nn.Module]
    example: Callable[[], dict[str, Tensor]]
    roles: Roles
    outputs: Roles = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def having(self, model: nn.Module, *roles: str) -> list[str]:
        """Names of the parameters of *model* that have one of *roles*, as the table says."""
        globs = [g for role in roles for g in self.roles.get(role, ())]
        return [
            f"{path}.{leaf}"
            for path, module in model.named_modules()
            for leaf, _ in module.named_parameters(recurse=False)
            if any(fnmatchcase(n, g) for g in globs for n in (path, f"{path}.{leaf}"))
        ]

    def rows_of(self, name: str) -> dict[str, tuple[tuple[int, int], ...]]:
        """Which output features of a fused parameter have which role, as the table says."""
        module = name.rpartition(".")[0]
        found = [r for g, r in self.rows.items() if fnmatchcase(module, g) or fnmatchcase(name, g)]
        return found[0] if found else {}


def hf(config: str, auto: str, **values: Any) -> Callable[..., nn.Module]:
    """Builds a transformers model; what is given to the result is added to the configuration."""

    def build(**more: Any) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**values, **more})
        return getattr(transformers, auto)(made).eval()

    return build


def text(vocabulary: int = 61, **extra: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocabulary, (2, 9), generator=generator)
        return {"input_ids": ids, **{k: f() for k, f in extra.items()}}

    return example


def decoder_ids() -> Tensor:
    return torch.tensor([[2, 5, 7, 9], [2, 4, 8, 6]])


def noise(name: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def image(size: int = 16) -> Callable[[], dict[str, Tensor]]:
    return noise("pixel_values", 2, 3, size, size)


def under(prefix: str, roles: Mapping[str, tuple[str, ...]]) -> Roles:
    """*roles* with *prefix* before each glob."""
    return {role: tuple(prefix + g for g in globs) for role, globs in roles.items()}


def joined(*parts: Mapping[str, tuple[str, ...]]) -> Roles:
    """The globs of several, by role."""
    found: Roles = {}
    for part in parts:
        for role, globs in part.items():
            found[role] = (*found.get(role, ()), *globs)
    return found


def fused(*, step: int, **sizes: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Rows of attention's projections that follow each other, *step* times over."""
    width, found = sum(sizes.values()), {}
    start = 0
    for name, size in sizes.items():
        spans = tuple((i * width + start, i * width + start + size) for i in range(step))
        found[f"attention.{name}"] = spans
        start += size
    return found


def both(module: str, role: str) -> Roles:
    """A module that is a sublayer, and whose output is what goes into the residual stream."""
    return {role: (module,), f"residual.{role}": (module,)}


SDPA_TOO = ("eager",)
FLEX_TOO = ("eager", "flex_attention")
