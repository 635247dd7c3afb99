"""Prompts, p-tunings and prefixes against HF PEFT: outputs, gradients, files."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import CheckpointError, NotAdaptedError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.soft_prompts import (
    TASKS,
    P,
    gradient,
    inputs,
    joined_gradient,
    ours,
    pair,
    rule,
    seen,
    theirs,
)

BOUND = 2e-6  # of the largest difference, as of the largest value: the outputs are about 1
NAMES = ("llama", "phi3", "gpt2", "bert", "t5")


def compiled(model: nn.Module, lower: str = "aot_eager") -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(None, lower), fullgraph=True)  # type: ignore


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in NAMES else [pytest.mark.sweep]) for n in TASKS]
)
def test_equal_to_peft(name: str, method: str) -> None:
    base, reference, model = pair(name, method)
    compiles = method == "prefix" and name == "t5"  # eager cannot tell its relative biases
    for padding in ("none", "left") if compiles else ("none", "right", "left"):
        x = inputs(name, padding)
        expected = seen(name, x, output(reference, x), P)
        plain = seen(name, x, output(base, x), P)
        assert plain.shape != expected.shape or relative(plain, expected) > 1e-2
        expected.square().mean().backward()
        want = gradient(reference)
        runs = [model] * (not compiles) + [compiled(model)] * (compiles or padding == "left")
        for run in runs:
            out = seen(name, x, output(run, x), P)
            assert (out - expected).abs().max() <= BOUND
            out.square().mean().backward()
            got = joined_gradient(model)
            rows = slice(None) if method == "prefix" else slice(P)  # T5's other rows are dead
            assert (got[rows] - want[rows]).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    "name, method",
    [("bert", "prefix"), ("llama", "prefix"), ("llama", "prompt")],
)
@pytest.mark.slow
def test_through_inductor(name: str, method: str) -> None:
    _, reference, model = pair(name, method)
    x = inputs(name, "left")
    expected = seen(name, x, output(reference, x), P)
    out = seen(name, x, output(compiled(model, "inductor"), x), P)
    assert (out - expected).abs().max() <= BOUND
    expected.square().mean().backward()
    out.square().mean().backward()
    want = gradient(reference)
    assert (joined_gradient(model) - want).abs().max() <= 1e-5 * want.abs().max()


ENCODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mlp": ("ptuning", {"encoder_hidden_size": 12}, {"encoder": "mlp", "hidden": 12}),
    "lstm": (
        "ptuning", {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
        {"encoder": "lstm", "hidden": 12},
    ),
    "prefix": (
        "prefix", {"prefix_projection": True, "encoder_hidden_size": 12},
        {"mlp": True, "hidden": 12},
    ),
}  # fmt: skip


def share(reference: Any, model: nn.Module) -> list[tuple[nn.Parameter, Tensor, Any]]:
    """Our parameters with PEFT's of the same meaning and the part of it; theirs are copied in."""
    held = dict(reference.prompt_encoder["default"].named_parameters())
    last = held.get("transform.2.weight")
    found = []
    for i, (name, p) in enumerate(peftfx.named_parameters(model)):
        leaf = name.rpartition(".")[2]
        part: Any = slice(None)
        if leaf == "embeddings":
            key = "embedding.weight"
        elif leaf.startswith(("weight_", "bias_")):
            key = f"lstm_head.{leaf}"
        elif last is None:
            key = f"mlp_head.{2 * (int(leaf[-1]) - 1)}.{leaf[:-1]}"
        else:
            key = f"transform.{2 * (int(leaf[-1]) - 1)}.{leaf[:-1]}"
            if leaf.endswith("2"):  # a site has its own rows of the last layer
                layer = int(name.split("layers.")[1][0])
                part = slice(layer * p.shape[0], (layer + 1) * p.shape[0])
        with torch.no_grad():
            p.copy_(held[key][part])
        found.append((p, held[key], part))
        assert i < 40
    return found


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_equal_peft_s_and_stay_when_saved(kind: str, tmp_path: Path) -> None:
    method, options, spec = ENCODERS[kind]
    base, x = by_name("llama").build(), inputs("llama", "left")
    reference = theirs(base, "llama", method, **options)
    model = copy.deepcopy(base)
    Backend({"rules": [rule("llama", method, **spec)]}, "aot_eager").bind(model)
    shared = share(reference, model)
    assert {id(q) for _, q, _ in shared} == {id(q) for q in reference.parameters()
                                             if q.requires_grad}  # fmt: skip
    expected = seen("llama", x, output(reference, x), P)
    expected.square().mean().backward()
    want = [q.grad[part].clone() for _, q, part in shared if q.grad is not None]
    for run in (model, compiled(model)):
        out = seen("llama", x, output(run, x), P)
        assert (out - expected).abs().max() <= BOUND
        for p, _, _ in shared:
            p.grad = None
        out.square().mean().backward()
        for (p, _, _), grad in zip(shared, want, strict=True):
            assert p.grad is not None
            assert (p.grad - grad).abs().max() <= 1e-5 * max(g.abs().max() for g in want)

    peftfx.save(model, tmp_path / "own")  # all of it: training goes on where it was
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    again = copy.deepcopy(base)
    peftfx.load(again, tmp_path / "own", compile=False, trainable=True)
    a, b = peftfx.state_dict(model), peftfx.state_dict(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    peftfx.save(model, tmp_path / "peft", format="peft")  # what it has made, as PEFT does
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert (seen("llama", x, output(read, x), P) - expected).abs().max() <= BOUND
    finished = copy.deepcopy(base)
    peftfx.load(finished, tmp_path / "peft", compile=False)
    assert (seen("llama", x, output(finished, x), P) - expected).abs().max() <= BOUND


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_files_interchange(name: str, method: str, tmp_path: Path) -> None:
    base = by_name(name).build()
    reference = theirs(base, name, method)
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(base, reference)
    peftfx.save(model, tmp_path / "ours", format="peft")
    a = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    b = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        if name == "t5":  # PEFT reads these rows alone, and those slots
            width = a[key].shape[1]
            live = slice(P) if method != "prefix" else (slice(None), slice(width // 2))
            assert torch.equal(a[key][live], b[key][live])
        else:
            assert torch.equal(a[key], b[key])
    x = inputs(name)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(output(again, x), output(reference, x))
    third = copy.deepcopy(base)
    peftfx.load(third, tmp_path / "ours", compile=False)
    left, right = peftfx.state_dict(model), peftfx.state_dict(third)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_configurations_for_training() -> None:
    make = functools.partial(dict, num_virtual_tokens=7, task_type="CAUSAL_LM")
    for config, expected in (
        (peft.PromptTuningConfig(**make()), {"method": "prompt", "length": 7}),
        (
            peft.PromptTuningConfig(**make(prompt_tuning_init="SAMPLE_VOCAB")),
            {"method": "prompt", "length": 7, "init": "vocabulary"},
        ),
        (
            peft.PromptEncoderConfig(**make(encoder_hidden_size=9)),
            {"method": "ptuning", "length": 7, "hidden": 9},
        ),
        (
            peft.PrefixTuningConfig(**make(prefix_projection=True, encoder_hidden_size=9)),
            {"method": "prefix", "length": 7, "mlp": True, "hidden": 9},
        ),
    ):
        (found,) = peftfx.Spec.from_peft(config).to_dict()["rules"]
        role = found.pop("role")
        assert role == ("attention" if found["method"] == "prefix" else "tokens")
        assert found == expected
    seq2seq = peft.PrefixTuningConfig(**make(task_type="SEQ_2_SEQ_LM"))
    assert peftfx.Spec.from_peft(seq2seq).to_dict()["rules"][0]["stack"] == "decoder"


def test_what_peft_s_format_cannot_say(tmp_path: Path) -> None:
    cases: list[tuple[str, list[dict[str, Any]], str]] = [
        ("llama", [rule("llama", "prefix", layers="last 1")], "at all 2 layers"),
        ("llama", [rule("llama", "prompt"), rule("llama", "prefix")], "one of prompt"),
        ("t5", [rule("t5", "prefix")], "one prefix"),  # layers that PEFT has share their slots
    ]
    for name, rules, message in cases:
        model = by_name(name).build()
        Backend({"rules": rules}, "eager").bind(model)
        fill(peftfx.parameters(model))
        with pytest.raises(CheckpointError, match=message):
            peftfx.save(model, tmp_path, format="peft")
        peftfx.save(model, tmp_path)  # in peftfx's own form
        again = by_name(name).build()
        peftfx.load(again, tmp_path, compile=False)
        left, right = peftfx.state_dict(model), peftfx.state_dict(again)
        assert all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    """PEFT refuses it for prefixes; here they need no cache."""
    grads = []
    for checkpoints in (False, True):
        torch._dynamo.reset()
        model, x = by_name("llama").build(), inputs("llama", "left")
        peftfx.adapt(model, {"rules": [rule("llama", method)]}, lower="aot_eager", fullgraph=True)
        fill(peftfx.parameters(model), scale=1.0)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore
        model.train()
        output(model, x).square().mean().backward()
        grads.append([p.grad for p in peftfx.parameters(model)])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-7)


def test_relative_biases_under_checkpoints_are_refused() -> None:
    model = by_name("t5").build()
    both = {"method": "prefix", "role": "attention", "length": P}
    peftfx.adapt(model, {"rules": [both]}, lower="aot_eager")
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    with pytest.raises(NotAdaptedError, match="learned values for distances"):
        output(model, inputs("t5"))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_autocast(method: str) -> None:
    _, reference, model = pair("llama", method)
    x = inputs("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = output(reference, x)
        outs = [output(model, x), output(compiled(model), x)]
    for out in outs:
        assert out.dtype == expected.dtype and relative(out, expected) < 3e-2
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32
                   for p in peftfx.parameters(model))  # fmt: skip


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_bfloat16(method: str) -> None:
    base = by_name("llama").build().bfloat16()
    reference = theirs(base, "llama", method)
    model = ours(base, reference)
    assert {p.dtype for p in peftfx.parameters(model)} == {torch.float32}
    x = inputs("llama", "left")
    expected = seen("llama", x, output(reference, x), P)
    for run in (model, compiled(model)):
        out = seen("llama", x, output(run, x), P)
        assert out.dtype == torch.bfloat16 and relative(out, expected) < 3e-2
