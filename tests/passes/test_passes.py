"""The passes and their engine, on graphs that Dynamo traced and on torch.fx's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import peftfx
from peftfx import engine
from peftfx.backends import Backend
from peftfx.errors import BindError, GraphError, NotAdaptedError, SpecError
from peftfx.passes import JOINT, PARTS, PIPELINE
from tests.helpers import fill, relative

SPEC: dict[str, Any] = {
    "rules": [{"method": "lora", "name": ["q", "k", "v", "out", "emb", "conv"], "rank": 2}]
}


class Net(nn.Module):
    """Three linears on one input, one on another, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.q, self.k = nn.Linear(8, 5), nn.Linear(8, 5, bias=False)
        self.v, self.out = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1)
        return self.out(weights @ self.v(x))


IDS = torch.tensor([[1, 4, 8, 2], [3, 3, 0, 7]])


def compiled(
    spec: Any = None, train: bool = True, change: Callable[[nn.Module], None] | None = None
) -> tuple[Backend, nn.Module, Tensor]:
    model = Net().train(train)
    if change is not None:
        change(model)
    backend = Backend(spec or SPEC, "eager")
    backend.snapshots = True
    backend.bind(model, (IDS,))
    fill(peftfx.parameters(model))
    out = torch.compile(model, backend=backend, fullgraph=True)(IDS)
    return backend, model, out


def counts(backend: Backend) -> dict[str, int]:
    return {s.name: s.rewrites for s in backend.reports[-1].steps}


def test_pipeline_reads_top_to_bottom() -> None:
    names = ["freeze", "attend", "insert", "fuse", "chunk", "group", "clean"]
    assert [p.name for p in PIPELINE] == names and [p.name for p in JOINT] == ["recompute"]
    assert [p.name for p in PARTS] == ["absorb"]
    backend, model, out = compiled()
    assert counts(backend) == dict(zip(names, (0, 0, 6, 4, 0, 1, 0), strict=True))
    assert relative(out, model(IDS)) < 1e-5


def test_snapshots_are_python_with_provenance() -> None:
    backend, _, _ = compiled()
    by_name = {s.name: s.snapshot or "" for s in backend.reports[-1].steps}
    assert "peftfx.site" in by_name["freeze"] and "peftfx.site" not in by_name["insert"]
    assert "low_rank_linear_group" in by_name["group"]
    assert "# pass=insert rule=0" in by_name["insert"] and "site=out.weight" in by_name["insert"]
    for text in by_name.values():
        compile(text, "<snapshot>", "exec")


def test_dropout_keeps_masks_apart() -> None:
    spec = {"rules": [{**SPEC["rules"][0], "dropout": 0.3}]}
    backend, _, _ = compiled(spec)
    step = next(s for s in backend.reports[-1].steps if s.name == "group")
    assert step.rewrites == 0
    assert {r.reason for r in step.refusals} == {"dropout: each site has a mask of its own"}
    text = backend.reports[-1].steps[-1].snapshot or ""
    assert text.count("torch.randint") == 1  # one draw for the whole graph
    backend, _, _ = compiled(spec, train=False)
    assert counts(backend)["group"] == 1


def test_fuse_says_why_not() -> None:
    spec = {"rules": [{"method": "lora", "name": ["q", "k"], "rank": 2},
                      {"method": "train", "name": "q.weight"}]}  # fmt: skip
    backend, _, _ = compiled(spec)
    step = next(s for s in backend.reports[-1].steps if s.name == "fuse")
    assert step.rewrites == 1 and [r.reason for r in step.refusals] == ["the weight trains"]


def test_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, whole = compiled()
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setenv("PEFTFX_SKIP", "group, fuse")
    backend, _, out = compiled()
    assert counts(backend)["fuse"] == counts(backend)["group"] == 0
    assert out.shape == whole.shape
    torch._dynamo.reset()
    monkeypatch.setenv("PEFTFX_SKIP", "insert")
    with pytest.raises(SpecError, match="cannot be skipped"):
        compiled()


