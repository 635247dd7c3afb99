"""Every architecture, against HF PEFT on the same tensors: forward, gradients, files, merge."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import peftfx
from peftfx.backends import Backend
from peftfx.trace import trace
from tests.architectures import ARCHITECTURES, Architecture
from tests.helpers import fill, output, relative

ALL = pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
PEFT = pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a.targets], ids=str)
BREAKS = {"mixtral"}  # its experts' loop reads values: torch breaks the base's graph too


def reference(arch: Architecture, base: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(arch.targets))
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    fill(p for _, p in trained)
    for name, p in trained:
        # peft 0.21 adds the update of a MultiheadAttention's out_proj twice when it runs unmerged
        if "base_layer.out_proj.lora_B" in name:
            nn.init.zeros_(p)
    return model


def example_of(arch: Architecture) -> object:
    values = arch.example()
    return tuple(values.values()) if arch.name == "sequential" else values


@PEFT
def test_equal_to_peft(arch: Architecture, tmp_path: Path) -> None:
    base, x = arch.build(), arch.example()
    theirs = reference(arch, base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False, example=example_of(arch))
    expected = output(theirs, x)
    assert relative(expected, output(base, x)) > 1e-2  # the adapter does something

    assert relative(output(ours, x), expected) < 1e-5  # eager, by the marks
    backend = Backend(None, "aot_eager")
    compiled = torch.compile(ours, backend=backend, fullgraph=arch.name not in BREAKS)
    out = output(compiled, x)
    assert relative(out, expected) < 1e-5

    expected.square().mean().backward()
    out.square().mean().backward()
    want = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()
            if p.grad is not None}  # fmt: skip
    keys = _peft_keys(ours)
    got = {keys[n]: p.grad for n, p in peftfx.named_parameters(ours)}
    assert set(got) == set(want)
    largest = max(g.abs().max() for g in want.values())
    for key, grad in want.items():
        assert (got[key] - grad).abs().max() <= 1e-5 * largest, key

    peftfx.save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert relative(output(again, x), expected) < 1e-6
    before = peftfx.state_dict(ours)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path / "ours", compile=False, example=example_of(arch))
    after = peftfx.state_dict(fresh)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)  # files are bit-exact

    peftfx.merge(ours, untie=True)
    assert relative(output(ours, x), expected) < 1e-5
    peftfx.unmerge(ours)
    peftfx.release(ours)
    assert all(
        torch.equal(p, q)
        for p, q in zip(ours.state_dict().values(), base.state_dict().values(), strict=True)
    )


def _peft_keys(model: nn.Module) -> dict[str, str]:
    from peftfx.binding import bound
    from peftfx.peft_format import Directory

    placements = bound(model)[1].adapters["default"].plan.placements
    return {
        f"{p.site.name}:{p.method.name}.{name}": key
        for p, keys in zip(placements, Directory().keys_of(placements), strict=True)
        for name, key in keys.items()
    }


@ALL
def test_trace_leaves_no_trace(arch: Architecture) -> None:
    model = arch.build()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, example_of(arch))
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
