"""Schedules: what rules do to their tensors between optimizer steps, such as AdaLoRA's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.binding import bound
from peftfx.errors import CheckpointError
from peftfx.regularization import by_rule


class Schedule:
    """Steps the rules of a model's active adapters through their training.

    ``step()`` belongs after ``optimizer.step()`` and before the gradients are cleared. Tensors are
    changed in place and keep their shapes: a compiled model compiles nothing anew.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, _ = bound(model)
        self.steps = 0
        self.memory: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step is done."""
        model, binding = bound(self.model)
        self.steps += 1
        for name in binding.active:
            for rule, (method, sites) in by_rule(model, binding, binding.adapter(name)).items():
                memory = self.memory.setdefault(f"{name}:{rule}", {})
                method.advance(self.steps, sites, memory)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on from here."""
        return {"steps": self.steps, "memory": {k: dict(v) for k, v in self.memory.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where :meth:`state_dict` was taken."""
        if set(state) != {"steps", "memory"}:
            raise CheckpointError("this is no schedule's state", remedy="schedule.state_dict()")
        self.steps = int(state["steps"])
        self.memory = {k: dict(v) for k, v in state["memory"].items()}
