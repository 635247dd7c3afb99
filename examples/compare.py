"""The families of methods on one job: a real BERT that tells packages by their docstrings.

    python examples/compare.py [--part accuracy|times|table] [--methods lora,ia3] [--smoke]

Every method is a spec file in ``specs/``, with learning rates of its own. It trains on docstrings
of functions and is tested on those of functions in other modules, on those of classes there (the
domain shift), and on what the base was made for: sentence similarity. One file for each run lies
under ``runs/compare``; what is there is not run again. Times are a part of their own, to be taken
on a quiet machine; the table says where they are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo import base
from docstrings import PACKAGES, Split, build, build_pairs

HERE = Path(__file__).resolve().parent
FAMILIES = {
    "yardstick": ("head", "full"),
    "selective": ("bitfit", "norm", "last"),
    "reparametrised": ("lora", "dora", "ia3"),
    "additive": ("prompt", "prefix", "bottleneck"),
    "sparse": ("sparse_magnitude", "sparse_fisher"),
    "combined": ("lora_bitfit", "mam", "unipelt", "s4", "sparse_adapter"),
    "side network": ("ladder",),
}
FROZEN = "frozen"  # a spec by which next to nothing trains: the denominator of times
MEASURES = ("accuracy", "shift", "recall", "mrr")
COUNTS = ("trainable", "adapter_bytes")
METHODS = tuple(method for family in FAMILIES.values() for method in family)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and tested on; texts are counted for each package."""

    packages: tuple[str, ...] = tuple(PACKAGES)
    classes: int = 5
    train: int = 128
    test: int = 64
    shift: int = 48
    pairs: int = 64
    tokens: int = 32
    pair_tokens: int = 64
    epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    lower: str = "aot_eager"  # Inductor adds nothing to an accuracy
    lower_timed: str = "inductor"
    rounds: int = 12  # in which each method has its turn to be timed

    @property
    def splits(self) -> dict[str, Split]:
        return {
            "train": Split("train", self.train, ("function",)),
            "test": Split("test", self.test, ("function",)),
            "shift": Split("test", self.shift, ("class",)),
        }

    @property
    def similar(self) -> dict[str, Any]:
        """What the base's own task depends on."""
        return {"classes": self.classes, "pairs": self.pairs, "tokens": self.pair_tokens}


SMOKE = Sizes(
    packages=("numpy", "networkx"), classes=2, train=32, test=32, shift=16, pairs=16, tokens=16,
    pair_tokens=24, epochs=1, seeds=(0,), lower="eager", lower_timed="eager", rounds=2,
)  # fmt: skip


APART = ("seeds", "lower_timed", "rounds")  # no run of a seed depends on them


@dataclass(frozen=True)
class Place:
    """Where everything of a comparison lies."""

    runs: Path

    @property
    def data(self) -> Path:
        return self.runs / "data"

    @property
    def base(self) -> Path:
        return self.runs / "base.json"

    @property
    def times(self) -> Path:
        return self.runs / "times.json"

    def run(self, method: str, seed: int) -> Path:
        return self.runs / "accuracy" / f"{method}-{seed}.json"


def spec_of(method: str) -> Path:
    """The spec file of a method."""
    return HERE / "specs" / f"{method}.yaml"


def inputs(method: str, sizes: Sizes) -> dict[str, Any]:
    """What a run depends on; one that was made from something else is made again."""
    from peftfx import Spec

    values = {k: v for k, v in asdict(sizes).items() if k not in APART}
    made = {"sizes": values, "spec": Spec.load(spec_of(method)).to_dict()}
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


