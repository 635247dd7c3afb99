"""Kernels of one launch, against fp64: by Triton's interpreter here, for real under ``-m gpu``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import dynamo
from peftfx.backends import Backend
from peftfx.kernels.bottleneck.op import ACTIVATIONS, GRADIENTS
from peftfx.kernels.devices import assume
from peftfx.kernels.fused import FORMS, compute
from peftfx.kernels.low_rank_linear.forms import OPAQUE
from peftfx.passes.claims import CLAIMS, Claim, Definition
from peftfx.passes.claims.fused import Fused
from peftfx.passes.lower import Choice, LowerPass, chosen
from tests.helpers import relative
from tests.kernels.low_rank_cases import BOUND, DEVICES, distance, poisoned

OPS = torch.ops.peftfx
SMALL = st.integers(1, 40)
KINDS = st.sampled_from(list(BOUND))


def drawn(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


# -- norms ---------------------------------------------------------------------------------------


def norms(n: int, k: int, r: int, dtype: torch.dtype, turned: bool, device: str) -> None:
    weight, a, b = drawn((n, k), (r, k), (n, r), dtype=torch.float32)
    weight = (weight.to(dtype).t().contiguous().t() if turned else weight.to(dtype)).to(device)
    args = (weight, a.to(device), b.to(device), torch.tensor([0.7], device=device))
    with poisoned():
        got = compute("low_rank_norms", args)
    assert got.dtype == torch.float32 and got.shape == (n,)
    want = (weight.double() + 0.7 * args[2].double() @ args[1].double()).norm(dim=1)
    assert distance(got, want) < BOUND[dtype]
    assert distance(OPS.low_rank_norms(*args), want) < BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(n=SMALL, k=st.integers(1, 200), r=st.integers(1, 20), dtype=KINDS, turned=st.booleans())
def test_norms(device: str, n: int, k: int, r: int, dtype: torch.dtype, turned: bool) -> None:
    norms(n, k, r, dtype, turned, device)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1024, 4096, 14336])
def test_norms_of_real_sizes(n: int) -> None:
    norms(n, 4096, 16, torch.bfloat16, False, "cuda")


def test_norms_have_no_gradient_and_no_rounding_below_zero() -> None:
    """W + s·B·A = 0 has length 0, and not that of a negative number's root."""
    a, b = drawn((1, 5), (3, 1), dtype=torch.float32)
    a.requires_grad_()
    weight = -(b @ a).detach()
    for found in (OPS.low_rank_norms(weight, a, b, torch.ones(1)),
                  compute("low_rank_norms", (weight, a, b, torch.ones(1)))):  # fmt: skip
        assert found.abs().max() < 1e-2
    assert not OPS.low_rank_norms(weight, a, b, torch.ones(1)).requires_grad


# -- bottlenecks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes: rows, widths of y, of h (0: h is y), and of the bottleneck."""

    m: int = 37
    n: int = 24
    k: int = 0
    c: int = 5
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    device: str = "cpu"

    def operands(self) -> list[Any]:
        """y, h, D, d, U, u, s in fp64, their values as the kernels see them."""
        n, k, c = self.n, self.k or self.n, self.c
        y, h, up, down, ub, db = drawn((self.m, n), (self.m, k), (n, c), (c, k), (n,), (c,))
        wide = [t.to(self.dtype).double() for t in (y, h, down / k**0.5, db, up / c**0.5, ub)]
        return [wide[0], wide[1] if self.k else None, *wide[2:], torch.tensor([0.5]).double()]


