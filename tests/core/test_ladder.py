"""Ladder side networks: the formula, a base without a backward, checkpoints, caches, refusals."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, CheckpointError, MergeError, NotAdaptedError, PlanError
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.laws.test_methods import IDS, Net

RULE = {"method": "ladder", "role": "block", "reduction": 4, "activation": "silu"}


def bound(base: nn.Module, rule: dict[str, Any] = RULE, *more: dict[str, Any]) -> Any:
    """A copy of *base* with a ladder that is not at its start."""
    model = copy.deepcopy(base)
    Backend({"rules": [rule, *more]}, "aot_eager").bind(model)
    fill(peftfx.parameters(model), scale=0.5)
    return model


def compiled(model: nn.Module, lower: Any = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(None, lower), fullgraph=True)


def llama(layers: int = 2) -> Any:
    return by_name("llama").build(num_hidden_layers=layers)


X = by_name("llama").example()


def by_hand(base: Any, p: dict[str, Tensor], chosen: list[int]) -> Tensor:
    """Logits of a Llama with a ladder beside the *chosen* layers, the last of all among them."""
    outputs: list[Tensor] = []
    hooks = [
        base.model.layers[i].register_forward_hook(lambda m, a, y: outputs.append(y))
        for i in chosen
    ]
    with torch.no_grad():
        base(**X)
    for hook in hooks:
        hook.remove()

    def norm(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    side = torch.zeros(())
    for i, h in enumerate(outputs):
        z = h @ p["down"][i].T + p["down_bias"][i]
        if i:
            gate = 1 / (1 + torch.exp(-10 * p["alpha"][i - 1]))
            z = gate * z + (1 - gate) * side
        inner = norm(z, p["norm"][i], p["norm_bias"][i]) @ p["inner"][i].T + p["inner_bias"][i]
        side = z + F.silu(inner) @ p["outer"][i].T + p["outer_bias"][i]
    last = norm(side, p["last_norm"], p["last_norm_bias"])
    return base.lm_head(base.model.norm(outputs[-1] + last @ p["up"].T + p["up_bias"]))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n.rpartition(".")[2]: p for n, p in peftfx.named_parameters(model)}


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    out.float().square().mean().backward()
    found = {n: p.grad.clone() for n, p in tensors(model).items() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    assert found.keys() == tensors(model).keys()
    return found


def alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in want.values())
    for name, g in want.items():
        assert float((got[name] - g).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("layers", ["all", pytest.param("every 2", marks=pytest.mark.slow)])
def test_formula(layers: str) -> None:
    base = llama(3).requires_grad_(False)
    rule = RULE if layers == "all" else {**RULE, "layers": "every 2"}  # 0 and 2 of three
    model = copy.deepcopy(base)
    backend = Backend({"rules": [rule]}, "aot_eager")
    backend.bind(model)
    assert torch.equal(output(model, X), output(base, X))  # it starts as the base
    fill(peftfx.parameters(model), scale=0.5)
    want = by_hand(base, tensors(model), [0, 1, 2] if layers == "all" else [0, 2])
    assert relative(want, output(base, X)) > 1e-2
    expected = gradients(model, want)
    for run in (model, compiled(model)):
        out = output(run, X)
        assert relative(out, want) < 1e-5
        alike(gradients(model, out), expected)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("how", ["eager", "aot_eager", INDUCTOR])
def test_no_backward_through_the_base(how: str) -> None:
    """Nothing of the layers is kept for a backward, which runs when their weights are NaN."""
    model = bound(llama())
    run = model if how == "eager" else compiled(model, how)
    want = gradients(model, output(run, X))
    weights = {p.data_ptr(): n for n, p in model.named_parameters() if "layers" in n
               and not p.requires_grad}  # fmt: skip
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = output(run, X)
    assert kept and not [weights[t.data_ptr()] for t in kept if t.data_ptr() in weights]
    # no values of an attention or a feed-forward: what is kept is as wide as the stream or narrower
    heads, inner = 4, model.config.intermediate_size
    sizes = {tuple(t.shape) for t in kept}
    assert not [s for s in sizes if inner in s[-1:] or (len(s) == 4 and s[1] == heads)], sizes
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and not p.requires_grad:
                p.data.fill_(torch.nan)
    alike(gradients(model, out), want)


@pytest.mark.slow
def test_checkpoints() -> None:
    """HF's are inside of the marks: with them it runs eagerly too, of either kind."""
    base = llama()
    plain = bound(base).train()
    want = gradients(plain, output(plain, X))
    for reentrant in (True, False):
        model = bound(base).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        alike(gradients(model, output(model, X)), want)
    run = compiled(model)
    alike(gradients(model, output(run, X)), want)
    with torch.autocast("cpu", torch.bfloat16):
        out = output(run, X)
    assert all(torch.isfinite(g).all() for g in gradients(model, out).values())


