"""Job files: what to train, on what, with which adapter."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from peftfx.errors import SpecError
from peftfx.errors import nearest as nearest_name
from peftfx.files import open_regular
from peftfx.spec_file import Document, read


class Job(pydantic.BaseModel):
    """A training job. Paths are taken from the job file's directory."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = pydantic.Field(description="Directory of the base model and its tokenizer.")
    spec: str | None = pydantic.Field(
        None, description="Spec file; without one, the whole model is fine-tuned."
    )
    train: str = pydantic.Field(description="CSV or JSONL with the columns text and label.")
    evaluate: str = pydantic.Field(description="The same, to evaluate on.")
    output: str = pydantic.Field(description="Directory for checkpoints and results.")
    text: str = pydantic.Field("text", description="Name of the text column.")
    label: str = pydantic.Field("label", description="Name of the label column.")
    epochs: int = pydantic.Field(3, ge=1, description="Passes over the training data.")
    batch_size: int = pydantic.Field(32, ge=1, description="Texts per step.")
    accumulate: int = pydantic.Field(1, ge=1, description="Batches per optimizer step.")
    max_length: int = pydantic.Field(64, ge=4, description="Tokens per text.")
    learning_rate: float = pydantic.Field(
        5e-4, gt=0, description="Peak learning rate, where a rule has no `lr` of its own."
    )
    weight_decay: float = pydantic.Field(0.01, ge=0, description="Of matrices only.")
    warmup: float = pydantic.Field(0.06, ge=0, le=1, description="Share of steps to warm up.")
    patience: int | None = pydantic.Field(
        None, ge=1, description="Stop after so many evaluations without a better one."
    )
    calibration: int = pydantic.Field(
        64, ge=1, description="Training texts shown to rules that start from data."
    )
    checkpointing: bool = pydantic.Field(False, description="Gradient checkpointing.")
    lower: str = pydantic.Field("auto", description="auto, inductor, aot_eager or eager.")
    compile: bool = pydantic.Field(True, description="Compile the model.")
    resume: bool = pydantic.Field(False, description="Go on from the last checkpoint in output.")
    seed: int = pydantic.Field(0, description="Of everything random.")


def load_job(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Job:
    """The job in a YAML, TOML or JSON file, with *changes* on top.

    Raises:
        SpecError: with file and line.
    """
    document = read(path)
    values = {**document.values, **(changes or {})}
    job = make_job(values, document)
    base = Path(path).resolve().parent
    paths = {
        k: str(base / v)
        for k in ("model", "spec", "train", "evaluate", "output")
        if (v := getattr(job, k)) is not None
    }
    return job.model_copy(update=paths)


def make_job(values: Mapping[str, Any], document: Document | None = None) -> Job:
    """The job in a mapping."""
    document = document or Document(values, {}, "<job>")
    try:
        return Job.model_validate(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        remedy = None
        if first["type"] == "extra_forbidden":
            remedy = nearest_name(key, Job.model_fields)
        raise SpecError(
            f"{key}: {first['msg']}", where=document.where((key,)), remedy=remedy
        ) from None


def read_rows(path: str, text: str, label: str) -> list[tuple[str, str]]:
    """Texts and labels of a CSV or JSONL file."""
    file = Path(path)
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]]
            if file.suffix == ".csv":
                rows = list(csv.DictReader(stream))
            elif file.suffix in (".jsonl", ".json"):
                rows = [json.loads(line) for line in stream if line.strip()]
            else:
                raise SpecError("data is .csv or .jsonl", where=path)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise SpecError(f"not readable: {error}", where=path) from None
    if not rows:
        raise SpecError("there are no rows", where=path)
    for number, row in enumerate(rows, 2 if file.suffix == ".csv" else 1):
        for column in (text, label):
            if not isinstance(row, dict) or row.get(column) in (None, ""):
                raise SpecError(f"no value for {column!r}", where=f"{path}:{number}")
    return [(str(row[text]), str(row[label])) for row in rows]
