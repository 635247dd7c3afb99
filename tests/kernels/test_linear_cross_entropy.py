"""Losses of a frozen head in chunks, against torch's of whole logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftfx
from benchmarks.compare import peak_on_cpu as peak
from peftfx.errors import LossError
from peftfx.kernels.definition import Defined
from peftfx.kernels.devices import why_plain
from peftfx.kernels.linear_cross_entropy import op
from peftfx.losses import linear_cross_entropy, linear_kl
from tests.helpers import relative

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
SHAPES = [(1, 3, 2), (7, 5, 4), (13, 11, 6), (0, 5, 3)]  # rows, classes, width


class Case:
    """x [M, K], a head [V, K], labels that do not all count, and a teacher of another width."""

    def __init__(
        self, shape: tuple[int, int, int] = (7, 5, 4), dtype: torch.dtype = torch.float64,
        bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        m, v, k = shape

        def made(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

        self.x, self.weight, self.bias = made(m, k), made(v, k), made(v) if bias else None
        self.teacher, self.teacher_weight = made(m, k + 1), made(v, k + 1)
        self.labels = torch.randint(v, (m,), generator=g)
        self.labels[torch.rand(m, generator=g) < 0.3] = -100
        self.counts = self.labels != -100

    def logits(self) -> Tensor:
        """In fp64, of the leaf ``self.wide``."""
        self.wide = self.x.double().requires_grad_()
        shift = None if self.bias is None else self.bias.double()
        return F.linear(self.wide, self.weight.double(), shift)


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(3 * loss.sum(), x)[0]


@given(
    st.sampled_from(SHAPES), st.sampled_from(list(BOUND)), st.booleans(), st.integers(0, 9),
    st.sampled_from([0.0, 0.1]), st.sampled_from([1.0, 0.3]), st.sampled_from([None, 1.5]),
    st.sampled_from(["mean", "sum", "none"]), st.integers(0, 3),
)  # fmt: skip
def test_cross_entropy(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, chunk: int, smoothing: float,
    scale: float, cap: float | None, reduction: Any, seed: int,
) -> None:  # fmt: skip
    c = Case(shape, dtype, bias, seed)
    z = c.logits() * scale
    z = z if cap is None else (z / cap).tanh() * cap
    want = F.cross_entropy(z, c.labels, label_smoothing=smoothing, reduction=reduction)
    x = c.x.requires_grad_()
    loss = linear_cross_entropy(
        x, c.weight, c.labels, bias=c.bias, label_smoothing=smoothing, reduction=reduction,
        scale=scale, softcap=cap, chunk=chunk,
    )  # fmt: skip
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == want.shape
    if not c.counts.any() and reduction == "mean":
        assert loss.isnan() and want.isnan()
        return
    if loss.numel():
        assert relative(loss, want) < BOUND[dtype]
    if len(x):
        assert relative(grad(loss, x), grad(want, c.wide)) < 2 * BOUND[dtype]
        with torch.no_grad():
            assert torch.equal(
                loss.detach(),
                linear_cross_entropy(
                    x, c.weight, c.labels, bias=c.bias, label_smoothing=smoothing,
                    reduction=reduction, scale=scale, softcap=cap, chunk=chunk,
                ),
            )  # fmt: skip


@given(
    st.sampled_from(SHAPES), st.sampled_from(list(BOUND)), st.booleans(), st.integers(0, 9),
    st.sampled_from([0.5, 1.0, 3.0]),
)  # fmt: skip
def test_divergence(
    shape: tuple[int, int, int], dtype: torch.dtype, hidden: bool, chunk: int, temperature: float
) -> None:
    """Of a teacher's logits, and of what its head is given."""
    c = Case(shape, dtype)
    t = F.linear(c.teacher, c.teacher_weight)
    given_ = (c.teacher, c.teacher_weight) if hidden else (t, None)
    logs = [(a / temperature).log_softmax(-1) for a in (c.logits(), t.double())]
    each = temperature**2 * F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    want = (each * c.counts).sum() / c.counts.sum().clamp(min=1)
    x = c.x.requires_grad_()
    loss = linear_kl(
        x, c.weight, given_[0], c.counts, bias=c.bias, teacher_weight=given_[1],
        temperature=temperature, chunk=chunk,
    )  # fmt: skip
    assert relative(loss, want) < BOUND[dtype]
    if len(x) and c.counts.any():
        assert relative(grad(loss, x), grad(want, c.wide)) < 2 * BOUND[dtype]


