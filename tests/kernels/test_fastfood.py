"""The Fastfood transform, against its matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftfx.kernels.fastfood import op


def sylvester(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), h)
    return h


@pytest.mark.parametrize(("dimension", "size"), [(1, 5), (4, 9), (5, 8), (7, 40), (16, 16)])
def test_equal_to_its_matrices(dimension: int, size: int) -> None:
    seed = torch.tensor(12)
    theta = torch.randn(dimension, dtype=torch.float64, requires_grad=True)
    length = 2 ** math.ceil(math.log2(dimension))
    blocks = math.ceil(size / length)
    signs, normal, order = op.drawn(seed, 0, blocks, length, theta.device)
    assert set(signs.unique().tolist()) <= {-1, 1}
    h = sylvester(length)
    rows = []
    for b in range(blocks):
        permutation = torch.eye(length, dtype=torch.float64)[order[b]]
        rows.append(
            h @ torch.diag(normal[b]) @ permutation @ h @ torch.diag(signs[b].to(torch.float64))
        )
    matrix = torch.cat(rows)[:size, :dimension] / math.sqrt(length * size)
    v = torch.ops.peftfx.fastfood(theta, seed, size)
    assert torch.allclose(v, matrix @ theta)
    grad = torch.randn(size, dtype=torch.float64)
    (got,) = torch.autograd.grad(v, theta, grad)
    assert torch.allclose(got, matrix.t() @ grad)


def test_columns_are_unit_vectors_on_average() -> None:
    columns = torch.stack(
        [torch.ops.peftfx.fastfood(e, torch.tensor(3), 6000) for e in torch.eye(20)]
    )
    gram = columns @ columns.t()
    assert abs(gram.diagonal().mean().item() - 1) < 0.05
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 0.1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, grad, seed = torch.randn(6), torch.randn(100), torch.tensor(5)
    whole = op.fastfood(theta, seed, 100), op.fastfood_backward(grad, seed, 6)
    monkeypatch.setattr(op, "CHUNK", 16)
    parts = op.fastfood(theta, seed, 100), op.fastfood_backward(grad, seed, 6)
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1], atol=1e-6)


def test_opcheck() -> None:
    theta = torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.peftfx.fastfood.default, (theta, torch.tensor(5), 20))
