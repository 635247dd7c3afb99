"""Saving and loading: formats, atomicity, and files that must not be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import (
    AdapterError,
    CheckpointError,
    FingerprintError,
    PeftfxError,
)
from tests.architectures import by_name
from tests.helpers import fill, output

SPEC: dict[str, Any] = {
    "rules": [
        {"method": "lora", "name": ["*.q_proj", "*.v_proj"], "rank": 3,
         "overrides": [{"layers": "last 1", "rank": 5, "alpha": 7}]},
        {"method": "train", "name": "lm_head"},
    ]
}  # fmt: skip
MIXED: dict[str, Any] = {"rules": [*SPEC["rules"], {"method": "train", "name": "model.norm"},
                                   {"method": "bitfit", "name": "*"}]}  # fmt: skip


def model_with(spec: Any = None, seed: int = 0) -> nn.Module:
    model = by_name("llama").build()
    Backend(spec or SPEC, "eager").bind(model)
    fill(peftfx.parameters(model), seed)
    return model


def test_both_formats_are_lossless(tmp_path: Path) -> None:
    x = by_name("llama").example()
    for format, name in (("peft", "adapter_config.json"), ("peftfx", "peftfx_model.safetensors")):
        model = model_with()
        peftfx.save(model, tmp_path / format, format=format)  # type: ignore[arg-type]
        assert (tmp_path / format / name).exists()
        fresh = by_name("llama").build()
        peftfx.load(fresh, tmp_path / format, compile=False)
        want, got = peftfx.state_dict(model), peftfx.state_dict(fresh)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[k], got[k]) for k in want)
        assert torch.equal(output(fresh, x), output(model, x))
        assert not any(p.requires_grad for p in fresh.parameters())


def test_what_peft_cannot_say_is_refused_and_kept(tmp_path: Path) -> None:
    rules = {"rules": [{"method": "lora", "name": "*.q_proj"},
                       {"method": "lora", "name": "*.v_proj", "dropout": 0.1}]}  # fmt: skip
    model = model_with(rules)
    with pytest.raises(CheckpointError, match="one dropout"):
        peftfx.save(model, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()
    peftfx.save(model, tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "peftfx.json", "peftfx_model.safetensors",
    ]  # fmt: skip
    peftfx.save(model_with(), tmp_path / "a")  # over it, now in PEFT's form: nothing stale stays
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "peftfx.json",
    ]  # fmt: skip


def test_foreign_files_survive_a_save(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "a" / "deep" / "note").write_text("note")
    peftfx.save(model_with(), tmp_path / "a")
    assert (tmp_path / "a" / "optimizer.pt").read_bytes() == b"state"
    assert (tmp_path / "a" / "deep" / "note").read_text() == "note"
    assert not [f for f in tmp_path.iterdir() if f.name != "a"]


def test_another_base_is_an_error_and_another_dtype_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peftfx.save(model_with(), tmp_path)
    other = by_name("llama").build()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.3)  # type: ignore[union-attr, index]
    with pytest.raises(FingerprintError, match="not those"):
        peftfx.load(other, tmp_path, compile=False)
    half = by_name("llama").build().bfloat16()
    with caplog.at_level("WARNING", logger="peftfx"):
        peftfx.load(half, tmp_path, compile=False)
    assert "another dtype" in caplog.text
    (tmp_path / "peftfx.json").unlink()
    with caplog.at_level("INFO", logger="peftfx"):
        peftfx.load(other, tmp_path, compile=False)
    assert "no fingerprint" in caplog.text


def test_a_smaller_model_is_refused(tmp_path: Path) -> None:
    peftfx.save(model_with(), tmp_path)
    with pytest.raises(PeftfxError):
        peftfx.load(by_name("bert").build(), tmp_path, compile=False)
    with pytest.raises(AdapterError):
        peftfx.load(by_name("llama").build(), tmp_path, adapter="../x", compile=False)


def test_load_beside_and_into(tmp_path: Path) -> None:
    first, second = model_with(seed=1), model_with(seed=2)
    peftfx.save(first, tmp_path / "one")
    peftfx.save(second, tmp_path / "two")
    model = model_with(seed=3)
    peftfx.add(model, tmp_path / "one", "one")
    peftfx.load(model, tmp_path / "two")  # into the adapter of that name
    x = by_name("llama").example()
    assert torch.equal(output(model, x), output(second, x))
    peftfx.activate(model, "one")
    assert torch.equal(output(model, x), output(first, x))


def test_load_state_dict_checks_before_it_writes() -> None:
    model = model_with(seed=1)
    want = {k: v.clone() for k, v in peftfx.state_dict(model_with(seed=2)).items()}
    before = {k: v.clone() for k, v in peftfx.state_dict(model).items()}
    key = next(k for k in want if k.endswith("lora.A"))
    for bad in (
        {k: v for k, v in want.items() if k != key},
        {**want, "more": torch.zeros(1)},
        {**want, key: want[key].t()},
        {**want, key: want[key] * float("nan")},
    ):
        with pytest.raises(CheckpointError):
            peftfx.load_state_dict(model, bad)
        assert all(torch.equal(v, before[k]) for k, v in peftfx.state_dict(model).items())
    peftfx.load_state_dict(model, want)
    assert all(torch.equal(v, want[k]) for k, v in peftfx.state_dict(model).items())


def test_save_pretrained_saves_the_adapter(tmp_path: Path) -> None:
    model = model_with()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not (tmp_path / "model.safetensors").exists()
    fresh = by_name("llama").build()
    peftfx.load(fresh, tmp_path, compile=False)
    x = by_name("llama").example()
    assert torch.equal(output(fresh, x), output(model, x))
