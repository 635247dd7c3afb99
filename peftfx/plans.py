"""Plans: which rule of a spec acts at which site of a model, with what parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peftfx.errors import PlanError, RoleError, nearest
from peftfx.layout import Layout, layout
from peftfx.methods.method import Method, Param
from peftfx.roles import Roles
from peftfx.roles import roles as roles_of
from peftfx.select import Selector
from peftfx.site import OUTPUT, Site, outputs, sites
from peftfx.spec import Rule, Spec
from peftfx.trace import Trace, trace

SOUGHT = {
    "tokens": "at a table of embeddings that a sequence of token ids goes into",
    "attention": "at calls of scaled_dot_product_attention whose queries a linear makes",
}


@dataclass(frozen=True)
class Placement:
    """One method at one site, as asked for by one rule."""

    site: Site
    method: Method
    rule: int
    where: str | None = None

    @property
    def params(self) -> dict[str, Param]:
        """The tensors that make the adapter here."""
        return self.method.params(self.site) if self.method.trains else {}

    def holder(self, name: str) -> tuple[object, ...]:
        """What says whether a tensor is another placement's too: those alike have one."""
        shared = self.params[name].shared
        where = (self.site.name,) if shared is None else (self.rule, self.method, shared)
        return (self.method.name, *where, name)

    @property
    def shares(self) -> bool:
        """Whether all that trains here is shared with other placements of the rule."""
        return all(param.shared is not None for param in self.params.values() if param.trains)

    @property
    def count(self) -> int:
        """Trainable values; those that several placements share are counted with each."""
        return sum(math.prod(p.shape) for p in self.params.values() if p.trains)


@dataclass(frozen=True)
class Refusal:
    """A site that a rule's selectors name and its method does not act at."""

    site: Site
    rule: int
    reason: str
    other_kind: bool = False  # a glob may pass over what a method is not for


