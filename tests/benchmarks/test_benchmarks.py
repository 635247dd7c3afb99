"""The benchmark's harness at tiny sizes: every part runs, and goes on where it stopped."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, run, store, variants
from benchmarks.parts import first_step, linear, tests
from benchmarks.peers import Ordered
from benchmarks.registry import PARTS, Row, Setting, part
from benchmarks.store import RESULTS, Results, load, read
from benchmarks.verify import Mismatch, dropped, gate
from peftfx.kernels import timing

TINY = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "WARM", 1)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", PARTS)
def test_a_part(name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plumbing that only a GPU would reveal as broken is a defect: all parts run here, tiny."""
    if device == "cuda" and device not in part(name).devices:
        pytest.skip("it is for CPUs")
    monkeypatch.setattr(first_step, "NAMES", ("peftfx",))
    assert not run.measure(name, Setting(torch.device(device), tiny=True), tmp_path)
    (path,) = tmp_path.glob(f"*/{name}.json")
    head, rows = read(path)
    assert head["part"] == name and head["size"] == "tiny" and head["commit"] and head["torch"]
    assert rows and all(v > 0 for row in rows for n, v in row.values.items() if "adds" not in n)
    for row in rows:
        assert row.over is None or row.over in row.values or name == "first_step"
        if "peftfx" in row.values and name != "first_step":
            assert row.errors["peftfx"] >= 0
    text = "\n".join(report.section(part(name), head, rows))
    assert all(f"| {row.case}, {row.unit} | {row.way} | " in text for row in rows)


def test_the_part_of_tests_has_all_that_are_for_a_gpu() -> None:
    """Those of the benchmark itself are left out: its parts are what runs next."""
    found = {
        path.stem
        for path in (tests.ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu|import.*\bDEVICES", path.read_text())
    }
    assert found - {"test_benchmarks"} == set(tests.FILES)


def test_failing_tests_are_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="test_none"):
        tests._file(TINY, "test_none")


def test_a_failing_case_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad() -> list[Row]:
        raise ZeroDivisionError("oh")

    given = {"bad": bad, "good": lambda: [Row("good", {"frozen": 1.0})]}
    monkeypatch.setattr(linear, "cases", lambda setting: given)
    part.cache_clear()
    try:
        assert run.measure("linear", TINY, tmp_path) == ["linear, bad: ZeroDivisionError"]
        assert "Traceback" in capsys.readouterr().err
        assert len(list(tmp_path.glob("*/linear.json"))) == 1
    finally:
        part.cache_clear()


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run._run("slow", [sys.executable, "-c", code], minutes=2 / 60)
    assert not run._run("wrong", [sys.executable, "-c", "raise SystemExit(3)"], minutes=1)
    time.sleep(2.5)
    assert not list(tmp_path.iterdir())


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def cases(setting: Setting) -> dict[str, Any]:
        def row(name: str) -> list[Row]:
            made.append(name)
            if name == "wrong":
                raise Mismatch("off")
            if name == "missing":
                raise ModuleNotFoundError("peft not installed")
            return [Row(name, {"frozen": 1.23456, "peftfx": 2.0}, way) for way in ("one", "two")]

        return {name: lambda name=name: row(name) for name in ("a", "wrong", "missing", "b")}

    monkeypatch.setattr(linear, "cases", cases)
    part.cache_clear()
    try:
        assert not run.measure("linear", TINY, tmp_path, minutes=0) and not made  # no time at all
        failed = run.measure("linear", TINY, tmp_path)
        assert failed == ["linear, wrong: off", "linear, missing: peft not installed"]
        made.clear()
        run.measure("linear", TINY, tmp_path)
        assert made == ["wrong", "missing"]  # what is done stays
        ((_, rows),) = [found["linear"] for found in load(tmp_path).values()]
        assert [r.case for r in rows] == ["a", "a", "b", "b"] and rows[0].values["frozen"] == 1.235
        made.clear()
        run.measure("linear", TINY, tmp_path, again=True)
        assert made[0] == "a"
    finally:
        part.cache_clear()


