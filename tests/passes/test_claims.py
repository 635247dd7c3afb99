"""The claims for GPUs: who takes a call and why, what it is said to cost, and that it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import dynamo
from peftfx.backends import Backend
from peftfx.errors import SpecError
from peftfx.kernels.devices import KNOWN, assume
from peftfx.passes.claims import CLAIMS, Claim, Definition, cost
from peftfx.passes.claims.kernels import Triton
from peftfx.passes.claims.library import Accumulate
from peftfx.passes.lower import Choice, LowerPass
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
@pytest.mark.parametrize("claim", [Triton(anywhere=True), Accumulate(anywhere=True)])
def test_training_through_a_claim(claim: Claim, dropout: float) -> None:
    """By Triton's interpreter, and by the library's products: as by the definitions."""
    expected, _, _ = train([Definition()], dropout)
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


def ask(claim: Claim, op: str = "low_rank_linear", **changes: Any) -> str | None:
    with assume("NVIDIA H200"):
        return claim.check(op, list(call(**changes).values()))


def test_on_a_cpu() -> None:
    args = [torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(1, 4), torch.ones(3, 1), None,
            torch.ones(1), None, 0.0, 0]  # fmt: skip
    assert Triton().check("low_rank_linear", args) == "it is for GPUs, and this is on cpu"
    assert Accumulate().check("low_rank_linear", args) is None
    assert [c.name for c in CLAIMS][-1] == "definition"


def test_refusals_say_why() -> None:
    assert ask(Triton(), dtype=torch.float64) == "there is no kernel for torch.float64"
    with FakeTensorMode():
        odd = torch.empty(4096, 4096, device="cuda")
    assert "the weight is torch.float32" in (ask(Triton(), weight=odd) or "")


def test_no_gpu_no_kernel() -> None:
    assert Triton().check("low_rank_linear", list(call().values())) == "no GPU is at hand"


def test_break_even_is_where_arithmetic_puts_it() -> None:
    """A slower product costs more the deeper it is: few columns to Triton, many to the library."""
    assert ask(Triton(), k=1024) is None
    reason = ask(Triton(), k=14336)
    assert reason is not None and reason.startswith("accumulate is predicted at ")
    assert ask(Accumulate(), k=14336) is None
    assert "triton is predicted" in (ask(Accumulate(), k=1024) or "")
    assert ask(Triton(), rows=8) is None  # one launch against three


def test_orders_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate, low_rank_backward=triton")
    assert ask(Triton()) == "PEFTFX_FORMS orders accumulate"
    assert cost.forced("low_rank_backward") == "triton"
    for wrong, name in (("trition", "triton"), ("low_rank_liner=triton", "low_rank_linear")):
        monkeypatch.setenv("PEFTFX_FORMS", wrong)
        with pytest.raises(SpecError, match=f"did you mean '{name}'"):
            cost.forced("low_rank_linear")
    monkeypatch.setenv("PEFTFX_DEVICE", "NVIDIA H20")
    with pytest.raises(SpecError, match="NVIDIA H200"):
        Triton().check("low_rank_linear", list(call().values()))


def test_measured_times_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of calls whose every form was measured; the others stay with the arithmetic."""
    args = list(call(k=1024).values())
    known = cost.Call.of("low_rank_linear", args)
    table = {"figures": {"tflops": 700, "tflops_fp32": 50, "gigabytes": 4000, "launch": 2.0,
                         "triton": 0.9},
             "calls": {known.key: {"triton": 0.5, "accumulate": 0.4}}}  # fmt: skip
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(cost, "MEASURED", tmp_path)
    cost.table.cache_clear()
    try:
        assert ask(Triton(), k=1024) == "accumulate is predicted at 0.400 ms, this at 0.500 ms"
        assert cost.prices(known, H200)["triton"].source == "measured"
        other = cost.Call.of("low_rank_linear", list(call(k=2048).values()))
        assert cost.prices(other, H200)["triton"].source == "roofline, measured rates"
    finally:
        cost.table.cache_clear()


def test_shipped_tables_are_measurements() -> None:
    """Every table names the commit and the versions that it was measured with."""
    for path in cost.MEASURED.glob("*.json"):
        content = json.loads(path.read_text())
        assert set(content) == {"device", "commit", "torch", "triton", "figures", "calls"}


def test_work_is_counted() -> None:
    """2·M·(N·K + R·K + N·R), and every operand once."""
    price = cost.least(cost.Call.of("low_rank_linear", list(call(2048, 1024, 512).values())))
    assert price.flops == 2 * 2048 * (512 * 1024 + 16 * 1024 + 512 * 16)
    assert price.bytes == 2 * (2048 * (1024 + 512 + 16) + 512 * 1024) + 4 * 16 * (1024 + 512)
    for device in KNOWN.values():
        found = cost.prices(cost.Call.of("low_rank_linear", list(call().values())), device)
        assert all(p.seconds and p.flops >= price.flops for p in found.values())


def test_choices_tell_the_price() -> None:
    _, choices, _ = train([Definition()], 0.0)
    assert all("FLOP, " in str(c) and str(c).startswith(c.node) for c in choices)
