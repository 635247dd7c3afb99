"""Norms and gates that make S beside y: against fp64, by the interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfx.kernels.low_rank_linear.forms import OPAQUE
from peftfx.kernels.shrink.launch import FORMS, compute
from peftfx.kernels.shrink.op import ACTS, DEFINITIONS
from tests.kernels.low_rank_cases import BOUND, DEVICES, distance, poisoned

OPS = torch.ops.peftfx
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: (
        0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)))
    ),
    "quick_gelu": lambda t: t / (1 + torch.exp(-1.702 * t)),
    "relu": lambda t: t.clamp_min(0),
    "relu_squared": lambda t: t.clamp_min(0) ** 2,
}


def exact(name: str, args: tuple[Any, ...], total: Tensor | None = None) -> list[Tensor]:
    """y and S in fp64; of a norm mean and 1/deviation too. *total*: the sum, rounded."""

    def wide(t: Tensor | None) -> Any:
        return None if t is None else t.double()

    if name == "gate_shrink":
        gate, up, A, act, _ = args
        y = ACTIVATIONS[act](gate.double()) * (1.0 if up is None else up.double())
        return [y, y @ torch.cat([a.double() for a in A]).t()]
    x, _, weight, shift, A, eps, offset, centred, _ = args
    h = wide(x if total is None else total)
    mean = h.mean(-1, keepdim=True) if centred else torch.zeros_like(h[..., :1])
    rstd = ((h - mean).square().mean(-1, keepdim=True) + eps) ** -0.5
    y = (h - mean) * rstd * (1.0 if weight is None else offset + wide(weight))
    y = y if shift is None else y + wide(shift)
    return [y, y @ torch.cat([a.double() for a in A]).t(), mean, rstd]


def agree(name: str, args: tuple[Any, ...]) -> None:
    """The kernel gives what fp64 does, in the form of the definition, and leaves nothing out."""
    with poisoned():
        got = list(compute(name, args))
    for one, like in zip(got, DEFINITIONS[name](*args), strict=True):
        assert one.shape == like.shape and one.stride() == like.stride() and one.dtype == like.dtype
    total = None
    if name == "norm_shrink":
        x, more, *_ = args
        total, *got = got
        if more is None:
            assert not total.numel()
            total = None
        else:
            assert distance(total, x.double() + more.double()) < BOUND[x.dtype]
    for one, expected in zip(got, exact(name, args, total), strict=True):
        if one.numel():
            assert distance(one, expected) < BOUND[args[-1]], (name, args[-1])


@st.composite
def calls(draw: Any, device: str) -> tuple[str, tuple[Any, ...]]:
    """Any op, odd sizes, rows that are apart, every dtype, sums of one and results in another."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    lead = draw(st.sampled_from([(1,), (17,), (2, 9), (0,)]))
    k = draw(st.sampled_from([1, 7, 16, 33, 48]))
    dtype, factors = (draw(st.sampled_from(list(BOUND))) for _ in range(2))
    out = draw(st.sampled_from([dtype, torch.float32, torch.bfloat16]))
    far = draw(st.booleans())

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        t = torch.randn(*shape, generator=g, dtype=torch.float64)
        if far and len(shape) > 1:
            t = torch.cat([t, t], -1)[..., 1 : shape[-1] + 1]
        return t.to(of).to(device)

    A = [made(r, k, of=factors) for r in draw(st.sampled_from([(1,), (5, 3), (17, 20, 4)]))]
    x = made(*lead, k)
    other = made(*lead, k) if draw(st.booleans()) else None
    if draw(st.booleans()):
        return "gate_shrink", (x, other, A, draw(st.sampled_from(list(ACTS))), out)
    weight, shift = (made(k, of=factors) if draw(st.booleans()) else None for _ in range(2))
    offset = draw(st.sampled_from([0.0, 1.0])) if weight is not None else 0.0
    return "norm_shrink", (x, other, weight, shift, A, 1e-2, offset, draw(st.booleans()), out)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30)
@given(data=st.data())
def test_any_call(device: str, data: Any) -> None:
    agree(*data.draw(calls(device)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_takes_no_digits(device: str) -> None:
    """Deviations of 1 around 1000: a mean of squares would have lost six of fp32's digits."""
    x = (1000 + torch.randn(20, 70)).to(device)
    args = (x, None, None, None, [torch.randn(4, 70, device=device)], 1e-5, 0.0, True, x.dtype)
    got, expected = compute("norm_shrink", args), exact("norm_shrink", args)
    assert distance(got[4], expected[3]) < 1e-5 and distance(got[1], expected[0]) < 1e-4


@pytest.mark.parametrize("name", list(FORMS))
def test_ops(name: str) -> None:
    """Definition and the op that holds the kernel: torch's checks."""
    x, A = torch.randn(2, 9, 24), [torch.randn(4, 24), torch.randn(3, 24)]
    args: tuple[Any, ...] = (x, x.flip(0), A, "silu", x.dtype)
    if name == "norm_shrink":
        args = (x, x.flip(0), x[0, 0], x[0, 1], A, 1e-5, 1.0, True, x.dtype)
    for op in (name, OPAQUE + name):
        torch.library.opcheck(
            getattr(OPS, op).default, args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 2048, 8192])
@pytest.mark.parametrize("k", [4096, 14336])
def test_real_sizes(rows: int, k: int) -> None:
    """The tiles that are shipped, on sizes that they are shipped for; the same bits twice."""
    A = [torch.randn(16, k, device="cuda") * k**-0.5 for _ in range(3)]
    x, more = (torch.randn(rows, k, device="cuda").bfloat16() for _ in range(2))
    w = torch.randn(k, device="cuda").bfloat16()
    for name, args in (
        ("norm_shrink", (x, more, w, None, A, 1e-5, 0.0, False, x.dtype)),
        ("norm_shrink", (x, None, w, w, A, 1e-5, 0.0, True, x.dtype)),
        ("gate_shrink", (x, more, A, "silu", x.dtype)),
        ("gate_shrink", (x, None, A, "gelu", x.dtype)),
    ):
        agree(name, args)
        one, two = compute(name, args), compute(name, args)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
