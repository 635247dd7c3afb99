"""Saving and loading: formats, atomicity, and files that must not be believed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import peftfx
from peftfx import files, tensors
from peftfx.backends import Backend
from peftfx.errors import (
    AdapterError,
    CheckpointError,
    FingerprintError,
    PeftfxError,
    SaveError,
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


def _read(file: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in load_file(file).items()}  # load_file maps the file


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        values = _read(file)
        change(values)
        save_file(values, file)

    return edit


def _edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def _first(values: dict[str, torch.Tensor]) -> str:
    return next(k for k in sorted(values) if "lora_A" in k)


def _set(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _edit_weights(lambda v: v.update({_first(v): value(v[_first(v)])}))


def _nan(t: torch.Tensor) -> torch.Tensor:
    t[0, 0] = float("nan")
    return t


def _header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = change(json.loads(data[8 : 8 + length]))
        raw = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return edit


def _duplicate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    raw = data[8 : 8 + length].rstrip()
    name, entry = next((k, v) for k, v in json.loads(raw).items() if k != "__metadata__")
    raw = raw[:-1] + f', "{name}": {json.dumps(entry)}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def _pickle(directory: Path) -> None:
    values = _read(directory / "adapter_model.safetensors")
    torch.save(values, directory / "adapter_model.safetensors")


def _only_bin(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def _cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


CORPUS: dict[str, Callable[[Path], None]] = {
    "truncated": _cut,
    "empty": lambda d: (d / "adapter_model.safetensors").write_bytes(b"") and None,
    "huge header": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64) and None,
    "duplicate key": _duplicate,
    "pickle under a safetensors name": _pickle,
    "only a .bin": _only_bin,
    "NaN": _set(_nan),
    "infinity": _set(lambda t: t.fill_(float("inf"))),
    "wrong dtype": _set(lambda t: t.to(torch.int32)),
    "wrong shape": _set(lambda t: t[:, :-1].contiguous()),
    "extra key": _edit_weights(lambda v: v.update(extra=torch.zeros(2))),
    "missing key": _edit_weights(lambda v: v.__delitem__(_first(v))),
    "many empty tensors": _edit_weights(
        lambda v: v.update({f"e{i}": torch.empty(0) for i in range(3000)})
    ),
    "overlap": _header(lambda h: {k: ({**v, "data_offsets": [0, 4]} if k != "__metadata__" else v)
                                  for k, v in h.items()}),
    "unknown dtype": _header(lambda h: {k: ({**v, "dtype": "F4"} if k != "__metadata__" else v)
                                        for k, v in h.items()}),
    "config is no JSON": lambda d: (d / "adapter_config.json").write_text("{") and None,
    "config is a list": lambda d: (d / "adapter_config.json").write_text("[]") and None,
    "own file is no JSON": lambda d: (d / "peftfx.json").write_text("{") and None,
    "own spec is hostile": _edit_json("peftfx.json", spec={"rules": [{"method": "os.system"}]}),
    "own spec is missing": _edit_json("peftfx.json", spec=None),
    "fingerprint is malformed": _edit_json("peftfx.json", fingerprint=[1]),
    "no weights": lambda d: (d / "adapter_model.safetensors").unlink(),
}  # fmt: skip
FOREIGN: dict[str, dict[str, Any]] = {  # edits of a config that PEFT alone wrote
    "rank 10^10": {"r": 10**10},
    "rank 0": {"r": 0},
    "rank is text": {"r": "8"},
    "hostile expression": {"target_modules": "([a-z_]+)+!"},
    "expression with look-ahead": {"target_modules": "(?=q).*"},
    "no such modules": {"target_modules": ["nothing"]},
    "another method": {"peft_type": "BOFT"},
    "unknown meaning": {"use_dora": True},
    "bias": {"bias": "all"},
    "hostile pattern": {"rank_pattern": {"([a-z_]+)+!(": 4}},
}


def refused(tmp_path: Path) -> None:
    model = by_name("llama").build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    held = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        peftfx.load(model, tmp_path, compile=False)
    assert time.monotonic() - start < 5
    assert not peftfx.is_adapted(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == held


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    peftfx.save(model_with(), tmp_path)
    CORPUS[name](tmp_path)
    refused(tmp_path)


@pytest.mark.parametrize("name", FOREIGN)
def test_hostile_configs(tmp_path: Path, name: str) -> None:
    peftfx.save(model_with(), tmp_path)
    (tmp_path / "peftfx.json").unlink()
    _edit_json("adapter_config.json", **FOREIGN[name])(tmp_path)
    refused(tmp_path)


@given(st.data())
def test_flipped_bytes_never_get_past(tmp_path_factory: Any, data: Any) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    peftfx.save(_KEPT, directory)
    file = directory / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # anything else is a failure
        tensors.read(file)


_KEPT = model_with()


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


# -- atomicity -----------------------------------------------------------------------------------

OLD, NEW = {"a": b"old" * 9, "b": b"old"}, {"a": b"new" * 9, "b": b"new"}


def content(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


@pytest.mark.parametrize("call", ["mkdir", "fsync", "link", "open"])
@pytest.mark.parametrize("after", range(4))
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    target = tmp_path / "adapter"
    files.write_directory(target, {**OLD, "foreign": b"kept"})
    count = 0
    real = getattr(os, call)

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        try:
            files.write_directory(target, NEW)
            expected = NEW
        except SaveError as error:
            assert "No space" in error.message
            expected = OLD
    assert content(target) == {**expected, "foreign": b"kept"}


def test_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(source: Path, target: Path, flag: int) -> None:
        raise OSError(22, "Invalid argument")

    target = tmp_path / "adapter"
    files.write_directory(target, OLD)
    monkeypatch.setattr(files, "_rename", refuses)
    files.write_directory(target, NEW)
    assert content(target) == NEW and len(list(tmp_path.iterdir())) == 1
    target.rename(tmp_path / ".adapter.peftfx-old-1-aa")  # killed between the two renames
    files.recover(target)
    assert content(target) == NEW


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SaveError):
            files.write_directory(target, NEW)
    assert (tmp_path / "file").read_text() == "x"


_SAVER = """
import sys, itertools
from peftfx.files import write_directory
for i in itertools.count():
    write_directory(sys.argv[1], {"a": b"%d" % i * 4096, "b": b"%d" % i})
    print(i, flush=True)
"""


def test_killed_savers(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(target)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = content(target)
        assert found["a"] == found["b"] * 4096
    files.write_directory(target, NEW)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]  # leftovers are swept


def test_savers_side_by_side(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    running = [
        subprocess.Popen([sys.executable, "-c", _SAVER, str(target)], stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        try:
            a, b = (target / "a").read_bytes(), (target / "b").read_bytes()
        except FileNotFoundError:
            continue  # the first save, or an exchange between two look-ups
        assert a == a[: len(a) // 4096] * 4096 and b.isdigit()
    for process in running:
        assert process.poll() is None, "a saver failed"
        process.kill()
        process.wait()
    found = content(target)
    assert found["a"] == found["b"] * 4096
