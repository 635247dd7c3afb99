"""Roles: what a parameter, or a module's output, is for, read off the model's dataflow.

Attention is found by its core, a feed-forward by what lies between two linears, and what is left
by what it reads. No names are looked at, and no list of architectures is kept. Where the dataflow
does not tell, there is no role, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftfx.roles import parts
from peftfx.roles.attention import attentions
from peftfx.roles.feed_forward import feed_forwards
from peftfx.roles.flow import Flow
from peftfx.roles.mixture import mixtures
from peftfx.roles.outputs import Output, blocks, outputs
from peftfx.roles.stacks import stacks
from peftfx.roles.sublayer import Sublayer, Unclear
from peftfx.select import ROLES
from peftfx.site import Rows
from peftfx.trace import Trace


@dataclass
class Roles:
    """What the dataflow of a model tells.

    Attributes:
        found: roles by parameter. A fused projection has several.
        rows: by parameter, which output features have which role, where not all have each; empty
            ranges where the dataflow does not tell.
        outputs: modules whose output is a place to act, by path.
        stacks: the stack of what is under a module, by path.
        unclear: what looks like a role, and why it is none: role, parameter or module, reason.
    """

    found: dict[str, set[str]] = field(default_factory=dict)
    rows: dict[str, dict[str, Rows]] = field(default_factory=dict)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    unclear: list[tuple[str, str, str]] = field(default_factory=list)

    def of(self, name: str) -> frozenset[str]:
        """The roles of a parameter; none where the dataflow does not tell."""
        return frozenset(self.found.get(name, ()))

    def stack(self, path: str) -> str | None:
        """The stack that a module is in; None where the model has one alone."""
        inside = [root for root in self.stacks if f"{path}.".startswith(f"{root}.")]
        return self.stacks[max(inside, key=len)] if inside else None

    def explain(self, role: str, at_outputs: bool = False) -> str:
        """What was found instead of *role*, of parameters or of modules' outputs."""
        shown = {r for roles in self.found.values() for r in roles}
        if at_outputs:
            shown = {o.role for found in self.outputs.values() for o in found}
        have = f"the model shows {', '.join(sorted(shown))}" if shown else "the model shows none"
        near = self.nearest(role) or [(n, why) for _, n, why in self.unclear]
        told = [f"{name} ({why})" for name, why in near[:3]]
        return f"{role}: {have}{'; nearest: ' + '; '.join(told) if told else ''}."

    def nearest(self, role: str) -> list[tuple[str, str]]:
        """What looks like *role*, and why it is not told."""
        group = role.split(".")[0]
        return list(
            dict.fromkeys((n, why) for r, n, why in self.unclear if r.split(".")[0] == group)
        )

    def add(self, role: str, params: tuple[str, ...]) -> None:
        assert role in ROLES, role
        for name in params:
            self.found.setdefault(name, set()).add(role)

    def doubt(self, unclear: Unclear) -> None:
        names = [n for n in unclear.op.params if n.endswith("weight")] or [unclear.op.module]
        self.unclear.append((unclear.role, names[0], unclear.reason))


def roles(trace: Trace) -> Roles:
    """What the dataflow of a traced model tells."""
    flow, told = Flow(trace), Roles()
    sublayers = list(_sublayers(flow, told))
    for sublayer in sublayers:
        for name, projection in sublayer.projections.items():
            alone = name in ("router", "experts")
            role = name if alone else f"{sublayer.kind}.{name}"
            told.add(role, projection.params)
            for param, rows in projection.rows.items():
                told.rows.setdefault(param, {})[role] = rows
    for role, params in (*parts.norms(flow), *parts.convolutions(flow)):
        told.add(role, params)
    taken = {n for s in sublayers for p in s.projections.values() for n in p.params}
    for found in (*parts.embeddings(flow), *parts.heads(flow)):
        if isinstance(found, Unclear):
            told.doubt(found)
        elif not taken & set(found[1]):
            told.add(*found)
    whole = _whole(flow, sublayers)
    for place in (*outputs(flow, whole), *blocks(flow, whole)):
        if isinstance(place, Unclear):
            told.doubt(place)
            continue
        path, output = place
        if output not in told.outputs.setdefault(path, []):
            told.outputs[path].append(output)
    told.stacks = stacks(flow, sublayers)
    return told


def _sublayers(flow: Flow, told: Roles) -> list[Sublayer]:
    found: list[Sublayer] = []

    def keep(every: object) -> None:
        for one in every:  # type: ignore[attr-defined]
            if isinstance(one, Unclear):
                told.doubt(one)
            else:
                found.append(one)

    keep(attentions(flow))
    keep(mixtures(flow))
    keep(feed_forwards(flow, {at for s in found for at in s.ops}))
    return found


def _whole(flow: Flow, sublayers: list[Sublayer]) -> list[Sublayer]:
    """Without the feed-forwards that are parts of a mixture of experts."""
    mixed = [flow.smallest(s.ops) for s in sublayers if "router" in s.projections]
    return [
        s
        for s in sublayers
        if "router" in s.projections
        or not any(c.start <= min(s.ops) and max(s.ops) < c.stop for c in mixed if c is not None)
    ]
