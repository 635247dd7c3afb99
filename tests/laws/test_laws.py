"""The laws, over random models and random specs."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import BindError, MergeError, PlanError, TraceError
from tests.helpers import fill, relative
from tests.methods import ROWS, merges, start_of

WIDTHS = (4, 6, 9)
EXAMPLES = int(os.environ.get("PEFTFX_EXAMPLES", "0"))


class Random(nn.Module):
    """A model drawn at random: layers with branches, residuals and modules used twice."""

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTHS[0])
        self.steps: list[tuple[str, list[str]]] = []
        self.dead = nn.Linear(3, 5)  # never called
        width = WIDTHS[0]
        previous: str | None = None
        for i, (kind, pick, extra) in enumerate(plan):
            name, out = f"{kind}{i}", WIDTHS[pick % 3]
            if kind == "linear":
                self.add_module(name, nn.Linear(width, out, bias=bool(extra % 2)))
                width, previous = out, None
            elif kind == "residual":
                self.add_module(name, nn.Linear(width, width))
                previous = name
            elif kind == "again":
                name = previous or ""
            elif kind == "branches":
                for side in "ab":
                    self.add_module(f"{name}{side}", nn.Linear(width, out, bias=side == "a"))
                width, previous = out, None
            elif kind == "norm":
                self.add_module(name, nn.LayerNorm(width))
            elif kind == "conv":
                self.add_module(name, nn.Conv1d(width, out, 3, padding=1))
                width, previous = out, None
            self.steps.append((kind, [name]))
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for kind, (name,) in self.steps:
            if kind in ("linear", "norm"):
                x = getattr(self, name)(x)
            elif kind in ("residual", "again") and name:
                x = x + torch.tanh(getattr(self, name)(x))
            elif kind == "branches":
                x = getattr(self, name + "a")(x) * torch.sigmoid(getattr(self, name + "b")(x))
            elif kind == "conv":
                x = getattr(self, name)(x.transpose(1, 2)).transpose(1, 2)
            elif kind == "act":
                x = torch.nn.functional.gelu(x)
        return self.head(x)


layers = st.lists(
    st.tuples(
        st.sampled_from(["linear", "residual", "again", "branches", "norm", "conv", "act"]),
        st.integers(0, 2), st.integers(0, 1),
    ),
    min_size=1, max_size=5,
)  # fmt: skip
lora = st.fixed_dictionaries(
    {
        "method": st.just("lora"),
        "name": st.sampled_from(
            [["*"], ["linear*"], ["*a", "*b", "head"], ["table", "head"], ["conv*", "residual*"]]
        ),
        "rank": st.integers(1, 3),
        "alpha": st.sampled_from([0.5, 3.0]),
        "except": st.just("dead"),
    },
    optional={"rank_stabilized": st.booleans()},
)
# Every row of the table, at what its name says or at a choice of sites; one may stack on another
_places = st.sampled_from([["*"], ["linear*", "conv*"], ["*a", "*b", "head"], ["residual*"]])
_apart = ("train", "bitfit", "norm", "ladder")  # a ladder's layers: test_methods.py
_rows = st.sampled_from([r for r in ROWS if r.method not in _apart])
method = st.builds(
    lambda row, where: row.rule(
        name=where if row.name == "*" else row.name, **{"except": "dead"}
    ),
    _rows, _places,
)  # fmt: skip
train = st.fixed_dictionaries(
    {"method": st.sampled_from(["train", "bitfit"]), "name": st.sampled_from(["norm*", "head"])}
)
specs = st.tuples(
    st.one_of(lora, method, method), st.one_of(st.none(), method), st.one_of(st.none(), train)
).map(lambda rules: {"rules": [r for r in rules if r is not None]})


def bound(base: nn.Module, spec: Any, lower: Any) -> tuple[nn.Module, Tensor, Backend] | None:
    ids = torch.randint(0, 11, (2, 5))
    model = copy.deepcopy(base)
    backend = Backend(spec, lower)
    try:
        backend.bind(model, (ids,))
    except PlanError:
        return None  # nothing of that name in this model
    return model, ids, backend


def check(plan: Any, spec: Any, lower: Any) -> None:
    """All laws on a model drawn at random and one spec; *lower* None is without a compiler."""
    torch.manual_seed(0)
    check_on(Random(plan), spec, lower)


def check_on(base: nn.Module, spec: Any, lower: Any) -> None:
    base.eval().requires_grad_(False)  # torch rounds otherwise where gradients are due
    made = bound(base, spec, lower or "eager")
    if made is None:
        return
    model, ids, backend = made
    assert relative(model(ids), base(ids)) <= start_of(spec)  # mostly the base
    fill(peftfx.parameters(model), scale=0.4)
    eager = model(ids)
    eager.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in peftfx.named_parameters(model) if p.grad is not None}
    planned = {id(p) for p in peftfx.parameters(model)}
    assert all((id(p) in planned) == p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in planned)
    for p in model.parameters():
        p.grad = None
    if lower is not None:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out = compiled(ids)
        assert relative(out, eager) < 1e-5
        out.square().mean().backward()
        same_gradients(model, grads)
    else:
        rewritten(base, model, spec, ids, eager, grads)
    if merges(spec):
        peftfx.merge(model)
        assert relative(model(ids), eager) < 1e-5
        peftfx.unmerge(model)
    else:
        with pytest.raises(MergeError):
            peftfx.merge(model)
    assert torch.equal(model(ids), eager)
    with peftfx.disabled(model):
        assert torch.equal(model(ids), base(ids))
    saved = {k: v.clone() for k, v in peftfx.state_dict(model).items()}
    fill(peftfx.parameters(model), seed=5)
    peftfx.load_state_dict(model, saved)
    assert torch.equal(model(ids), eager)
    peftfx.release(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True)
    )


def same_gradients(model: nn.Module, grads: dict[str, Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, p in peftfx.named_parameters(model):
        if name in grads:
            assert p.grad is not None
            assert float((p.grad - grads[name]).abs().max()) <= 1e-5 * max(largest, 1.0), name


def rewritten(
    base: nn.Module, model: nn.Module, spec: Any, ids: Tensor, eager: Tensor, grads: Any
) -> None:
    """The passes on an fx graph: the marks' result, their gradients, and no others."""
    if any(rule.get("role") for rule in spec["rules"]):
        with pytest.raises(TraceError):  # roles are found by a run, and a graph has no example
            peftfx.rewrite(fx.symbolic_trace(base), spec)
        return
    if any(rule.get("first") or rule.get("last") for rule in spec["rules"]):
        with pytest.raises(BindError, match="positions are counted"):
            peftfx.rewrite(fx.symbolic_trace(base), spec)
        return
    gm = peftfx.rewrite(fx.symbolic_trace(base), spec)
    peftfx.load_state_dict(gm, peftfx.state_dict(model))
    out = gm(ids)
    assert relative(out, eager) < 1e-5
    out.square().mean().backward()
    same_gradients(gm, grads)
    trained = {id(p) for p in peftfx.parameters(gm)}
    assert all(p.grad is None for p in gm.parameters() if id(p) not in trained)


