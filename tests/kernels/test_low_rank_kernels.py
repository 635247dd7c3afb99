"""The kernels against fp64, by Triton's interpreter here and for real under ``-m gpu``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftfx.kernels.low_rank_linear import configs, launch
from peftfx.kernels.low_rank_linear.forms import FORMS, OPAQUE, compute
from peftfx.kernels.low_rank_linear.launch import backward, forward
from peftfx.kernels.low_rank_linear.op import DEFINITIONS
from peftfx.kernels.low_rank_linear.runner import Runner, kernels
from tests.kernels.low_rank_cases import (
    BOUND,
    DEVICES,
    Case,
    agree,
    cases,
    distance,
    poisoned,
    reference,
    runner,
)

OPS = torch.ops.peftfx


class Noting(Runner):
    """A runner that notes which kernels it launched."""

    launched: list[str]

    def __call__(self, kernel: Any, grid: tuple[Any, ...], **arguments: Any) -> None:
        self.launched.append(kernel.fn.__name__)
        super().__call__(kernel, grid, **arguments)


def noting(device: str, **changes: Any) -> Noting:
    run = Noting(**{**vars(runner(device)), **changes})
    object.__setattr__(run, "launched", [])
    return run


def with_tile(**changes: Any) -> Any:
    """A source of tiles: those shipped, changed."""

    def found(kernel: str, device: Any, shape: configs.Shape) -> configs.Config:
        return replace(configs.config(kernel, device, shape), **changes)

    return found


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(device: str, data: Any) -> None:
    agree(data.draw(cases(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("drops", [False, True])
def test_many_rows(device: str, dtype: torch.dtype, drops: bool) -> None:
    """More rows than one launch takes: S by itself, and sums over several parts."""
    agree(Case((70,), 33, (20,), (17,), dtype, p=0.3 if drops else 0.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [1, 16, 65, 130])
def test_any_rank(device: str, rank: int) -> None:
    agree(Case((66,), 20, (18,), (rank,), device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_any_number_of_parts(device: str, parts: int) -> None:
    run = noting(device, configs=with_tile(parts=parts))
    agree(Case((90,), 64, (40, 17), (3, 30), device=device), run)
    assert "low_rank_linear_s_kernel" in run.launched


class Counting(Noting):
    """A runner whose counters start at *start*, and are kept."""

    counters: list[Tensor]
    start: int

    def counter(self, like: Tensor) -> Tensor:
        self.counters.append(super().counter(like).fill_(self.start))
        return self.counters[-1]


def counting(device: str, start: int, **changes: Any) -> Counting:
    run = Counting(**{**vars(runner(device)), **changes})
    for name, value in (("launched", []), ("counters", []), ("start", start)):
        object.__setattr__(run, name, value)
    return run


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=8)
@given(data=st.data())
def test_few_rows(device: str, data: Any) -> None:
    """S by the first programs of the launch, or by who waited for them in vain: the same bits."""
    parts, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rows, k = data.draw(st.sampled_from([1, 16, 17])), data.draw(st.integers(1, 100))
    outs = tuple(data.draw(st.lists(st.integers(1, 20), min_size=count, max_size=count)))
    ranks = tuple(data.draw(st.lists(st.integers(1, 20), min_size=count, max_size=count)))
    case = Case((rows,), k, outs, ranks, data.draw(st.sampled_from(list(BOUND))), device=device)
    given_, found = case.operands(), []
    for start in (0, -(10**9)):
        run = counting(device, start, configs=with_tile(parts=parts))
        with poisoned(), mock.patch.object(launch, "POLLS", 2):
            ys, s = forward(run, **given_)
        assert run.launched == ["low_rank_linear_decode_kernel"]
        tile = run.config("decode", configs.Shape(rows, k, sum(outs), sum(ranks), case.dtype))
        steps = -(-k // tile.block_k)
        made = -(-steps // -(-steps // min(parts, steps)))  # as many as have something to do
        (counter,) = run.counters
        assert counter[0] - start == count * made * -(-rows // tile.block_m)
        assert not (counter[1:] - start).any()
        found.append([*ys, s])
    for got, other, want in zip(*found, reference(case, given_), strict=False):
        assert torch.equal(got, other) and distance(got, want) < BOUND[case.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("p", "outs", "ranks"), [(0.0, (48,), (16,)), (0.2, (48,), (3,)),
                                                  (0.0, (32, 48, 16), (8, 3, 16))])  # fmt: skip
def test_descriptors(device: str, p: float, outs: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """With what the copy engine needs, and one column too many, which it must not touch."""
    if device == "cuda" and not configs.has("dx_descriptor", runner(device).device.target,
                                            torch.bfloat16):  # fmt: skip
        pytest.fail("this GPU has no tensor descriptors")
    case = Case((80,), 64, outs, ranks, torch.bfloat16, p=p, device=device)
    run = noting(device)
    agree(case, run)
    assert "low_rank_linear_dx_descriptor_kernel" in run.launched
    assert ("low_rank_linear_fwd_descriptor_kernel" in run.launched) == (len(outs) == 1)
    run = noting(device)
    agree(replace(case, k=65), run)
    assert not any("descriptor" in name for name in run.launched)
    run = noting(device, descriptors=False)
    agree(case, run)
    assert not any("descriptor" in name for name in run.launched)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_update_alone(device: str, dtype: torch.dtype, p: float) -> None:
    """``low_rank_add`` and its backward: no weight is seen."""
    case = Case((5, 13), 33, (20,), (6,), dtype, p=p, device=device, lora_bias=False)
    given_ = case.operands()
    base = torch.randn(5, 13, 20).to(dtype).to(device)
    given_["weights"], given_["biases"] = [], [None]
    with poisoned():
        ys, s = forward(runner(device), **given_, drop=case.drop(), base=base)
        dx, das, dbs = backward(
            runner(device), case.grads(ys), given_["x"], s, [], given_["A"], given_["B"],
            given_["scales"], [True] * 3, case.drop(),
        )  # fmt: skip
    for got, want in zip([*ys, s, dx, *das, *dbs], reference(case, given_, base), strict=True):
        assert distance(got, want) < BOUND[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_twice(device: str) -> None:
    case = Case((150,), 70, (33, 40), (4, 9), torch.bfloat16, device=device)
    given_ = case.operands()
    found = []
    for _ in range(2):
        ys, s = forward(runner(device), **given_)
        keys = ("weights", "A", "B", "scales")
        dx, das, dbs = backward(
            runner(device), case.grads(ys), given_["x"], s, *(given_[k] for k in keys), [True] * 3
        )
        found.append([*ys, s, dx, *das, *dbs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_mask_is_the_definitions(device: str) -> None:
    """Ones in, identities for factors: S shows the mask of x, dX that of its gradient."""
    k, p, drop = 32, 0.4, Case(p=0.4, device=device).drop()
    x, eye = torch.ones(70, k, device=device), torch.eye(k, device=device)
    scale = torch.ones(1, device=device)
    zero = torch.zeros(k, k, device=device)
    with poisoned():
        (y,), s = forward(runner(device), x, [zero], [None], [eye], [eye], [None], [scale], drop)
        dx, _, _ = backward(
            runner(device), [torch.ones_like(y)], x, s, [zero], [eye], [eye], [scale],
            [True] * 3, drop,
        )  # fmt: skip
    assert drop.seed is not None
    mask = OPS.dropout(x, drop.seed, p, drop.site)
    assert torch.allclose(s, mask) and torch.allclose(dx, mask) and torch.allclose(y, mask)


def arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op."""
    g, d = case.operands(), case.drop()
    drop = (d.seed, d.p, d.site)
    x, (w, v), (a, b), (c, e) = g["x"], g["weights"], g["A"], g["B"]
    y, low, s = g["scales"][0], [None, None], g["scales"][0]
    y = torch.nn.functional.linear(x, w)
    S = torch.nn.functional.linear(x, a)
    both = torch.nn.functional.linear(x, torch.cat([a, b]))
    other = torch.nn.functional.linear(x, v)
    mask = [True, True, True]
    return {
        "low_rank_add": (y, x, a, c, None, s, *drop),
        "low_rank_linear": (x, w, g["biases"][0], a, c, None, s, *drop),
        "low_rank_linear_group": (x, [w, v], g["biases"], [a, b], [c, e], low, g["scales"]),
        "low_rank_expand": (x, both, [w, v], g["biases"], [c, e], low, g["scales"]),
        "low_rank_backward": (y, x, S, w, a, c, s, *drop, mask),
        "low_rank_group_backward": (
            [y, other], x, both, [w, v], [a, b], [c, e], g["scales"], mask,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(FORMS))
def test_ops(device: str, name: str) -> None:
    """The ops that hold the kernels: torch's checks, and the same form as the definition's."""
    case = Case((2, 9), 24, (20, 12), (4, 3), p=0.0 if "group" in name else 0.3, device=device)
    args = arguments(case)[name]
    got, expected = compute(name, args), DEFINITIONS[name](*args)
    for g, e in zip(_flat(got), _flat(expected), strict=True):
        assert g.shape == e.shape and g.stride() == e.stride() and g.dtype == e.dtype
        assert distance(g, e) < 1e-5
    torch.library.opcheck(
        getattr(OPS, OPAQUE + name).default, args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_masked_gradients_come_back_empty(device: str) -> None:
    args = arguments(Case((2, 9), 24, (20, 12), (4, 3), device=device))["low_rank_backward"]
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        dx, da, db = compute("low_rank_backward", (*args[:-1], mask))
        assert [t.numel() > 0 for t in (dx, da, db)] == mask


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("outs", [(4096,), (1024,), (14336,), (4096, 1024, 1024)])
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_real_sizes(rows: int, outs: tuple[int, ...], p: float) -> None:
    """The tiles that are shipped, on the sizes that they are shipped for."""
    if p and len(outs) > 1:
        return
    for descriptors in (True, False):
        run = replace(runner("cuda"), descriptors=descriptors)
        case = Case((rows,), 4096, outs, (16,) * len(outs), torch.bfloat16, p=p, device="cuda")
        agree(case, run)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("outs", [(4096,), (4096, 1024, 1024), (14336, 14336)])
def test_who_waits_gets_the_same_bits(rows: int, outs: tuple[int, ...]) -> None:
    """Of real sizes: programs of one launch that run at once, again and again; or none that waits
    for another."""
    case = Case((rows,), 4096, outs, (16,) * len(outs), torch.bfloat16, device="cuda")
    given_ = case.operands()
    alone, s = forward(counting("cuda", -(10**9)), **given_)
    assert distance(alone[0], reference(case, given_)[0]) < BOUND[case.dtype]
    for _ in range(50):
        ys, t = forward(runner("cuda"), **given_)
        assert all(torch.equal(a, b) for a, b in zip([*ys, t], [*alone, s], strict=True))


@pytest.mark.gpu
def test_few_rows_in_a_cuda_graph() -> None:
    """Replays count from 0 again: the fill is a part of what is captured."""
    case = Case((8,), 4096, (4096, 1024, 1024), (16,) * 3, torch.bfloat16, device="cuda")
    given_ = case.operands()
    expected, _ = forward(runner("cuda"), **given_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys, _ = forward(runner("cuda"), **given_)
    for _ in range(20):
        for y in ys:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got, expected = compute_case(Case((512,), 1024, (512,), (16,), device="cuda"))
        bound = 1e-5 if precision == "highest" else 2e-3
        assert all(distance(g, e) < bound for g, e in zip(got, expected, strict=True))
    finally:
        torch.set_float32_matmul_precision(before)


def compute_case(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    from tests.kernels.low_rank_cases import compute as both

    return both(case)


def _flat(values: Any) -> list[Tensor]:
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]


def test_every_kernel_is_launched_by_these_tests() -> None:
    """The table of kernels has no entry that no call reaches."""
    run = noting("cpu")
    agree(Case((80,), 64, (48,), (16,), torch.bfloat16), run)
    agree(Case((80,), 65, (48,), (16,)), run)
    agree(Case((8,), 64, (48,), (16,)), run)
    names = {k.fn.__name__ for k in vars(kernels()).values() if hasattr(k, "fn")}
    assert set(run.launched) == names
