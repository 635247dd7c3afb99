"""Methods that start from data, against what they should have seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, NotAdaptedError, PlanError, TraceError
from tests.architectures import by_name
from tests.helpers import fill, output


def bound(arch_name: str, **rule: Any) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    arch = by_name(arch_name)
    base = arch.build()
    model = copy.deepcopy(base)
    Backend({"rules": [rule]}, "eager").bind(model)
    batches = []
    for seed in range(3):
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
        batches.append({"input_ids": ids, "labels": ids})
    return base, model, batches


def held(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {k.partition(".weight:")[0]: v for k, v in peftfx.state_dict(model).items()
            if k.endswith(f".{name}")}  # fmt: skip


@pytest.mark.parametrize(("name", "target"), [("llama", "*.q_proj"), ("gpt2", "*.c_fc")])
def test_eva_takes_the_principal_directions_of_the_inputs(name: str, target: str) -> None:
    base, model, batches = bound(name, method="lora", name=target, rank=3, init="eva")
    peftfx.calibrate(model, ({"input_ids": b["input_ids"]} for b in batches))
    seen: dict[str, list[Tensor]] = {}
    for path in held(model, "A"):
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
        )
    for batch in batches:
        base(**batch)
    for path, a in held(model, "A").items():
        v = torch.linalg.svd(torch.cat(seen[path]), full_matrices=False)[2][:3]
        assert torch.allclose(a @ a.t(), torch.eye(3), atol=1e-5)
        assert torch.linalg.svdvals(a @ v.detach().t()).min() > 0.99  # the same space
        assert (a[0] @ v[0].detach()).abs() > 0.999
    assert all(b.norm().item() == 0 for b in held(model, "B").values())


@pytest.mark.parametrize("mask", ["fisher", "sam"])
@pytest.mark.parametrize(
    ("name", "target", "structure"),
    [
        ("llama", "*.down_proj", "element"),
        ("gpt2", "*.c_fc", "element"),
        ("bert", "*.query", "row"),
    ],
)
def test_masks_from_gradients(mask: str, name: str, target: str, structure: str) -> None:
    rule = {"method": "sparse", "name": target, "density": 0.1, "mask": mask}
    base, model, batches = bound(name, **rule, structure=structure)
    if name == "bert":
        batches = [{"input_ids": b["input_ids"], "labels": torch.tensor([0, 2])} for b in batches]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.train()
    peftfx.calibrate(model, batches)
    assert model.training and {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    total: dict[str, Tensor] = {}
    for batch in batches:
        base.zero_grad()
        base(**batch).loss.backward()
        for path in held(model, "index"):
            grad = base.get_submodule(path).weight.grad
            assert isinstance(grad, Tensor)
            grad = grad.t() if name == "gpt2" else grad
            total[path] = total.get(path, 0) + (grad**2 if mask == "fisher" else grad)
    for path, index in held(model, "index").items():
        scores = total[path].abs()
        scores = scores.sum(1) if structure == "row" else scores.reshape(-1)
        best = scores.argsort(descending=True)[: index.shape[-1]]
        index = index[0] if structure == "element" else index
        assert index.tolist() == sorted(best.tolist())


def test_a_loss_of_ones_own() -> None:
    _, model, batches = bound("llama", method="sparse", name="*.q_proj", mask="sam", density=0.1)
    inputs = [{"input_ids": b["input_ids"]} for b in batches]
    with pytest.raises(TraceError, match="gives no loss"):
        peftfx.calibrate(model, inputs)
    peftfx.calibrate(model, inputs, loss=lambda out, batch: out.logits.square().mean())
    output(model, inputs[0])


def test_nothing_runs_before_it_has_seen_data(tmp_path: Path) -> None:
    base, model, batches = bound("llama", method="lora", name="*.q_proj", rank=3, init="eva")
    x = {"input_ids": batches[0]["input_ids"]}
    compiled = torch.compile(model, backend=Backend(None, "eager"))
    for run in (model, compiled):
        with pytest.raises(NotAdaptedError, match="has seen none"):
            output(run, x)
    with peftfx.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    peftfx.calibrate(model, batches)
    assert torch.equal(output(model, x), output(base, x))  # B is zero
    fill(peftfx.parameters(model))
    expected = output(compiled, x)
    peftfx.save(model, tmp_path)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path, compile=False)  # it brings what the data made
    assert torch.equal(output(fresh, x), expected)
    peftfx.add(fresh, {"rules": [{"method": "lora", "name": "*.q_proj", "rank": 3,
                                  "init": "eva"}]}, "b")  # fmt: skip
    peftfx.activate(fresh, "b")
    with pytest.raises(NotAdaptedError, match="'b' starts from data"):
        output(fresh, x)
    peftfx.load_state_dict(fresh, peftfx.state_dict(model), "b")
    assert torch.equal(output(fresh, x), expected)


def test_calibration_that_cannot_be() -> None:
    _, model, batches = bound("llama", method="lora", name="*.q_proj", rank=3)
    with pytest.raises(BindError, match="no rule starts from data"):
        peftfx.calibrate(model, batches)
    _, model, batches = bound("llama", method="lora", name="*.q_proj", rank=30, init="eva")
    with pytest.raises(PlanError, match="inputs were seen"):
        peftfx.calibrate(model, batches[:1])
    with pytest.raises(BindError, match="never reached"):
        peftfx.calibrate(model, [])
