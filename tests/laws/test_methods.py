"""What holds for every method of the table: training in one graph, files, mixes, low precision."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx.backends import Backend
from peftfx.errors import MergeError, PlanError
from peftfx.methods import lookup, names
from tests.helpers import fill, relative
from tests.methods import ELSEWHERE, ROWS, Row
from tests.soft_prompts import CONFIGS

EVERY = pytest.mark.parametrize("row", ROWS, ids=str)
# compiling takes seconds: one row for each method, the others with the slow tests
FIRST = {r.method: r.id for r in reversed(ROWS)}
COMPILED = [
    pytest.param(r, id=str(r), marks=[] if FIRST[r.method] == r.id else [pytest.mark.sweep])
    for r in ROWS
]


def test_every_method_has_a_row() -> None:
    """Methods without a local form have laws of their own, and say so by what they act on."""
    far = {n for n in names() if lookup(n).acts in ("attention", "tokens")}
    assert far == set(CONFIGS)  # tests/e2e/test_soft_prompts.py runs over these
    assert set(names()) - far == {row.method for row in ROWS} | ELSEWHERE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Checkpointed blocks between an embedding and a head; rows find what they act at."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.head(x)


def made(row: Row, lower: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Backend]:
    torch.manual_seed(0)
    base = Net().eval().to(dtype)
    model = copy.deepcopy(base)
    backend = Backend({"rules": [row.rule()]}, lower)
    backend.bind(model, (IDS,))
    return base, model, backend


def shake(row: Row, model: nn.Module, seed: int = 0) -> None:
    fill(peftfx.parameters(model), seed, scale=0.3)
    with torch.no_grad():
        for name, p in peftfx.named_parameters(model):
            if name.rpartition(".")[2] in row.near_one:
                p.add_(1.0)


IDS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 3, 1, 1]])
LABELS = torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, 0, 2]])


def loss_of(out: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.flatten(0, 1).float(), LABELS.flatten())


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in peftfx.named_parameters(model) if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def trains(row: Row, lower: str) -> None:
    """One full graph, through checkpoints, with the marks' gradients; then it learns."""
    _, model, backend = made(row, lower)
    shake(row, model)
    model.eval()
    loss_of(model(IDS)).backward()
    eager = grads(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss_of(compiled(IDS)).backward()
    largest = max(float(g.abs().max()) for g in eager.values())
    found = grads(model)
    assert found.keys() == eager.keys() == {n for n, _ in peftfx.named_parameters(model)}
    assert all(float((found[n] - eager[n]).abs().max()) <= 1e-5 * largest for n in eager)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative(compiled(IDS), model(IDS)) < 3e-2
    model.train()
    optimizer = torch.optim.Adam(peftfx.parameter_groups(model, lr=2e-2))
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(compiled(IDS)) + peftfx.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    steps = [s for r in backend.reports for s in r.steps if s.name != "recompute"]  # of any model
    rewrites = sum(s.rewrites for s in steps)
    assert (rewrites > 0) == (lookup(row.method).acts != "parameter")


@pytest.mark.parametrize("row", COMPILED)
def test_trains_in_one_graph(row: Row) -> None:
    trains(row, "aot_eager")


@pytest.mark.sweep
@EVERY
def test_trains_through_inductor(row: Row) -> None:
    trains(row, "inductor")


@EVERY
def test_files_are_lossless(row: Row, tmp_path: Path) -> None:
    base, model, _ = made(row, "eager")
    assert relative(model(IDS), base(IDS)) <= row.start
    shake(row, model)
    expected = model(IDS)
    assert relative(expected, base(IDS)) > 1e-3
    for format in ("peftfx", "auto"):
        peftfx.save(model, tmp_path / format, format=format)  # type: ignore[arg-type]
        fresh = copy.deepcopy(base)
        peftfx.load(fresh, tmp_path / format, compile=False, example=(IDS,))
        assert torch.equal(fresh(IDS), expected)
        before, after = peftfx.state_dict(model), peftfx.state_dict(fresh)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    shake(row, model, seed=5)
    model.load_state_dict(state)
    assert torch.equal(model(IDS), expected)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    with peftfx.disabled(model):
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), expected)
    peftfx.release(model)
    assert torch.equal(model(IDS), base(IDS))
    assert model.state_dict().keys() == base.state_dict().keys()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters as they are while the adapter is merged."""
    peftfx.merge(model)
    found = {k: v.clone() for k, v in model.state_dict().items() if "peftfx" not in k}
    peftfx.unmerge(model)
    return found


AT_LINEARS = [r for r in ROWS if not r.merges and "role" not in r.options]


@pytest.mark.parametrize("row", AT_LINEARS, ids=str)
def test_mixes_without_weights_to_sum(row: Row) -> None:
    """Two adapters at one linear add up there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(2, 4, 6)
    peftfx.adapt(model, {"rules": [row.rule()]}, (x,), lower="eager")
    with peftfx.disabled(model):
        base = model(x)
    shake(row, model, 1)
    first = model(x)
    peftfx.add(model, {"rules": [row.rule()]}, "b", (x,))
    peftfx.activate(model, "b")
    shake(row, model, 2)
    second = model(x)
    if not row.mixes:
        with pytest.raises(MergeError):
            peftfx.activate(model, {"default": 0.7, "b": -0.4})
        return
    peftfx.activate(model, {"default": 0.7, "b": -0.4})
    assert relative(model(x), base + 0.7 * (first - base) - 0.4 * (second - base)) < 1e-5


