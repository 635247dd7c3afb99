"""The comparison of the families: its files, its table, and a tiny run of all its parts."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peftfx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("compare")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("compare_table")


def test_every_method_is_a_spec_file(compare: Any) -> None:
    files = {file.stem for file in (EXAMPLES / "specs").glob("*.yaml")}
    assert files == {*compare.METHODS, compare.FROZEN}
    for name in files:
        assert all(rule.rates.lr for rule in peftfx.Spec.load(compare.spec_of(name)).rules) or (
            name == compare.FROZEN
        )


def test_the_readme_has_the_results(table: Any) -> None:
    results = json.loads((EXAMPLES / "results" / "compare.json").read_text())
    assert table.section(results) in (EXAMPLES / "README.md").read_text()
    for name, found in results["methods"].items():
        for key in ("accuracy", "shift", "recall", "mrr"):
            assert len(found[key]) == len(found["seeds"]) and all(0 < v <= 1 for v in found[key])
        assert f"[{name}](specs/{name}.yaml)" in table.table(results)


def test_the_table_says_what_is_missing(table: Any) -> None:
    found = {"family": "sparse", "seeds": [], "trainable": None, "adapter_bytes": None}
    found |= {key: [] for key in ("accuracy", "shift", "recall", "mrr")}
    one = {**found, "accuracy": [0.5], "shift": [0.25], "recall": [0.125], "mrr": [0.5]}
    results = {
        "sizes": {"seeds": [0, 1, 2]},
        "base": {"recall": 0.5, "mrr": 0.625},
        "times": {
            "frozen": {"step": [1.0, 2.0], "unmerged": [0.5, 1.0]},
            "b": {"step": [2.0, 2.2], "unmerged": [0.5, 2.0], "merged": [None, None], "peak": 2e6},
        },
        "methods": {"a": found, "b": {**one, "trainable": 1234, "adapter_bytes": 5e6}},
    }
    a, b = table.table(results).splitlines()[-2:]
    assert a.count("not measured") == 10
    assert "0.500 (0.500 to 0.500, 1 of 3 seeds)" in b and "1,234" in b and "5.00 MB" in b
    assert b.endswith("| 1.55 | 1.50 | cannot be merged | 2 MB |")


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    """All parts, twice: what was run is not run again."""
    command = [sys.executable, str(EXAMPLES / "compare.py"), "--smoke", "--runs", str(tmp_path),
               "--methods", "head,lora"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "lora, seed 0" in run()
    assert "seed" not in run()
    results = json.loads((tmp_path / "results" / "compare.json").read_text())
    lora, frozen = results["methods"]["lora"], results["times"]["frozen"]
    assert lora["accuracy"][0] > 0.6 and lora["trainable"] > 300_000
    assert len(frozen["step"]) == 2 and results["times"]["lora"]["merged"][0] > 0
    assert results["times"]["lora"]["peak"] > 4 * 22_000_000
    assert results["methods"]["ia3"]["accuracy"] == []
    assert (tmp_path / "results" / "compare.png").stat().st_size > 10_000
    assert "| [lora](specs/lora.yaml) |" in (tmp_path / "README.md").read_text()
    with (tmp_path / "data" / "shift.csv").open(newline="") as stream:
        shifted = {row["text"] for row in csv.DictReader(stream)}
    with (tmp_path / "data" / "train.csv").open(newline="") as stream:
        assert not shifted & {row["text"] for row in csv.DictReader(stream)}
