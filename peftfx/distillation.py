"""Distillation: an adapter learns beside a teacher, the base itself or another model.

The KL of softened logits (Hinton et al., 2015, arXiv 1503.02531) and the squared distance of what
chosen modules give (FitNets, Romero et al., 2015, arXiv 1412.6550), means over the rows that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.binding import unwrap
from peftfx.divergence import kl, wide
from peftfx.errors import DistillationError
from peftfx.operations import disabled, is_adapted
from peftfx.trace import inputs_of
from peftfx.watch import Chosen, Seen, Watch, modules_of


class Distillation:
    """What a teacher adds to the loss of a student.

    ::

        distillation = peftfx.Distillation(model, hidden="*.layer.?")
        with distillation(inputs) as target:  # the teacher runs here
            outputs = model(**inputs)
        loss = outputs.loss + target.loss(outputs)

    The teacher runs in eval mode, without gradients and without labels; each of its modules gets
    its training flag back.

    Args:
        model: the student, adapted already.
        teacher: another model; without one the base, *model* with its adapters off.
        temperature: T.
        weight: of the KL term; 0 leaves it out.
        hidden: modules whose outputs are compared, by globs of their names, such as all blocks; or
            by the selectors of a spec, ``{"role": "residual.mlp", "layers": "last 2"}``.
        teacher_hidden: the same in the teacher, where they have other names there. Modules are
            paired in the order in which they run.
        hidden_weight: of the MSE term, the mean over those pairs.
        chunk: rows of logits that are worked on at once.
        shift: whether row t foretells label t + 1, as in causal language models; None: as HF's
            ``loss_type`` says.
        ignore: the label of rows that do not count. Nor do those that an attention mask hides.
        example: inputs of both, for selectors by role; HF models need none.

    Raises:
        BindError: *model* is not adapted, and there is no other teacher.
        RoleError, SpecError: selectors that mean no module, or cannot be.
        DistillationError: a glob that names no module, or a number that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 2.0,
        weight: float = 1.0,
        hidden: Chosen = (),
        teacher_hidden: Chosen | None = None,
        hidden_weight: float = 1.0,
        chunk: int = 1024,
        shift: bool | None = None,
        ignore: int = -100,
        example: Any = None,
    ) -> None:
        if not (min(weight, hidden_weight) >= 0 and temperature > 0 and chunk >= 1):
            raise DistillationError("a weight below 0, or a temperature or chunk that is not above")
        if not weight and not (hidden and hidden_weight):
            raise DistillationError("nothing is compared", remedy="give `weight`, or `hidden`")
        self.student = unwrap(model)
        self.teacher = self.student if teacher is None else unwrap(teacher)
        self.temperature, self.weight, self.hidden_weight = temperature, weight, hidden_weight
        self.chunk, self.ignore = chunk, ignore
        causal = getattr(self.student, "loss_type", None) == "ForCausalLM"
        self.shift = causal if shift is None else shift
        other = hidden if teacher_hidden is None else teacher_hidden
        with self._teaching():  # selectors are told of the base; and what forbids it shows now
            taught = modules_of(self.teacher, other, example)
        with disabled(self.student) if is_adapted(self.student) else nullcontext():
            learned = modules_of(self.student, hidden, example)
        self.of_student, self.of_teacher = Watch(learned), Watch(taught)

    @contextmanager
    def __call__(self, inputs: Any) -> Iterator[Target]:
        """Runs the teacher on *inputs*, in any form of ``example``; the block runs the student.

        Raises:
            DistillationError: a chosen module did not run, in the teacher or in the block.
        """
        args, kwargs = inputs_of(self.student, inputs)
        given = dict(kwargs)
        if "decoder_input_ids" in given or not _decodes(self.teacher):  # it makes them of labels
            given.pop("labels", None)
        with self._teaching(), self.of_teacher.watching() as taught:
            out = self.teacher(*args, **given)
        logits = logits_of(out) if self.weight else None
        with self.of_student.watching() as learned:
            yield Target(self, kwargs, logits, taught, learned)

    def remove(self) -> None:
        """Takes the hooks off both models: they are as before, and their graphs with them."""
        for watch in (self.of_student, self.of_teacher):
            for hook in watch.hooks.values():
                hook.remove()

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        modes = [(m, m.training) for m in self.teacher.modules()]
        with ExitStack() as stack:
            if self.teacher is self.student:
                stack.enter_context(disabled(self.student))
            stack.enter_context(torch.no_grad())
            try:
                for m, _ in modes:
                    m.training = False
                yield
            finally:
                for m, training in modes:
                    m.training = training


