"""Every error that peftfx raises by intent.

An error says where (file and line of a spec, or the name of a site), what is wrong and what to do
about it. Catch :class:`PeftfxError` to catch them all; the second base class of each lets code that
expects Python's usual types go on working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class PeftfxError(Exception):
    """Base of all errors.

    Args:
        message: what is wrong, in one sentence.
        where: ``file:line`` of a spec, or a path.
        site: qualified name of the site concerned.
        remedy: what the user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        site: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if len(message) > LONGEST:  # it quotes a file, which may hold anything
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        self.message, self.where, self.site, self.remedy = message, where, site, remedy
        text = f"{where}: {message}" if where else message
        if site:
            text += f" [site {site}]"
        if remedy:
            text += f"\n  remedy: {remedy}"
        Exception.__init__(self, text)  # not super(): a surfacing error has another base beside

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments do not survive the default
        return _rebuild, (type(self), self.message, self.where, self.site, self.remedy)


def _rebuild(
    cls: type[PeftfxError], message: str, where: str | None, site: str | None, remedy: str | None
) -> PeftfxError:
    return cls(message, where=where, site=site, remedy=remedy)


class SpecError(PeftfxError, ValueError):
    """A spec that cannot be read, or says something that no method or selector knows."""


class PlanError(PeftfxError, ValueError):
    """A spec that does not fit the model: nothing matches, two rules clash, a shape forbids it."""


class RoleError(PlanError):
    """A role that the model's dataflow does not show."""


class TraceError(PeftfxError, RuntimeError):
    """The model could not be run on its example."""


class BindError(PeftfxError, RuntimeError):
    """A model that cannot be bound, or an operation that needs a bound one."""


class NotAdaptedError(PeftfxError, RuntimeError):
    """The model would have run without its adapter, so it does not run."""


class OptimizerError(PeftfxError, RuntimeError):
    """An optimizer that holds none of the parameters which train."""


class DistillationError(PeftfxError, ValueError):
    """A student and a teacher that do not go together, or a site of theirs that never ran."""


class LossError(PeftfxError, RuntimeError):
    """A loss that cannot be taken in chunks, or logits that are asked for and were never made."""


class AdapterError(PeftfxError, KeyError):
    """An adapter name that is unknown, taken or not allowed."""

    __str__ = Exception.__str__  # KeyError would print the repr


class MergeError(PeftfxError, RuntimeError):
    """A method without a merge rule, or a weight that must not be merged into."""


class GraphError(PeftfxError, RuntimeError):
    """A graph that is illegal after a pass: a defect of the pass, named in the message."""


class CheckpointError(PeftfxError, ValueError):
    """Adapter files that are incomplete, malformed, unsafe or made for something else."""


class FingerprintError(CheckpointError):
    """An adapter that was trained on other base weights than these."""


class SaveError(PeftfxError, OSError):
    """A save that could not be completed; what was there before is still whole."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest of *known*, otherwise the list of what there is."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return f"known: {shown}" if shown else "none are known here"
