"""Methods beside each other: the examples' combinations on a BERT, and several at one site."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from peftfx.backends import Backend
from peftfx.binding import bound
from tests.architectures import by_name
from tests.helpers import fill, output, relative

SPECS = Path(__file__).resolve().parents[2] / "examples" / "specs"
HEAD = {("train", None): 4}  # pooler and classifier, weights and biases
# How many sites each method has in each layer, as the papers have it
S4: dict[tuple[str, int | None], int] = {
    **{("bottleneck", i): 1 for i in (0, 1, 2, 3, 4)},
    **{("lora", i): 2 for i in (0, 5)},
    **{("prefix", i): 1 for i in (1, 2, 3, 4, 5)},
    **{("bitfit", i): 8 for i in (3, 4, 5)},
}
COMBINED: dict[str, dict[tuple[str, int | None], int]] = {
    "mam": {(m, i): 1 for m in ("prefix", "bottleneck") for i in (0, 1)},
    "unipelt": {(m, i): n for m, n in (("prefix", 1), ("lora", 2), ("bottleneck", 1))
                for i in (0, 1)},
    "s4": S4,
    "sparse_adapter": {("bottleneck", i): 2 for i in (0, 1)},
    "ladder": {("ladder", i): 1 for i in (0, 1)},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("s4", "ladder") else []) for n in COMBINED],
)
def test_examples(name: str, tmp_path: Path) -> None:
    """Each acts where its paper says, in one graph, with the marks' gradients; it learns."""
    arch = by_name("bert")
    base, x = arch.build(num_hidden_layers=6 if name == "s4" else 2), arch.example()
    model = copy.deepcopy(base)
    backend = Backend(SPECS / f"{name}.yaml", "aot_eager")
    backend.bind(model)
    placed = Counter((p.method.name, p.site.layer) for p, _ in bound(model)[1].installed)
    assert placed == Counter({**COMBINED[name], **HEAD})

    optimizer = torch.optim.SGD(peftfx.parameter_groups(model, lr=1e-3))
    rates = {rule.rates.lr for rule in peftfx.Spec.load(SPECS / f"{name}.yaml").rules}
    assert {g["lr"] for g in optimizer.param_groups} == rates  # each rule has its own
    gates = [n for n, _ in peftfx.named_parameters(model) if n.endswith(".gate")]
    assert len(gates) == (8 if name == "unipelt" else 0)
    fill(peftfx.parameters(model), scale=0.3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    losses, grads = [], []
    for run in (model, compiled):
        out = output(run, x)
        losses.append(out)
        found = torch.autograd.grad(out.square().mean(), peftfx.parameters(model))
        grads.append(found)
    assert relative(losses[1], losses[0]) < 1e-5
    assert relative(losses[0], output(base, x)) > 1e-3
    largest = max(float(g.abs().max()) for g in grads[0])
    assert all(float((a - b).abs().max()) <= 1e-5 * largest for a, b in zip(*grads, strict=True))
    before = output(compiled, x).square().mean()
    before.backward()
    optimizer.step()
    assert output(compiled, x).square().mean() < before

    expected = output(model, x)
    peftfx.save(model, tmp_path)
    fresh = copy.deepcopy(base)
    peftfx.load(fresh, tmp_path, compile=False)
    assert relative(output(fresh, x), expected) < 1e-6
    peftfx.release(model)
    assert all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))


def test_a_sparse_adapter_trains_its_share() -> None:
    """Four times the width at a quarter of the entries: as many as the plain one's that count."""
    arch = by_name("bert")
    live = []
    for name in ("sparse_adapter", "bottleneck"):
        model = arch.build()
        Backend(SPECS / f"{name}.yaml", "eager").bind(model)
        state = peftfx.state_dict(model)
        maps = {k: t for k, t in state.items() if k.rpartition(".")[2] in ("down", "up")}
        live.append(sum(int(state.get(f"{k}_mask", torch.ones_like(t)).sum())
                        for k, t in maps.items()))  # fmt: skip
    assert live[0] == live[1]


def test_stacked_at_one_site() -> None:
    """A rule is given what those before it made; reversed, they are another model."""
    torch.manual_seed(0)
    base, x = nn.Linear(6, 9), torch.randn(2, 4, 6)
    rules: list[dict[str, Any]] = [
        {"method": "lora", "rank": 2, "alpha": 2.0},
        {"method": "ia3"},
        {"method": "bottleneck", "size": 3, "scale": 0.5},
        {"method": "reft", "rank": 2, "orthogonal": False, "subtract": False},
        {"method": "bitfit"},
    ]
    outs = []
    for order in (rules, rules[::-1]):
        model = nn.Sequential(copy.deepcopy(base))
        backend = Backend({"rules": [{**r, "name": "0"} for r in order]}, "aot_eager")
        backend.bind(model, (x,))
        fill(peftfx.parameters(model), scale=0.4)
        state = peftfx.state_dict(model)
        t = {".".join(k.rpartition(":")[2].split(".")): v for k, v in state.items()}
        y = x @ base.weight.T + t["bitfit.value"]
        for r in order:
            if r["method"] == "lora":
                y = y + x @ t["lora.A"].T @ t["lora.B"].T
            elif r["method"] == "ia3":
                y = y * t["ia3.l"].flatten()
            elif r["method"] == "bottleneck":
                p = {k.partition(".")[2]: v for k, v in t.items() if k.startswith("bottleneck")}
                inner = torch.relu(y @ p["down"].T + p["down_bias"])
                y = y + 0.5 * (inner @ p["up"].T + p["up_bias"])
            elif r["method"] == "reft":
                made = y @ t["reft.source"].T + t["reft.bias"]
                y = y + made @ t["reft.basis"]
        torch._dynamo.reset()
        for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
            assert relative(run(x), y) < 1e-5
        outs.append(y)
    assert relative(outs[0], outs[1]) > 1e-2
