"""Adapters that are prompts or prefixes: states, files, several on one model, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftfx
from peftfx.errors import MergeError, NotAdaptedError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.soft_prompts import P, inputs, prompted, rule


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
def test_states_of_an_adapter(method: str, tmp_path: Path) -> None:
    base, x = by_name("llama").build(), inputs("llama", "left")
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    spec = {"rules": [rule("llama", method)]}
    model = prompted(base, spec)
    expected = output(model, x)
    expected.square().mean().backward()
    trained = {id(p) for p in peftfx.parameters(model)}
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    with peftfx.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    saved = {k: v.clone() for k, v in peftfx.state_dict(model).items()}
    peftfx.save(model, tmp_path / "a")
    fill(peftfx.parameters(model), 5)
    assert relative(output(model, x), expected) > 1e-3
    peftfx.load_state_dict(model, saved)
    assert torch.equal(output(model, x), expected)
    peftfx.load(model, tmp_path / "a", adapter="again")
    peftfx.activate(model, "again")
    # loaded to be frozen: torch rounds a linear otherwise where its weight requires a gradient
    assert relative(output(model, x), expected) < 1e-6
    with pytest.raises(MergeError, match="no change of a weight"):
        peftfx.merge(model)
    with pytest.raises(MergeError, match="cannot be mixed"):
        peftfx.activate(model, {"default": 0.5, "again": 0.5})
    assert peftfx.adapters(model) == {"default": 0.0, "again": 1.0}
    assert relative(output(model, x), expected) < 1e-6  # and not the base, for the mix that failed
    peftfx.activate(model, "default")
    peftfx.remove(model, "again")
    assert torch.equal(output(model, x), expected)
    peftfx.release(model)
    assert type(model) is type(base) and torch.equal(output(model, x), output(base, x))
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    for module in model.modules():
        assert not any("peftfx" in key for key in vars(module)), vars(module)
        assert "peftfx" not in type(module).__module__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_adapters_of_other_lengths_and_methods() -> None:
    base, x = by_name("llama").build(), inputs("llama")
    model = prompted(base)
    expected = output(model, x)
    peftfx.add(model, {"rules": [rule("llama", "prompt", init="vocabulary") | {"length": 2}]}, "b")
    peftfx.add(model, {"rules": [rule("llama", "ptuning", encoder="lstm")]}, "c")
    lora = {"method": "lora", "name": "*.q_proj", "rank": 3}
    peftfx.add(model, {"rules": [rule("llama", "prefix"), lora]}, "d")
    lengths = {"default": P + 9, "b": 2 + 9, "c": P + 9, "d": 9}
    for name, length in {**lengths, "default": P + 9}.items():
        peftfx.activate(model, name)
        assert output(model, x).shape[1] == length
    peftfx.activate(model, "default")
    assert torch.equal(output(model, x), expected)
    for name in "bcd":
        peftfx.remove(model, name)
    assert torch.equal(output(model, x), expected)
    assert not any("lora" in n or "prefix" in n for n, _ in model.named_modules())


def test_a_prompt_beside_another_adapter() -> None:
    """Each stands for itself with weight one; two prompts do not go together."""
    base, x = by_name("llama").build(), inputs("llama")
    lora = {"method": "lora", "name": "*.q_proj", "rank": 3}
    model = prompted(base)
    peftfx.add(model, {"rules": [lora]}, "b")
    fill(peftfx.parameters(model, "b"), 3)
    peftfx.add(model, {"rules": [rule("llama", "ptuning", encoder="none")]}, "c")
    peftfx.activate(model, {"default": 1.0, "b": 1.0})
    both = output(model, x)
    together = prompted(base, {"rules": [rule("llama", "prompt"), lora]})
    values = {**peftfx.state_dict(model, "default"), **peftfx.state_dict(model, "b")}
    peftfx.load_state_dict(together, values)
    assert relative(both, output(together, x)) < 1e-6
    peftfx.activate(model, {"default": 1.0, "c": 1.0})
    with pytest.raises(NotAdaptedError, match="two prompts"):
        output(model, x)


def test_training_learns() -> None:
    torch.manual_seed(0)
    model = by_name("bert").build().train()
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # type: ignore[operator, union-attr]
    peftfx.adapt(model, {"rules": [rule("bert", "ptuning")]}, lower="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(peftfx.parameter_groups(model, lr=3e-2))
    ids = torch.randint(3, 61, (12, 9))
    losses = []
    for _ in range(25):  # the head is frozen: the prompt alone turns it to one label
        loss = model(input_ids=ids, labels=torch.full((12,), 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
