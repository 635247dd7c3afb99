"""Forms of the library's products against the definitions, and when they are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import peftfx
from peftfx.kernels.low_rank_linear.op import DEFINITIONS
from peftfx.passes.claims import CLAIMS, Claim
from peftfx.passes.claims.library import Accumulate, Folded
from peftfx.passes.lower import chosen
from tests.helpers import fill, relative


def calls(m: int, k: int, n: int, r: int, biased: bool, mask: list[bool]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, scales = made(2, m, k), [torch.tensor([0.7]), torch.tensor([1.3])]
    w, a, b = [made(n, k), made(n + 1, k)], [made(r, k), made(1, k)], [made(n, r), made(n + 1, 1)]
    bias, shift = [made(n) if biased else None, made(n + 1)], [made(n), None]
    dy, s = [made(2, m, n), made(2, m, n + 1)], made(2, m, r + 1)
    return {
        "low_rank_linear": (x, w[0], bias[0], a[0], b[0], shift[0], scales[0], None, 0.0, 0),
        "low_rank_linear_group": (x, w, bias, a, b, shift, scales),
        "low_rank_expand": (x, s, w, bias, b, shift, scales),
        "low_rank_backward": (
            dy[0], x, s[..., :r], w[0], a[0], b[0], scales[0], None, 0.0, 0, mask,
        ),
        "low_rank_group_backward": (dy, x, s, w, a, b, scales, mask),
    }  # fmt: skip


@given(
    st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(),
    st.lists(st.booleans(), min_size=3, max_size=3),
)  # fmt: skip
@pytest.mark.parametrize("claim", [Folded(), Accumulate()])
def test_is_the_definition(
    claim: Claim, m: int, k: int, n: int, r: int, biased: bool, mask: list[bool]
) -> None:
    wanted = [True, *mask[1:]] if claim.name == "folded" else mask  # it is about dX
    made = calls(m, k, n, r, biased, wanted)
    assert made.keys() >= set(claim.ops) and claim.emit is not None
    for op in claim.ops:
        args = made[op]
        found, expected = claim.emit(op, *args), DEFINITIONS[op](*args)
        for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype, op
            assert one.is_contiguous() == other.is_contiguous(), op
            if one.numel():
                assert relative(one, other) < 1e-5, op


def test_folded_where_it_is_cheaper() -> None:
    """By arithmetic where M is above 2·K, or 2·N for dX; never where it would be wrong."""
    for m, form in ((900, "folded"), (90, "accumulate")):
        found = calls(m, 400, 400, 2, True, [True, True, True])
        for op in Folded().ops:
            args = found[op]
            assert chosen(CLAIMS, op, args).claim == form, (op, m)
    backward = calls(50, 8, 8, 2, True, [False, True, True])["low_rank_backward"]
    assert Folded().check("low_rank_backward", backward) == "no dX is wanted"
    x, *rest = calls(50, 8, 8, 2, True, [True] * 3)["low_rank_linear"]
    assert "round" in str(Folded().check("low_rank_linear", (x.bfloat16(), *rest)))
    rest[6] = torch.tensor(1)
    assert "dropout" in str(Folded().check("low_rank_linear", (x, *rest)))


def test_folded_trains_alike() -> None:
    """Through AOTAutograd, M far above K and N: marks' gradients, and the claim was taken."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    x = torch.randn(200, 6)
    spec = {"rules": [{"method": "lora", "name": "*", "rank": 2}]}
    backend = peftfx.backend(spec, lower="aot_eager")
    backend.bind(model, (x,))
    fill(peftfx.parameters(model))
    expected = model(x)
    expected.square().mean().backward()
    want = [p.grad for p in peftfx.parameters(model)]
    for p in model.parameters():
        p.grad = None
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    out.square().mean().backward()
    assert relative(out, expected) < 1e-5
    for p, grad in zip(peftfx.parameters(model), want, strict=True):
        assert relative(p.grad, grad) < 1e-5
    assert {c.claim for c in backend.reports[-1].choices} >= {"folded"}