def test_a_wrong_variant_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the case that it is in: what it is compared with may be as wrong."""
    monkeypatch.setattr(linear, "ALL", ("frozen", "unsloth's order"))
    monkeypatch.setattr(
        variants, "Ordered", lambda sites, name, rank, s: Ordered(sites, name, rank, 1.5 * s)
    )
    failed = run.measure("linear", TINY, tmp_path)
    assert len(failed) == 2 and not list(tmp_path.glob("*/*.json"))
    assert all("unsloth's order: result 0 is off by" in why for why in failed)


def test_another_commit_starts_anew(tmp_path: Path) -> None:
    for commit in ("one", "two"):
        setting = Setting(torch.device("cpu"), tiny=True, commit=commit)
        found = Results(tmp_path, part("marks"), store.environment(setting), again=False)
        assert not found.rows
        found.add([Row("a mark", {"plain": 1.0}, over=None)])
        assert found.done("a mark") and not found.done("b")


def test_the_gate() -> None:
    right = torch.randn(40, 30, dtype=torch.float64)
    assert gate("v", [right.bfloat16()], [right]) < 1e-2
    with pytest.raises(Mismatch, match=r"v: result 0 is off by 0.1, above 0.02"):
        gate("v", [1.1 * right.bfloat16()], [right])
    wrong = right.clone()
    wrong[3, 4] = float("nan")
    with pytest.raises(Mismatch, match="off by nan"):
        gate("v", [wrong.float()], [right])
    update = torch.randn(400, 30)
    for p, drawn in ((0.1, 0.1), (0.1, 0.4)):
        kept = (torch.rand(400, 30) >= drawn) / (1 - drawn)
        if p == drawn:
            assert 0.8 < dropped("v", right[0] + update * kept, right[0] + update, update, p) < 1.2
            continue
        with pytest.raises(Mismatch, match="of the noise"):
            dropped("v", update * kept, update, update, p)


def test_the_command(tmp_path: Path) -> None:
    """One part in its own process, then its table; tiny numbers never go beside real ones."""
    given = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--part", "figures"]
    assert run.main([*given, "--results", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*/figures.json"))) == 1
    with pytest.raises(SystemExit):
        run.main(given)
    rates = run.rates(tmp_path, TINY)
    setting = Setting(TINY.device, True, rates=rates)
    assert rates["tflops"] > 0
    assert setting.floor(1e12, 1.0, torch.float32) == pytest.approx(1e3 / rates["tflops_fp32"])
    assert TINY.floor(1e12, 1.0, torch.float32) is None


def test_the_readme_is_the_results() -> None:
    """``python -m benchmarks.report`` writes it; nobody else."""
    path = report.HERE / "README.md"
    assert path.read_text() == report.text(path.read_text(), load(RESULTS))


def test_what_is_not_measured_is_said() -> None:
    assert "On a GPU: `tests`, `figures`, `products`" in "\n".join(report.missing({}))
    head = {"device": "NVIDIA H200"}
    seen = {"h200": {n: (head, []) for n in PARTS}}
    assert "On a GPU" not in "\n".join(report.missing(seen))


def test_results_are_whole() -> None:
    """What is committed was measured at real sizes, and says with what."""
    for device, parts in load(RESULTS).items():
        for name, (head, rows) in parts.items():
            assert name in PARTS and rows and head["size"] == "full"
            assert store.measured.slug(head["device"]) == device and head["commit"]


def test_the_picture(tmp_path: Path) -> None:
    row = Row("a, bfloat16", {"frozen": 1.0, "peftfx": 1.1}, work={"flops": 1e9, "bytes": 1e6})
    rates = {"gigabytes": 4000.0, "tflops": 700.0, "tflops_fp32": 50.0}
    report.roofline(rates, ({}, [row]), tmp_path / "x" / "roofline.png")
    assert (tmp_path / "x" / "roofline.png").stat().st_size > 5000


def test_no_picture_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "README.md").write_text("About.\n")
    report.write(tmp_path)
    assert capsys.readouterr().out == "no pictures: matplotlib is not installed\n"
    assert (tmp_path / "README.md").read_text().startswith(f"About.\n\n{report.ENDING}\n")


def test_two_devices_of_a_kind(tmp_path: Path) -> None:
    """Each has its own section; what one of them measured is not said to be missing."""
    for name in ("One CPU, 2 threads", "Other CPU, 4 threads"):
        head = {**store.environment(TINY), "device": name}
        Results(tmp_path, part("marks"), head, again=False).add([Row("a mark", {"plain": 1.0})])
    found = load(tmp_path)
    text = report.text("", found)
    assert text.index("## One CPU") < text.index("## Other CPU") and text.count("### marks") == 2
    (line,) = [at for at in text.splitlines() if at.startswith("On a CPU")]
    assert "marks" not in line and "`linear`" in line


def test_tables_have_ratios(tmp_path: Path) -> None:
    row = Row(
        "a", {"frozen": 2.0, "peftfx": 2.1}, "forward", least=1.0,
        megabytes={"peftfx": 12.3}, errors={"peftfx": 1e-3}, missing={"peft": "not installed"},
    )  # fmt: skip
    lines = report.section(part("linear"), {"commit": "abc", "python": "3"}, [row])
    assert "| a, ms | forward | 2 | 2.1 (1.05) | 1 | peftfx 12 | 1.0e-03 |" in lines
    assert "No numbers for peft: not installed." in lines
    assert json.dumps(store._written(row))
