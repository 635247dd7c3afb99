"""The claims for GPUs: who takes a call and why, what it is said to cost, and that it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import dynamo
from peftfx.backends import Backend
from peftfx.errors import SpecError
from peftfx.kernels.devices import KNOWN, Device, assume, host
from peftfx.kernels.low_rank_linear.configs import Shape
from peftfx.kernels.measured import Table
from peftfx.passes.claims import CLAIMS, Claim, Definition, cost
from peftfx.passes.claims.kernels import Triton
from peftfx.passes.claims.library import Accumulate
from peftfx.passes.claims.measure import LLAMA_8B
from peftfx.passes.lower import Choice, LowerPass, chosen
from tests.helpers import relative

H200 = KNOWN["NVIDIA H200"]


class Net(nn.Module):
    """Three linears on one input and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16)
        self.o = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.k(x), self.v(x)], dim=-1)
        out: torch.Tensor = self.o(torch.tanh(self.q(x)) * both)
        return out


def train(claims: list[Claim], dropout: float) -> tuple[list[torch.Tensor], list[Choice], int]:
    """Outputs and gradients of three batches of different sizes, the choices, the compilations."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, choices, graphs = Net(), [], []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return dynamo.compile_aot(gm, inputs, LowerPass(claims, choices))

    spec = {"rules": [{"method": "lora", "name": "*", "rank": 3, "dropout": dropout}]}
    backend = Backend(spec, inner)
    backend.bind(model, (torch.randn(2, 24),))
    for p in peftfx.parameters(model):
        nn.init.normal_(p.data, std=0.3)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    found = []
    for rows in (3, 6, 66):
        torch.manual_seed(rows)
        x = torch.randn(rows, 24, requires_grad=True)
        y = compiled(x)
        y.square().mean().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad]
    grads = [p.grad for p in peftfx.parameters(model)]
    return found + [g for g in grads if g is not None], choices, len(graphs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("claim", [Triton(anywhere=True), Accumulate()])
def test_training_through_a_claim(
    claim: Claim, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's interpreter, and by the library's products: as by the definitions."""
    expected, _, _ = train([Definition()], dropout)
    monkeypatch.setenv("PEFTFX_FORMS", claim.name)
    got, choices, graphs = train([claim, Definition()], dropout)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-5
    assert graphs == 1  # for three numbers of rows
    taken = {c.op for c in choices if c.claim == claim.name}
    assert taken >= ({"low_rank_linear"} if dropout else {"low_rank_linear_group"})
    if claim.name == "triton":
        assert {c.claim for c in choices} == {"triton"}


def call(rows: int = 2048, k: int = 4096, n: int = 4096, **changes: Any) -> dict[str, Any]:
    """Fake operands of ``low_rank_linear`` on a GPU."""
    dtype = changes.pop("dtype", torch.bfloat16)
    with FakeTensorMode():
        made = {
            "x": torch.empty(rows, k, dtype=dtype, device="cuda"),
            "weight": torch.empty(n, k, dtype=dtype, device="cuda"),
            "bias": None,
            "A": torch.empty(16, k, device="cuda"),
            "B": torch.empty(n, 16, device="cuda"),
            "lora_bias": None,
            "scale": torch.empty(1, device="cuda"),
            "seed": None,
            "p": 0.0,
            "site": 0,
        }
        return {**made, **changes}


def ask(device: str = "NVIDIA H200", **changes: Any) -> tuple[str, dict[str, str]]:
    """The form that is taken for a call of ``low_rank_linear``, and why the others are not."""
    with assume(device):
        found = chosen(CLAIMS, "low_rank_linear", list(call(**changes).values()))
    return found.claim, dict(found.refusals)


def test_on_a_cpu() -> None:
    args = [torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(1, 4), torch.ones(3, 1), None,
            torch.ones(1), None, 0.0, 0]  # fmt: skip
    found = chosen(CLAIMS, "low_rank_linear", args)
    assert found.claim == "accumulate" and "rates assumed for a CPU" in found.cost
    assert dict(found.refusals)["triton"] == "it is for GPUs, and this is on cpu"
    assert [c.name for c in CLAIMS][-1] == "definition"


def test_refusals_say_why() -> None:
    form, why = ask(dtype=torch.float64)
    assert form == "accumulate" and why["triton"] == "there is no kernel for torch.float64"
    with FakeTensorMode():
        odd = torch.empty(4096, 4096, device="cuda")
    assert "the weight is torch.float32" in ask(weight=odd)[1]["triton"]


def test_no_gpu_no_kernel() -> None:
    reason = Triton().check("low_rank_linear", list(call().values()))
    assert reason == "no GPU is at hand for which there are kernels"


def test_break_even_is_where_arithmetic_puts_it() -> None:
    """A slower product costs more the deeper it is: few columns to Triton, many to the library."""
    assert ask(k=1024)[0] == "triton"
    form, why = ask(k=14336)
    assert form == "accumulate" and why["triton"].startswith("accumulate is predicted at ")
    assert ask(rows=8)[0] == "triton"  # one launch against three
    assert ask(k=14336, dtype=torch.float32)[0] == "accumulate"


