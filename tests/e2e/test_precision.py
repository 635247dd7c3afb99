"""Half precision and autocast, against HF PEFT in the same precision and in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from tests.architectures import by_name
from tests.helpers import fill, output

# Root-mean-square error against float32 on the same bf16 weights: 8 bits of mantissa through two
# layers. PEFT makes the update in float32, peftfx in the activations' dtype: hence the factor.
BOUND, FACTOR = 3e-2, 3.0
NAMES = ["llama", "gpt2", "bert", "t5", "vit"]


def error_of(got: Tensor, expected: Tensor) -> float:
    difference = got.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


def pair(name: str, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Any]:
    """The same model and adapter by PEFT and by peftfx, and inputs."""
    arch = by_name(name)
    base = arch.build().to(dtype)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(arch.targets))
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(directory)
    ours = copy.deepcopy(base).eval()
    peftfx.load(ours, directory, compile=False, example=arch.example())
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arch.example().items()}
    return theirs, ours, x


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    theirs, ours, x = pair(name, tmp_path, torch.bfloat16)
    compiled = torch.compile(ours, backend=Backend(None, "aot_eager"), fullgraph=True)
    with torch.no_grad():
        got, peft_got = output(compiled, x), output(theirs, x)
        exact = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
        expected = output(theirs.float(), exact)
    assert got.dtype == peft_got.dtype == torch.bfloat16
    error = error_of(got, expected)
    assert error < BOUND and error < FACTOR * error_of(peft_got, expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast(name: str, tmp_path: Path) -> None:
    theirs, ours, x = pair(name, tmp_path, torch.float32)
    compiled = torch.compile(ours, backend=Backend(None, "aot_eager"), fullgraph=True)
    with torch.no_grad():
        expected = output(theirs, x)
        with torch.autocast("cpu", torch.bfloat16):
            got, peft_got = output(compiled, x), output(theirs, x)
    error = error_of(got, expected)
    assert error < BOUND and error < FACTOR * error_of(peft_got, expected)
