"""``peftfx train job.yaml``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from peftfx.cli import app, console
from peftfx.errors import SpecError


def changes(settings: list[str]) -> dict[str, Any]:
    """``key=value`` settings; values are read as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {setting}: write key=value")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


@app.command()
def train(
    job: Annotated[Path, typer.Argument(help="Job file (YAML, TOML or JSON).")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the file's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a sequence classifier on labelled texts, and save the adapter."""
    from peftfx.training.job import load_job, read_rows

    loaded = load_job(job, changes(settings or []))
    if dry_run:
        rows = read_rows(loaded.train, loaded.text, loaded.label)
        console.print(f"{len(rows)} texts, {len({y for _, y in rows})} labels; the job is sound")
        return
    from peftfx.training.run import run

    result = run(loaded)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table("measure", "value")
    for name, value in (
        ("accuracy", f"{result.accuracy:.4f}"),
        ("loss", f"{result.loss:.4f}"),
        ("trainable parameters", f"{result.trainable:,} of {result.total:,}"),
        ("adapter", f"{result.adapter_bytes / 1e6:.2f} MB"),
        ("peak memory", f"{result.peak_memory / 1e6:.0f} MB"),
        ("median step", f"{result.step_seconds * 1e3:.1f} ms"),
        ("training", f"{result.seconds:.0f} s, {result.steps} steps"),
    ):
        table.add_row(name, value)
    console.print(table)