@dataclass(frozen=True)
class Target:
    """What the teacher gave for a batch, and what the student's chosen modules did."""

    distillation: Distillation
    inputs: Mapping[str, Any]
    logits: Tensor | None  # [..., V]
    taught: Seen
    learned: Seen

    def loss(self, outputs: Any) -> Tensor:
        """The weighted terms, a scalar, from the student's outputs; asked for after the block.

        Raises:
            DistillationError: outputs of different shapes or counts, or without a gradient.
        """
        d, terms = self.distillation, []
        if self.logits is not None:
            logits = logits_of(outputs)
            alike("logits", logits, self.logits)
            divergence = kl(logits, self.logits, self._rows(logits), d.temperature, d.chunk)
            terms.append(d.weight * divergence)
        if d.hidden_weight and d.of_student.modules:
            terms.append(d.hidden_weight * self._distance())
        return torch.stack([t.to(terms[0].device) for t in terms]).sum()

    def _distance(self) -> Tensor:
        if len(self.learned) != len(self.taught):
            learned, taught = ([name for name, _ in s] for s in (self.learned, self.taught))
            raise DistillationError(
                f"{len(learned)} outputs of the student's and {len(taught)} of the teacher's "
                f"modules: {', '.join(learned)}; {', '.join(taught)}",
                remedy="choose as many in both, and ask for the loss after the block",
            )
        means = []
        for (site, h), (_, t) in zip(self.learned, self.taught, strict=True):
            alike("outputs", h, t, site)
            if torch.is_grad_enabled() and not h.requires_grad:
                raise DistillationError(
                    "no gradient can flow back from here: nothing before it trains, or a reentrant "
                    "checkpoint in eager mode cut it off",
                    site=site,
                    remedy="choose modules behind the adapter; use_reentrant=False",
                )
            moved = wide(h) - wide(t.to(h.device))
            squares = moved.square().mean(-1)  # [...]
            counts = self._mask(squares, "decoder" in site)
            means.append(squares.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1))
        return torch.stack([m.to(means[0].device) for m in means]).mean()

    def _mask(self, rows: Tensor, decoder: bool = True) -> Tensor:
        """Which rows the attention mask shows that is for them; all, where there is none."""
        theirs = decoder and _decodes(self.distillation.student)
        mask = self.inputs.get("decoder_attention_mask" if theirs else "attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != rows.shape:
            return torch.ones_like(rows, dtype=torch.bool)
        return mask.to(rows.device) != 0

    def _rows(self, logits: Tensor) -> Tensor:
        """The rows of the logits that count, ``[...]``."""
        counts = self._mask(logits[..., 0])
        labels = self.inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.shape != counts.shape:
            return counts
        said = labels.to(counts.device) != self.distillation.ignore
        if self.distillation.shift:
            said = nn.functional.pad(said[..., 1:], (0, 1))
        return counts & said


def _decodes(model: nn.Module) -> bool:
    """Whether *model* is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def logits_of(out: Any) -> Tensor:
    """The logits of a model: what it calls so, or the tensor that it gives."""
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise DistillationError(
            f"a {type(out).__name__} without logits [..., classes] came out of the model",
            remedy="let it give a tensor or something with `logits`; or weight=0, and `hidden`",
        )
    return found


def alike(what: str, student: Tensor, teacher: Tensor, site: str | None = None) -> None:
    """Raises :class:`DistillationError` where two tensors cannot be compared."""
    if student.shape != teacher.shape:
        raise DistillationError(
            f"{what} of the student's are {tuple(student.shape)}, of the teacher's "
            f"{tuple(teacher.shape)}",
            site=site,
            remedy="both need the same widths, classes and tokens; virtual tokens add to those",
        )
