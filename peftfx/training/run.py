"""Runs a job: an HF sequence classifier on labelled texts, by ``transformers.Trainer``."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftfx.backends import adapt
from peftfx.binding import bound
from peftfx.calibration import calibrate
from peftfx.checkpoint import save
from peftfx.errors import SpecError
from peftfx.files import write_directory
from peftfx.loading import load
from peftfx.log import logger
from peftfx.spec import Spec
from peftfx.training.job import Job, read_rows
from peftfx.training.trainer import Trainer

ADAPTER = "adapter"


@dataclass(frozen=True)
class Result:
    """What came out of a job. Times in seconds, sizes in bytes."""

    accuracy: float
    loss: float
    trainable: int
    total: int
    adapter_bytes: int
    peak_memory: int
    step_seconds: float
    seconds: float
    steps: int
    labels: list[str]
    history: list[dict[str, Any]]
    predictions: list[str]  # the label of each evaluated text, in their order


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tokenized texts of one length, so that a compiled model sees one shape."""

    def __init__(
        self, rows: list[tuple[str, str]], labels: list[str], tokenizer: Any, length: int
    ) -> None:
        self.encoded = tokenizer(
            [text for text, _ in rows],
            truncation=True,
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
        self.labels = torch.tensor([labels.index(label) for _, label in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: values[index] for name, values in self.encoded.items()}
        return {**row, "labels": self.labels[index]}


class _Clock(transformers.TrainerCallback):
    """Time of each optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.start)


def classifier(job: Job, labels: list[str]) -> nn.Module:
    """The base model with a fresh head for *labels*."""
    torch.manual_seed(job.seed)
    if not Path(job.model).is_dir():
        raise SpecError("there is no such model directory", where=job.model)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return model


def run(job: Job) -> Result:
    """Trains, evaluates and saves; writes ``result.json`` beside the adapter."""
    transformers.set_seed(job.seed)
    rows = read_rows(job.train, job.text, job.label)
    held_out = read_rows(job.evaluate, job.text, job.label)
    labels = sorted({label for _, label in rows})
    unknown = sorted({label for _, label in held_out} - set(labels))
    if unknown:
        raise SpecError(f"labels that were not trained on: {unknown[:5]}", where=job.evaluate)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    model = classifier(job, labels)
    train = Texts(rows, labels, tokenizer, job.max_length)
    test = Texts(held_out, labels, tokenizer, job.max_length)
    if job.spec is not None:
        spec = Spec.load(job.spec)
        if job.compile:
            adapt(model, spec, lower=job.lower)  # type: ignore[arg-type]
        else:
            from peftfx.bind import bind

            bind(model, spec)
        _calibrate(job, model, train)
    elif job.compile:
        model.compile(backend="inductor" if job.lower == "auto" else job.lower)
    trainer, clock = _trainer(job, model, train, test)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=_last(job.output) if job.resume else None)
    seconds = time.perf_counter() - start
    found = trainer.predict(test, metric_key_prefix="eval")
    metrics = found.metrics
    size = 0
    if job.spec is not None:
        save(model, Path(job.output) / ADAPTER)
        size = sum(f.stat().st_size for f in (Path(job.output) / ADAPTER).glob("*.safetensors"))
    result = Result(
        accuracy=metrics["eval_accuracy"],
        loss=metrics["eval_loss"],
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        adapter_bytes=size,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        step_seconds=statistics.median(clock.times) if clock.times else math.nan,
        seconds=seconds,
        steps=int(trainer.state.global_step),
        labels=labels,
        history=list(trainer.state.log_history),
        predictions=[labels[i] for i in _guesses(found.predictions).tolist()],
    )
    text = json.dumps(asdict(result), indent=2).encode()
    write_directory(Path(job.output) / "result", {"result.json": text})
    return result


def _calibrate(job: Job, model: nn.Module, train: Texts) -> None:
    """Shows texts to the rules that start from data: one at a time, as Fisher masks want it."""
    _, binding = bound(model)
    if any(adapter.waits for adapter in binding.adapters.values()):
        texts = (train[i] for i in range(min(job.calibration, len(train))))
        calibrate(model, ({k: v.unsqueeze(0) for k, v in text.items()} for text in texts))


def _last(output: str) -> str | None:
    if not os.path.isdir(output):
        return None
    found: str | None = transformers.trainer_utils.get_last_checkpoint(output)
    if found is None:
        logger.info("no checkpoint in %s: training starts anew", output)
    return found


# the option's name in this version of transformers
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)


def _trainer(job: Job, model: nn.Module, train: Texts, test: Texts) -> tuple[Any, _Clock]:
    per_epoch = math.ceil(len(train) / (job.batch_size * job.accumulate))
    steps = per_epoch * job.epochs
    arguments = transformers.TrainingArguments(
        output_dir=job.output,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulate,
        learning_rate=job.learning_rate,
        weight_decay=job.weight_decay,
        warmup_steps=int(job.warmup * steps),
        **{_CHECKPOINTING: job.checkpointing},  # type: ignore[arg-type]
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=job.patience is not None,
        metric_for_best_model="accuracy",
        logging_steps=10,
        seed=job.seed,
        report_to="none",
        dataloader_pin_memory=False,
    )
    clock = _Clock()
    callbacks: list[transformers.TrainerCallback] = [clock]
    if job.patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(job.patience))
    kind = Trainer if job.spec is not None else transformers.Trainer
    trainer = kind(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=_accuracy,
        callbacks=callbacks,
    )
    return trainer, clock


def _guesses(logits: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((_guesses(prediction.predictions) == prediction.label_ids).mean())}


def restored(job: Job, adapter: str | os.PathLike[str] | None) -> tuple[nn.Module, list[str]]:
    """A fresh base, uncompiled, with a finished job's head and a saved adapter; and its labels."""
    labels = json.loads((Path(job.output) / "result" / "result.json").read_text())["labels"]
    model = classifier(job, labels).eval()
    return model if adapter is None else load(model, adapter, compile=False), labels


def predict(job: Job, adapter: str | os.PathLike[str] | None, texts: list[str]) -> Tensor:
    """Logits of *texts* by a fresh base with a saved adapter."""
    model, labels = restored(job, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    data = Texts([(text, labels[0]) for text in texts], labels, tokenizer, job.max_length)
    with torch.no_grad():
        logits: Tensor = model(**data.encoded).logits
    return logits