def test_what_a_teacher_rules_out_adds_nothing() -> None:
    c = Case()
    t = F.linear(c.teacher, c.teacher_weight)
    t[:, 1] = -torch.inf
    loss = linear_kl(c.x.requires_grad_(), c.weight, t, c.counts, bias=c.bias)
    assert loss.isfinite() and bool(grad(loss, c.x).isfinite().all())


def test_gradients_of_the_definition() -> None:
    c = Case((5, 4, 3))
    x = c.x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: linear_cross_entropy(
            x, c.weight, c.labels, label_smoothing=0.1, reduction="none", softcap=2.0, chunk=2
        ),
        x,
    )
    assert torch.autograd.gradcheck(
        lambda x: linear_kl(x, c.weight, c.teacher, c.counts, teacher_weight=c.teacher_weight), x
    )


def test_opcheck() -> None:
    c = Case(dtype=torch.float32)
    x = c.x.requires_grad_()
    torch.library.opcheck(
        torch.ops.peftfx.linear_cross_entropy.default,
        (x, c.weight, c.bias, c.labels, -100, 0.1, 1.0, 0.0, 3, True),
    )
    torch.library.opcheck(
        torch.ops.peftfx.linear_kl.default,
        (x, c.weight, None, c.teacher, c.teacher_weight, None, c.counts, 2.0, 0, True),
    )


