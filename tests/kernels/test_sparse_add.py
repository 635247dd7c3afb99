"""The sparse update: its definition, its other form, and that no dense update is ever made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftfx.kernels.sparse_add import op
from tests.helpers import Seen, relative

SIZES = st.integers(1, 9)


def case(m: int, n: int, k: int, share: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(m * 100 + n * 10 + k)
    count = max(int(share * n * k), 1)
    index = torch.randperm(n * k, generator=generator)[:count].sort().values
    made = [torch.randn(s, generator=generator).to(dtype) for s in ((m, n), (m, k), (count,))]
    return made[0], made[1], made[2], index, op.by_columns(index, n, k)


def dense(values: Tensor, index: Tensor, n: int, k: int) -> Tensor:
    return torch.zeros(n * k, dtype=values.dtype).index_put((index,), values).reshape(n, k)


@given(SIZES, SIZES, SIZES, st.sampled_from([0.1, 0.5, 1.0]))
def test_equal_to_a_dense_update(m: int, n: int, k: int, share: float) -> None:
    y, x, values, index, order = case(m, n, k, share, torch.float64)
    given_ = [t.requires_grad_() for t in (y, x, values)]
    out = torch.ops.peftfx.sparse_add(y, x, values, index, order)
    want = y + x @ dense(values, index, n, k).t()
    assert torch.allclose(out, want)
    weight = torch.randn(out.shape, dtype=out.dtype)
    got = torch.autograd.grad((out * weight).sum(), given_)
    expected = torch.autograd.grad((want * weight).sum(), given_)
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))


@given(SIZES, SIZES, SIZES, st.sampled_from([0.2, 1.0]), st.sampled_from([1, 2**22]))
def test_gathered_forms(m: int, n: int, k: int, share: float, chunk: int) -> None:
    """What is used where torch has no sparse products."""
    y, x, values, index, _ = case(m, n, k, share, torch.float64)
    before, op.CHUNK = op.CHUNK, chunk
    try:
        out, found = y.clone(), op.sampled(y, x, index)
        op.gather(out, x, values, index)
    finally:
        op.CHUNK = before
    assert torch.allclose(out, y + x @ dense(values, index, n, k).t())
    assert torch.allclose(found, (y.t() @ x).reshape(-1)[index])


def test_gradcheck_and_opcheck() -> None:
    y, x, values, index, order = case(3, 4, 5, 0.3, torch.float64)
    given_ = tuple(t.requires_grad_() for t in (y, x, values))
    assert torch.autograd.gradcheck(
        lambda *t: torch.ops.peftfx.sparse_add(*t, index, order), given_
    )
    torch.library.opcheck(torch.ops.peftfx.sparse_add.default, (*given_, index, order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3), (0,), (5,)])
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(*shape, w, generator=generator).to(dtype) for w in (4, 6))
    values, index = torch.randn(5, generator=generator), torch.tensor([0, 3, 9, 17, 23])
    order = op.by_columns(index, 4, 6)
    x, values = x.requires_grad_(), values.requires_grad_()
    out = torch.ops.peftfx.sparse_add(y, x, values, index, order)
    assert out.dtype == dtype and out.shape == y.shape
    want = y.float() + x.float() @ dense(values, index, 4, 6).t()
    assert torch.allclose(out.float(), want, atol=3e-2, rtol=3e-2)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert values.grad is not None and values.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_kernels_by_the_interpreter(dtype: torch.dtype, share: float) -> None:
    """Rows without a place, rows with many, and ragged edges of tiles."""
    from peftfx.kernels.sparse_add import triton

    y, x, values, index, _ = case(131, 19, 23, share, dtype)
    index = index[index // 23 != 3]
    values = values[: len(index)].float()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    want = y.double() + x.double() @ dense(values.double(), index, 19, 23).t()
    found = triton.added(y, x, values, index)
    assert relative(found, want) < bound
    assert torch.equal(triton.added(y.t().contiguous().t(), x, values, index), found)
    places = (y.double().t() @ x.double()).reshape(-1)[index]
    assert relative(triton.sampled(y, x, index, torch.float32), places) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Forward and backward, twice the same bits."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    y, x, values, index, order = (t.cuda() for t in case(300, 190, 230, 0.02, dtype))
    x, values = x.requires_grad_(), values.float().requires_grad_()
    weight = torch.randn(y.shape, device="cuda").to(dtype)
    runs = []
    for _ in range(2):
        out = torch.ops.peftfx.sparse_add(y, x, values, index, order)
        runs.append([out, *torch.autograd.grad(out, [x, values], weight)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, values)]
    want = y.cpu().double() + wide[0] @ dense(wide[1], index.cpu(), 190, 230).t()
    grads = torch.autograd.grad(want, wide, weight.cpu().double())
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for got, expected in zip(runs[0], (want, *grads), strict=True):
        assert relative(got.cpu(), expected) < bound


def test_nothing_is_as_large_as_the_weight() -> None:
    m, n, k = 5, 300, 200
    y, x, values, index, order = case(m, n, k, 0.001, torch.float32)
    with Seen() as seen:
        op.sparse_add(y, x, values, index, order)
        op.sparse_add_backward(y, x, values, index, order, [True, True])
    assert seen.size == m * n < n * k / 10


@given(SIZES, SIZES, st.sampled_from([0.3, 1.0]))
def test_order_by_columns(n: int, k: int, share: float) -> None:
    *_, index, order = case(1, n, k, share, torch.float32)
    places = op.turned(index, n, k)[order]
    assert bool((places[1:] > places[:-1]).all())
    assert torch.equal(places % n * k + places // n, index[order])


def test_no_step_sorts() -> None:
    """The places never move, so that their orders are made with the mask."""
    y, x, values, index, order = case(5, 30, 20, 0.1, torch.float32)
    with Seen() as seen:
        op.sparse_add(y, x, values, index, order)
        op.sparse_add_backward(y, x, values, index, order, [True, True])
    assert "aten::searchsorted" in seen.calls
    assert not seen.calls.keys() & {"aten::sort", "aten::argsort", "aten::topk"}


def test_strides_of_any_kind() -> None:
    """The result is contiguous, and x, y and dY as they come."""
    y, x, values, index, order = case(6, 4, 5, 0.4, torch.float64)
    want = torch.ops.peftfx.sparse_add(y, x, values, index, order)
    back = torch.ops.peftfx.sparse_add_backward(y, x, values, index, order, [True, True])
    y, x = (t.t().contiguous().t() for t in (y, x))
    kept = y.clone()
    found = torch.ops.peftfx.sparse_add(y, x, values, index, order)
    assert torch.allclose(found, want) and found.is_contiguous() and torch.equal(y, kept)
    again = torch.ops.peftfx.sparse_add_backward(y, x, values, index, order, [True, True])
    assert all(torch.allclose(a, b) and a.is_contiguous() for a, b in zip(again, back, strict=True))
    torch.library.opcheck(torch.ops.peftfx.sparse_add.default, (y, x, values, index, order))