@dataclass(frozen=True)
class Plan:
    """What :func:`resolve` decided. ``str(plan)`` is a table."""

    placements: tuple[Placement, ...]
    refusals: tuple[Refusal, ...] = ()
    total: int = 0  # values of the base

    @property
    def trainable(self) -> int:
        """Number of values that train."""
        sizes = {
            p.holder(name): math.prod(param.shape)
            for p in self.placements
            for name, param in p.params.items()
            if param.trains
        }
        return sum(sizes.values())

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    def rows(self) -> list[dict[str, object]]:
        """The table as plain values, a row for each placement."""
        return [
            {
                "site": p.site.name,
                "kind": p.site.kind,
                "roles": sorted(p.site.roles),
                "layer": p.site.layer,
                "shape": list(p.site.shape),
                "method": p.method.name,
                "parameters": p.count,
                "rule": p.rule,
                "where": p.where,
            }
            for p in self.placements
        ]

    def __str__(self) -> str:
        rows = [("site", "kind", "role", "shape", "method", "parameters", "rule")]
        for p in self.placements:
            rows.append(
                (
                    p.site.name,
                    p.site.kind,
                    " ".join(sorted(p.site.roles)) or "-",
                    "×".join(map(str, p.site.shape)),
                    p.method.name,
                    f"{p.count:,}",
                    p.where or str(p.rule),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"{len(self.placements)} placements, {self.trainable:,} trainable values "
            f"({share:.3g} % of the base's {self.total:,})"
        )
        lines += [f"not at {r.site.name}: {r.reason} (rule {r.rule})" for r in self.refusals]
        return "\n".join(lines)


def make_plan(
    model: nn.Module, spec: Spec | Mapping[str, Any] | str | os.PathLike[str], example: Any = None
) -> tuple[Plan, Trace | None]:
    """The plan of *spec*, and the trace of the model where roles or an example called for one."""
    spec = Spec.of(spec)
    selectors = [s for r in spec.rules for s in (r.selector, *(o.selector for o in r.overrides))]
    needed = any(s.role or s.stack or OUTPUT in s.kind for s in selectors)
    needed |= any(r.rows.named for r in spec.rules)
    placed = any(r.method.acts in ("tokens", "attention") for r in spec.rules)
    traced = trace(model, example) if needed or placed or example is not None else None
    if traced is None:
        return resolve(model, spec), None
    places = layout(model, traced, example) if placed else None
    return resolve(model, spec, roles_of(traced) if needed or placed else None, places), traced


def resolve(
    model: nn.Module, spec: Spec, roles: Roles | None = None, places: Layout | None = None
) -> Plan:
    """The plan of *spec* on *model*. Nothing is changed.

    Args:
        roles: what the model's dataflow says, needed by specs that select by role.
        places: where it embeds tokens and attends, needed by methods that act there.

    Raises:
        PlanError: a rule that matches nothing, two rules that clash, a shape that forbids a rule.
        RoleError: a role that the dataflow does not show.
    """
    known = list(sites(model))
    if not known:
        raise PlanError("the model has no parameters: there is nothing to adapt")
    if roles is not None:
        known = [_told(s, roles) for s in known] + list(_outputs(model, roles))
    placements: list[Placement] = []
    refusals: list[Refusal] = []
    for number, rule in enumerate(spec.rules):
        acts = rule.method.acts
        within = [s for s in known if _open_to(rule, s)]
        if places and acts in ("tokens", "attention"):
            within = places.sites(within, acts)
        if not within and acts in SOUGHT:
            raise PlanError(
                f"{rule.method.name} acts {SOUGHT[acts]}, and the model's run shows none",
                where=rule.where,
            )
        matched = [s for s in within if rule.selector.matches(s, rule.method, s.layers or 0)]
        outer = {s.module for s in matched if s.kind == OUTPUT}
        matched = [s for s in matched if s.kind == OUTPUT or s.module not in outer]
        if not matched:
            raise _nothing(rule, within, roles)
        placed = []
        for site in matched:
            method = rule.method_at(site)
            if site.computed:
                if method.acts != "parameter" and method.accepts(site) is None:
                    raise _computed(rule, site)
                continue
            part = rule.rows.of(site)
            reason = part if isinstance(part, str) else _refused(rule, method, part)
            if reason is None:
                assert isinstance(part, Site)
                placed.append(Placement(part, method, number, rule.where))
            else:
                refusals.append(Refusal(site, number, reason, site.kind not in method.kinds))
        if not placed:
            computed = next((s for s in matched if s.computed), None)
            if computed is not None:
                raise _computed(rule, computed)
            first = refusals[-len(matched)]
            raise PlanError(
                f"rule {number} ({rule.method.name}) acts nowhere: {first.reason}",
                where=rule.where,
                site=first.site.name,
                remedy="name sites that the method acts at",
            )
        placements += _over(placed)
    # a glob that names a module means its weight: that its bias was not meant is no news
    told = {(p.rule, p.site.module) for p in placements}
    refusals = [r for r in refusals if (r.rule, r.site.module) not in told]
    placements = _same_tensor(placements)
    _clashes(placements)
    for p in placements:
        try:
            p.method.check(p.site)
        except PlanError as error:
            raise PlanError(
                error.message, where=p.where, site=p.site.name, remedy=error.remedy
            ) from None
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    return Plan(tuple(placements), tuple(refusals), total)


def _told(site: Site, roles: Roles) -> Site:
    rows = roles.rows.get(site.name, {})
    return replace(site, roles=roles.of(site.name), rows=rows, stack=roles.stack(site.module))


def _outputs(model: nn.Module, roles: Roles) -> Iterator[Site]:
    """The sites that are a module's output."""
    places = [(path, found[0].widths, found[0].beside) for path, found in roles.outputs.items()]
    for site in outputs(model, places):
        told = frozenset(output.role for output in roles.outputs[site.module])
        yield replace(site, roles=told, stack=roles.stack(site.module))


def outputs_of(model: nn.Module, selector: Selector, example: Any = None) -> list[str]:
    """The modules whose outputs *selector* means: the model's sublayers, by their roles.

    Raises:
        RoleError: it means none.
    """
    known = list(_outputs(model, roles_of(trace(model, example))))
    chosen = [s.module for s in known if selector.matches(s, Method, s.layers or 0)]
    if not chosen:
        raise RoleError(
            f"no output of a sublayer is meant by {selector}",
            remedy=nearest(selector.role[0] if selector.role else "", (s.module for s in known)),
        )
    return chosen


def _open_to(rule: Rule, site: Site) -> bool:
    """Whether a rule means sites such as this.

    Outputs are for methods made for them, asked for by role or kind. To these ``mlp`` means what
    the sublayer gives, not what each of its linears does.
    """
    kinds, asked = rule.method.kinds, rule.selector.role
    if site.kind == OUTPUT:
        return OUTPUT in kinds and (bool(asked) or OUTPUT in rule.selector.kind)
    return OUTPUT not in kinds or not asked or bool(site.roles & {*asked})


def _computed(rule: Rule, site: Site) -> PlanError:
    """A glob may pass over what a method never acts at, not over a weight that it would act at.

    What trains parameters means those that the weight is made of: they are sites of their own.
    """
    return PlanError(
        f"{rule.method.name} cannot act here: the {site.parameter} is computed at each call, by a "
        "parametrization, a weight norm or a pruning",
        where=rule.where,
        site=site.name,
        remedy="take that off first, or exclude the site with `except:`; what trains parameters "
        "names those that it is made of",
    )


def _over(placed: list[Placement]) -> list[Placement]:
    """Each method of a rule, told all the sites that it acts at with the same options."""
    sites: dict[Method, list[Site]] = {}
    for p in placed:
        sites.setdefault(p.method, []).append(p.site)
    told = {method: method.over(where) for method, where in sites.items()}
    placed = [replace(p, method=told[p.method]) for p in placed]
    return _gathered(placed) if placed[0].method.gathers else placed


def _gathered(placed: list[Placement]) -> list[Placement]:
    """The placements of a rule that gathers, each told its place in their order."""
    stacks = {p.site.module.rpartition(".")[0] for p in placed}
    if len(stacks) > 1 or len({p.method for p in placed}) > 1:
        raise PlanError(
            f"{placed[0].method.name} is one over all its sites, and these have several options or "
            f"are in several stacks ({', '.join(sorted(stacks))})",
            where=placed[0].where,
            remedy="give it a rule for each: `stack: decoder`, `name: …`",
        )
    ordered = sorted(placed, key=lambda p: p.site.layer or 0)
    return [
        replace(p, site=replace(p.site, attrs={**p.site.attrs, "rung": (i, len(ordered))}))
        for i, p in enumerate(ordered)
    ]


def _refused(rule: Rule, method: Method, site: Site) -> str | None:
    """Why a rule does not act at *site*, None where it does."""
    if site.part and method.acts_at(site) not in ("output", "weight"):
        return f"{method.name} acts on more than rows of what this computes"
    return method.accepts(site) or (None if rule.rows.said else _partly(rule, site))


def _partly(rule: Rule, site: Site) -> str | None:
    """A fused projection is taken whole or not at all: no role of it may be left out silently."""
    if not rule.selector.role or not site.rows or rule.method.acts in ("tokens", "attention"):
        return None
    missing = sorted(r for r in site.rows if not rule.selector.asks(r))
    if missing:
        return (
            f"one weight computes {', '.join(sorted(site.rows))}: ask for {', '.join(missing)} "
            "too, select it by name, or take a part of it: `rows: query`"
        )
    known = [rows for rows in site.rows.values() if rows]
    covered = sum(stop - start for rows in known for start, stop in rows)
    if len(known) == len(site.rows) and covered < (width := _width(site)):
        return (
            f"{width - covered} of its {width} output features are not "
            f"{', '.join(sorted(site.rows))}: select it by name, or take rows of it"
        )
    return None


def _width(site: Site) -> int:
    return site.shape[0] if len(site.shape) == 1 else site.out_features


def _nothing(rule: Rule, known: list[Site], roles: Roles | None) -> PlanError:
    if rule.selector.role and roles is not None:
        found: frozenset[str] = frozenset().union(*(s.roles for s in known))
        if not any(rule.selector.asks(r) for r in found):
            at_outputs = OUTPUT in rule.method.kinds
            return RoleError(
                f"no site has the role {' '.join(rule.selector.role)}",
                where=rule.where,
                remedy=" ".join(roles.explain(r, at_outputs) for r in rule.selector.role),
            )
    if rule.selector.stack and roles is not None and not roles.stacks:
        return PlanError(
            "the model has one stack of layers alone", where=rule.where, remedy="drop `stack`"
        )
    names = {s.module for s in known} | {s.name for s in known}
    wanted = " ".join(rule.selector.name or ())
    return PlanError(
        f"the {rule.method.name} rule matches nothing ({rule.selector})",
        where=rule.where,
        remedy=nearest(wanted, names) if wanted else "loosen the selectors",
    )


def _same_tensor(placements: list[Placement]) -> list[Placement]:
    """A tied parameter is trained once, however many of its names a rule matches."""
    seen: set[tuple[int, str]] = set()
    kept = []
    for p in placements:
        names = {p.site.name, *p.site.aliases}
        if p.method.acts == "parameter":
            if any((p.rule, n) in seen for n in names):
                continue
            seen |= {(p.rule, n) for n in names}
        kept.append(p)
    return kept


def _clashes(placements: Iterable[Placement]) -> None:
    at: dict[tuple[str, str], Placement] = {}
    moved: dict[str, Placement] = {}
    for p in placements:
        # methods that take a parameter over, or stand in front of all else, exclude each other;
        # others may be stacked
        alone = p.method.acts in ("parameter", "tokens", "attention")
        what = p.method.acts if alone else p.method.name
        names = (p.site.name, *p.site.aliases) if what == "parameter" else (p.site.name,)
        for name in names:
            other = at.setdefault((name, what), p)
            if other is not p:
                raise PlanError(
                    f"rule {other.rule} ({other.method.name}) and rule {p.rule} "
                    f"({p.method.name}) both act here",
                    where=p.where,
                    site=name,
                    remedy="exclude the site from one of them with `except:`",
                )
        for path, _ in p.site.around.get("positions", ()):
            other = moved.setdefault(path, p)
            if other.method.length != p.method.length:  # type: ignore[attr-defined]
                raise PlanError(
                    f"prefixes of different lengths share the positions of {path}",
                    where=p.where,
                    site=p.site.name,
                    remedy="give all prefixes of a stack one length",
                )
