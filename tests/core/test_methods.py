"""Methods by themselves: formulas of their papers, bounds, schedules, penalties, a toy method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound, entry_of
from peftfx.errors import CheckpointError, PlanError, SpecError
from peftfx.kernels.sparse_add.op import by_columns
from peftfx.methods import Call, Method, Param, method, option, register
from peftfx.spec import Spec
from tests.architectures import by_name
from tests.helpers import fill, output, relative
from tests.laws import test_laws, test_methods
from tests.methods import Row


def bind(model: nn.Module, *rules: dict[str, Any], example: Any = None) -> nn.Module:
    Backend({"rules": list(rules)}, "eager").bind(model, example)
    return model


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    arch = by_name("llama")
    return arch.build(), arch.example()


# -- a method of one's own -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Adds a learned multiple of what a linear computes."""

    name: ClassVar[str] = "toy"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    factor: float = option("Multiplies the update.", 2.0)
    baked: ClassVar[tuple[str, ...]] = ("factor",)

    def params(self, site: Any) -> dict[str, Param]:
        return {"g": Param((site.out_features,), nn.init.zeros_)}

    def apply(self, y: Tensor | None, x: Tensor, p: Any, call: Call) -> Tensor:
        assert y is not None
        return y * (1 + self.factor * p["g"]).to(y.dtype)

    def merge(self, w: Tensor, p: Any, site: Any) -> Tensor:
        return w * (1 + self.factor * p["g"])[:, None]

    def merge_bias(self, bias: Tensor | None, p: Any, site: Any) -> Tensor | None:
        return None if bias is None else bias * (1 + self.factor * p["g"])


@pytest.fixture
def toy() -> Iterator[Row]:
    register(Toy)
    try:
        yield Row("toy", "toy", {"factor": 3.0}, mixes=False)
    finally:
        del method._TABLE["toy"]


def test_a_method_is_one_class_and_one_registration(toy: Row, tmp_path: Path) -> None:
    test_methods.trains(toy, "aot_eager")
    test_methods.test_files_are_lossless(toy, tmp_path)
    test_methods.test_mixes_are_sums_of_updates(toy)
    test_methods.test_low_precision(toy)
    torch._dynamo.reset()
    plan = [("linear", 1, 1), ("residual", 0, 0), ("branches", 2, 0), ("again", 0, 0)]
    rules = {"rules": [toy.rule(), {"method": "lora", "name": "*", "rank": 2, "except": "dead"}]}
    rules["rules"][0]["except"] = "dead"
    for lower in (None, "aot_eager"):
        test_laws.check(plan, rules, lower)


# -- bounds --------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "lora", "init": "orthogonal", "rank": 3}, "rank is 3"),
    ({"method": "lora", "plus": 0.0}, "plus is 0"),
    ({"method": "lora", "init": "pissa", "alpha": -1.0}, "alpha is -1"),
    ({"method": "adalora", "target": 0}, "target is 0"),
    ({"method": "adalora", "warmup": 9, "end": 5}, "warmup is 9"),
    ({"method": "vera", "rank": 0}, "rank is 0"),
    ({"method": "vera", "dropout": 1.0}, "dropout is 1"),
    ({"method": "loha", "rank": 0}, "rank is 0"),
    ({"method": "lokr", "split": 0}, "split is 0"),
    ({"method": "oft", "block": 1}, "block is 1"),
    ({"method": "oft", "terms": 3}, "terms is 3"),
    ({"method": "hra", "rank": 0}, "rank is 0"),
    ({"method": "ia3", "at": "middle"}, "at is 'middle'"),
    ({"method": "tokens", "ids": [1, 1]}, "ids is"),
    ({"method": "tokens", "ids": [-1]}, "ids is"),
    ({"method": "sparse", "density": 0.0}, "density is 0"),
    ({"method": "sparse", "rank": 2, "structure": "row"}, "rank is 2"),
    ({"method": "sparse", "budget": 0.1, "structure": "row"}, "budget is 0.1"),
    ({"method": "said", "dimension": 0}, "dimension is 0"),
    ({"method": "train", "l2_sp": -1.0}, "l2_sp is -1"),
    ({"method": "lora", "lr": -1.0}, "lr is -1"),
    ({"method": "lora", "lr": 10**400}, "lr is 1000"),
    ({"method": "lora", "alpha": 10**400}, "alpha is 1000"),
    ({"method": "lora", "layer_decay": 2}, "layer_decay is 2"),
    ({"method": "lora", "weight_decay": "x"}, "weight_decay is 'x'"),
]
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"method": "adalora", "rank": 99}, "larger than"),
    ({"method": "loha", "rank": 99}, "larger than"),
    ({"method": "vera", "inputs": 3}, "shared factors"),
    ({"method": "oft", "block": 5}, "do not divide a width of 32"),
    ({"method": "hra", "rank": 99}, "reflections"),
    ({"method": "sparse", "rank": 99}, "places are kept"),
    ({"method": "sparse", "density": 0.01, "budget": 0.5}, "a budget of"),
    ({"method": "tokens", "name": "*.embed_tokens"}, "no rows"),
    ({"method": "tokens", "name": "*.embed_tokens", "ids": [61]}, "no row 61"),
    ({"method": "norm"}, "norm trains normalisations"),
    ({"method": "lora", "name": "*.embed_tokens", "init": "pissa"}, "for linears"),
]