def agree(case: Case) -> None:
    """Forward and backward of definition and kernel are those of plain torch in fp64."""
    wide = [t if t is None else t.requires_grad_() for t in case.operands()]
    y, h, down, db, up, ub, s = wide
    inner = ACTIVATIONS[case.activation](nn.functional.linear(y if h is None else h, down, db))
    want = y + s * nn.functional.linear(inner, up, ub)
    (dy,) = drawn((case.m, case.n), seed=1)
    dy = dy.to(case.dtype)
    leaves = [t for t in wide if t is not None]
    grads = list(torch.autograd.grad(want, leaves, dy.double()))
    into = [grads.pop(0)] if h is None else [grads.pop(0), grads.pop(0)]

    def narrow(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if t is None else t.detach().to(dtype).to(case.device)

    given_ = [narrow(t, case.dtype) for t in (y, h)] + [narrow(t, torch.float32) for t in wide[2:]]
    held = given_[0] if h is None else given_[1]
    back = (dy.to(case.device), held, *given_[2:], case.activation, h is None, [True] * 3)
    for run in (compute, lambda name, args: getattr(OPS, name)(*args)):
        with poisoned():
            got = run("bottleneck", (*given_, case.activation))
            found = run("bottleneck_backward", back)
        assert got.dtype == case.dtype and distance(got, want) < 2 * BOUND[case.dtype]
        for one, other in zip(found, [into[-1], *grads], strict=True):
            # a sum of few terms may be nearly nothing
            size = max(float(other.norm()), 0.1 * other.numel() ** 0.5)
            off = float((one.double().cpu() - other).norm()) / size
            assert off < 4 * BOUND[case.dtype], (case, one.shape, off)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12)
