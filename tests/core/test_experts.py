"""Stacks of experts as transformers has them, against PEFT's ``target_parameters``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftfx
from peftfx.backends import Backend
from tests.architectures import by_name
from tests.helpers import fill, relative

IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(14).reshape(2, 7) + 2


def out(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@IGNORED
@pytest.mark.parametrize(
    "name", ["mixtral", pytest.param("qwen3-moe", marks=pytest.mark.slow)]
)  # fmt: skip
def test_stacks_of_experts(name: str, tmp_path: Path) -> None:
    base = by_name(name).build().eval().requires_grad_(False)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill((p for p in theirs.parameters() if p.requires_grad), scale=0.3)
    want = out(theirs)
    assert relative(want, out(base)) > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path / "theirs", trainable=True, compile=False)
    assert relative(out(ours), want) < 1e-5
    want.square().mean().backward()
    out(ours).square().mean().backward()
    norms = [
        sorted(float(p.grad.norm()) for p in of if p.grad is not None)
        for of in (theirs.parameters(), peftfx.parameters(ours))
    ]
    assert norms[0] and torch.allclose(*map(torch.tensor, norms), rtol=1e-3, atol=1e-7)
    peftfx.save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert relative(out(again), want) < 1e-6

    spec = next(iter(ours._peftfx.adapters.values())).spec
    compiled = torch.compile(ours, backend=Backend(spec, "eager"))
    assert relative(out(compiled), want) < 1e-5
    peftfx.merge(ours)
    assert relative(out(ours), want) < 1e-5
    peftfx.release(ours)
    assert torch.equal(out(ours), out(base))