def test_accumulated_and_under_autocast() -> None:
    c = Case(dtype=torch.float32)
    halves = [
        linear_cross_entropy(c.x[at], c.weight, c.labels[at], num_items=c.counts.sum())
        for at in (slice(0, 3), slice(3, None))
    ]
    assert torch.allclose(sum(halves), linear_cross_entropy(c.x, c.weight, c.labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(c.x.requires_grad_(), c.weight, c.labels)
        want = F.cross_entropy(F.linear(c.x, c.weight), c.labels)
    assert loss.dtype == torch.float32 and torch.allclose(loss, want, atol=1e-6)
    assert grad(loss, c.x).dtype == torch.float32


def test_under_a_transform() -> None:
    c = Case((4, 5, 3))
    args = (c.weight, None, c.labels, -100, 0.0, 1.0, 0.0, 0, False)
    with Defined():
        taken = torch.func.grad(lambda x: torch.ops.peftfx.linear_cross_entropy(x, *args)[0].sum())
        found = taken(c.x)
    x = c.x.requires_grad_()
    total = linear_cross_entropy(x, c.weight, c.labels, reduction="sum")
    assert torch.allclose(found, grad(total, x) / 3)


def test_refusals() -> None:
    c = Case()
    x = c.x.requires_grad_()
    with pytest.raises(LossError, match="would get none"):
        linear_cross_entropy(x, c.weight.clone().requires_grad_(), c.labels)
    with pytest.raises(LossError, match="labels"):
        linear_cross_entropy(x, c.weight, c.labels[:2])
    with pytest.raises(LossError, match="reduction"):
        linear_cross_entropy(x, c.weight, c.labels, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(LossError, match="tokens"):
        peftfx.linear_kl(x, c.weight, c.teacher[:2])
    (first,) = torch.autograd.grad(
        linear_cross_entropy(x, c.weight, c.labels).square(), x, create_graph=True
    )
    with pytest.raises(LossError, match="first derivative"):
        first.sum().backward()


@pytest.mark.parametrize("chunk", [64, 128])
def test_memory_is_that_of_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logits nor their gradient are whole, whatever the rows."""
    v, k = 4096, 16
    monkeypatch.setattr(op, "PART", 8 * v)
    weight = torch.randn(v, k)

    def ours(m: int) -> int:
        x, labels = torch.randn(m, k, requires_grad=True), torch.randint(v, (m,))
        rows = 3 * m * (k + 4) * 4  # x's gradients, losses, labels
        loss = lambda: linear_cross_entropy(x, weight, labels, chunk=chunk)  # noqa: E731
        return peak(lambda: loss().backward()) - rows

    buffer, parts = chunk * v * 4, 4 * 8 * v * 4
    assert ours(256) < buffer + parts and ours(1024) < buffer + parts < 256 * v * 4
    x, labels = torch.randn(1024, k, requires_grad=True), torch.randint(v, (1024,))
    whole = peak(lambda: F.cross_entropy(F.linear(x, weight), labels).backward())
    assert whole > 2 * 1024 * v * 4


@pytest.mark.parametrize("soft", [False, True])
def test_memory_is_the_same_whatever_rows_and_classes(
    soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a chunk has fewer rows where there are more classes, down to 1024 of them."""
    for v in (1000, 49_152, 128_256, 256_000):
        assert op.rows_of(0, v) * v <= max(op.BUFFER, op.LEAST * v)
    k, buffer, part = 16, 2**17, 2**14
    monkeypatch.setattr(op, "LEAST", 8)
    monkeypatch.setattr(op, "BUFFER", buffer)
    monkeypatch.setattr(op, "PART", part)

    def taken(m: int, v: int) -> int:
        x, weight = torch.randn(m, k, requires_grad=True), torch.randn(v, k)
        labels, teacher = torch.randint(v, (m,)), (torch.randn(m, k), torch.randn(v, k))

        def step() -> None:
            if soft:
                linear_kl(x, weight, teacher[0], teacher_weight=teacher[1]).backward()
            else:
                linear_cross_entropy(x, weight, labels, label_smoothing=0.1).backward()

        return peak(step) - 3 * m * (k + 4) * 4

    held = (1 + soft) * buffer * 4 + 8 * part * 4  # the teacher's logits are there too
    sizes = [(64, 4096), (512, 4096), (64, 16384), (512, 16384)]
    assert all(buffer * 4 <= taken(m, v) <= held < m * v * 4 * 2 for m, v in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing, scale, cap", [(0.0, 1.0, 0.0), (0.1, 0.5, 2.0)])
def test_kernels_by_the_interpreter(
    dtype: torch.dtype, smoothing: float, scale: float, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftfx.kernels.linear_cross_entropy import triton

    monkeypatch.setattr(triton, "BLOCK", 16)
    g = torch.Generator().manual_seed(1)
    z = (4 * torch.randn(6, 45, generator=g)).to(dtype)[:, :37]  # rows of another stride
    z[0, :20] = -torch.inf if not cap else 0
    labels = torch.tensor([30, -100, 0, 36, 7, -100])
    for wanted in (True, False):
        runs = []
        for rows in (op.cross_entropy_rows, triton.cross_entropy):
            logits, losses = z.clone(), torch.full((6,), torch.nan)
            rows(logits, labels, losses, -100, smoothing, scale, cap, wanted)
            runs.append((losses, logits))
        assert torch.allclose(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6, equal_nan=True)
        if wanted:
            assert relative(runs[1][1][1:], runs[0][1][1:]) < BOUND[dtype]
    t, counts = torch.randn(6, 37, generator=g).to(dtype), labels >= 0
    t[:, :17] = -torch.inf
    z = z[:, :37].contiguous()
    z[0] = 0
    runs = []
    for rows in (op.kl_rows, triton.kl):
        logits, losses = z.clone(), torch.full((6,), torch.nan)
        rows(logits, t, counts, losses, 2.0, True)
        runs.append((losses, logits))
    assert torch.allclose(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)
    assert relative(runs[1][1], runs[0][1]) < BOUND[dtype]


def test_a_label_that_is_no_class_is_seen() -> None:
    from peftfx.kernels.linear_cross_entropy import triton

    losses = torch.zeros(2)
    triton.cross_entropy(torch.zeros(2, 4), torch.tensor([4, 1]), losses, -100, 0.0, 1.0, 0.0, True)
    assert losses[0].isnan() and losses[1].isfinite()
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([4, 1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    c = Case((2500, 3001, 64), dtype)
    x, weight, labels = (t.cuda() for t in (c.x, c.weight, c.labels))
    assert why_plain(x) is None
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels, bias=c.bias.cuda(), chunk=1024)
    want = F.cross_entropy(c.logits(), c.labels)
    assert relative(loss.cpu(), want) < BOUND[dtype]
    assert relative(grad(loss, x).cpu(), grad(want, c.wide)) < 2 * BOUND[dtype]
