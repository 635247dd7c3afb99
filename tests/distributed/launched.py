"""A training script as users have them, for ``accelerate launch``: HF's Trainer, an adapted model.

Its arguments are a directory for checkpoints, the batch of each process, and a checkpoint to
resume from, if any.
"""

from __future__ import annotations

import sys

import torch
import transformers

import peftfx
from peftfx.training.trainer import Trainer
from tests.architectures import by_name
from tests.e2e.test_trainer import Data

SPEC = {
    "rules": [
        {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3},
        {"method": "train", "name": "classifier"},
    ]
}


def main(directory: str, batch: int, resume: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = by_name("bert").build()
    peftfx.adapt(model, SPEC, lower="eager")
    arguments = transformers.TrainingArguments(
        output_dir=directory, per_device_train_batch_size=batch, learning_rate=1e-2, max_steps=4,
        save_steps=2, report_to="none", seed=1, dataloader_pin_memory=False, use_cpu=True,
        ddp_backend="gloo" if batch < 8 else None,
        adam_epsilon=1e-2,  # else gradients near zero give steps of any sign
        average_tokens_across_devices=False,  # each process has the mean of its own share
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Data())
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size * batch == 8
    trainer.save_model(f"{directory}/last")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
