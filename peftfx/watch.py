"""What chosen modules of a model give while it runs, compiled or not.

Forward hooks append to a list. Dynamo traces them with the model: what they append becomes an
output of its graph, and no graph breaks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peftfx import dynamo, mark
from peftfx.errors import DistillationError, nearest
from peftfx.plans import outputs_of
from peftfx.select import SELECTORS, Selector, glob_matches
from peftfx.site import SLOT

Chosen = str | Sequence[str] | Mapping[str, Any]
Seen = list[tuple[str, Tensor]]  # names of modules and their outputs


class Watch:
    """What chosen modules give, in the order in which they run."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.on, self.seen, self.modules = False, Seen(), modules
        self.hooks = {
            name: module.register_forward_hook(functools.partial(self.see, name))
            for name, module in self.modules.items()
        }

    def see(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        """The forward hook: a tensor, or the first of those that the module gives."""
        if self.on:
            several = out.values() if isinstance(out, Mapping) else out
            self.seen.append((name, out if isinstance(out, Tensor) else next(iter(several))))

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Gives a list that is filled at the end of the block, with each chosen module in it."""
        for name, module in self.modules.items():
            later = [f for i, f in module._forward_hooks.items() if i > self.hooks[name].id]
            if mark.after in later:
                raise DistillationError(
                    "an adapter was added here after the distillation was made, which looks first",
                    site=name,
                    remedy="make another Distillation",
                )
        found = Seen()
        self.on = True
        try:
            with dynamo.effects_in_checkpoints():
                yield found
            found += self.seen
        finally:
            self.on = False
            self.seen.clear()  # the same list always, for graphs hold on to it
        missed = self.modules.keys() - {name for name, _ in found}
        if missed:
            raise DistillationError(
                "this module did not run",
                site=min(missed),
                remedy="choose modules that the model calls, and run it inside the block",
            )


def modules_of(model: nn.Module, chosen: Chosen, example: Any) -> dict[str, nn.Module]:
    """The modules that are chosen, by name."""
    if isinstance(chosen, Mapping):
        unknown = chosen.keys() - set(SELECTORS)
        if unknown:
            what = f"unknown selector {min(unknown)!r}"
            raise DistillationError(what, remedy=nearest(min(unknown), SELECTORS))
        paths = outputs_of(model, Selector.parse(chosen), example)
        return {path: model.get_submodule(path) for path in paths}
    known = {n: m for n, m in model.named_modules() if n and SLOT not in n.split(".")}
    found: dict[str, nn.Module] = {}
    for glob in [chosen] if isinstance(chosen, str) else chosen:
        matched = {n: m for n, m in known.items() if glob_matches(glob, n)}
        if not matched:
            what = f"{glob!r} names no module of {type(model).__name__}"
            raise DistillationError(what, remedy=nearest(glob, known))
        found |= matched
    return found
