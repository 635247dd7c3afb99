"""The comparison's table, its results as JSON, and its plot, from what the runs left."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- comparison -->", "<!-- end of comparison -->"
MISSING = "not measured"


def spread(values: list[float], seeds: int) -> str:
    """The mean, and from where to where; how many seeds, where some are missing."""
    if not values:
        return MISSING
    short = "" if len(values) == seeds else f", {len(values)} of {seeds} seeds"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}{short})"


def ratio(times: list[float | None] | None, base: list[float] | None) -> str:
    """The median over the rounds of a time over the base's in the same round."""
    if times is None or base is None:
        return MISSING
    pairs = [(t, b) for t, b in zip(times, base, strict=True) if t is not None]
    return f"{statistics.median(t / b for t, b in pairs):.2f}" if pairs else "cannot be merged"


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    head = (
        "method", "family", "accuracy", "shifted", "recall@1", "MRR", "trained", "adapter",
        "step", "unmerged", "merged", "memory",
    )  # fmt: skip
    times, seeds = results["times"], len(results["sizes"]["seeds"])
    frozen = times["frozen"] if times else {}
    base = results["base"]
    lines = [head, ("---",) * len(head)]
    similar = (f"{base[key]:.3f}" for key in ("recall", "mrr"))
    lines.append(("base", "", "", "", *similar, *[""] * 6))
    for name, found in results["methods"].items():
        of = (times or {}).get(name)
        lines.append(
            (
                f"[{name}](specs/{name}.yaml)",
                found["family"],
                *(spread(found[key], seeds) for key in ("accuracy", "shift", "recall", "mrr")),
                f"{found['trainable']:,}" if found["accuracy"] else MISSING,
                f"{found['adapter_bytes'] / 1e6:.2f} MB" if found["accuracy"] else MISSING,
                *(
                    ratio(of and of[key], frozen.get("step" if key == "step" else "unmerged"))
                    for key in ("step", "unmerged", "merged")
                ),
                f"{of['peak'] / 1e6:.0f} MB" if of else MISSING,
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(results: dict[str, Any]) -> str:
    """What the README says of the results: how they were got, and the table."""
    s = results["sizes"]
    timed = results["timed"]
    notes = [
        f"{s['classes']} packages, {s['train']} docstrings of functions each to train on for "
        f"{s['epochs']} epochs of {s['tokens']} tokens a text; accuracy on {s['test']} each of "
        f"functions in other modules, *shifted* on {s['shift']} each of classes in those modules. "
        f"Mean over seeds {', '.join(map(str, s['seeds']))}, and from where to where.",
        f"recall@1 and MRR: a first sentence looks for the rest of its docstring among "
        f"{s['pairs'] * s['classes']} held-out ones, by the base with the adapter and without the "
        "head. *trained* and *adapter* have the head in them.",
        "step, unmerged and merged: time over that of the frozen base, which has one norm and the "
        "head trained, for a training step and for inference. memory: the most that a training "
        "step holds at once, weights and optimizer with it.",
        (
            f"Times: {timed['device']}, torch {timed['torch']}, {s['lower_timed']}, batches of 32; "
            f"medians over {s['rounds']} interleaved rounds."
        )
        if timed
        else "Times are not measured yet: `make compare` on a quiet machine does so.",
    ]
    return "\n".join((BEGIN, *(f"{note}\n" for note in notes), table(results), END))


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy against what trains, and against what is left of the base's own task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    families = sorted({found["family"] for found in results["methods"].values()})
    for name, found in results["methods"].items():
        if not found["accuracy"]:
            continue
        colour = f"C{families.index(found['family'])}"
        y = statistics.mean(found["accuracy"])
        low, high = y - min(found["accuracy"]), max(found["accuracy"]) - y
        for axes, x in (
            (left, found["trainable"]),
            (right, statistics.mean(found["recall"])),
        ):
            axes.errorbar(x, y, [[low], [high]], fmt="o", color=colour, capsize=2)
            axes.annotate(
                name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour
            )
    left.set(xscale="log", xlabel="parameters that train, with the head", ylabel="accuracy")
    right.axvline(results["base"]["recall"], color="grey", linestyle=":")
    right.set(xlabel="recall@1 of sentence similarity (dotted: the base)")
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=f"C{i}", label=family)
        for i, family in enumerate(families)
    ]
    left.legend(handles=handles, fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(results: dict[str, Any], directory: Path) -> None:
    """Writes ``results/compare.json`` and its plot, and the table into ``README.md``."""
    plot(results, directory / "results" / "compare.png")
    file = directory / "results" / "compare.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    readme = directory / "README.md"
    text = readme.read_text() if readme.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    readme.write_text(before + section(results) + rest.partition(END)[2])
