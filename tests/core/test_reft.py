"""ReFT against its paper's formula, at all positions and at chosen ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.binding import bound
from peftfx.errors import NotAdaptedError
from tests.architectures import by_name
from tests.helpers import fill, output, relative

IDS = torch.tensor([[5, 9, 7, 4, 11, 3, 8], [6, 3, 12, 10, 5, 7, 4]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def moved(h: Tensor, p: dict[str, Tensor], orthogonal: bool, subtract: bool) -> Tensor:
    """The paper's formula."""
    rows = p["basis"]
    if orthogonal:  # the nearest way to have the same span and orientation: Gram-Schmidt
        found: list[Tensor] = []
        for row in rows:
            left = row - sum(((row @ q) * q for q in found), torch.zeros_like(row))
            found.append(left / left.norm())
        rows = torch.stack(found)
    made = h @ p["source"].T + p["bias"]
    return h + (made - h @ rows.T if subtract else made) @ rows


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_formula(orthogonal: bool, subtract: bool) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(4, 6), torch.randn(2, 5, 4)
    model = nn.Sequential(copy.deepcopy(base))
    rule = {"method": "reft", "name": "0", "rank": 3}
    rule |= {"orthogonal": orthogonal, "subtract": subtract}
    peftfx.adapt(model, {"rules": [rule]}, (x,), lower="eager")
    assert relative(model(x), base(x)) < 1e-6
    fill(peftfx.parameters(model), scale=0.6)
    p = {n.rpartition(".")[2]: t for n, t in peftfx.state_dict(model).items()}
    assert relative(model(x), moved(base(x), p, orthogonal, subtract)) < 1e-5


def llama(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A Llama, and the same with ReFT behind its layers that is not trivial."""
    base = by_name("llama").build(use_cache=True)
    model = copy.deepcopy(base)
    rule = {"method": "reft", "role": "block", "rank": 3, **options}
    peftfx.adapt(model, {"rules": [rule]}, {"input_ids": IDS}, lower="eager")
    fill(peftfx.parameters(model), scale=0.6)
    return base, model


def by_hand(base: nn.Module, model: nn.Module, chosen: Tensor) -> nn.Module:
    """*base* with the formula behind each layer, at the tokens [B, S] that are chosen."""
    made, state = copy.deepcopy(base), peftfx.state_dict(model)
    for i, layer in enumerate(made.model.layers):  # type: ignore[union-attr, arg-type]
        p = {n: state[f"model.layers.{i}:reft.{n}"] for n in ("basis", "source", "bias")}

        def hook(m: Any, a: Any, h: Tensor, p: dict[str, Tensor] = p) -> Tensor:
            return torch.where(chosen[..., None], moved(h, p, True, True), h)

        layer.register_forward_hook(hook)
    return made


def marked(mask: Tensor, first: int, last: int) -> Tensor:
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    for b, row in enumerate(mask):
        real = row.nonzero().flatten().tolist()
        for at in {*real[:first], *(real[-last:] if last else [])}:
            chosen[b, at] = True
    return chosen


@pytest.mark.parametrize("first, last", [(2, 0), (0, 2), (1, 3), (4, 4)])
@pytest.mark.parametrize("mask", [LEFT, RIGHT, None], ids=["left", "right", "none"])
def test_positions_are_counted_without_padding(mask: Tensor | None, first: int, last: int) -> None:
    base, model = llama(first=first, last=last)
    x = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": mask}
    known = torch.ones_like(IDS) if mask is None else mask
    chosen = marked(known, first, last)
    want = by_hand(base, model, chosen)(**x).logits
    real = known.bool()
    assert relative(model(**x).logits[real], want[real]) < 1e-5  # as compiled in place
    with torch.compiler.set_stance("force_eager"):
        assert relative(model(**x).logits[real], want[real]) < 1e-5
    assert relative(want[real], base(**x).logits[real]) > 1e-2


@pytest.mark.parametrize("options", [{"first": 2, "last": 1}, {}], ids=["chosen", "all"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(options: dict[str, int], cache: str) -> None:
    """Greedy steps with a cache: the prompt's positions are moved once, new tokens if all are."""
    base, model = llama(**options)
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(  # type: ignore[operator]
        input_ids=IDS, attention_mask=LEFT, cache_implementation=cache, min_new_tokens=4, **kwargs
    )
    ids, mask = IDS, LEFT
    for _ in range(4):
        chosen = marked(LEFT, 2, 1) if options else mask.bool()
        chosen = torch.nn.functional.pad(chosen, (0, ids.shape[1] - chosen.shape[1]))
        logits = by_hand(base, model, chosen)(input_ids=ids, attention_mask=mask).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end before its time
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(got, ids)


def test_trains_through_checkpoints() -> None:
    _, model = llama(first=1, last=1)
    x = {"input_ids": IDS, "attention_mask": RIGHT}
    output(model, x).square().mean().backward()
    want = [p.grad.clone() for p in peftfx.parameters(model) if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    output(model, x).square().mean().backward()
    found = [p.grad for p in peftfx.parameters(model) if p.grad is not None]
    assert len(found) == len(want) == len(peftfx.parameters(model))
    assert all(relative(a, b) < 1e-4 for a, b in zip(found, want, strict=True))
    _, model = llama(first=1, role="mlp.down")  # inside of what is checkpointed
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    output(model.train(), x).square().mean().backward()
    with torch.compiler.set_stance("force_eager"):
        out = output(model, x)
        with pytest.raises(NotAdaptedError, match="positions are asked for"):
            out.square().mean().backward()


def _first(model: nn.Module, rule: dict[str, Any], x: Any) -> str:
    """The name of another adapter, for the first token."""
    peftfx.add(model, {"rules": [{**rule, "last": 0, "first": 1}]}, "first", x)
    with torch.no_grad():
        for tensors in bound(model)[1].adapters["first"].stored or []:
            fill(tensors.values())
    return "first"


def test_refusals_and_models_without_masks() -> None:
    _, model = llama(first=1)
    with pytest.raises(NotAdaptedError, match="positions are asked for"):
        hidden = torch.randn(2, 7, 32)
        model.model.layers[0](hidden, position_embeddings=(torch.ones(1, 7, 8),) * 2)  # type: ignore
    rule = {"method": "reft", "role": "block", "rank": 2, "last": 1, "layers": "last 1"}
    vit = by_name("vit")
    model, x = vit.build(), vit.example()
    peftfx.adapt(model, {"rules": [rule]}, x, lower="eager")
    out = output(model, x)
    fill(peftfx.parameters(model))
    assert relative(output(model, x), out) < 1e-5  # of the first token, not the last
    peftfx.activate(model, _first(model, rule, x))
    assert relative(output(model, x), out) > 1e-3
    speech = by_name("wav2vec2")
    model, x = speech.build(), speech.example()
    peftfx.adapt(model, {"rules": [rule]}, x, lower="eager")
    output(model, x)
    with pytest.raises(NotAdaptedError, match="which tokens are padding is unknown"):
        output(model, {**x, "attention_mask": torch.ones(x["input_values"].shape).long()})


def test_release_takes_the_hooks_off() -> None:
    base, model = llama(first=1)
    peftfx.release(model)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks  # type: ignore
    x = {"input_ids": IDS}
    assert torch.equal(output(model, x), output(base, x))
    assert isinstance(model, transformers.LlamaForCausalLM)
