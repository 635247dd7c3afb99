"""Tables and pictures of benchmarks/README.md, from the JSON: ``python -m benchmarks.report``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import PARTS, Part, Row, part
from benchmarks.store import RESULTS, Found, load

HERE = Path(__file__).parent
KINDS = {"cuda": "a GPU", "cpu": "a CPU"}
ENDING = "<!-- what follows is made by `python -m benchmarks.report` -->"


def write(root: Path) -> None:
    """Writes the README's tables anew, and a picture of each device's roofline."""
    found = load(root)
    drawn = importlib.util.find_spec("matplotlib") is not None
    for device, parts in found.items():
        if drawn and "figures" in parts and "linear" in parts:
            roofline(parts["figures"][1][0].values, parts["linear"], root / device / "roofline.png")
    if not drawn:
        print("no pictures: matplotlib is not installed")
    (HERE / "README.md").write_text(text((HERE / "README.md").read_text(), found))


def text(before: str, found: Found) -> str:
    """The README: what people wrote, down to the marker, and the tables of what was measured."""
    head = before.partition(ENDING)[0]
    return "\n".join([head.rstrip() + "\n", ENDING, "", *missing(found), *tables(found)])


def missing(found: Found) -> list[str]:
    """What has no numbers, said plainly."""
    lines = ["## Not measured yet", ""]
    for kind, words in KINDS.items():
        seen = {name for parts in found.values() for name, (head, _) in parts.items()
                if is_gpu(head) == (kind == "cuda")}  # fmt: skip
        names = [n for n in PARTS if kind in part(n).devices and n not in seen]
        if names:
            lines.append(f"On {words}: {', '.join(f'`{n}`' for n in names)}.")
    return [*lines, ""]


def is_gpu(head: dict[str, Any]) -> bool:
    """Whether the results of a file are a GPU's: a CPU's name says how many threads were used."""
    return not head["device"].endswith("threads")


def tables(found: Found) -> list[str]:
    """A section for each device, a table for each part of it."""
    lines: list[str] = []
    for device, parts in found.items():
        names = [n for n in PARTS if n in parts]
        lines += [f"## {parts[names[0]][0]['device']}", ""]
        if (RESULTS / device / "roofline.png").exists():
            lines += [f"![roofline](results/{device}/roofline.png)", ""]
        for name in names:
            lines += [f"### {name}", "", *section(part(name), *parts[name])]
    return lines


def section(one: Part, head: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What a part is about, what it was measured with, and its table."""
    versions = ", ".join(f"{n} {head[n]}" for n in ("torch", "triton", "peft", "transformers")
                         if head.get(n, "-") != "-")  # fmt: skip
    lines = [one.about, ""]
    if one.target:
        lines += [f"Aim: {one.target}.", ""]
    lines += [f"Commit {head['commit']}, {versions}, Python {head['python']}.", ""]
    lines += table(rows)
    reasons = {f"{name}: {why}" for row in rows for name, why in row.missing.items()}
    return [*lines, "", *(f"No numbers for {reason}." for reason in sorted(reasons)), ""]


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each case and way: the number, over what it is divided by where there is that."""
    names = list(dict.fromkeys(n for row in rows for n in row.values))
    extra = [
        ("roofline", any(r.least is not None for r in rows)),
        ("MB", any(r.megabytes for r in rows)),
        ("chosen", any(r.chosen for r in rows)),
        ("worst error", any(r.errors for r in rows)),
    ]
    heads = ["case", "", *names, *(name for name, there in extra if there)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row.case}, {row.unit}", row.way, *(cell(row, name) for name in names)]
        if extra[0][1]:
            cells.append("" if row.least is None else number(row.least))
        if extra[1][1]:
            cells.append(", ".join(f"{n} {v:.0f}" for n, v in row.megabytes.items()))
        if extra[2][1]:
            cells.append(row.chosen)
        if extra[3][1]:
            cells.append(f"{max(row.errors.values()):.1e}" if row.errors else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell(row: Row, name: str) -> str:
    """``time (ratio)``."""
    if name not in row.values:
        return "-"
    value, over = row.values[name], row.values.get(row.over or "")
    return number(value) if over is None or name == row.over else (
        f"{number(value)} ({value / over:.2f})"
    )  # fmt: skip


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def roofline(rates: dict[str, float], linear: tuple[Any, Iterable[Row]], path: Path) -> None:
    """Operations a second over operations a byte: what the device allows, and what was reached."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    every = list(linear[1])
    half = any("bfloat16" in row.case for row in every)  # else it was not worth measuring there
    dtype, peak = ("bfloat16", rates["tflops"]) if half else ("float32", rates["tflops_fp32"])
    memory = rates["gigabytes"] / 1e3
    knee = peak / memory
    axes.plot([1, knee, 100 * knee], [memory, peak, peak], color="black", label="what there is")
    for name in ("peftfx", "peft", "unsloth's order"):
        rows = [r for r in every if name in r.values and r.work and dtype in r.case]
        axes.scatter(
            [r.work["flops"] / r.work["bytes"] for r in rows],
            [r.work["flops"] / r.values[name] / 1e9 for r in rows], s=14, label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved",
             ylabel="TFLOP/s", title=f"linears with their updates, {dtype}")  # fmt: skip
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
