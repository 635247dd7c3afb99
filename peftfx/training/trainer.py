"""``transformers.Trainer`` for adapted models.

Checkpoints hold only the adapter (``save_pretrained`` of a bound model writes nothing else); this
handle loads them back when training resumes or the best model is restored. Its optimizer obeys the
rates of the spec's rules, its loss has their penalties, and their schedules are stepped and kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from peftfx.binding import bound
from peftfx.distillation import Distillation
from peftfx.loading import load
from peftfx.operations import parameter_groups
from peftfx.regularization import penalty
from peftfx.schedule import Schedule

SCHEDULE = "peftfx_schedule.pt"


class Trainer(transformers.Trainer):
    """A ``transformers.Trainer`` whose checkpoints are adapters. The model has to be adapted.

    Args:
        distillation: adds its teacher's terms to the loss that trains.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        bound(model)
        self.distillation = distillation
        super().__init__(model, *args, **kwargs)
        self.schedule = Schedule(model)
        self.add_callback(_Steps(self.schedule))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss; while the model trains, with the rules' penalties and the teacher's terms."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = penalty(model)
        if self.distillation is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            with self.distillation(inputs) as target:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            extra = extra + target.loss(outputs)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            extra = extra / self.current_gradient_accumulation_steps  # as the loss is already
        return (loss + extra, outputs) if return_outputs else loss + extra

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: transformers.TrainingArguments, model: Any = None
    ) -> tuple[Any, Any]:
        """The optimizer of *args*, for the groups of ``peftfx.parameter_groups``."""
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if model is not None:  # an optimizer that chooses its own parameters keeps them
            groups = parameter_groups(model, args.learning_rate, args.weight_decay)
            options = {"params": groups, **options}
        return kind, options

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        _load(self.model if model is None else model, resume_from_checkpoint)
        kept = Path(resume_from_checkpoint) / SCHEDULE
        if kept.exists():
            self.schedule.load_state_dict(torch.load(kept, weights_only=True))

    def _load_best_model(self) -> None:
        _load(self.model, str(self.state.best_model_checkpoint))


class _Steps(transformers.TrainerCallback):
    """Steps the rules' schedules with the optimizer, and saves where they are."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.schedule.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.schedule.state_dict(), directory / SCHEDULE)


def _load(model: Any, directory: str) -> None:
    _, binding = bound(model)
    for name in binding.active:
        load(model, directory, adapter=name)