@given(m=st.integers(1, 70), n=SMALL, k=st.integers(0, 40), c=st.integers(1, 20), dtype=KINDS)
def test_bottlenecks(device: str, m: int, n: int, k: int, c: int, dtype: torch.dtype) -> None:
    agree(Case(m, n, k, c, dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation(device: str, activation: str) -> None:
    agree(Case(9, 12, 7, 6, activation=activation, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(BOUND))
def test_several_steps_and_programs(device: str, dtype: torch.dtype) -> None:
    agree(Case(130, 70, 0, 33, dtype, device=device))
    agree(Case(33, 70, 130, 128 if dtype.itemsize == 2 else 64, dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2048, 8192])
@pytest.mark.parametrize("c", [64, 128])
def test_bottlenecks_of_real_sizes(m: int, c: int) -> None:
    agree(Case(m, 4096, 0, c, torch.bfloat16, device="cuda"))


def test_gradients_of_activations() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    x = x[x != 0].requires_grad_()
    for name, f in ACTIVATIONS.items():
        (want,) = torch.autograd.grad(f(x).sum(), x)
        assert torch.allclose(GRADIENTS[name](torch.ones_like(x), x.detach()), want), name


@pytest.mark.parametrize("serial", [True, False])
def test_gradcheck(serial: bool) -> None:
    y, h, *rest = Case(3, 4, 5 if not serial else 0, 2).operands()
    given_ = [t.requires_grad_() for t in (y, h, *rest) if t is not None]
    if serial:
        function = lambda y, *r: OPS.bottleneck(y, None, *r, "tanh")  # noqa: E731
    else:
        function = lambda *r: OPS.bottleneck(*r, "tanh")  # noqa: E731
    assert torch.autograd.gradcheck(function, given_)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_twice_and_nothing_unasked(device: str) -> None:
    y, _, *rest = (t if t is None else t.float().to(device) for t in Case(70).operands())
    masks = ([True] * 3, [True, False, False], [False, True, False], [False, False, True])
    for mask in masks:
        args = (y, y, *rest, "relu", True, mask)
        one, two = (compute("bottleneck_backward", args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert [t.numel() > 0 for t in one] == [mask[0], *[mask[1]] * 4, mask[2]]


def arguments() -> dict[str, tuple[Any, ...]]:
    y, h, *rest = (t.float() for t in Case(6, 8, 5, 3).operands())
    a, b, scale = *drawn((2, 8), (6, 2), dtype=torch.float32), torch.ones(1)
    return {
        "low_rank_norms": (y, a, b, scale),
        "bottleneck": (y, h, *rest, "silu"),
        "bottleneck_backward": (y, h, *rest, "silu", False, [True] * 3),
    }


@pytest.mark.parametrize("name", list(FORMS))
def test_ops(name: str) -> None:
    """Torch's checks of the op and of the one that holds the kernel; both give the same form."""
    args = arguments()[name]
    got, want = compute(name, args), FORMS[name].definition(*args)
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        assert distance(a, b) < 1e-5
    torch.library.opcheck(getattr(OPS, name).default, args)
    torch.library.opcheck(
        getattr(OPS, OPAQUE + name).default, args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


# -- in use --------------------------------------------------------------------------------------

DORA = {"method": "dora", "name": "*", "rank": 3}
BESIDE = {"method": "bottleneck", "name": ["up", "down"], "size": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.gate(x)) * self.up(x))
        return out


def train(rule: dict[str, Any], claims: list[Claim]) -> tuple[list[Tensor], list[Choice], int]:
    """Outputs and gradients of batches of two sizes, choices, and how often was compiled."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, choices, graphs = Net(), [], []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return dynamo.compile_aot(gm, inputs, LowerPass(claims, choices))

    backend = Backend({"rules": [rule]}, inner)
    backend.bind(model, (torch.randn(2, 12),))
    for p in peftfx.parameters(model):
        nn.init.normal_(p.data, std=0.3)
    run, found = torch.compile(model, backend=backend, fullgraph=True, dynamic=True), []
    for rows in (3, 18):
        x = torch.randn(rows, 12, requires_grad=True)
        out = run(x)
        out.square().mean().backward()
        assert x.grad is not None
        found += [out.detach(), x.grad]
    grads = [p.grad for p in peftfx.parameters(model)]
    assert all(g is not None for g in grads)
    return found + [g for g in grads if g is not None], choices, len(graphs)


@pytest.mark.parametrize("rule", [DORA, BESIDE, {**BESIDE, "parallel": True}])
def test_training_through_the_kernels(rule: dict[str, Any]) -> None:
    expected, _, _ = train(rule, [Definition()])
    got, choices, graphs = train(rule, [Fused(anywhere=True), Definition()])
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    assert graphs == 1
    taken = {c.op: c.claim for c in choices}
    ours = {"low_rank_norms"} if rule is DORA else {"bottleneck", "bottleneck_backward"}
    assert {op for op, claim in taken.items() if claim == "triton"} == ours
    if rule is DORA:  # the product is LoRA's: those on one x are one op, in both directions
        assert {"low_rank_linear_group", "low_rank_linear", "low_rank_group_backward"} <= set(taken)


def ask(op: str, rows: int, c: int = 64, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """The choice for a call on a pretended H200."""
    with FakeTensorMode(), assume("NVIDIA H200"):

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        y, one = made(rows, 4096, dtype=dtype), made(1)
        if op == "low_rank_norms":
            return chosen(CLAIMS, op, (y, made(c, 4096), made(rows, c), one))
        rest = (made(c, 4096), made(c), made(4096, c), made(4096), one, "gelu")
        if op == "bottleneck":
            return chosen(CLAIMS, op, (y, None, *rest))
        return chosen(CLAIMS, op, (y, y, *rest, True, [True] * 3))


@pytest.mark.parametrize("op", list(FORMS))
def test_chosen_with_a_reason(op: str) -> None:
    found = ask(op, 8192)
    assert found.claim == "triton" and "roofline" in found.cost
    assert "triton is predicted" in dict(found.refusals)["definition"]
    assert "there is no kernel" in dict(ask(op, 8192, dtype=torch.float64).refusals)["triton"]
    wide = dict(ask(op, 8192, c=129).refusals)["triton"]
    assert "one tile holds 64" in wide or "128 fit on the chip" in wide


def test_few_rows_do_not_fill_the_device() -> None:
    """One program would read D and U by itself: the library's products have all processors."""
    assert ask("bottleneck", 16).claim == "definition"
