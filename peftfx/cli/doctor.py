"""``peftfx doctor``: what is installed, and whether adapters are safe here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from peftfx.cli import app, console

TESTED = ("2.11", "2.13", "2.15")


def report() -> dict[str, Any]:
    """Versions, devices and problems of this installation."""
    versions = {}
    for name in ("peftfx", "torch", "transformers", "peft", "triton", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    problems = []
    if not versions["torch"].startswith(TESTED):
        problems.append(f"torch {versions['torch']} is untested; tested: {', '.join(TESTED)}")
    if shutil.which("g++") is None and not torch.cuda.is_available():
        problems.append("no g++: Inductor cannot compile for the CPU; use lower='aot_eager'")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices or ["cpu"],
        "problems": problems,
    }


@app.command()
def doctor(
    bypass: Annotated[bool, typer.Option(help="Try every way to lose an adapter.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions and problems; with --bypass, the table of ways to lose an adapter."""
    if not bypass:
        found = report()
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            for name, version in found["versions"].items():
                console.print(f"{name:14}{version}")
            console.print(f"{'devices':14}{', '.join(found['devices'])}")
            for problem in found["problems"]:
                console.print(f"problem: {problem}", style="red")
        raise typer.Exit(1 if found["problems"] else 0)
    from peftfx.bypass import run

    rows = list(run())
    if as_json:
        print(json.dumps([asdict(r) for r in rows], indent=2))
    else:
        table = Table("situation", "fullgraph", "verdict", "detail")
        for row in rows:
            style = "" if row.holds else "red"
            table.add_row(
                row.situation, str(row.fullgraph), row.verdict, row.detail[:80], style=style
            )
        console.print(table)
        lost = sum(not r.holds for r in rows)
        console.print(f"{len(rows)} runs, {lost} with the wrong result")
    raise typer.Exit(0 if all(r.holds for r in rows) else 1)


@app.command()
def bisect(
    command: Annotated[list[str], typer.Argument(help="What fails, e.g.: python train.py")],
) -> None:
    """Find the optional pass that makes COMMAND fail, by running it with passes skipped."""
    from peftfx import engine
    from peftfx.passes import JOINT, PARTS, PIPELINE

    def works(skip: frozenset[str]) -> bool:
        environment = {**os.environ, "PEFTFX_SKIP": ",".join(sorted(skip))}
        code = subprocess.run(command, env=environment, check=False).returncode
        without = f"without {', '.join(sorted(skip))}" if skip else "with all passes"
        console.print(f"{without}: exit status {code}")
        return code == 0

    culprit = engine.bisect(works, (*PIPELINE, *JOINT, *PARTS))
    if culprit is None:
        console.print("no pass by itself: it fails without them too, or with none of them skipped")
        raise typer.Exit(1)
    console.print(f"it fails with pass {culprit!r}; PEFTFX_SKIP={culprit} goes around it")
