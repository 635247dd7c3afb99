"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from ruamel.yaml import YAML

from peftfx.cli import show
from peftfx.errors import SaveError
from peftfx.methods import names

SPEC = """\
rules:
  - method: lora
    role: [attention.query, mlp.down]
    rank: 2
  - method: train
    name: "classifier.*"
    lr: 0.02
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as a directory."""
    directory = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "is", "the", "sky"]
    (directory / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(directory / "vocab.txt"))
    tokenizer.save_pretrained(directory)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(directory)
    return directory


def run(*arguments: Any, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "peftfx.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout if expect == 0 else done.stderr


def test_plan_check_explain(base: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    auto = ("--class", "AutoModelForSequenceClassification")
    plan = json.loads(run("plan", spec, "-m", base, *auto, "--json"))
    assert len(plan["placements"]) == 6 and plan["trainable"] > 0
    assert "attention.query" in run("plan", spec, "-m", base, *auto)
    assert "6 placements" in run("check", spec, "-m", base, *auto)
    picture = tmp_path / "layer.svg"
    assert "6 placements" in run("explain", spec, "-m", base, *auto, "--picture", picture)
    assert "attention.query" in picture.read_text()
    with pytest.raises(SaveError, match="cannot be written"):
        show.explain(spec, base, auto[1], picture=tmp_path / "none" / "layer.svg")
    text = run("explain", spec, "-m", base, *auto)
    assert "low_rank_linear" in text and "accumulate" in text
    spec.write_text(SPEC.replace("rank", "rnk"))
    error = run("check", spec, expect=2)
    assert f"{spec}:4" in error.replace("\n", "") and "'rank'" in error


@pytest.mark.slow
def test_methods_schema_doctor(base: Path, tmp_path: Path) -> None:
    counts = {
        n: m["llama_7b"]["trainable"] for n, m in json.loads(run("methods", "--json")).items()
    }
    assert set(counts) == set(names())
    none = {n for n, count in counts.items() if not count}
    assert none == {"bitfit", "freeze"}  # a Llama has no biases
    shapes = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert counts["lora"] == 32 * 8 * shapes and counts["prefix"] == 32 * 2 * 20 * 4096
    assert counts["bottleneck"] == 64 * (2 * 4096 * 64 + 64 + 4096)
    assert "1,048,704" in run("methods")  # ReFT, 32 layers of 2 * 4 * 4096 + 4
    said = json.loads(run("methods", "--peft", "--json"))["said"]
    assert said["lora"]["options"]["rank"] == "r" and "lora_alpha" in run("methods", "--peft")
    assert "draft-07" in run("schema")
    line = run("schema", tmp_path / "peftfx.json")
    assert line.startswith("# yaml-language-server: $schema=")
    run("init", "-m", base, "-o", tmp_path / "spec.yaml")
    text = line + (tmp_path / "spec.yaml").read_text()
    (tmp_path / "spec.yaml").write_text(text)
    assert "placements" in run("check", tmp_path / "spec.yaml", "-m", base)
    jsonschema.Draft7Validator(json.loads((tmp_path / "peftfx.json").read_text())).validate(
        YAML(typ="safe").load(text)
    )
    assert "exists" in run("init", "-m", base, "-o", tmp_path / "spec.yaml", expect=2)
    assert "Remedy" in run("help", "BindError") and "did you mean" in run(
        "help", "BindEror", expect=2)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "peftfx.cli", "doctor", "--json"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_train(base: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    rows = ["text,label"] + ["the sky is red,a", "the sky is blue,b"] * 16
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text('{"text": "blue sky", "label": "b"}\n' * 4)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {base}\nspec: spec.yaml\ntrain: train.csv\nevaluate: test.jsonl\n"
        "output: out\nbatch_size: 8\nmax_length: 8\nepochs: 2\nlower: aot_eager\npatience: 2\n"
        "learning_rate: 0.01\n"
    )
    assert "sound" in run("train", job, "--dry-run")
    result = json.loads(run("train", job, "--json").strip().splitlines()[-1])
    assert result["steps"] == 8 and result["accuracy"] == 1.0
    adapter = tmp_path / "out" / "adapter"
    assert (adapter / "adapter_config.json").exists()
    found = json.loads(run("inspect", adapter, "--json"))
    assert found["type"] == "LORA" and found["finite"] and len(found["rules"]) == 2
    assert "classifier" in run("inspect", adapter)
    auto = ("-m", base, "--class", "AutoModelForSequenceClassification")
    run("convert", adapter, tmp_path / "own", "--format", "peftfx", *auto)
    assert json.loads(run("inspect", tmp_path / "own", "--json"))["values"] == found["values"]
    assert "--model" in run("convert", adapter, tmp_path / "x", "--format", "peftfx", expect=2)
    again = json.loads(
        run("train", job, "--json", "--set", "resume=true", "--set", "epochs=3").splitlines()[-1]
    )
    assert again["steps"] == 12
    assert "epochs" in run("train", job, "--set", "epoch=3", expect=2)
    job.write_text(job.read_text().replace("test.jsonl", "none.csv"))
    assert "none.csv" in run("train", job, expect=2).replace("\n", "")


def test_bisect() -> None:
    fails = "import os, sys; sys.exit('group' not in os.environ['PEFTFX_SKIP'])"
    assert "PEFTFX_SKIP=group goes around it" in run("bisect", "--", sys.executable, "-c", fails)
    never = run("bisect", "--", sys.executable, "-c", "import sys; sys.exit(2)", expect=1)
    assert "Traceback" not in never
