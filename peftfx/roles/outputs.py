"""Modules whose output is a sublayer's: where a method acts on what a sublayer as a whole gives.

``attention``, ``cross_attention``, ``mlp``: the smallest module that holds the sublayer, gives its
output and takes its input, so that what acts there may also act beside it. ``residual.…``: the
last module whose output is on its way to the sum with the residual stream. ``block``: a layer of
a stack, whose output is the residual stream behind its sublayers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from peftfx.roles.flow import Flow
from peftfx.roles.sublayer import Sublayer, Unclear
from peftfx.trace import Call


@dataclass(frozen=True)
class Output:
    """A module's output as a place to act.

    Attributes:
        role: what it is.
        widths: of the output's last axis and of the input's.
        beside: a parameter of the sublayer, whose dtype and device the output has.
    """

    role: str
    widths: tuple[int, int]
    beside: str


def outputs(flow: Flow, sublayers: list[Sublayer]) -> Iterator[tuple[str, Output] | Unclear]:
    """Modules by path, each with one of its roles.

    A module that is called for something else too has none: what acts on its output would act
    there as well.
    """
    ends: dict[int, list[Call]] = {}
    for call in flow.trace.calls:
        if call.output is not None:
            ends.setdefault(call.output, []).append(call)
    candidates = [list(_candidates(flow, s, ends)) for s in sublayers]
    found: dict[tuple[str, str], list[Call]] = {}
    for role, call in chain.from_iterable(candidates):
        found.setdefault((role, call.path), []).append(call)
    alone = {
        (role, path)
        for (role, path), calls in found.items()
        if flow.trace.called[path] == len({id(call) for call in calls})
    }
    for sublayer, places in zip(sublayers, candidates, strict=True):
        told: set[str] = set()
        for role, call in places:
            if role not in told and (role, call.path) in alone:
                told.add(role)
                yield call.path, _output(flow, role, call, sublayer)
        for role, reason in _expected(sublayer):
            if role not in told:
                yield Unclear(role, flow.ops[max(sublayer.ops)], reason)


def blocks(flow: Flow, sublayers: list[Sublayer]) -> Iterator[tuple[str, Output]]:
    """The layers that sublayers are in, with the role ``block``.

    Of lists within lists the outermost, all of whose members give the residual stream.
    """
    lists: dict[str, dict[str, dict[int, Output | None]]] = {}
    for sublayer in sublayers:
        way = flow.to_sum(sublayer.result)
        plain = way is not None and _features_last(flow, way[0]) == way[0]
        for call in flow.around(sublayer.ops):
            if not call.path.rpartition(".")[2].isdigit():
                continue
            parts = ["*" if part.isdigit() else part for part in call.path.split(".")]
            calls = lists.setdefault(".".join(parts), {}).setdefault(call.path, {})
            calls.setdefault(call.start, None)
            if way is None or not plain or call.output is None:
                continue
            if flow.shape(call.output) == flow.shape(way[0][-1]):
                calls[call.start] = _output(flow, "block", call, sublayer)
    chosen: list[str] = []
    for pattern in sorted(lists, key=lambda p: p.count("*")):
        if any(pattern.startswith(f"{outer}.") for outer in chosen):
            continue
        found = {
            path: output
            for path, calls in lists[pattern].items()
            if (output := next(iter(calls.values()))) is not None
            and None not in calls.values()
            and len(calls) == flow.trace.called[path]
        }
        if len(found) == len(lists[pattern]):
            chosen.append(pattern)
            yield from found.items()


def _output(flow: Flow, role: str, call: Call, sublayer: Sublayer) -> Output:
    assert call.output is not None
    width = flow.shape(call.output)[-1]
    given = flow.shape(call.input)[-1] if call.input is not None else width
    last = list(sublayer.projections.values())[-1].params
    return Output(role, (width, given), max(last, key=lambda n: len(flow.trace.shapes[n])))


def _expected(sublayer: Sublayer) -> Iterator[tuple[str, str]]:
    """The roles that a sublayer's output should have, and why there may be no module for one."""
    yield sublayer.kind, f"no module is this {sublayer.kind} alone, input to output"
    yield f"residual.{sublayer.kind}", "no module's output is what is added to a residual stream"


def _candidates(
    flow: Flow, sublayer: Sublayer, ends: dict[int, list[Call]]
) -> Iterator[tuple[str, Call]]:
    """Where a sublayer's output may be had: each role's places, the best first."""
    way = flow.to_sum(sublayer.result)
    path = _features_last(flow, way[0] if way is not None else [sublayer.result])
    inside = [c for c in flow.around(sublayer.ops) if c.output in path]
    for call in inside[:1]:
        if call.input is not None and flow.through(call.input) in flow.origins(sublayer.source):
            yield sublayer.kind, call
    if flow.residual(sublayer.result, sublayer.source):
        for value in reversed(path):
            outermost = sorted(ends.get(value, ()), key=lambda c: c.start - c.stop)
            for call in outermost:
                yield f"residual.{sublayer.kind}", call


def _features_last(flow: Flow, path: list[int]) -> list[int]:
    """The first values of a path, as long as features are along the last axis."""
    width = flow.shape(path[0])[-1]
    kept = [path[0]]
    for at in path[1:]:
        if flow.shape(at)[-1] != width or flow.turns_last(at):
            break
        kept.append(at)
    return kept
