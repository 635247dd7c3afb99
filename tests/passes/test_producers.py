"""What makes a value is recognised by what it computes: ways of writing norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftfx import dynamo
from peftfx.passes.producers import Producer, producer

K = 24


def traced(function: Callable[..., Tensor], inputs: list[Tensor], decomposed: bool) -> fx.Graph:
    """*function* in aten, with the values of nodes, as AOTAutograd hands it over."""
    table = dynamo.decompositions() if decomposed else {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t) for t in inputs]
    graph: fx.Graph = make_fx(function, decomposition_table=table)(*fakes).graph
    return graph


def found(
    function: Callable[..., Tensor], inputs: list[Tensor], decomposed: bool = True
) -> tuple[Producer | str, list[fx.Node]]:
    graph = traced(function, inputs, decomposed)
    (output,) = graph.find_nodes(op="output")
    result = output.args[0]
    return producer(result), graph.find_nodes(op="placeholder")


def module(made: nn.Module) -> Callable[..., Tensor]:
    """*made* with its parameters as arguments."""
    names = [n for n, _ in made.named_parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(made, dict(zip(names, given, strict=True)), (x,))
        return out

    return run


def by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A layer norm as it is in papers, in fp32."""
    wide = x.float()
    centred = wide - wide.sum(-1, keepdim=True) / K
    return (b + w * centred / torch.sqrt(1e-4 + (centred * centred).mean(-1, True))).to(x.dtype)


def viewed(x: Tensor, w: Tensor) -> Tensor:
    flat = x.reshape(-1, K)
    out = flat * (flat.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()
    return (out * w.view(1, K)).reshape(x.shape)


NORMS: dict[str, tuple[Callable[..., Tensor], int, tuple[Any, ...]]] = {
    # the function, its vectors, and (weight, shift, eps, offset, centred); vectors by number
    "llama": (module(LlamaRMSNorm(K, eps=1e-6)), 1, (1, None, 1e-6, 0.0, False)),
    "gemma": (module(Gemma2RMSNorm(K, eps=1e-5)), 1, (1, None, 1e-5, 1.0, False)),
    "t5": (module(T5LayerNorm(K, eps=1e-4)), 1, (1, None, 1e-4, 0.0, False)),
    "torch's rms norm": (module(nn.RMSNorm(K, eps=1e-3)), 1, (1, None, 1e-3, 0.0, False)),
    "torch's layer norm": (module(nn.LayerNorm(K, eps=1e-12)), 2, (1, 2, 1e-12, 0.0, True)),
    "no parameters": (lambda x: F.layer_norm(x, (K,), eps=1e-5), 0, (None, None, 1e-5, 0.0, True)),
    "no shift": (lambda x, w: F.layer_norm(x, (K,), w), 1, (1, None, 1e-5, 0.0, True)),
    "by hand": (by_hand, 2, (1, 2, 1e-4, 0.0, True)),
    "viewed": (viewed, 1, (1, None, 1e-3, 0.0, False)),
}


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(NORMS))
def test_norms(name: str, dtype: torch.dtype, decomposed: bool) -> None:
    function, count, (weight, shift, *rest) = NORMS[name]
    inputs = [torch.randn(2, 5, K).to(dtype), *(torch.randn(K).to(dtype) for _ in range(count))]
    made, given = found(function, inputs, decomposed)
    assert isinstance(made, Producer), made
    assert made.op == "norm_shrink" and made.sources == (given[0],)
    *vectors, eps, offset, centred = made.arguments
    assert eps == pytest.approx(rest[0]) and [offset, centred] == rest[1:]
    assert vectors == [None if i is None else given[i] for i in (weight, shift)]


GATES: dict[str, tuple[Callable[..., Tensor], str, tuple[int, ...]]] = {
    "swiglu": (lambda u, g: F.silu(g) * u, "silu", (1, 0)),
    "swiglu, sigmoid": (lambda g, u: u * (g * torch.sigmoid(g)), "silu", (0, 1)),
    "geglu": (lambda g, u: F.gelu(g) * u, "gelu", (0, 1)),
    "gelu": (lambda g: F.gelu(g), "gelu", (0,)),
    "gelu by erf": (lambda g: g * 0.5 * (1.0 + torch.erf(g / 2**0.5)), "gelu", (0,)),
    "gpt-2's": (ACT2FN["gelu_new"], "gelu_tanh", (0,)),
    "torch's tanh": (lambda g: F.gelu(g, approximate="tanh"), "gelu_tanh", (0,)),
    "clip's": (ACT2FN["quick_gelu"], "quick_gelu", (0,)),
    "relu": (torch.relu, "relu", (0,)),
    "squared": (lambda g: torch.relu(g).square(), "relu_squared", (0,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(GATES))
def test_gates(name: str, dtype: torch.dtype) -> None:
    function, act, order = GATES[name]
    inputs = [torch.randn(2, 5, K).to(dtype) for _ in order]
    for decomposed in (True, False):
        made, given = found(function, inputs, decomposed)
        assert isinstance(made, Producer), made
        assert made.op == "gate_shrink" and made.arguments == (act,)
        assert made.sources == tuple(given[i] for i in order)


@pytest.mark.parametrize(
    ("function", "count", "why"),
    [
        (lambda x: torch.special.i0(x) @ x[0].T, 1, "neither"),
        (lambda x: torch.cumsum(x, 1), 1, "which no loop over elements does"),
        (lambda x, y: F.silu(x) + y, 2, "neither a norm nor an activation"),
        (lambda x: F.elu(x), 1, "neither a norm nor an activation"),
        (lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-3), 1, "neither"),
        (lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5), 1, "makes it"),
        (lambda x: F.silu(x) * torch.rand_like(x).round(), 1, "neither"),
        (lambda x: F.layer_norm(x, (5, K)), 1, "neither"),
    ],
)
def test_what_is_neither(function: Callable[..., Tensor], count: int, why: str) -> None:
    made, _ = found(function, [torch.randn(2, 5, K) for _ in range(count)])
    assert isinstance(made, str) and why in made


def test_the_nearest_source_is_taken() -> None:
    """A norm of a sum is one of the sum; statistics are known by their values."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        return F.layer_norm(torch.tanh(x) + y, (K,))

    made, _ = found(run, [torch.randn(2, 5, K) for _ in range(2)])
    assert isinstance(made, Producer) and made.sources[0].target is torch.ops.aten.add.Tensor
    assert sorted(set(made.statistics.values())) == ["mean", "rstd"]