def found(file: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left, if it was made from the same."""
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text())
    return content if content.pop("made_from") == made_from else None


def keep(file: Path, made_from: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes what a run found, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps({"made_from": made_from, **content}, indent=2))
    draft.replace(file)


def missing(method: str, sizes: Sizes, place: Place) -> list[int]:
    """The seeds that a method was not run with yet."""
    made_from = inputs(method, sizes)
    return [s for s in sizes.seeds if found(place.run(method, s), made_from) is None]


def prepare(sizes: Sizes, place: Place) -> None:
    """Writes the data, once."""
    note = place.data / "sizes.json"
    wanted = json.dumps([str(split) for split in sizes.splits.values()] + [sizes.pairs])
    if note.exists() and note.read_text() == wanted:
        return
    build(place.data, sizes.splits, sizes.classes, sizes.packages)
    packages = sorted({label for _, label in rows(place, "train")})
    build_pairs(place.data / "pairs.csv", sizes.pairs, packages)
    note.write_text(wanted)


def rows(place: Place, name: str, columns: tuple[str, str] = ("text", "label")) -> Any:
    """The rows of one of the files."""
    from peftfx.training.job import read_rows

    return read_rows(str(place.data / f"{name}.csv"), *columns)


def accuracy(method: str, seed: int, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Trains a method by one seed, and tests what it saved on a fresh base."""
    from similarity import retrieval
    from transformers import AutoTokenizer

    from peftfx.training.job import make_job
    from peftfx.training.run import ADAPTER, predict, restored, run

    output = place.runs / "work" / f"{method}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    job = make_job(
        {
            "model": base(),
            "spec": str(spec_of(method)),
            "train": str(place.data / "train.csv"),
            "evaluate": str(place.data / "test.csv"),
            "output": str(output),
            "max_length": sizes.tokens,
            "epochs": sizes.epochs,
            "seed": seed,
            "lower": sizes.lower,
        }
    )
    result = run(job)
    shift = rows(place, "shift")
    guesses = predict(job, output / ADAPTER, [text for text, _ in shift]).argmax(-1).tolist()
    right = [result.labels[g] == label for g, (_, label) in zip(guesses, shift, strict=True)]
    model, _ = restored(job, output / ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    similar = retrieval(
        model, tokenizer, rows(place, "pairs", ("first", "rest")), sizes.pair_tokens
    )
    shutil.rmtree(output)
    return {
        "accuracy": result.accuracy,
        "shift": sum(right) / len(right),
        **asdict(similar),
        "trainable": result.trainable,
        "adapter_bytes": result.adapter_bytes,
        "losses": [h["loss"] for h in result.history if "loss" in h],
    }


def untouched(sizes: Sizes, place: Place) -> dict[str, float]:
    """Sentence similarity of the base."""
    from similarity import retrieval
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base()).eval()
    tokenizer = AutoTokenizer.from_pretrained(base())
    pairs = rows(place, "pairs", ("first", "rest"))
    return asdict(retrieval(model, tokenizer, pairs, sizes.pair_tokens))


def time_all(methods: tuple[str, ...], sizes: Sizes, place: Place) -> None:
    """Times of the methods, and of the frozen base that they are set against."""
    from compare_times import measure

    names = (FROZEN, *methods)
    made_from = {name: inputs(name, sizes) for name in names} | {"rounds": sizes.rounds}
    if found(place.times, made_from) is None:
        specs = {name: spec_of(name) for name in names}
        keep(place.times, made_from, measure(specs, base(), sizes, rows(place, "train")))


def collect(sizes: Sizes, place: Place) -> dict[str, Any]:
    """All that the runs left, where they were made from what the files say now."""
    methods = {}
    for family, names in FAMILIES.items():
        for name in names:
            made_from = inputs(name, sizes)
            runs = {s: found(place.run(name, s), made_from) for s in sizes.seeds}
            done = {seed: run for seed, run in runs.items() if run is not None}
            methods[name] = {
                "family": family,
                "seeds": list(done),
                **{k: [run[k] for run in done.values()] for k in MEASURES},
                **{k: next((run[k] for run in done.values()), None) for k in COUNTS},
            }
    timed = json.loads(place.times.read_text()) if place.times.exists() else None
    return {
        "sizes": asdict(sizes),
        "base": found(place.base, sizes.similar),
        "timed": timed and {k: timed[k] for k in ("device", "torch")},
        "times": timed and timed["methods"],
        "methods": methods,
    }


def work(method: str, sizes: Sizes, place: Place) -> None:
    """All missing runs of one method, one after the other: they share their compiled graphs."""
    made_from = inputs(method, sizes)
    for seed in missing(method, sizes, place):
        start = time.perf_counter()
        content = accuracy(method, seed, sizes, place)
        keep(place.run(method, seed), made_from, content)
        shown = ", ".join(f"{k} {content[k]:.3f}" for k in MEASURES)
        print(f"{method}, seed {seed}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("accuracy", "times", "table"), help="one part only")
    parser.add_argument("--methods", default="", help="comma-separated; without it, all")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see whether it works")
    parser.add_argument("--runs", type=Path, help="where the runs lie")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a method, run in this process
    return parser.parse_args()


def main() -> None:
    given = arguments()
    sizes = SMOKE if given.smoke else Sizes()
    default = HERE.parent / "runs" / ("compare-smoke" if given.smoke else "compare")
    place = Place(given.runs or default)
    methods = tuple(given.methods.split(",")) if given.methods else METHODS
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(METHODS)}")
    if given.worker:
        work(given.worker, sizes, place)
        return
    for part in [given.part] if given.part else ("accuracy", "times", "table"):
        if part == "accuracy":
            prepare(sizes, place)
            if found(place.base, sizes.similar) is None:
                keep(place.base, sizes.similar, untouched(sizes, place))
            for method in methods:
                if missing(method, sizes, place):
                    # a process of its own: nothing of one method is left for the next
                    again = [sys.executable, __file__, *sys.argv[1:], "--worker", method]
                    subprocess.run(again, check=True, env=ENVIRONMENT)
        elif part == "times":
            prepare(sizes, place)
            time_all(methods, sizes, place)
        else:
            from compare_table import write

            write(collect(sizes, place), place.runs if given.smoke else HERE)


if __name__ == "__main__":
    main()
