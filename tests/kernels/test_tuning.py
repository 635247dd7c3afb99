"""Tuning: bounded, right before it is fast, kept on disk, and read by what chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfx.cli import kernels as cli
from peftfx.errors import GraphError, SpecError
from peftfx.kernels import measured, rates, timing
from peftfx.kernels.devices import Device, computes, describe
from peftfx.kernels.low_rank_linear import tune
from peftfx.kernels.low_rank_linear.calls import Operands, Sizes, drawn
from peftfx.kernels.low_rank_linear.configs import Shape, config
from peftfx.kernels.measured import Table
from peftfx.kernels.timing import Wall
from peftfx.passes.claims import cost, measure

CPU = torch.device("cpu")
SHAPE = Shape(20, 17, 33, 5, torch.float32, drops=True)
AXES = {"fwd": {"block_m": (64,), "block_n": (64,)}, "dsb": {"parts": (1, 2)}}


@pytest.fixture(autouse=True)
def few_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(tune, "AXES", AXES)
    monkeypatch.setattr(timing, "WARM", 0)
    monkeypatch.setenv("PEFTFX_CACHE", str(tmp_path))
    measured.table.cache_clear()
    config.cache_clear()
    yield
    measured.table.cache_clear()
    config.cache_clear()


def operands(**sizes: Any) -> Operands:
    return Operands.of(
        Sizes(**{"rows": 20, "k": 17, "outs": (33,), "rank": 5, "drops": True, **sizes}),
        torch.float32, drawn(CPU),
    )  # fmt: skip


def interpreter() -> Device:
    found = describe(CPU)
    assert found is not None
    return found


def test_the_faster_tile_is_found_and_then_used(tmp_path: Path) -> None:
    """In the interpreter a program costs what its instructions do: fewer programs are faster."""
    found = {t.kernel: t for t in tune.tune(interpreter(), operands(), Wall(), rounds=1)}
    best = found["fwd"].best
    assert set(found) == {"fwd", "dsb"} and (best.block_m, best.block_n) == (64, 64)
    assert found["fwd"].seconds < found["fwd"].shipped_seconds and not found["fwd"].failures
    key = found["fwd"].key
    assert key == f"fwd/{SHAPE.key}" and config("fwd", interpreter(), SHAPE) != best
    path = measured.cached_file("interpreter")
    measured.write(path, "interpreter", Table(tiles={key: vars(best)}))
    assert path.parent == tmp_path and not list(tmp_path.glob("tmp*"))
    measured.table.cache_clear()
    config.cache_clear()
    assert config("fwd", interpreter(), SHAPE) == best
    assert config("fwd", interpreter(), replace(SHAPE, k=18)) != best  # another class


def test_it_is_bounded() -> None:
    trials = [t.trials for t in tune.tune(interpreter(), operands(), Wall(), trials=1, rounds=1)]
    assert trials == [2, 2]  # the one to start from, and one more
    assert not list(tune.tune(interpreter(), operands(), Wall(), deadline=0.0))


def test_a_wrong_tile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tune.results

    def broken(operands: Operands, run: Any) -> list[torch.Tensor]:
        got = given(operands, run)
        if run.config("fwd", SHAPE).block_m == 64:
            got[0][3, 4] += 1.0
        return got

    monkeypatch.setattr(tune, "results", broken)
    found = {t.kernel: t for t in tune.tune(interpreter(), operands(), Wall(), rounds=1)}
    assert found["fwd"].best.block_m == 16
    assert any("result 0 (20, 33) is off by" in why for why in found["fwd"].failures.values())


def test_a_tile_that_takes_the_kernel_out_of_use_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "AXES", {"fwd_descriptor": {"block_m": (64,)}})
    case = Operands.of(Sizes(70, 16, (24, 32), 5), torch.bfloat16, drawn(CPU))
    (found,) = tune.tune(interpreter(), case, Wall(), rounds=1)
    assert found.best.block_m == 16
    assert list(found.failures.values()) == ["with it the kernel is not used"]


def test_wrong_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tune.results
    monkeypatch.setattr(tune, "results", lambda *args: [t * 1.01 for t in given(*args)])
    with pytest.raises(GraphError, match="wrong before anything was tuned: result 0"):
        list(tune.tune(interpreter(), operands(), Wall(), rounds=1))


@pytest.mark.parametrize("sizes", [{"outs": (24, 8), "drops": False}, {"weight": False}, {}])
def test_exact_is_the_kernels_reference(sizes: dict[str, Any]) -> None:
    case = operands(**sizes)
    run = tune.Alone(interpreter())
    assert tune.verify(tune.results(case, run), tune.exact(case)) is None
    case.B[0].mul_(1.01)
    wrong = tune.verify(tune.results(case, run), tune.exact(operands(**sizes)))
    assert wrong is not None and wrong.startswith("result 0")


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates, and times of every form, which the cost model then goes by."""
    monkeypatch.setattr(measure, "rates", lambda device, rounds: rates.rates(device, 1, 64))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cli.tune(["40:24", "40:24,32"], rows="100", rank=3, dtype="float32", minutes=1.0, trials=1)
    device = computes(CPU)
    assert device is not None
    content = json.loads(measured.cached_file(device.name).read_text())
    assert content["device"] == device.name and content["torch"] == torch.__version__
    assert set(content["calls"]) == {
        f"low_rank_{op}/float32/m128/k40/n{n}/r{r}/x{x}"
        for op, n, r, x in (("linear", 24, 3, 1), ("backward", 24, 3, 1),
                            ("linear_group", 56, 6, 2), ("group_backward", 56, 6, 2))
    }  # fmt: skip
    assert all(set(c) == {"accumulate", "folded", "definition"} for c in content["calls"].values())
    assert "accumulate" in capsys.readouterr().out
    _, args = next(
        iter(operands(rows=100, k=40, outs=(24,), rank=3, drops=False).ops(torch.empty(0)).items())
    )
    prices = cost.prices(cost.Call.of("low_rank_linear", args), device)
    assert {p.source for p in prices.values()} == {"measured"}
    other, _ = operands().ops(torch.empty(0)).items()
    prices = cost.prices(cost.Call.of(*other), device)
    assert {p.source for p in prices.values()} == {"roofline, measured rates"}
    with pytest.raises(SpecError, match="write K:N"):
        cli.tune(["4096"])


def test_a_broken_table_is_an_error(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"tiles": {}}'):
        path = tmp_path / "broken.json"
        path.write_text(text)
        with pytest.raises(SpecError, match="delete the file"):
            measured.read(path)


def test_shipped_tables_are_measurements() -> None:
    """Every table names the commit and the versions that it was measured with."""
    for path in measured.SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert set(content) == {
            "device", "commit", "torch", "triton", "figures", "tiles", "calls"
        }  # fmt: skip
        assert measured.slug(content["device"]) == path.stem and content["commit"]


def test_the_list_of_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    cli.kernels(target="", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["low_rank_linear"]["claims"][:2] == ["triton", "opaque"]
    assert found["ops"]["low_rank_linear"]["schema"].startswith("peftfx::low_rank_linear(Tensor x")
    assert set(found["targets"]) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert found["targets"]["sm_90"]["fwd"]["bfloat16"][0]["config"]["block_m"] == 64
    taken = found["resources"]["sm_90:bfloat16"]
    assert all({"registers", "spills", "shared_memory"} <= set(t) for t in taken.values())
    cli.kernels(target="gfx942", as_json=False)
    shown = capsys.readouterr().out
    assert "gfx942" in shown and "sm_90" not in shown
