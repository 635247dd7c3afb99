"""What Inductor's loops beside the products move on a GPU, where there is none: ``python -m …``.

Prints JSON: the bytes of each loop of a Llama-8B's layer, forward and backward in one graph, frozen
and with the rules below. Every operand of a loop counts once. Nothing is run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.models import LLAMA_8B, Layer
from peftfx import dynamo
from peftfx.backends import Backend
from peftfx.kernels.devices import assume
from peftfx.passes.claims import INDUCTOR_CLAIMS
from peftfx.passes.lower import LowerPass
from tests.kernels.inductor_without_gpu import pretend

ROWS = 8192
RULES: dict[str, dict[str, Any] | None] = {
    "frozen": None,
    "lora": {"method": "lora", "name": "*linears*", "rank": 16},
    "dora": {"method": "dora", "name": "*linears*", "rank": 16},
    "ia3": {
        "method": "ia3", "name": ["qkv.linears.1", "qkv.linears.2", "down.linears.0"],
        "overrides": [{"name": "down.linears.0", "at": "input"}],
    },
}  # fmt: skip
Graph = tuple[fx.GraphModule, list[Tensor]]


def adapted(rule: dict[str, Any] | None) -> Graph:
    """The layer as the inner compiler gets it, and its inputs."""
    found: list[Graph] = []

    def note(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append((gm, inputs))
        return lambda *given: (given[0].new_empty(()),)  # nobody asks for the layer's result

    torch._dynamo.reset()
    model = Layer(LLAMA_8B, ROWS).bfloat16().requires_grad_(False)
    x = torch.randn(1, ROWS, LLAMA_8B.hidden, dtype=torch.bfloat16, requires_grad=True)
    backend: Any = note
    if rule is not None:
        backend = Backend({"rules": [rule]}, note)
        backend.bind(model, (x,))
    torch.compile(model, backend=backend, fullgraph=True)(x)
    (graph,) = found
    return graph


def both_directions(gm: fx.GraphModule) -> Callable[..., Any]:
    def run(dy: Tensor, *given: Tensor) -> Any:
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in given]
        (y,) = gm(*inputs)
        y = y * y  # so that nothing of the backward can be made before the forward is through
        return y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)

    return run


def loops(rule: dict[str, Any] | None) -> list[int]:
    """The bytes of each loop."""
    gm, given = adapted(rule)
    mode = FakeTensorMode()
    with mode:  # autograd knows no pretended device: its graph is made on the CPU
        here = [mode.from_tensor(t) for t in (given[0], *given)]
        joint = make_fx(both_directions(gm))(*here)
        there = [torch.empty_like(t, device="cuda") for t in here]
    for node in joint.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    joint.recompile()
    table = {  # torch's own of ops in place copy, and there is nothing to copy to
        op: f for op, f in dynamo.decompositions().items()
        if not getattr(getattr(op, "_schema", None), "is_mutable", False)
    }  # fmt: skip
    with mode, assume("NVIDIA H200"), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        joint = make_fx(joint, decomposition_table=table)(*there)
        lower = LowerPass(INDUCTOR_CLAIMS)
        with config.patch(post_grad_custom_pre_pass=lower, compile_threads=1, fx_graph_cache=False):
            post_grad_passes(joint, is_inference=True)
            graph = GraphLowering(joint, example_inputs=there)
            with V.set_graph_handler(graph):
                graph.run(*there)
                code = graph.codegen()[0].value
    known = {**graph.graph_inputs, **graph.name_to_buffer}
    found = []
    for operands in re.findall(r"triton_\w+\.run\((.*?), stream", code):
        tensors = [known[name] for name in operands.split(", ") if name in known]
        found.append(sum(math.prod(t.get_size()) * t.get_dtype().itemsize for t in tensors))
    return [int(size) for size in found]


if __name__ == "__main__":
    pretend()
    os.environ["PEFTFX_FORMS"] = "accumulate,low_rank_norms=triton"
    print(json.dumps({name: loops(rule) for name, rule in RULES.items()}))
