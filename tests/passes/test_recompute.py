"""What the backward keeps: counted in the partitioned graph, against the least it could."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftfx
from peftfx import dynamo, engine
from peftfx.passes import JOINT
from peftfx.passes.recompute import Recompute
from tests.helpers import fill, relative

WIDTH, LAYERS, TOKENS, RANK = 256, 3, 16, 1
SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Values of 16 bits that a token keeps in a layer, in widths of the residual stream, for the shapes
# of Llama-3 8B: both residuals, q, k and v of a quarter, what attention gives, gate and up.
FLOOR = 1 + 1 + (1 + 1 / 4 + 1 / 4) + 1 + 2 * 3.5


def llama() -> nn.Module:
    """Llama-3 8B's proportions: feed-forward 3.5 widths, four queries to a key."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).to(torch.bfloat16)


class Kept:
    """A compiler that runs nothing but counts what the forward hands to the backward, in bytes."""

    def __init__(self, joint: engine.GraphPasses | None) -> None:
        self.joint, self.bytes = joint, 0

    def __call__(self, gm: Any, inputs: Any, **options: Any) -> Any:
        graphs: list[torch.fx.Graph] = []
        compiled = dynamo.compile_aot(gm, inputs, graphs.append, self.joint)

        def run(*args: Any) -> Any:
            out = compiled(*args)
            if not self.bytes:
                self.bytes = self._count(graphs[0])
            return out

        return run

    def _count(self, forward: torch.fx.Graph) -> int:
        (output,) = forward.find_nodes(op="output")
        kept, storages = 0, set()
        for node in output.args[0][1:]:  # the first is the model's own
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
            if not isinstance(value, Tensor) or node.op == "placeholder":
                continue
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                storages.add(storage._cdata)
                kept += storage.nbytes()
        return kept


def kept(model: nn.Module, compiler: Any) -> float:
    """Widths of the residual stream that a token keeps in a layer."""
    compiled = torch.compile(model, backend=compiler)
    out = compiled(input_ids=torch.randint(0, 64, (1, TOKENS))).last_hidden_state
    out.float().square().mean().backward()
    counter = compiler.lower if isinstance(compiler, peftfx.Backend) else compiler
    return counter.bytes / 2 / WIDTH / TOKENS / LAYERS


def ours(joint: engine.GraphPasses | None) -> float:
    model = llama()
    spec = {"rules": [{"method": "lora", "name": [f"*.{s}" for s in SITES], "rank": RANK}]}
    backend = peftfx.backend(spec, lower=Kept(joint))
    backend.bind(model, {"input_ids": torch.ones(1, TOKENS, dtype=torch.int64)})
    return kept(model, backend)


def test_near_the_floor() -> None:
    """At most 1.15 of what cannot be made again, and 0.9 of what PEFT keeps under torch.compile."""
    config = peft.LoraConfig(r=RANK, target_modules=SITES)
    theirs = kept(peft.get_peft_model(llama(), config), Kept(None))
    torch._dynamo.reset()
    without = ours(None)
    torch._dynamo.reset()
    found = ours(engine.GraphPasses(JOINT, engine.Report()))
    assert FLOOR <= found <= 1.15 * FLOOR
    assert found < 0.7 * without and found < 0.9 * theirs


class Layer(nn.Module):
    """A norm, a gated feed-forward and a residual; what follows is named by *tail*."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.gate, self.up = nn.Linear(12, 20), nn.Linear(12, 20)
        self.down, self.last = nn.Linear(20, 12), nn.Linear(12, 5)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        if self.tail == "dropout":
            x = F.dropout(x, 0.5, training=True)
        if self.tail == "spread":
            x = x.mean(0, keepdim=True).expand(3, 7, 12)
        return self.last(torch.tanh(x))


@pytest.mark.parametrize("lower", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tail", ["", "dropout", "spread"])
def test_changes_no_gradient(tail: str, lower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, marked = [], []
    for skip in ("recompute", ""):
        monkeypatch.setenv("PEFTFX_SKIP", skip)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Layer(tail), torch.randn(3, 7, 12)
        backend = peftfx.backend({"rules": [{"method": "lora", "name": "*", "rank": 2,
                                             "except": "norm"}]}, lower)  # fmt: skip
        backend.bind(model, (x,))
        backend.snapshots = True  # or a cached graph tells nothing
        fill(peftfx.parameters(model))
        torch.manual_seed(1)
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in peftfx.parameters(model))])
        marked.append(sum(s.rewrites for s in backend.reports[-1].steps if s.name == "recompute"))
    assert marked[0] == 0 < marked[1]
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and relative(a, b) < 1e-5


def test_what_the_user_checkpoints_is_left() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("primals_1")
    y = graph.call_function(torch.ops.aten.tanh.default, (x,))
    tangent = graph.placeholder("tangents_1")
    out = graph.call_function(torch.ops.aten.mm.default, (tangent, y))
    graph.output((y, out))
    for node in (x, y, tangent, out):
        node.meta["val"] = torch.ones(4, 4)
    assert Recompute()(graph, engine.Step("recompute")) == 1 and "recompute" in y.meta
    assert Recompute()(graph, engine.Step("recompute")) == 0  # it has tags now: somebody has chosen