def test_bisect_names_the_culprit() -> None:
    tried = []

    def works(skip: frozenset[str]) -> bool:
        tried.append(skip)
        return "group" in skip

    assert engine.bisect(works, PIPELINE) == "group"
    assert engine.bisect(lambda skip: True, PIPELINE) is None
    assert engine.bisect(lambda skip: False, PIPELINE) is None


@dataclass(frozen=True)
class Broken:
    """A pass that does *what* to a graph."""

    what: Callable[[fx.GraphModule], None]
    name: str = "broken"
    optional: bool = True

    def __call__(self, gm: fx.GraphModule, context: engine.Context) -> int:
        self.what(gm)
        return 1

    def check(self, gm: fx.GraphModule) -> str | None:
        return "not legal" if any(n.target is torch.sin for n in gm.graph.nodes) else None


def _fails(gm: fx.GraphModule) -> None:
    raise KeyError("no")


def _drops_output(gm: fx.GraphModule) -> None:
    output = next(iter(gm.graph.find_nodes(op="output")))
    output.args = (None,)


def _disorders(gm: fx.GraphModule) -> None:
    first, second = [n for n in gm.graph.nodes if n.op == "call_function"][:2]
    second.append(first)


def _illegal(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    with gm.graph.inserting_after(node):
        gm.graph.call_function(torch.sin, (node,))


@pytest.mark.parametrize("what", [_fails, _drops_output, _disorders, _illegal])
def test_engine_holds_passes_to_the_rules(what: Any) -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(torch.tanh(x)))
    with pytest.raises(GraphError, match="broken"):
        engine.run(gm, [Broken(what)])


def test_every_pass_is_idempotent_and_leaves_others_alone() -> None:
    gm = fx.symbolic_trace(Net())
    before = gm.code
    engine.run(gm, PIPELINE)
    assert gm.code == before
    rewritten = peftfx.rewrite(gm, SPEC)
    code = rewritten.code
    report = engine.run(rewritten, PIPELINE)
    assert rewritten.code == code and not any(s.rewrites for s in report.steps)
    assert gm.code == before


def test_nested_graphs() -> None:
    from torch.utils.checkpoint import checkpoint

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(self.net, x, use_reentrant=False)

    model, x = Nested(), torch.randn(3, 4)
    backend = Backend({"rules": [{"method": "lora", "name": "net.*", "rank": 2}]}, "aot_eager")
    backend.bind(model, (x,))
    fill(peftfx.parameters(model))
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert relative(out, model(x)) < 1e-5
    assert counts(backend)["insert"] == 2
    out.sum().backward()
    assert all(p.grad is not None for p in peftfx.parameters(model))


def test_freeze_notices_what_thaws() -> None:
    model = Net()
    backend = Backend(SPEC, "eager")
    backend.bind(model, (IDS,))
    model.q.weight.requires_grad_(True)
    with pytest.raises(NotAdaptedError, match="requires a gradient"):
        torch.compile(model, backend=backend)(IDS)


@pytest.mark.parametrize("form", ["fx", "export"])
def test_rewrite(form: str) -> None:
    base = Net().eval()
    target = fx.symbolic_trace(base) if form == "fx" else torch.export.export(base, (IDS,))
    gm = peftfx.rewrite(target, SPEC)
    assert torch.allclose(gm(IDS), base(IDS), atol=1e-6)
    fill(peftfx.parameters(gm))
    model = copy.deepcopy(base)
    Backend(SPEC, "eager").bind(model, (IDS,))
    peftfx.load_state_dict(model, peftfx.state_dict(gm))
    assert relative(gm(IDS), model(IDS)) < 1e-5
    gm(IDS).square().mean().backward()
    trained = {id(p) for p in peftfx.parameters(gm)}
    assert all((p.grad is not None) == (id(p) in trained) for p in gm.parameters())
    targets = {str(n.target) for n in gm.graph.nodes}
    assert "peftfx.low_rank_linear_group.default" in targets
    assert not any("site" in t for t in targets)
    for switch in (peftfx.merge, peftfx.release, lambda m: peftfx.activate(m, "default")):
        with pytest.raises(BindError, match="built in"):
            switch(gm)
    with pytest.raises(BindError, match="built in"), peftfx.disabled(gm):
        pass
