"""The low-rank ops: against fp64 arithmetic written anew, with every check torch has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftfx.kernels.low_rank_linear.op
from peftfx.errors import NotAdaptedError
from peftfx.kernels.philox.op import keep_mask
from tests.helpers import relative

assert peftfx.kernels.low_rank_linear.op
OPS = torch.ops.peftfx
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


class Case:
    """Operands of every op, non-square, filled from a seed."""

    def __init__(
        self, lead: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(of)

        wide = torch.promote_types(dtype, torch.float32)
        self.x, self.w, self.b = made(*lead, k), made(n, k), made(n)
        self.a, self.bb = made(r, k, of=wide), made(n, r, of=wide)
        self.bias, self.y = made(n, of=wide), made(*lead, n)
        self.scale = torch.tensor([0.7], dtype=wide)

    def low(self, seed: Tensor | None, p: float, site: int) -> list[Any]:
        return [self.a, self.bb, self.bias, self.scale, seed, p, site]


def reference(c: Case, seed: Tensor | None, p: float, site: int) -> Tensor:
    """``x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ + s·bias`` by einsum, in fp64."""
    x = c.x.double()
    kept = x
    if seed is not None:
        kept = x * keep_mask(x, seed, p, site) / (1 - p)
    y = torch.einsum("...k,nk->...n", x, c.w.double()) + c.b.double()
    s = torch.einsum("...k,rk->...r", kept, c.a.double())
    return y + 0.7 * (torch.einsum("...r,nr->...n", s, c.bb.double()) + c.bias.double())


shapes = st.tuples(
    st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple),
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5),
)  # fmt: skip


@given(shapes, st.sampled_from(list(BOUND)), st.booleans(), st.integers(0, 9))
def test_forward(shape: tuple[Any, ...], dtype: torch.dtype, drops: bool, site: int) -> None:
    lead, k, n, r = shape
    c = Case(lead, k, n, r, dtype)
    seed, p = (torch.tensor(11), 0.3) if drops else (None, 0.0)
    y, s = OPS.low_rank_linear(c.x, c.w, c.b, *c.low(seed, p, site))
    assert y.shape == (*lead, n) and s.shape == (*lead, r) and y.dtype == dtype
    expected = reference(c, seed, p, site)
    if y.numel():
        assert relative(y, expected) < BOUND[dtype]
        base = torch.nn.functional.linear(c.x, c.w, c.b)
        added, _ = OPS.low_rank_add(base, c.x, *c.low(seed, p, site))
        assert relative(added, expected) < BOUND[dtype]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("lead", [(4,), (2, 3), (0, 3)])
def test_gradients(lead: tuple[int, ...], drops: bool) -> None:
    c = Case(lead, 7, 5, 2, torch.float64)
    seed, p = (torch.tensor(5), 0.3) if drops else (None, 0.0)
    for t in (c.x, c.b, c.a, c.bb, c.bias, c.y):
        t.requires_grad_()

    def linear(*args: Tensor) -> Tensor:
        x, b, a, bb, bias = args
        return OPS.low_rank_linear(x, c.w, b, a, bb, bias, c.scale, seed, p, 1)[0]

    def add(*args: Tensor) -> Tensor:
        y, x, a, bb, bias = args
        return OPS.low_rank_add(y, x, a, bb, bias, c.scale, seed, p, 1)[0]

    assert torch.autograd.gradcheck(linear, (c.x, c.b, c.a, c.bb, c.bias))
    assert torch.autograd.gradcheck(add, (c.y, c.x, c.a, c.bb, c.bias))


def group(c: Case, d: Case, first_bias: bool = True) -> tuple[Any, ...]:
    return (
        c.x, [c.w, d.w], [c.b if first_bias else None, d.b], [c.a, d.a], [c.bb, d.bb],
        [None, d.bias], [c.scale, d.scale],
    )  # fmt: skip


def test_group() -> None:
    c = Case((2, 3), 7, 5, 2, torch.float64)
    d = Case((2, 3), 7, 4, 3, torch.float64, seed=1)
    ys, s = OPS.low_rank_linear_group(*group(c, d))
    assert s.shape == (2, 3, 5)
    one, _ = OPS.low_rank_linear(c.x, c.w, c.b, c.a, c.bb, None, c.scale, None, 0.0, 0)
    two, _ = OPS.low_rank_linear(c.x, d.w, d.b, d.a, d.bb, d.bias, d.scale, None, 0.0, 0)
    assert torch.allclose(ys[0], one) and torch.allclose(ys[1], two)
    for t in (c.x, c.a, c.bb, d.a, d.bb):
        t.requires_grad_()

    def both(x: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        given_ = (x, [c.w, d.w], [c.b, d.b], [a, a2], [b, b2], [None, None], [c.scale, d.scale])
        return tuple(OPS.low_rank_linear_group(*given_)[0])

    assert torch.autograd.gradcheck(both, (c.x, c.a, c.bb, d.a, d.bb))


@pytest.mark.parametrize("drops", [False, True])
def test_opcheck(drops: bool) -> None:
    c = Case((2, 3), 7, 5, 2, torch.float32)
    d = Case((2, 3), 7, 4, 3, torch.float32, seed=1)
    seed, p = (torch.tensor(5), 0.3) if drops else (None, 0.0)
    for t in (c.x, c.a, c.bb):
        t.requires_grad_()
    torch.library.opcheck(OPS.low_rank_linear.default, (c.x, c.w, c.b, *c.low(seed, p, 1)))
    torch.library.opcheck(OPS.low_rank_add.default, (c.y, c.x, *c.low(seed, p, 1)))
    for first in (True, False):
        torch.library.opcheck(OPS.low_rank_linear_group.default, group(c, d, first))


def test_strided_input() -> None:
    c = Case((6, 4), 7, 5, 2, torch.float32)
    turned = c.x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    seed = torch.tensor(9)  # the mask follows the logical order, not the memory's
    low = c.low(seed, 0.3, 0)
    a, _ = OPS.low_rank_linear(c.x, c.w, c.b, *low)
    b, _ = OPS.low_rank_linear(turned, c.w, c.b, *low)
    assert torch.allclose(a, b, atol=1e-5)


def test_saves_x_and_s_only() -> None:
    c = Case((64,), 48, 40, 2, torch.float32)
    parameters = {t.data_ptr() for t in (c.w, c.b, c.a, c.bb, c.bias, c.scale)}
    c.x.requires_grad_()
    c.a.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OPS.low_rank_linear(c.x, c.w, c.b, *c.low(torch.tensor(1), 0.5, 0))
    kept = [t for t in saved if t.data_ptr() not in parameters and t.numel() > 1]
    assert {tuple(t.shape) for t in kept} == {(64, 48), (64, 2)}


def test_frozen_weight_is_held_to_it() -> None:
    c = Case((3,), 7, 5, 2, torch.float32)
    c.w.requires_grad_()
    with pytest.raises(NotAdaptedError, match="would get none"):
        OPS.low_rank_linear(c.x, c.w, c.b, *c.low(None, 0.0, 0))


def test_autocast_is_that_of_the_moment() -> None:
    c = Case((3,), 7, 5, 2, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y, _ = OPS.low_rank_linear(c.x, c.w, c.b, *c.low(None, 0.0, 0))
        assert y.dtype == dtype
        assert relative(y, reference(c, None, 0.0, 0)) < 3e-2


def test_survives_aotautograd_in_both_directions() -> None:
    from peftfx.dynamo import compile_aot

    seen: list[set[str]] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append({str(n.target) for n in graph.nodes if "peftfx" in str(n.target)})

    c = Case((3,), 7, 5, 2, torch.float32)
    for t in (c.x, c.a, c.bb):
        t.requires_grad_()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_aot(gm, inputs, look)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return OPS.low_rank_linear(x, c.w, c.b, a, b, None, c.scale, None, 0.0, 0)[0].sin()

    torch.compile(run, backend=backend, fullgraph=True)(c.x, c.a, c.bb).sum().backward()
    assert seen == [{"peftfx.low_rank_linear.default"}, {"peftfx.low_rank_backward.default"}]
