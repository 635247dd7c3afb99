"""What rules say of training: rates, penalties, and the budget of ranks."""

from __future__ import annotations

import copy
import functools
import math
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound
from peftfx.errors import OptimizerError
from peftfx.spec import Spec
from tests.architectures import by_name
from tests.helpers import fill, output, relative


def bind(model: nn.Module, *rules: dict[str, Any]) -> nn.Module:
    Backend({"rules": list(rules)}, "eager").bind(model)
    return model


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    arch = by_name("llama")
    return arch.build(), arch.example()


def test_parameter_groups() -> None:
    model, _ = llama()
    bind(
        model,
        {"method": "lora", "name": "*.q_proj", "rank": 2, "plus": 4.0, "layer_decay": 0.5},
        {"method": "train", "name": "lm_head", "lr": 1e-5, "weight_decay": 0.3},
        {"method": "ia3", "name": "*.v_proj",
         "overrides": [{"layers": "last 1", "lr": 7e-3}]},
        {"method": "tokens", "name": "*.embed_tokens", "ids": [1, 2], "layer_decay": 0.5},
    )  # fmt: skip
    found: dict[str, tuple[float, float]] = {}
    names = {id(p): n for n, p in peftfx.named_parameters(model)}
    for group in peftfx.parameter_groups(model, lr=1e-3, weight_decay=0.1):
        for p in group["params"]:
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    layer = "model.layers.{}.self_attn.{}_proj.weight:{}"
    assert found == {
        layer.format(0, "q", "lora.A"): (0.5e-3, 0.1),
        layer.format(0, "q", "lora.B"): (2e-3, 0.1),
        layer.format(1, "q", "lora.A"): (1e-3, 0.1),
        layer.format(1, "q", "lora.B"): (4e-3, 0.1),
        layer.format(0, "v", "ia3.l"): (1e-3, 0.0),  # a vector, whatever its shape
        layer.format(1, "v", "ia3.l"): (7e-3, 0.0),
        "lm_head.weight:train.value": (1e-5, 0.3),
        "model.embed_tokens.weight:tokens.rows": (0.25e-3, 0.1),
    }
    with pytest.raises(OptimizerError, match="multiplies a learning rate"):
        peftfx.parameter_groups(model)
    spec = bound(model)[1].adapters["default"].spec
    assert Spec.parse(spec.to_dict()) == spec


def test_penalties() -> None:
    model, _ = llama()
    assert peftfx.penalty(bind(model, {"method": "ia3", "name": "*.q_proj"})).item() == 0.0
    peftfx.release(model)
    bind(
        model,
        {"method": "train", "name": "lm_head", "l2_sp": 0.3},
        {"method": "norm", "name": "model.norm", "l2_sp": 0.1},
    )
    assert peftfx.penalty(model).item() == 0.0
    base = {n: p.detach().clone() for n, p in peftfx.named_parameters(model)}
    fill(peftfx.parameters(model))
    want = sum(
        (0.3 if "lm_head" in n else 0.1) / 2 * float((p - base[n]).detach().square().sum())
        for n, p in peftfx.named_parameters(model)
    )
    term = peftfx.penalty(model)
    assert math.isclose(float(term.detach()), want, rel_tol=1e-5)
    term.backward()
    for n, p in peftfx.named_parameters(model):
        weight = 0.3 if "lm_head" in n else 0.1
        assert p.grad is not None and torch.allclose(p.grad, weight * (p - base[n]), atol=1e-6)


# -- AdaLoRA's budget ----------------------------------------------------------------------------

STEPS, WARMUP, END = 12, 2, 9


def _first(value: Any, **_: Any) -> Any:
    return value


def test_ranks_are_allocated_as_peft_does(tmp_path: Path) -> None:
    base, x = llama()
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, tinit=WARMUP, tfinal=STEPS - END, total_step=STEPS,
        deltaT=2, orth_reg_weight=0.1, target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    peftfx.load(ours, tmp_path, trainable=True, compile=False)
    counter = CompileCounterWithBackend("eager")
    backend = Backend(None, counter)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    schedule = peftfx.Schedule(ours)
    theirs.base_model.rankallocator = RankAllocator(theirs.base_model.model, config, "default")
    optimizers = [
        torch.optim.SGD([p for p in m if p.requires_grad], lr=0.5)
        for m in (theirs.parameters(), peftfx.parameters(ours))
    ]
    for step in range(1, STEPS + 1):
        if step == 7:  # resumed from a file
            torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
            schedule = peftfx.Schedule(ours)
            schedule.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
        regularised = types.SimpleNamespace(loss=torch.zeros(()))
        kept = theirs.base_model.model.forward
        theirs.base_model.model.forward = functools.partial(_first, regularised)
        theirs.base_model(**x)  # adds the penalty to the loss
        theirs.base_model.model.forward = kept
        term = peftfx.penalty(ours)
        assert relative(term, regularised.loss) < 1e-5
        for loss in (output(theirs, x).square().mean() + regularised.loss,
                     output(compiled, x).square().mean() + term):  # fmt: skip
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        want = [p for n, p in theirs.named_parameters() if "lora_E" in n]
        got = [p for n, p in peftfx.named_parameters(ours) if n.endswith(".E")]
        assert [(a != 0).tolist() for a in want] == [(b != 0).tolist() for b in got], step
    left = sum(int((e != 0).sum()) for e in got)
    assert left == 2 * len(got) < 4 * len(got)
    assert counter.frame_count == 1  # nothing compiled anew
    assert relative(output(ours, x), output(theirs, x)) < 1e-4