@settings(max_examples=200)
@given(layers, specs)
def test_a_few_without_a_compiler(plan: Any, spec: Any) -> None:
    check(plan, spec, None)


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 2000)
@given(layers, specs)
def test_without_a_compiler(plan: Any, spec: Any) -> None:
    check(plan, spec, None)


# two sites on one x whose gradients come from ops of one form
STACKED = {"rules": [
    {"method": "lora", "name": ["*"], "rank": 1, "alpha": 0.5, "except": "dead"},
    {"method": "bottleneck", "name": ["*"], "size": 5, "except": "dead"},
]}  # fmt: skip


@settings(max_examples=20)
@given(layers, specs)
@example([("branches", 0, 0)], STACKED)
def test_a_few_compiled(plan: Any, spec: Any) -> None:
    torch._dynamo.reset()
    check(plan, spec, "aot_eager")


@pytest.mark.slow
@settings(max_examples=EXAMPLES // 10 or 200)
@given(layers, specs)
def test_compiled(plan: Any, spec: Any) -> None:
    torch._dynamo.reset()
    check(plan, spec, "aot_eager")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Residual blocks in a list, for what takes a stack of them as one."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ladder = st.fixed_dictionaries(
    {
        "method": st.just("ladder"),
        "role": st.just("block"),
        "reduction": st.sampled_from([1.0, 2.5, 9.0]),
        "expansion": st.sampled_from([0.5, 2.0]),
        "activation": st.sampled_from(["relu", "gelu"]),
    },
    optional={"layers": st.sampled_from(["last 2", "every 2", [0]])},
)
beside = st.sampled_from([r.rule(name="*.down") for r in ROWS if r.method in ("lora", "ia3")])


@settings(max_examples=EXAMPLES // 100 or 15)
@given(st.integers(1, 3), st.sampled_from([4, 6]), ladder, st.none() | beside)
def test_stacks_as_one(depth: int, width: int, rule: Any, other: Any) -> None:
    torch.manual_seed(0)
    check_on(Stack(depth, width), {"rules": [r for r in (rule, other) if r]}, None)


@pytest.mark.slow
@settings(max_examples=20)
@given(layers, specs)
def test_through_inductor(plan: Any, spec: Any) -> None:
    torch._dynamo.reset()
    check(plan, spec, "inductor")
