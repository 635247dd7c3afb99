"""Sites that are a module's output, shown by a method of one's own that acts at them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import MergeError, PlanError, RoleError
from peftfx.methods import Call, Method, Param, method, option, register
from peftfx.plans import make_plan
from peftfx.site import OUTPUT, Site
from tests.architectures import Architecture, by_name
from tests.helpers import fill, output, relative

SHOWN = ("llama", "bert", "t5", "gpt2", "vit", "bart", "whisper", "albert", "swin")
RESIDUAL = ("residual.attention", "residual.cross_attention", "residual.mlp")
SUBLAYERS = ("attention", "cross_attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """``y + W2·gelu(W1·h)``, of the output itself or, beside the sublayer, of its input."""

    name: ClassVar[str] = "bottleneck_of_a_test"
    kinds: ClassVar[tuple[str, ...]] = (OUTPUT,)
    baked: ClassVar[tuple[str, ...]] = ("parallel",)
    parallel: bool = option("Whether it reads the sublayer's input.", False)

    def params(self, site: Site) -> dict[str, Param]:
        width = site.in_features if self.parallel else site.out_features
        return {
            "down": Param((3, width), nn.init.normal_),
            "up": Param((site.out_features, 3), nn.init.zeros_),
        }

    def apply(self, y: Tensor | None, x: Tensor, p: Any, call: Call) -> Tensor:
        assert y is not None
        return y + F.gelu((x if self.parallel else y) @ p["down"].t()) @ p["up"].t()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Bottleneck)
    try:
        yield
    finally:
        del method._TABLE[Bottleneck.name]


def spec_of(arch: Architecture, parallel: bool) -> dict[str, Any]:
    asked = [r for r in (SUBLAYERS if parallel else RESIDUAL) if r in arch.outputs]
    return {"rules": [{"method": Bottleneck.name, "role": asked, "parallel": parallel}]}


def places(arch: Architecture, model: nn.Module, parallel: bool) -> list[str]:
    """The modules that the table names."""
    globs = [g for r in (SUBLAYERS if parallel else RESIDUAL) for g in arch.outputs.get(r, ())]
    return [p for p, _ in model.named_modules() if any(fnmatchcase(p, g) for g in globs)]


def adapted_by_hand(
    arch: Architecture, base: nn.Module, parallel: bool, weights: dict[str, Tensor]
) -> nn.Module:
    """*base* with the formula in hooks of its own, at the modules that the table names."""
    model = copy.deepcopy(base)

    def hook(down: Tensor, up: Tensor) -> Callable[..., Any]:
        def act(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            x = (args[0] if args else kwargs["hidden_states"]) if parallel else y
            y = y + nn.functional.gelu(x @ down.T) @ up.T
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return act

    for path in places(arch, model, parallel):
        key = f"{path}:{Bottleneck.name}."
        module = model.get_submodule(path)
        module.register_forward_hook(
            hook(weights[key + "down"], weights[key + "up"]), with_kwargs=True
        )
    return model


FAST = [("llama", True), *((n, False) for n in ("llama", "bert", "t5", "gpt2", "vit"))]
CASES = [
    pytest.param(name, parallel, marks=[pytest.mark.sweep] if (name, parallel) not in FAST else [])
    for name in SHOWN
    for parallel in (False, True)
    if not (parallel and not set(SUBLAYERS) & set(by_name(name).outputs))
]


@pytest.mark.parametrize("name, parallel", CASES)
def test_acts_where_the_table_says(name: str, parallel: bool, tmp_path: Path) -> None:
    arch = by_name(name)
    base, x = arch.build().requires_grad_(False), arch.example()
    spec = spec_of(arch, parallel)
    model = copy.deepcopy(base)
    backend = Backend(spec, "eager")
    backend.bind(model, x)
    assert set(peftfx.state_dict(model)) == {
        f"{path}:{Bottleneck.name}.{leaf}"
        for path in places(arch, model, parallel)
        for leaf in ("down", "up")
    }
    assert torch.equal(output(model, x), output(base, x))
    fill(peftfx.parameters(model), scale=0.5)

    weights = {k: v.clone().requires_grad_() for k, v in peftfx.state_dict(model).items()}
    expected = output(adapted_by_hand(arch, base, parallel, weights), x)
    assert relative(expected, output(base, x)) > 1e-2
    assert relative(output(model, x), expected) < 1e-5

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected.square().mean().backward()
    check_gradients(model, compiled, x, expected, weights)
    if getattr(model, "supports_gradient_checkpointing", False):
        model.config.use_cache = False  # what some log when they turn it off breaks the graph
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # T5 sets `requires_grad` in a region: torch breaks the base's graph there too
        compiled = torch.compile(model.train(), backend=backend, fullgraph=name != "t5")
        check_gradients(model, compiled, x, expected, weights)
        model.eval()

    peftfx.save(model, tmp_path)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path, compile=False, example=x)
    before, after = peftfx.state_dict(model), peftfx.state_dict(fresh)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(output(fresh, x), output(model, x))
    with pytest.raises(MergeError, match="no weight"):
        peftfx.merge(model)
    with peftfx.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    peftfx.release(model)
    assert torch.equal(output(model, x), output(base, x))


def check_gradients(
    model: nn.Module, run: Any, x: Any, expected: Tensor, weights: dict[str, Tensor]
) -> None:
    """One training step's gradients, of the parameters that *expected* was made with."""
    out = output(run, x)
    assert relative(out, expected) < 1e-5
    out.square().mean().backward()
    largest = max(float(w.grad.abs().max()) for w in weights.values() if w.grad is not None)
    for name, p in peftfx.named_parameters(model):
        assert p.grad is not None and weights[name].grad is not None
        assert (p.grad - weights[name].grad).abs().max() <= 1e-5 * largest, name
        p.grad = None
    assert all(p.grad is None for p in model.parameters())


def test_a_wrong_base_is_refused(tmp_path: Path) -> None:
    arch = by_name("llama")
    model, x = arch.build(), arch.example()
    peftfx.adapt(model, spec_of(arch, False), x, lower="eager")
    peftfx.save(model, tmp_path)
    other = arch.build()
    fill([other.model.layers[1].self_attn.o_proj.weight])  # type: ignore[union-attr, index]
    with pytest.raises(peftfx.errors.FingerprintError):
        peftfx.load(other, tmp_path, compile=False, example=x)


def test_methods_of_parameters_leave_outputs_alone() -> None:
    arch = by_name("llama")
    plan, _ = make_plan(arch.build(), {"rules": [{"method": "lora", "role": "attention"}]})
    assert {p.site.kind for p in plan} == {"linear"} and not plan.refusals
    with pytest.raises(RoleError, match=r"residual\.mlp: the model shows attention\.key"):
        make_plan(arch.build(), {"rules": [{"method": "lora", "role": "residual.mlp"}]})


def test_what_no_module_gives_is_refused() -> None:
    rule = {"method": Bottleneck.name, "role": "mlp", "parallel": True}
    with pytest.raises(RoleError, match=r"block, residual\.attention, residual\.mlp") as caught:
        make_plan(by_name("bert").build(), {"rules": [rule]})
    assert "layer.0.output.dense.weight (no module is this mlp alone" in str(caught.value)
    with pytest.raises(PlanError, match="both act here"):
        twice = [{"method": Bottleneck.name, "role": r} for r in ("attention", "residual")]
        make_plan(by_name("llama").build(), {"rules": twice})