@pytest.mark.parametrize("row", [r for r in ROWS if r.merges], ids=str)
def test_mixes_are_sums_of_updates(row: Row) -> None:
    base, model, _ = made(row, "eager")
    shake(row, model, 1)
    first = weights(model)
    peftfx.add(model, {"rules": [row.rule()]}, "b", (IDS,))
    peftfx.activate(model, "b")
    shake(row, model, 2)
    second = weights(model)
    if not row.mixes:
        with pytest.raises(MergeError):
            peftfx.activate(model, {"default": 0.7, "b": -0.4})
        return
    peftfx.activate(model, {"default": 0.7, "b": -0.4})
    mixed = copy.deepcopy(base)
    start = base.state_dict()
    mixed.load_state_dict(
        {k: w + 0.7 * (first[k] - w) - 0.4 * (second[k] - w) for k, w in start.items()}
    )
    assert relative(model(IDS), mixed(IDS)) < 1e-5


@EVERY
def test_low_precision(row: Row) -> None:
    """On a bf16 base: as near to fp32 as its 8 bits allow, and adapters are fp32."""
    base, model, _ = made(row, "eager", torch.bfloat16)
    shake(row, model)
    exact = Net().eval()
    exact.load_state_dict(base.state_dict())
    Backend({"rules": [row.rule()]}, "eager").bind(exact, (IDS,))
    peftfx.load_state_dict(
        exact, {k: v.float() if v.is_floating_point() else v for k, v in
                peftfx.state_dict(model).items()}
    )  # fmt: skip
    got, want = model(IDS), exact(IDS)
    assert got.dtype == torch.bfloat16
    error = (got.double() - want.double()).square().mean().sqrt()
    assert (error / want.double().square().mean().sqrt()).item() < 3e-2
    if lookup(row.method).acts != "parameter":
        assert all(p.dtype == torch.float32 for p in peftfx.parameters(model))
    with peftfx.disabled(model):
        assert torch.equal(model(IDS), base(IDS))


CONVOLUTIONS = [
    r
    for r in ROWS
    if "conv2d" in lookup(r.method).kinds
    and r.options.get("init", "gaussian") == "gaussian"  # other starts are for linears
    and "gate" not in r.options  # as are gates
]


@settings(max_examples=50)
@pytest.mark.parametrize("row", CONVOLUTIONS, ids=str)
@given(
    axes=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]),
    bias=st.booleans(), tucker=st.booleans(), spare=st.integers(0, 1),
)  # fmt: skip
def test_convolutions_merge_as_they_run(
    row: Row, axes: int, kernel: int, stride: int, padding: int, dilation: int, groups: int,
    bias: bool, tucker: bool, spare: int,
) -> None:  # fmt: skip
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    size = (kernel, *(kernel + spare,) * (axes - 1))
    conv = kind(6, 8, size, stride, padding, dilation, groups, bias)  # type: ignore[arg-type]
    rule = row.rule(name="*")
    if tucker and "tucker" in {f.name for f in dataclasses.fields(lookup(row.method))}:
        rule["tucker"] = True
    model, x = nn.Sequential(conv), torch.randn(2, 6, *(9,) * axes)
    try:
        Backend({"rules": [rule]}, "eager").bind(model, (x,))
    except PlanError:
        assert groups > 1 or f"conv{axes}d" not in lookup(row.method).kinds
        return
    base = model(x)
    shake(row, model)
    out = model(x)
    assert out.shape == base.shape and relative(out, base) > 1e-4
    try:
        peftfx.merge(model)
    except MergeError:
        assert groups > 1 or (row.options.get("bias") and not bias)
        return
    assert relative(model(x), out) < 2e-5
