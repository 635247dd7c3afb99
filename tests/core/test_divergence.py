"""The chunked divergence, against the formula at once, and what it holds in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftfx.divergence import kl


def formula(s: Tensor, t: Tensor, rows: Tensor, temperature: float) -> Tensor:
    p = F.softmax(t[rows] / temperature, -1)
    each = (p * (p.log() - F.log_softmax(s[rows] / temperature, -1))).sum(-1)
    return temperature**2 * (each.mean() if len(each) else each.sum())


@given(
    shape=st.sampled_from([(1, 3), (7, 5), (3, 4, 6), (2, 11, 9)]),
    chunk=st.integers(1, 24),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_equals_the_formula(
    shape: tuple[int, ...], chunk: int, temperature: float, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.rand(shape[:-1], generator=generator) < 0.6
    t[~rows] = torch.nan  # what does not count is not looked at
    s.requires_grad_()
    ours, want = kl(s, t, rows, temperature, chunk), formula(s, t, rows, temperature)
    assert torch.allclose(ours, want, rtol=1e-9, atol=1e-12)
    (mine,) = torch.autograd.grad(3 * ours, s)
    (theirs,) = torch.autograd.grad(3 * want, s)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert bool((mine[~rows] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    s, t = (torch.randn(3, 7, 33).to(dtype) for _ in range(2))
    rows = torch.ones(3, 7, dtype=torch.bool)
    s.requires_grad_()
    ours = kl(s, t, rows, 2.0, 4)
    assert ours.dtype == torch.float32
    double = s.detach().double().requires_grad_()
    want = formula(double, t.double(), rows, 2.0)
    assert torch.allclose(ours.double(), want, rtol=1e-5)
    ours.backward(), want.backward()
    assert s.grad is not None and double.grad is not None and s.grad.dtype == dtype
    assert torch.allclose(s.grad.double(), double.grad, rtol=1e-2, atol=1e-6)


class Memory(TorchDispatchMode):
    """The most bytes that storages made inside the block hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
            if storage is None or storage._cdata in self.known | inputs:
                continue
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(loss: Callable[[Tensor], Tensor], logits: Tensor) -> int:
    gc.collect()
    with Memory() as memory:
        loss(logits.requires_grad_()).backward()
    return memory.peak


def test_memory_is_that_of_a_chunk() -> None:
    rows, classes, chunk = 512, 1000, 32
    s, t = (torch.randn(rows, classes).bfloat16() for _ in range(2))
    every = torch.ones(rows, dtype=torch.bool)
    gradient, of_chunk = 2 * rows * classes, 4 * chunk * classes
    ours = peak(lambda x: kl(x, t, every, 2.0, chunk), s.clone())
    whole = peak(lambda x: formula(x.float(), t.float(), every, 2.0), s.clone())
    assert gradient <= ours <= gradient + 6 * of_chunk
    assert whole > 4 * ours