def test_what_cannot_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cheapest form cannot take a call, the cheapest of the others does."""
    assert ask(k=1024)[0] == "triton"
    monkeypatch.setattr(Triton, "check", lambda *given: "not today")
    form, why = ask(k=1024)
    assert form == "accumulate" and why["triton"] == why["opaque"] == "not today"


def test_orders_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFX_FORMS", "opaque, low_rank_backward=triton")
    form, why = ask()
    assert form == "opaque" and why["triton"] == "PEFTFX_FORMS orders opaque"
    assert cost.forced("low_rank_backward") == "triton"
    assert ask(dtype=torch.float64)[0] == "accumulate"  # what is ordered cannot
    for wrong, name in (("trition", "triton"), ("low_rank_liner=triton", "low_rank_linear")):
        monkeypatch.setenv("PEFTFX_FORMS", wrong)
        with pytest.raises(SpecError, match=f"did you mean '{name}'"):
            cost.forced("low_rank_linear")
    monkeypatch.setenv("PEFTFX_DEVICE", "NVIDIA H20")
    with pytest.raises(SpecError, match="NVIDIA H200"):
        Triton().check("low_rank_linear", list(call().values()))


def test_measured_times_come_first(known: Any) -> None:
    """Of calls of which two forms were measured; the others stay with the arithmetic."""
    one, two = (cost.Call.of("low_rank_linear", list(call(k=k).values())) for k in (1024, 2048))
    known("NVIDIA H200", Table(
        {"tflops": 700, "tflops_tf32": 300, "tflops_fp32": 50, "gigabytes": 4000, "launch": 2.0,
         "triton": 0.9, "triton_fp32": 0.5},
        calls={one.key: {"opaque": 0.3, "triton": 0.5, "accumulate": 0.4}, two.key: {"triton": 1}},
    ))  # fmt: skip
    form, why = ask(k=1024)
    assert form == "opaque" and why["triton"] == "opaque is predicted at 0.300 ms, this at 0.500 ms"
    assert why["definition"] == "its time is not known here"
    assert cost.prices(one, H200)["triton"].source == "measured"
    assert cost.prices(two, H200)["triton"].source == "roofline, measured rates"


def test_rates_of_a_device_like_it() -> None:
    some = Device("NVIDIA GeForce RTX 4090", "sm_80", 128)
    found = cost.figures(some)
    assert found is not None and "assumed for NVIDIA A100" in found.source


def test_work_is_counted() -> None:
    """2·M·(N·K + R·K + N·R), and every operand once."""
    price = cost.least(cost.Call.of("low_rank_linear", list(call(2048, 1024, 512).values())))
    assert price.flops == 2 * 2048 * (512 * 1024 + 16 * 1024 + 512 * 16)
    assert price.bytes == 2 * (2048 * (1024 + 512 + 16) + 512 * 1024) + 4 * 16 * (1024 + 512)
    for device in (*KNOWN.values(), host()):
        found = cost.prices(cost.Call.of("low_rank_linear", list(call().values())), device)
        assert all(p.seconds and p.flops >= price.flops for p in found.values())
        third = "folded" if device.target == "cpu" else "triton"
        assert set(found) == {"definition", "accumulate", third}


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_few_rows_are_predicted_to_cost_what_merged_ones_do(rows: int) -> None:
    """The linears of a Llama-8B's layer, rank 16, in bf16: at most 1.05 of the frozen products."""
    rates, ours, frozen = cost.figures(H200), 0.0, 0.0
    assert rates is not None
    for k, outs in LLAMA_8B:
        shape = Shape(rows, k, sum(outs), 16 * len(outs), torch.bfloat16, len(outs))
        op = "low_rank_linear_group" if len(outs) > 1 else "low_rank_linear"
        found = cost.prices(cost.Call(op, shape, outs, (16,) * len(outs), True, 4), H200)
        best = min(found, key=lambda form: found[form].seconds or 0.0)
        assert best == "triton"
        ours += found[best].seconds or 0.0
        for n in outs:
            size = 2 * (rows * (n + k) + n * k)
            frozen += max(size / (rates.gigabytes * 1e9), 2e-12 * rows * n * k / rates.tflops)
            frozen += 1e-6 * rates.launch
    assert ours < 1.05 * frozen


def test_what_a_cache_gives_again_takes_time() -> None:
    assert cost.Part(0, 10).seconds(1.0, 5.0) == cost.Part(0, 10, 20).seconds(1.0, 5.0) == 2.0
    assert cost.Part(0, 10, 50).seconds(1.0, 5.0) == 60 / (5.0 * cost.CACHE)


def test_choices_tell_the_price() -> None:
    _, choices, _ = train([Definition()], 0.0)
    assert all("FLOP, " in str(c) and str(c).startswith(c.node) for c in choices)
