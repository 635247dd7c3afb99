"""Plans and explanations for people: what a spec would do to a model, and how it is computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftfx.bind import bind, release
from peftfx.binding import unwrap
from peftfx.drawing import draw
from peftfx.engine import Report
from peftfx.plans import Plan, make_plan
from peftfx.roles import roles
from peftfx.spec import Spec
from peftfx.trace import inputs_of


def plan(
    model: nn.Module, spec: Spec | Mapping[str, Any] | str | os.PathLike[str], example: Any = None
) -> Plan:
    """What *spec* would do to *model*; nothing is changed. ``str(plan)`` is a table.

    Raises:
        PlanError: the spec does not fit the model.
    """
    return make_plan(unwrap(model), spec, example)[0]


def picture(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    example: Any = None,
    *,
    layer: int | None = None,
    stack: str | None = None,
) -> str:
    """One layer's dataflow as SVG: its sites with their roles, and what *spec* does at them.

    Args:
        layer: its number; by default the first that the spec adapts.
        stack: the stack that it is in, where the model has several.

    Raises:
        PlanError: the spec does not fit the model, or the model has no such layer.
    """
    model = unwrap(model)
    args, kwargs = inputs_of(model, example)
    found, traced = make_plan(model, spec, (args, kwargs))
    assert traced is not None
    return draw(model, found, traced, roles(traced), layer, stack)


@dataclass(frozen=True)
class Explanation:
    """The plan, and for each graph what the passes and the lowering did."""

    plan: Plan
    reports: tuple[Report, ...]

    def __str__(self) -> str:
        parts = [str(self.plan)]
        for number, report in enumerate(self.reports):
            parts.append(f"graph {number}\n{report}")
            if report.steps and report.steps[-1].snapshot:
                parts.append(report.steps[-1].snapshot)
        return "\n\n".join(parts)


def explain(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    example: Any = None,
    lower: str = "aot_eager",
) -> Explanation:
    """Compiles *model* once on *example* and tells what happened; the model is left as it was.

    Args:
        lower: ``aot_eager`` shows the lowering's choices without waiting for Inductor.
    """
    import torch

    from peftfx.backends import Backend

    model = unwrap(model)
    made = Backend(Spec.of(spec), lower)  # type: ignore[arg-type]
    made.snapshots = True
    args, kwargs = inputs_of(model, example)
    bind(model, made.spec, (args, kwargs))  # type: ignore[arg-type]
    try:
        found = make_plan(model, made.spec, (args, kwargs))[0]  # type: ignore[arg-type]
        torch.compile(model, backend=made)(*args, **kwargs)
    finally:
        release(model)
    return Explanation(found, tuple(made.reports))
