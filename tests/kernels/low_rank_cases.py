"""Operands for the low-rank ops, and what they should give: einsum in fp64, and autograd of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from peftfx.kernels.devices import describe
from peftfx.kernels.low_rank_linear.launch import backward, forward
from peftfx.kernels.low_rank_linear.runner import Drop, Runner
from peftfx.kernels.philox.op import keep_mask

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
SCALES = (0.7, -1.3, 2.0)
# ‖out - ref‖ / ‖ref‖. The interpreter rounds fp32 to bf16 by cutting off.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def distance(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖; NaN where there is one in *got*."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, memory that is allocated without being filled holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(()).new_empty(9).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Case:
    """One to three sites on one x. ``layout``: how x, dY and W lie in memory."""

    lead: tuple[int, ...] = (37,)
    k: int = 40
    outs: tuple[int, ...] = (24,)
    ranks: tuple[int, ...] = (5,)
    dtype: torch.dtype = torch.float32
    p: float = 0.0
    bias: bool = True
    lora_bias: bool = False
    layout: str = "plain"
    device: str = "cpu"
    factors: torch.dtype = torch.float32

    def operands(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(hash((self.lead, self.k, self.outs, self.ranks)) % 2**31)

        def made(*shape: int, of: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(of).to(self.device)

        none = [None] * len(self.outs)
        x, weights = made(*self.lead, self.k), [made(n, self.k) for n in self.outs]
        if self.layout == "turned":  # rows are far apart, or columns are
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
            weights = [w.t().contiguous().t() for w in weights]
        elif self.layout == "sliced":  # odd strides, no alignment
            x = torch.cat([x, x], dim=-1)[..., 1 : self.k + 1]
        scale = [torch.tensor([s], device=self.device) for s in SCALES]
        return {
            "x": x,
            "weights": weights,
            "biases": [made(n) for n in self.outs] if self.bias else none,
            "A": [made(r, self.k, of=self.factors) for r in self.ranks],
            "B": [made(n, r, of=self.factors) for n, r in zip(self.outs, self.ranks, strict=True)],
            "lora_biases": [None, *(made(n, of=torch.float32) for n in self.outs[1:])]
            if self.lora_bias
            else none,
            "scales": scale[: len(self.outs)],
        }

    def drop(self) -> Drop:
        seed = torch.tensor(123456789012345, device=self.device) if self.p else None
        return Drop(seed, self.p, 3)

    def grads(self, ys: list[Tensor]) -> list[Tensor]:
        """A dY for each y; in layout ``turned`` as autograd makes them from a sum: expanded."""
        if self.layout == "turned":
            return [torch.full((), 0.5, dtype=y.dtype, device=y.device).expand(y.shape) for y in ys]
        g = torch.Generator().manual_seed(7)
        return [torch.randn(y.shape, generator=g).to(y.dtype).to(y.device) for y in ys]


def reference(case: Case, given: dict[str, Any], base: Tensor | None = None) -> list[Tensor]:
    """ys, S, dX, dA's and dB's in fp64 on the CPU."""
    wide = {
        name: [v.detach().double().cpu() if v is not None else None for v in values]
        for name, values in given.items()
        if name != "x"
    }
    x = given["x"].detach().double().cpu().requires_grad_()
    leaves = [x, *(t.requires_grad_() for t in (*wide["A"], *wide["B"]))]
    kept, drop = x, case.drop()
    if drop.seed is not None:
        mask = keep_mask(x.cpu(), drop.seed.cpu(), drop.p, drop.site)
        kept = x * mask / (1 - drop.p)
    ys, low = [], []
    for i, (a, b) in enumerate(zip(wide["A"], wide["B"], strict=True)):
        s = torch.einsum("...k,rk->...r", kept, a)
        y = SCALES[i] * torch.einsum("...r,nr->...n", s, b)
        if base is None:
            y = y + torch.einsum("...k,nk->...n", x, wide["weights"][i])
            y = y if wide["biases"][i] is None else y + wide["biases"][i]
        else:
            y = y + base.double().cpu()
        extra = wide["lora_biases"][i]
        ys.append(y if extra is None else y + SCALES[i] * extra)
        low.append(s)
    dys = [dy.double().cpu() for dy in case.grads(ys)]
    dys = [dy.to(case.dtype).double() for dy in dys]
    grads = torch.autograd.grad(ys, leaves, dys)
    return [*ys, torch.cat(low, dim=-1), *grads]


def compute(case: Case, run: Runner | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels give and what they should, in the same order."""
    given = case.operands()
    run = run or runner(case.device)
    with poisoned():
        ys, s = forward(run, **given, drop=case.drop())
        dys = case.grads(ys)
        keys = ("weights", "A", "B", "scales")
        dx, das, dbs = backward(
            run, dys, given["x"], s, *(given[k] for k in keys), [True] * 3, case.drop()
        )
    return [*ys, s, dx, *das, *dbs], reference(case, given)


def runner(device: str) -> Runner:
    found = describe(torch.device(device))
    assert found is not None
    return Runner(found)


def agree(case: Case, run: Runner | None = None) -> None:
    """Asserts that kernels and reference agree, in value and in form."""
    got, expected = compute(case, run)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        if e.numel():
            assert distance(g, e) < BOUND[case.dtype], (case, g.shape)


@st.composite
def cases(draw: Any, device: str = "cpu") -> Case:
    """Odd sizes, one to three sites, every dtype and layout."""
    count = draw(st.integers(1, 3))
    lead = draw(st.lists(st.integers(0, 6), min_size=0, max_size=1))
    case = Case(
        lead=(*lead, draw(st.integers(0, 23))),
        k=draw(st.sampled_from([1, 7, 16, 33, 48])),
        outs=tuple(draw(st.lists(st.integers(1, 36), min_size=count, max_size=count))),
        ranks=tuple(draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))),
        dtype=draw(st.sampled_from(list(BOUND))),
        bias=draw(st.booleans()),
        lora_bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["plain", "turned", "sliced"])),
        device=device,
    )
    if draw(st.booleans()) and count == 1:
        case = replace(case, p=draw(st.sampled_from([0.1, 0.5])))
    return replace(case, factors=draw(st.sampled_from([torch.float32, case.dtype])))
