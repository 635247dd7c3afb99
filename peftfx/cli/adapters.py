"""Commands for saved adapters: inspect, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from peftfx.cli import app, console
from peftfx.cli.show import AsJson, Auto, build
from peftfx.converting import convert as convert_files
from peftfx.errors import CheckpointError
from peftfx.inspecting import inspect as inspect_files


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a saved adapter.")],
    as_json: AsJson = False,
) -> None:
    """Show what a saved adapter is: methods, sites, shapes, sizes; 1 if a value is not finite."""
    found = inspect_files(directory)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    if not found["finite"]:
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    kinds = ", ".join(f"{n} × {dtype}" for dtype, n in found["dtypes"].items())
    known = found["fingerprint"]
    bad = ", ".join(found["not_finite"])
    lines = {
        "format": found["format"] + (f", {found['type']}" if found["type"] else ""),
        "base": found["base"] or "not said",
        "tensors": f"{found['tensors']} ({kinds}), {found['values']:,} values, "
        f"{found['bytes']:,} bytes",
        "finite": "yes" if found["finite"] else f"NO: {bad}",
        "fingerprint": "none" if known is None else f"of {known} base weights",
    }
    for name, text in lines.items():
        console.print(f"{name:12} {text}", markup=False, highlight=False)
    for rule in found["rules"] if found["rules"] is not None else [found["options"]]:
        told = ", ".join(f"{key}: {json.dumps(value)}" for key, value in rule.items())
        console.print(f"{'rule':12} {told}", markup=False, highlight=False)
    table = Table("site", "tensors")
    for site, tensors in found["sites"].items():
        table.add_row(site, "  ".join(f"{name} {t['shape']}" for name, t in tensors.items()))
    console.print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of an adapter, PEFT's or peftfx's.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[
        str | None, typer.Option("--format", help="peft or peftfx; what it is if not given.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="HF model directory, for another format."),
    ] = None,
    auto: Auto = "AutoModel",
) -> None:
    """Write an adapter in another format, or of a pickle (adapter_model.bin) as safetensors."""
    if format not in (None, "peft", "peftfx"):
        raise CheckpointError(f"format {format!r} is not known", remedy="peft or peftfx")
    built = None if model is None else build(model, auto)
    convert_files(source, destination, format, built)  # type: ignore[arg-type]
    console.print(f"written: {destination}", markup=False, highlight=False)
