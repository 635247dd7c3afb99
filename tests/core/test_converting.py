"""Adapter files in other forms, and what is told of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftfx
from peftfx.backends import Backend
from peftfx.converting import convert
from peftfx.errors import CheckpointError, FingerprintError
from peftfx.inspecting import inspect
from tests.helpers import fill
from tests.peft_options import IDS, Model

RULES = [
    {"method": "lora", "name": ["*.q_proj", "*.experts.up"], "rank": 3, "alpha": 5,
     "overrides": [{"layers": 1, "rank": 2}]},
    {"method": "train", "name": "score"},
]  # fmt: skip


def base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().eval().requires_grad_(False)


def adapted(rules: list[dict[str, Any]]) -> Any:
    model = base()
    Backend({"rules": rules}, "eager").bind(model, (IDS,))
    fill(peftfx.parameters(model), scale=0.5)
    return model


def loaded(directory: Path) -> torch.Tensor:
    model = base()
    peftfx.load(model, directory, compile=False, example=(IDS,))
    return model(IDS)  # type: ignore[no-any-return]


def as_pickle(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()


def test_formats_and_pickles_hold_the_same(tmp_path: Path) -> None:
    model = adapted(RULES)
    want = model(IDS)
    peftfx.save(model, tmp_path / "peft", format="peft")
    shapes = base(seed=7)  # not the values
    convert(tmp_path / "peft", tmp_path / "own", "peftfx", shapes)
    assert {f.name for f in (tmp_path / "own").iterdir()} == {
        "peftfx.json", "peftfx_model.safetensors"}  # fmt: skip
    assert torch.equal(loaded(tmp_path / "own"), want)
    convert(tmp_path / "own", tmp_path / "back", "peft", base(seed=7))
    for name in ("adapter_config.json", "adapter_model.safetensors", "peftfx.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    as_pickle(tmp_path / "peft")
    with pytest.raises(CheckpointError, match="peftfx convert"):
        loaded(tmp_path / "peft")
    for format in (None, "peft", "peftfx"):
        convert(tmp_path / "peft", tmp_path / "safe", format, base(seed=7))  # type: ignore[arg-type]
        assert torch.equal(loaded(tmp_path / "safe"), want)
        assert not (tmp_path / "safe" / "adapter_model.bin").exists()
    assert not (tmp_path / "safe" / "adapter_config.json").exists()  # of the format before
    other = base(seed=7)
    with pytest.raises(FingerprintError):
        peftfx.load(other, tmp_path / "safe", compile=False, example=(IDS,))


class _Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


HOSTILE: dict[str, Any] = {
    "code": {"a": _Runs()},
    "a list": [torch.ones(2)],
    "a number": {"a": 1},
    "a module": nn.Linear(2, 2),
    "sparse": {"a": torch.eye(3).to_sparse()},
    "names": {1: torch.ones(2)},
    "complex": {"a": torch.ones(2, dtype=torch.complex64)},
}


@pytest.mark.parametrize("what", [*HOSTILE, "bytes", "a plain pickle", "cut short"])
def test_hostile_pickles(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    file = tmp_path / "source" / "adapter_model.bin"
    if what in HOSTILE:
        torch.save(HOSTILE[what], file)
    elif what == "a plain pickle":
        file.write_bytes(pickle.dumps({"a": _Runs()}))
    else:
        torch.save({"a": torch.ones(3)}, file)
        file.write_bytes(b"\x80\x02garbage" if what == "bytes" else file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"plain|not tensors"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    peftfx.save(adapted(RULES), tmp_path / "peft")
    with pytest.raises(CheckpointError, match="takes the model"):
        convert(tmp_path / "peft", tmp_path / "own", "peftfx")
    with pytest.raises(CheckpointError, match="are one"):
        convert(tmp_path / "peft", tmp_path / "peft" / ".." / "peft")
    with pytest.raises(CheckpointError, match="no such directory"):
        convert(tmp_path / "none", tmp_path / "own")
    with pytest.raises(CheckpointError, match="does not fit"):
        convert(tmp_path / "peft", tmp_path / "own", "peftfx", nn.Linear(3, 2))
    peftfx.save(adapted([{"method": "train", "name": "score"}]), tmp_path / "trained")
    with pytest.raises(CheckpointError, match="needs a method"):
        convert(tmp_path / "trained", tmp_path / "own", "peft", base())
    values = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    next(iter(values.values()))[0] = float("nan")
    save_file(values, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        convert(tmp_path / "peft", tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("format", ["peft", "peftfx"])
def test_inspect(format: Any, tmp_path: Path) -> None:
    model = adapted(RULES)
    peftfx.save(model, tmp_path, format=format)
    found = inspect(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["format"] == format and found["type"] == ("LORA" if format == "peft" else None)
    assert [r["method"] for r in found["rules"]] == ["lora", "train"]
    assert found["rules"][0]["rank"] == 3
    assert found["values"] == sum(p.numel() for p in peftfx.parameters(model))
    assert found["bytes"] == 4 * found["values"] and found["dtypes"] == {
        "float32": found["tensors"]}  # fmt: skip
    assert found["finite"] and found["fingerprint"] == 8  # 3 + 3 and two of the head
    sites = found["sites"]
    ending = "" if format == "peft" else ".weight"
    assert sites[f"decoder.layers.1.q_proj{ending}"].keys() >= {
        "A", "B"} if format == "peft" else {"lora.A", "lora.B"}  # fmt: skip
    ranks = {t["A" if format == "peft" else "lora.A"]["shape"][0] for n, t in sites.items()
             if "q_proj" in n}  # fmt: skip
    assert ranks == {2, 3}
    assert sum("score" in name for name in sites) == (1 if format == "peft" else 2)

    weights = next(tmp_path.glob("*model.safetensors"))
    values = load_file(weights)
    key = sorted(values)[0]
    values[key].view(-1)[1] = float("inf")
    save_file(values, weights)
    found = inspect(tmp_path)
    assert not found["finite"] and found["not_finite"] == [key]


def test_inspect_of_what_peft_alone_wrote(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["embed_tokens", "up"], r=3))
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["fingerprint"] is None and found["rules"][0]["name"]
    assert set(found["sites"]["embed_tokens"]) >= {"A", "B"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ".*up"}))  # fmt: skip
    found = inspect(tmp_path)  # it takes the model to read it as a spec
    assert found["rules"] is None and found["options"]["target_modules"] == ".*up"
