"""Adapters of a bound model: states, switches, mixes, and how often that compiles."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftfx
from peftfx.backends import Backend
from peftfx.errors import (
    AdapterError,
    BindError,
    MergeError,
    NotAdaptedError,
    OptimizerError,
    PlanError,
)
from tests.architectures import by_name
from tests.helpers import fill, output, relative

SPEC: dict[str, Any] = {
    "rules": [
        {"method": "lora", "name": ["*.q_proj", "*.v_proj", "*.down_proj"], "rank": 3},
        {"method": "train", "name": "lm_head"},
    ]
}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    arch = by_name("llama")
    return arch.build(), arch.example()


def adapted(spec: Any = None, lower: Any = "eager") -> tuple[nn.Module, dict[str, Tensor]]:
    model, x = llama()
    peftfx.adapt(model, spec or SPEC, lower=lower)
    fill(peftfx.parameters(model))
    return model, x


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_starts_as_the_base() -> None:
    base, x = llama()
    model = copy.deepcopy(base)
    peftfx.adapt(model, SPEC, lower="eager")
    assert torch.equal(output(model, x), output(base, x))


def test_gradients_reach_exactly_the_plan() -> None:
    model, x = adapted()
    output(model, x).square().mean().backward()
    trained = {id(p) for p in peftfx.parameters(model)}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name
        assert p.requires_grad == (id(p) in trained), name
    assert {n.rpartition(":")[2] for n, _ in peftfx.named_parameters(model)} == {
        "lora.A", "lora.B", "train.value",
    }  # fmt: skip


def test_no_recompile_after_warm_up() -> None:
    model, x = llama()
    counter = CompileCounterWithBackend("eager")
    backend = Backend(SPEC, counter)
    backend.bind(model)
    compiled = torch.compile(model, backend=backend)
    fill(peftfx.parameters(model), 1)
    peftfx.add(model, {**SPEC, "rules": [{**SPEC["rules"][0], "alpha": 5}, SPEC["rules"][1]]}, "b")
    fill(peftfx.parameters(model, "b"), 2)

    def round_of_everything() -> list[Tensor]:
        found = []
        for state in ("default", "b", {"default": 0.7, "b": 0.3}, {"default": 0.2, "b": 0.9}):
            peftfx.activate(model, state)
            for training in (True, False):
                model.train(training)
                found.append(output(compiled, x).detach())
        peftfx.activate(model, "default")
        with peftfx.disabled(model):
            found.append(output(compiled, x).detach())
        return found

    first = round_of_everything()
    warm = counter.frame_count
    second = round_of_everything()
    assert counter.frame_count == warm
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    a, b, mixed = first[0], first[2], first[4]
    assert relative(a, b) > 1e-2 and relative(mixed, a) > 1e-3


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.7, "b": -0.4}, {"a": 0.5}])
def test_mix_is_the_sum_of_the_updates(weights: dict[str, float]) -> None:
    base, x = llama()
    rule = {"method": "lora", "name": "lm_head", "rank": 3}
    model = copy.deepcopy(base)
    Backend({"rules": [rule]}, "eager").bind(model)
    fill(peftfx.parameters(model))
    peftfx.add(model, {"rules": [{**rule, "rank": 2, "alpha": 9}]}, "a")
    peftfx.add(model, {"rules": [{**rule, "rank": 4}]}, "b")
    fill(peftfx.parameters(model, "a"), 1)
    fill(peftfx.parameters(model, "b"), 2)
    plain = output(base, x)
    expected = plain.clone()
    for name, weight in weights.items():
        peftfx.activate(model, name)
        expected = expected + weight * (output(model, x) - plain)
    peftfx.activate(model, weights)
    assert relative(output(model, x), expected) < 1e-5
    peftfx.merge(model)
    assert relative(output(model, x), expected) < 1e-5


def test_merge_unmerge_release_are_bit_exact() -> None:
    base, x = llama()
    model = copy.deepcopy(base)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    peftfx.adapt(model, SPEC, lower="eager")
    fill(peftfx.parameters(model))
    before = output(model, x)
    peftfx.merge(model)
    assert relative(output(model, x), before) < 1e-5
    peftfx.unmerge(model)
    assert torch.equal(output(model, x), before)
    peftfx.merge(model)
    peftfx.release(model)
    assert same(model, base)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any("peftfx" in n for n, _ in model.named_modules())
    peftfx.adapt(model, SPEC, lower="eager")  # and once more
    assert torch.equal(output(model, x), output(base, x))


def test_disabled_gives_the_base_and_nan_does_not_leak() -> None:
    base, x = llama()
    model = copy.deepcopy(base)
    peftfx.adapt(model, SPEC, lower="eager")
    with torch.no_grad():
        for p in peftfx.parameters(model):
            p.fill_(float("nan"))
    with peftfx.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
        with peftfx.disabled(model):
            assert torch.equal(output(model, x), output(base, x))
        assert torch.equal(output(model, x), output(base, x))
    assert output(model, x).isnan().any()


def test_names_and_states_that_are_refused() -> None:
    model, _ = adapted()
    for name in ("../evil", "a/b", "", "x" * 65, "a.b"):
        with pytest.raises(AdapterError):
            peftfx.add(model, SPEC, name)
    with pytest.raises(AdapterError, match="already"):
        peftfx.add(model, SPEC, "default")
    with pytest.raises(AdapterError, match="is active"):
        peftfx.remove(model, "default")
    with pytest.raises(AdapterError):
        peftfx.activate(model, "nobody")
    for mix in ({}, {"default": float("nan")}, {"default": float("inf")}, {"default": 10**400}):
        with pytest.raises(AdapterError, match="no mix"):
            peftfx.activate(model, mix)
    peftfx.merge(model)
    with pytest.raises(MergeError):
        peftfx.activate(model, "default")
    with pytest.raises(BindError):
        peftfx.parameters(nn.Linear(2, 3))


def test_add_and_remove_leave_nothing() -> None:
    model, x = adapted()
    before = output(model, x)
    names = {n for n, _ in model.named_modules()}
    peftfx.add(model, {"rules": [{"method": "lora", "name": "*.up_proj"}]}, "b")
    peftfx.activate(model, "b")
    peftfx.activate(model, "default")
    peftfx.remove(model, "b")
    assert {n for n, _ in model.named_modules()} == names
    assert torch.equal(output(model, x), before)
    assert peftfx.adapters(model) == {"default": 1.0}


def test_binding_again() -> None:
    model, _ = adapted()
    kept = peftfx.parameters(model)
    Backend(SPEC, "eager").bind(model)  # the same spec: nothing happens
    assert all(a is b for a, b in zip(peftfx.parameters(model), kept, strict=True))
    with pytest.raises(BindError, match="another spec"):
        Backend({"rules": [{"method": "bitfit", "name": "*"}]}, "eager").bind(model)


def test_optimizer_made_too_early() -> None:
    model, x = llama()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=Backend(SPEC, "eager"))
    output(compiled, x).sum().backward()
    with pytest.raises(OptimizerError, match="nothing would train"):
        early.step()
    torch.optim.SGD(peftfx.parameters(model), lr=0.1).step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # made after the bind: holds both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_policy(dtype: torch.dtype) -> None:
    rule = {"rules": [{"method": "lora", "name": "*.q_proj", "rank": 3}]}
    for policy, expected in (
        ("float32", torch.promote_types(dtype, torch.float32)),
        ("base", dtype),
    ):
        model, x = llama()
        model.to(dtype)
        peftfx.adapt(model, {**rule, "dtype": policy}, lower="aot_eager")
        assert {p.dtype for p in peftfx.parameters(model)} == {expected}
        out = output(model, x)
        assert out.dtype == dtype
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == expected
                   for p in peftfx.parameters(model))  # fmt: skip


def test_tied_weights() -> None:
    arch = by_name("gpt2")
    base, x = arch.build(), arch.example()
    model = copy.deepcopy(base)
    Backend({"rules": [{"method": "lora", "name": "lm_head", "rank": 3}]}, "eager").bind(model)
    fill(peftfx.parameters(model))
    before = output(model, x)
    with pytest.raises(MergeError, match="tied"):
        peftfx.merge(model)
    peftfx.merge(model, untie=True)
    assert relative(output(model, x), before) < 1e-5
    assert torch.equal(model.transformer.wte.weight, base.transformer.wte.weight)  # type: ignore
    peftfx.release(model)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    Backend({"rules": [{"method": "train", "name": "lm_head"}]}, "eager").bind(model)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert len(peftfx.parameters(model)) == 1


def test_never_called_modules() -> None:
    arch = by_name("t5")
    model = arch.build()
    with pytest.raises(BindError, match=r"encoder\.embed_tokens"):
        Backend({"rules": [{"method": "lora", "name": "shared", "rank": 3}]}, "eager").bind(
            model, arch.example()
        )
    assert not peftfx.is_adapted(model)
    arch = by_name("mamba")
    base, x = arch.build(), arch.example()
    model = copy.deepcopy(base)
    spec = {"rules": [{"method": "lora", "name": "*.dt_proj", "rank": 2}]}
    peftfx.adapt(model, spec, lower="aot_eager", fullgraph=True)
    fill(peftfx.parameters(model), scale=2.0)
    out = output(model, x)
    assert relative(out, output(base, x)) > 1e-3  # read functionally, adapted all the same
    peftfx.merge(model)
    assert relative(output(model, x), out) < 1e-5


def test_copies_carry_their_own_adapter() -> None:
    model, x = adapted()
    before = output(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative(output(clone, x), before) < 1e-5
        fill(peftfx.parameters(clone), 9)
        assert relative(output(clone, x), before) > 1e-2
        assert torch.equal(output(model, x), before)


def test_plans_that_do_not_fit() -> None:
    model, _ = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for rule, message in (
        ({"method": "lora", "name": "*.q_prj"}, "matches nothing"),
        ({"method": "lora", "name": "*.q_proj", "rank": 33}, "larger than"),
        ({"method": "lora", "name": "model.norm"}, "acts nowhere"),
        ({"method": "lora", "role": "cross_attention.query"}, "no site has the role"),
    ):
        with pytest.raises(PlanError, match=message):
            peftfx.adapt(model, {"rules": [rule]})
    train = {"method": "train", "name": "lm_head"}
    for other in (train, {"method": "freeze", "name": "lm_head"}):
        with pytest.raises(PlanError, match="both act here"):
            peftfx.adapt(model, {"rules": [train, other]})
    assert not peftfx.is_adapted(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_fused_projection_is_taken_whole_or_not() -> None:
    arch = by_name("gpt2")
    rule = {"method": "lora", "role": ["attention.query", "attention.value"], "rank": 2}
    with pytest.raises(PlanError, match=r"ask for attention\.key too"):
        peftfx.plan(arch.build(), {"rules": [rule]})
    rule["role"] = "attention"
    found = peftfx.plan(arch.build(), {"rules": [rule]})
    assert {p.site.module.rpartition(".")[2] for p in found} == {"c_attn", "c_proj"}


def test_dropout_masks() -> None:
    spec = {"rules": [{"method": "lora", "name": ["*.q_proj", "*.v_proj"], "dropout": 0.5}]}
    model, x = adapted(spec, "aot_eager")
    model.eval()
    quiet = output(model, x)
    assert torch.equal(quiet, output(model, x))
    model.train()
    torch.manual_seed(1)
    a = output(model, x)
    torch.manual_seed(1)
    assert torch.equal(a, output(model, x))
    assert relative(output(model, x), a) > 1e-4  # another draw


def test_replaced_module_is_noticed() -> None:
    model, x = adapted()
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    attention.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(NotAdaptedError, match="was replaced"):
        output(model, x)


def test_dynamic_lengths_recompile_once() -> None:
    for name in ("llama", "bert"):
        torch._dynamo.reset()
        arch = by_name(name)
        model = arch.build()
        counter = CompileCounterWithBackend("eager")
        rule = {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3}
        peftfx.adapt(model, {"rules": [rule]}, lower=counter)
        for length in (9, 7, 12, 5, 11):
            model(input_ids=torch.randint(3, 60, (2, length)))
        assert counter.frame_count <= 2, name


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams: int) -> None:
    arch = by_name("llama")
    base = arch.build()
    model = copy.deepcopy(base)
    rule = {"method": "lora", "role": ["attention.query", "mlp.down"], "rank": 3}
    peftfx.adapt(model, {"rules": [rule]}, lower="eager")
    fill(peftfx.parameters(model), scale=0.5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams,
                               "use_cache": True}  # fmt: skip
    ids = arch.example()["input_ids"]
    out = model.generate(ids, **options)  # type: ignore[operator]
    plain = base.generate(ids, **options)  # type: ignore[operator]
    merged = copy.deepcopy(base)
    peftfx.adapt(merged, {"rules": [rule]}, lower="eager")
    fill(peftfx.parameters(merged), scale=0.5)
    peftfx.merge(merged)
    merged._compiled_call_impl = None
    assert torch.equal(out, merged.generate(ids, **options))  # type: ignore[operator]
    assert not torch.equal(out, plain)
