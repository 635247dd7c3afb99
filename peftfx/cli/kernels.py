"""``peftfx kernels`` and ``peftfx tune``: what computes the ops, and how well on this device."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from peftfx.cli import app, console
from peftfx.errors import SpecError
from peftfx.kernels import measured
from peftfx.kernels.ahead.resources import minor, recorded
from peftfx.kernels.devices import TARGETS, computes
from peftfx.kernels.fastfood import op as fastfood
from peftfx.kernels.low_rank_linear.calls import Sizes
from peftfx.kernels.low_rank_linear.configs import rules, shipped
from peftfx.kernels.sparse_add import op as sparse_add
from peftfx.passes.claims import INDUCTOR_CLAIMS
from peftfx.passes.claims.measure import LLAMA_8B, measure

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def report() -> dict[str, Any]:
    """Ops and their claims; for each target tiles, and what compiled kernels take there."""
    claims: dict[str, list[str]] = {}
    for claim in INDUCTOR_CLAIMS:
        for op in claim.ops:
            claims.setdefault(op, []).append(claim.name)
    for op in (*sparse_add.SCHEMAS, *fastfood.SCHEMAS):
        claims[op] = ["itself, in plain torch"]
    ops = {
        op: {"schema": str(getattr(torch.ops.peftfx, op).default._schema), "claims": names}
        for op, names in claims.items()
    }
    tiles = {
        target: {
            kernel: {
                str(dtype).removeprefix("torch."): [asdict(r) for r in rules(kernel, target, dtype)]
                for dtype in DTYPES.values()
                if rules(kernel, target, dtype)
            }
            for kernel in shipped()[target]
        }
        for target in TARGETS
    }
    installed = minor(measured.triton_version())
    version = installed if installed in recorded() else list(recorded())[-1]
    device = computes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = measured.table(device.name) if device is not None else measured.Table()
    return {
        "ops": ops,
        "targets": tiles,
        "triton": {"installed": measured.triton_version(), "compiled with": version},
        "resources": recorded()[version].table,
        "device": {
            "name": device.name if device is not None else "none that is known",
            "figures": table.figures,
            "tuned tiles": len(table.tiles),
            "measured calls": len(table.calls),
        },
    }


@app.command()
def kernels(
    target: Annotated[str, typer.Option(help="Only what is for this target.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List ops and what can compute them, tiles, and what the kernels take on each target."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("op", "can be computed by")
    for op, about in found["ops"].items():
        table.add_row(f"peftfx::{op}", ", ".join(about["claims"]))
    console.print(table)
    title = f"Triton kernels, compiled ahead of time by Triton {found['triton']['compiled with']}"
    table = Table("target", "kernel, tile, what is fixed", "registers", "spills", "shared, KB",
                  "instruction", title=title)  # fmt: skip
    for variant, launches in found["resources"].items():
        if not variant.startswith(target):
            continue
        for launch, taken in launches.items():
            table.add_row(
                variant, launch, str(taken["registers"]), str(taken["spills"]),
                f"{taken['shared_memory'] / 1024:.0f}", taken["instruction"] or "-",
            )  # fmt: skip
    console.print(table)
    device = found["device"]
    rates = ", ".join(f"{name} {value:.4g}" for name, value in device["figures"].items())
    console.print(
        f"{device['name']}: {rates or 'nothing measured'}; {device['tuned tiles']} tuned tiles, "
        f"{device['measured calls']} measured calls. `peftfx tune` measures."
    )


def parse(shape: str) -> tuple[int, tuple[int, ...]]:
    """``K:N`` or ``K:N,N,N`` as numbers."""
    try:
        k, outs = shape.split(":")
        return int(k), tuple(int(n) for n in outs.split(","))
    except ValueError as error:
        raise SpecError(f"--shape {shape}: write K:N, or K:N,N for sites on one x") from error


@app.command()
def tune(
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="K:N, or K:N,N for sites that share x; a Llama-8B's."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows, by commas.")] = "2048,8192",
    rank: Annotated[int, typer.Option(help="Rank of the update.")] = 16,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    dropout: Annotated[bool, typer.Option(help="Tiles for updates with dropout.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 8.0,
    trials: Annotated[int, typer.Option(help="Tiles to try for a kernel and a shape.")] = 40,
    output: Annotated[Path | None, typer.Option(help="File, instead of the cache's.")] = None,
) -> None:
    """Measure this device: its rates, tiles, and which form of each call is fastest.

    Lowering reads what is found from the cache directory, in processes that start after this one.
    """
    if dtype not in DTYPES:
        raise SpecError(f"--dtype {dtype}: there are kernels for {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = computes(device)
    if known is None:
        raise SpecError(
            "there are no kernels for this GPU", remedy="CUDA_VISIBLE_DEVICES= peftfx tune"
        )
    path = output or measured.cached_file(known.name)
    sizes = [
        Sizes(int(m), k, outs, rank, drops=dropout)
        for k, outs in (map(parse, shapes) if shapes else LLAMA_8B)
        for m in rows.split(",")
        if not dropout or len(outs) == 1
    ]
    console.print(f"{known.name}: {len(sizes)} calls, into {path}")
    for text, found in measure(device, sizes, DTYPES[dtype], minutes, trials):
        measured.write(path, known.name, found)
        console.print(text, markup=False, highlight=False)
