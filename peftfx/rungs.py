"""Rungs: how what several modules give comes together at the last of them.

A method that gathers acts at all its sites as one. Each but the last hands its output on as it is,
and the last is given them all. They lie in a record of the call at hand: Dynamo traces the hooks
that fill it, so that they are values of its graph. A call in which a module was left out, or ran
alone, again, or in another thread, refuses.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx import dynamo
from peftfx.errors import NotAdaptedError


@dataclass(eq=False)
class Rungs:
    """What the sites of one rule gave in the call at hand, in their order."""

    held: list[Tensor] = field(default_factory=list)
    thread: int = 0

    def add(self, number: int, y: Tensor) -> None:
        """The output of site *number*, from 0; no gradient flows back by it."""
        if number == 0:
            self.held.clear()
        self._follow(number)
        self.held.append(y.detach())

    def take(self, number: int) -> dict[str, Tensor]:
        """The outputs of the *number* sites before the last, by name; they are forgotten here."""
        self._follow(number)
        found = {f"rung{i}": h for i, h in enumerate(self.held)}
        self.held.clear()
        return found

    def _follow(self, number: int) -> None:
        if len(self.held) != number:
            raise NotAdaptedError(
                f"{number} modules come before this one, and {len(self.held)} of them ran: one was "
                "left out, or a checkpoint runs this one again",
                remedy="call the whole model; with checkpoints, compile it with peftfx",
            )
        if torch.compiler.is_compiling():
            return
        if number == 0:
            self.thread = threading.get_ident()
        elif self.thread != threading.get_ident():
            raise NotAdaptedError(
                "the model runs twice at a time, and what its modules gave is of one call",
                remedy="run a copy of the model in each thread",
            )


def join(installed: list[tuple[Any, Any]]) -> None:
    """Gives the entries of each rule that gathers one record.

    Args:
        installed: placements and their entries, of the adapters that are active.
    """
    records: dict[tuple[int, str], Rungs] = {}
    for placement, entry in installed:
        entry.rung = placement.site.rung
        if entry.rung is not None:
            alike = (placement.rule, placement.method.name)
            entry.rungs = records.setdefault(alike, Rungs())
    if records:
        dynamo.allow_effects_in_checkpoints()
