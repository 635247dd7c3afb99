"""``transformers.Trainer`` for adapted models.

Checkpoints hold only the adapter (``save_pretrained`` of a bound model writes nothing else); this
handle loads them back when training resumes or the best model is restored. Its optimizer obeys the
rates of the spec's rules.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from peftfx.binding import bound
from peftfx.loading import load
from peftfx.operations import parameter_groups


class Trainer(transformers.Trainer):
    """A ``transformers.Trainer`` whose checkpoints are adapters. The model has to be adapted."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound(model)
        super().__init__(model, *args, **kwargs)

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

    def _load_best_model(self) -> None:
        _load(self.model, str(self.state.best_model_checkpoint))


def _load(model: Any, directory: str) -> None:
    _, binding = bound(model)
    for name in binding.active:
        load(model, directory, adapter=name)
