"""The kernels where they are used: in compiled models that train.

``-m gpu``: every form through Inductor on a GPU. Without one: through Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.tune import exact, results, verify
from peftfx.passes.claims import Definition
from peftfx.passes.claims.kernels import Triton
from tests.helpers import relative
from tests.kernels.adapted import WIDTH, adapted, interpreted, step
from tests.kernels.low_rank_cases import runner

FORMS = ("triton", "opaque", "accumulate")


def agree(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    off = [relative(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(o < bound for o in off), off


@pytest.mark.parametrize("situation", ["checkpoints", "autocast"])
def test_interpreted(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed in the backward, with dropout; and with 16-bit products of 32-bit tensors."""
    autocast, found = situation == "autocast", []
    x, claims = torch.randn(6, WIDTH), [Triton(anywhere=True), Definition()]
    for form in ("definition", "triton"):
        monkeypatch.setenv("PEFTFX_FORMS", form)
        choices: list[Any] = []
        model, _ = adapted(
            interpreted(claims, choices), dropout=0.0 if autocast else 0.2,
            checkpoints=not autocast, blocks=1,
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(model, model, x))
        assert {c.claim for c in choices if c.op.startswith("low_rank")} == {form}
    agree(*found, 0.15 if autocast else 1e-4)  # the interpreter cuts off where it should round


def compiled(form: str, x: Tensor, seeds: int, **options: Any) -> tuple[list[Any], Any]:
    """Steps of a model through Inductor, in one form, and its backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTFX_FORMS", form)
        torch._dynamo.reset()
        model, backend = adapted(device="cuda", **options)
        found = []
        for seed in range(seeds):
            torch.compiler.cudagraph_mark_step_begin()
            found.append([t.clone() for t in step(model, model, x, seed)])
    taken = {c.claim for r in backend.reports for c in r.choices if c.op.startswith("low_rank")}
    assert taken == {form}
    return found, backend


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_training(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, at numbers of rows that were not seen before, none of them a recompile."""
    monkeypatch.setenv("PEFTFX_FORMS", form)
    model, backend = adapted(device="cuda", dynamic=True)
    for rows in (3, 70, 513, 64):
        x = torch.randn(rows, WIDTH, device="cuda")
        agree(*(step(run, model, x) for run in (model, model._orig_mod)), 1e-3)
    assert len(backend.reports) == 1
    assert {c.claim for c in backend.reports[0].choices} == {form}


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_dropout_autocast_and_checkpoints(form: str, dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(130, WIDTH, device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        (got,), _ = compiled(form, x, 1, dropout=0.2, checkpoints=True, blocks=1)
        (expected,), _ = compiled("definition", x, 1, dropout=0.2, checkpoints=True, blocks=1)
    agree(got, expected, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graphs(form: str) -> None:
    """``mode="reduce-overhead"`` records forward and backward, and replays are right."""
    from torch._dynamo.utils import counters
    from torch._inductor import cudagraph_trees

    x = torch.randn(70, WIDTH, device="cuda")
    expected, _ = compiled("definition", x, 5, dropout=0.2)
    counters.clear()
    found, _ = compiled(form, x, 5, dropout=0.2, mode="reduce-overhead")
    for got, wanted in zip(found, expected, strict=True):
        agree(got, wanted, 1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_manager(0, create_if_none_exists=False)
    assert manager is not None and manager.roots


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTFX_FORMS", form)
    model, _ = adapted(device="cuda", dynamic=True)
    x = torch.randn(0, WIDTH, device="cuda", requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (0, WIDTH) and x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in model._orig_mod.parameters()
               if p.requires_grad)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [Sizes(300_000, 8192, (16,), 8), Sizes(300_000, 16, (8192,), 8)])
def test_beyond_two_billion_elements(sizes: Sizes) -> None:
    """x, or y, has more elements than 31 bits count."""
    case = Operands.of(sizes, torch.bfloat16, drawn(torch.device("cuda")))
    got = results(case, runner("cuda"))
    tail = slice(sizes.rows - 64, sizes.rows)
    last = Operands(case.x[tail], case.weights, case.biases, case.A, case.B, case.scales,
                    [dy[tail] for dy in case.dys])  # fmt: skip
    expected = exact(last)
    rows = [t[tail] if t.shape[0] == sizes.rows else t for t in got]
    assert verify(rows[:3], expected[:3]) is None  # y, S, dX
    low = case.x.float().t() @ (case.dys[0].float() @ case.B[0] * case.scales[0])
    assert relative(got[3], low.t()) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [Sizes(4096), Sizes(2048, outs=(4096, 1024, 1024)),
                                   Sizes(2048, 14336, drops=True)])  # fmt: skip
def test_same_bits_at_real_sizes(sizes: Sizes) -> None:
    case = Operands.of(sizes, torch.bfloat16, drawn(torch.device("cuda")))
    one, two = (results(case, runner("cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("drops", [False, True])
def test_rows_far_apart(drops: bool) -> None:
    """Rows of x and dY that begin more than 2³¹ elements apart: offsets are of 64 bits."""

    def far(width: int) -> Tensor:
        memory = torch.empty(2 * 2**30 + 99)  # untouched, and so not taken, but for three rows
        return memory.as_strided((3, width), (2**30 + 5, 1)).copy_(torch.randn(3, width))

    near = Operands.of(Sizes(3, 7, (5,), 2, drops=drops), torch.float32, drawn(torch.device("cpu")))
    apart = replace(near, x=far(7), dys=[far(5)])
    near = replace(near, x=apart.x.clone(), dys=[apart.dys[0].clone()])
    assert verify(results(apart, runner("cpu")), exact(near)) is None