@pytest.mark.parametrize(("rule", "message"), WRONG)
def test_options_are_checked(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec.parse({"rules": [{"name": "*", **rule}]})


@pytest.mark.parametrize(("rule", "message"), UNFIT)
def test_shapes_are_checked(rule: dict[str, Any], message: str) -> None:
    model, _ = llama()
    with pytest.raises(PlanError, match=message):
        bind(model, {"name": "*.q_proj", **rule})
    assert not peftfx.is_adapted(model)


def test_places_in_a_file_are_checked() -> None:
    model = bind(nn.Sequential(nn.Linear(5, 4)), {"method": "sparse", "name": "*", "rank": 1},
                 example=(torch.ones(2, 5),))  # fmt: skip
    state = peftfx.state_dict(model)
    key = next(k for k in state if k.endswith("index"))
    before = {k: v.clone() for k, v in state.items()}
    places = torch.arange(9)
    order = by_columns(places, 4, 5)
    good = torch.stack([places, order])
    peftfx.load_state_dict(model, {**state, key: good})
    ways = [(places - 1, order), (places + 12, order), (places.flip(0), order), (order, order),
            (places, places), (places, order - 1), (places, torch.zeros_like(order)),
            (places, order.flip(0)), (places.float(), order.float())]  # fmt: skip
    for bad in (*(torch.stack(way) for way in ways), places):
        with pytest.raises(CheckpointError):
            peftfx.load_state_dict(model, {**before, key: bad})
    assert torch.equal(peftfx.state_dict(model)[key], good)


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pissa", "olora", "orthogonal", "gaussian"])
def test_starts_of_lora(kind: str) -> None:
    base = nn.Sequential(nn.Linear(7, 5))
    model = bind(copy.deepcopy(base), {"method": "lora", "name": "*", "rank": 4, "alpha": 2.0,
                 "init": kind}, example=(torch.ones(2, 7),))  # fmt: skip
    t = {k.rpartition(".")[2]: v for k, v in peftfx.state_dict(model).items()}
    w, product = base[0].weight.detach(), t["B"] @ t["A"]
    if kind == "pissa":
        u, s, v = torch.linalg.svd(w)
        assert torch.allclose(0.5 * product, u[:, :4] @ torch.diag(s[:4]) @ v[:4], atol=1e-5)
        assert torch.allclose(t["A"] @ t["A"].t(), torch.diag(2 * s[:4]), atol=1e-5)
    elif kind == "olora":
        assert torch.allclose(t["B"].t() @ t["B"], torch.eye(4), atol=1e-5)
        q, r = torch.linalg.qr(w)
        assert torch.allclose(product, q[:, :4] @ r[:4], atol=1e-5)
    elif kind == "orthogonal":
        assert product.abs().max() < 1e-6 and min(t["A"].norm(), t["B"].norm()) > 0.1
    else:
        assert t["B"].norm() == 0 and t["A"].norm() > 0
    assert torch.equal(model[0].weight, base[0].weight)  # type: ignore[index]


def test_a_lokr_of_full_rank_is_krona() -> None:
    """KronA: W + s·A ⊗ B with neither factor a product itself."""
    base, x = nn.Sequential(nn.Linear(6, 12)), torch.randn(3, 6)
    model = bind(copy.deepcopy(base), {"method": "lokr", "name": "*", "rank": 16, "alpha": 8.0},
                 example=(x,))  # fmt: skip
    fill(peftfx.parameters(model))
    t = {k.rpartition(".")[2]: v for k, v in peftfx.state_dict(model).items()}
    assert {n: tuple(v.shape) for n, v in t.items()} == {"w1": (3, 2), "w2": (4, 3)}
    update = torch.kron(t["w1"], t["w2"]) * 0.5
    assert relative(model(x), base(x) + x @ update.t()) < 1e-5


@pytest.mark.parametrize("structure", ["element", "row", "column"])
@pytest.mark.parametrize("conv", [False, True])
def test_magnitude_masks(structure: str, conv: bool) -> None:
    if conv:
        from transformers.pytorch_utils import Conv1D

        model: nn.Module = nn.Sequential(Conv1D(6, 9))
        w = model[0].weight.detach().t()  # type: ignore[index]
    else:
        model = nn.Sequential(nn.Linear(9, 6))
        w = model[0].weight.detach()  # type: ignore[index]
    bind(model, {"method": "sparse", "name": "*", "density": 0.4, "mask": "magnitude",
                 "structure": structure}, example=(torch.ones(2, 9),))  # fmt: skip
    index = next(v for k, v in peftfx.state_dict(model).items() if k.endswith("index"))
    size = w.abs()
    scores = {"element": size.reshape(-1), "row": size.sum(1), "column": size.sum(0)}[structure]
    best = scores.argsort(descending=True)[: round(0.4 * len(scores))].sort().values
    if structure == "element":
        assert torch.equal(index[1], by_columns(best, 6, 9))
        index = index[0]
    assert torch.equal(index, best)


def test_a_learned_mask_keeps_its_budget() -> None:
    torch.manual_seed(0)
    model = bind(
        nn.Sequential(nn.Linear(12, 10)),
        {"method": "sparse", "name": "*", "density": 0.5, "budget": 0.1},
        example=(torch.ones(2, 12),),
    )
    base = model[0].weight.detach().clone()  # type: ignore[index]
    target = torch.zeros(10, 12)
    index = next(v for k, v in peftfx.state_dict(model).items() if k.endswith("index"))
    target.view(-1)[index[0, :12]] = 1.0  # what is to be learned lies at the first 12 places
    x = torch.randn(64, 12)
    goal = x @ (base + target).t() + model[0].bias.detach()  # type: ignore[index]
    optimizer = torch.optim.Adam(peftfx.parameter_groups(model, lr=0.05))
    for _ in range(300):
        loss = (model(x) - goal).square().mean() + peftfx.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    first, second = model(x), model(x)
    assert torch.equal(first, second)  # gates are drawn in training alone
    assert (first - goal).square().mean() < 0.05 * (x @ target.t()).square().mean()
    peftfx.merge(model)
    changed = (model[0].weight != base).view(-1).nonzero().view(-1)  # type: ignore[index]
    assert len(changed) <= 12 and set(changed.tolist()) <= set(index[0].tolist())
    assert len(set(changed.tolist()) & set(index[0, :12].tolist())) >= 10


def test_said_moves_all_sites_along_one_vector() -> None:
    model = bind(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
                 {"method": "said", "name": "*", "dimension": 5, "scales": False},
                 example=(torch.ones(2, 4),))  # fmt: skip
    (vector,) = peftfx.parameters(model)
    assert vector.shape == (5,)
    base = [layer.weight.detach().clone() for layer in model]  # type: ignore[union-attr]
    fill([vector], scale=1.0)
    peftfx.merge(model)
    moves = [(a.weight - w).view(-1) for a, w in zip(model, base, strict=True)]  # type: ignore
    seeds = [entry_of(model, p).tensors()["seed"] for p in bound(model)[1].adapters["default"].plan]
    for move, seed in zip(moves, seeds, strict=True):
        want = torch.ops.peftfx.fastfood(vector, seed, len(move))
        assert torch.allclose(move, want, atol=1e-6)
    assert seeds[0] != seeds[1]


def test_a_scaled_embedding_merges_as_it_runs() -> None:
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(7, 5)
            self.embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    ids = torch.tensor([[1, 2, 3], [3, 6, 0]])
    for rule in ({"method": "lora", "rank": 2}, {"method": "dora", "rank": 2},
                 {"method": "tokens", "ids": [6, 3]}):  # fmt: skip
        model = bind(nn.Sequential(Scaled(), nn.Linear(5, 2)), {"name": "0", **rule},
                     example=(ids,))  # fmt: skip
        fill(peftfx.parameters(model), scale=0.5)
        out = model(ids)
        peftfx.merge(model)
        assert relative(model(ids), out) < 1e-5, rule


# -- training ------------------------------------------------------------------------------------


def test_frozen_a_is_kept_and_gets_no_gradient() -> None:
    model, x = llama()
    bind(model, {"method": "lora", "name": "*.q_proj", "rank": 3, "freeze_a": True})
    assert all(n.endswith(".B") for n, _ in peftfx.named_parameters(model))
    assert {k.rpartition(".")[2] for k in peftfx.state_dict(model)} == {"A", "B"}
    before = {k: v.clone() for k, v in peftfx.state_dict(model).items()}
    output(model, x).square().mean().backward()
    torch.optim.SGD(peftfx.parameters(model), lr=1.0).step()
    moved = {k.rpartition(".")[2] for k, v in peftfx.state_dict(model).items()
             if not torch.equal(v, before[k])}  # fmt: skip
    assert moved == {"B"}


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("names", [["0"], ["0", "1"]])
def test_frozen_a_does_not_keep_the_input(freeze_a: bool, names: list[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(50, 8))
            self.add_module("1", nn.Linear(50, 9))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([m(x) for m in self.children() if isinstance(m, nn.Linear)], -1)

    model, x = Two(), torch.randn(64, 50, requires_grad=True)
    backend = Backend(
        {"rules": [{"method": "lora", "name": names, "rank": 2, "freeze_a": freeze_a}]},
        "aot_eager",
    )
    backend.bind(model, (x,))
    fill(peftfx.parameters(model))
    sizes: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        sizes.add(t.untyped_storage().nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    out.square().sum().backward()
    assert (64 * 50 in sizes) == (not freeze_a)
    assert x.grad is not None
    got = x.grad.clone()
    x.grad = None
    model(x).square().sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-4)
