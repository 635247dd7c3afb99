"""Sublayers: the attentions and feed-forwards of a model, each with its projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftfx.site import Rows
from peftfx.trace import Op

Made = tuple[int, int]  # an op, and which of its results


@dataclass(frozen=True)
class Projection:
    """Weights that make one part of a sublayer.

    Attributes:
        ops: those that compute with them.
        params: the parameters, by name.
        rows: by parameter, the output features that make this part, where there are others too;
            empty where it could not be told which.
    """

    ops: tuple[int, ...]
    params: tuple[str, ...]
    rows: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward.

    Attributes:
        kind: ``attention``, ``cross_attention`` or ``mlp``.
        projections: by name: ``query``, ``key``, ``value``, ``output``; ``up``, ``gate``, ``down``.
        source: the value that its first weight is applied to.
        result: the value that it gives: its last weight's, or that of attention itself.
    """

    kind: str
    projections: Mapping[str, Projection]
    source: int
    result: int

    @property
    def name(self) -> str:
        """``attention`` or ``mlp``."""
        return self.kind.rpartition("_")[2]

    @property
    def ops(self) -> set[int]:
        """The ops that compute with its weights."""
        return {at for p in self.projections.values() for at in p.ops}


@dataclass(frozen=True)
class Unclear:
    """An op that looks as if it had a role, and what keeps that from being told."""

    role: str
    op: Op
    reason: str