def test_checkpoints_around_marks_want_a_compiler() -> None:
    """Eagerly the last layer cannot run again by itself (compiled: test_methods.py)."""
    model = Net()
    Backend({"rules": [RULE]}, "eager").bind(model, (IDS,))
    fill(peftfx.parameters(model))
    out = model.train()(IDS)
    with pytest.raises(NotAdaptedError, match="a checkpoint runs this one again"):
        out.sum().backward()


def test_generation_sees_what_a_forward_sees() -> None:
    model = bound(llama())
    ids = X["input_ids"][:, :5]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize(
    "name",
    ["bert", *(pytest.param(n, marks=pytest.mark.sweep) for n in ("t5", "gpt2", "vit", "whisper"))],
)
def test_other_architectures(name: str) -> None:
    arch = by_name(name)
    base, x = arch.build(), arch.example()
    model = bound(base, {**RULE, **({"stack": "decoder"} if name in ("t5", "whisper") else {})})
    expected = output(model, x)
    assert relative(expected, output(base, x)) > 1e-3
    want = gradients(model, expected)
    out = output(compiled(model), x)
    assert relative(out, expected) < 1e-5
    alike(gradients(model, out), want)


def test_adapters_with_other_layers_and_beside_a_lora() -> None:
    """Two ladders on one model take turns; a LoRA below keeps its own gradient."""
    base = llama()
    model = bound(base)
    first = output(model, X)
    peftfx.add(model, {"rules": [{**RULE, "layers": "last 1"}]}, "short", X)
    peftfx.activate(model, "short")
    fill(peftfx.parameters(model, "short"), 3, scale=0.5)
    second = output(model, X)
    assert relative(second, first) > 1e-3
    assert relative(output(compiled(model), X), second) < 1e-5
    peftfx.activate(model, "default")
    assert torch.equal(output(model, X), first)
    with pytest.raises(MergeError):
        peftfx.activate(model, {"default": 0.5, "short": 0.5})
    with peftfx.disabled(model):
        assert torch.equal(output(model, X), output(base, X))
    assert torch.equal(output(copy.deepcopy(model), X), first)

    lora = {"method": "lora", "role": "attention.query", "rank": 2}
    both = bound(base, RULE, lora)
    out = output(both, X)
    assert relative(output(compiled(both), X), out) < 1e-5
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in peftfx.parameters(both))


def test_refusals() -> None:
    base = llama(3)
    model = bound(base)
    layer = model.model.layers[2]
    with pytest.raises(NotAdaptedError, match="2 modules come before this one, and 0 of them ran"):
        layer(torch.randn(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8),) * 2)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            layer(torch.randn(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8),) * 2)
        except NotAdaptedError as error:
            failed.append(error)

    handle = model.model.layers[1].register_forward_hook(
        lambda *_: (thread := threading.Thread(target=elsewhere)).start() or thread.join()
    )
    output(model, X)
    handle.remove()
    assert failed
    with pytest.raises(MergeError, match="no weight to merge into"):
        peftfx.merge(model)
    with pytest.raises(CheckpointError):
        peftfx.save(model, "/nowhere", format="peft")
    with pytest.raises(PlanError, match="in several stacks"):
        bound(by_name("t5").build())
    with pytest.raises(PlanError, match="several options"):
        bound(base, {**RULE, "overrides": [{"layers": "last 1", "reduction": 2}]})
    with pytest.raises(BindError, match="runs several times"):
        bound(by_name("albert").build())
