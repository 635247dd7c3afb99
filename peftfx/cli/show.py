"""Commands that show and change no model: plan, explain, check, methods, schema, init, help."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Column, Table

from peftfx import peft_support
from peftfx.cli import app, console, sizes
from peftfx.cli.errors import section
from peftfx.drafting import draft
from peftfx.errors import SaveError, SpecError
from peftfx.explaining import explain as explain_model
from peftfx.explaining import picture as draw_model
from peftfx.explaining import plan as plan_model
from peftfx.methods.method import lookup, names
from peftfx.schema import schema as spec_schema
from peftfx.spec import Spec

SpecFile = Annotated[Path, typer.Argument(help="Spec file (YAML, TOML or JSON).")]
Model = Annotated[
    Path, typer.Option("--model", "-m", help="HF model directory; config.json is enough.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Auto = Annotated[str, typer.Option("--class", help="transformers class to build the model by.")]


def build(directory: Path, auto: str) -> torch.nn.Module:
    """The model of a directory's configuration, with random weights: shapes are what matters."""
    import transformers

    if not (directory / "config.json").is_file():
        raise SpecError("there is no config.json", where=str(directory))
    cls = getattr(transformers, auto, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise SpecError(f"transformers has no auto class {auto!r}", remedy="e.g. AutoModel")
    config = transformers.AutoConfig.from_pretrained(directory)
    model: torch.nn.Module = cls.from_config(config)
    return model.eval()


@app.command()
def plan(spec: SpecFile, model: Model, auto: Auto = "AutoModel", as_json: AsJson = False) -> None:
    """Show which rule acts at which site, and how many parameters train."""
    found = plan_model(build(model, auto), spec)
    if as_json:
        print(json.dumps({"trainable": found.trainable, "total": found.total,
                          "placements": found.rows()}, indent=2))  # fmt: skip
        return
    print(found)


@app.command()
def explain(
    spec: SpecFile,
    model: Model,
    auto: Auto = "AutoModel",
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw a layer into this SVG file instead.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="The layer to draw.")] = None,
    stack: Annotated[str | None, typer.Option("--stack", help="The stack it is in.")] = None,
) -> None:
    """Compile the model once and show the graph after the passes, and what computes each op."""
    built = build(model, auto)
    if picture is None:
        print(explain_model(built, spec))
        return
    print(plan_model(built, spec))
    drawn = draw_model(built, spec, layer=layer, stack=stack)
    try:
        picture.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot be written: {error.strerror}", where=str(picture)) from None


@app.command()
def check(
    spec: SpecFile,
    model: Annotated[Path | None, typer.Option("--model", "-m")] = None,
    auto: Auto = "AutoModel",
) -> None:
    """Check a spec by itself, and against a model if one is given."""
    loaded = Spec.load(spec)
    console.print(f"{spec}: {len(loaded.rules)} rules, well-formed")
    if model is not None:
        found = plan_model(build(model, auto), loaded)
        console.print(f"{len(found.placements)} placements, {found.trainable:,} trainable values")


@app.command()
def methods(
    as_json: AsJson = False,
    peft: Annotated[bool, typer.Option("--peft", help="What HF PEFT's files can say.")] = False,
) -> None:
    """List the methods, their options, and how many values each trains on a Llama of 7B."""
    if peft:
        _support(as_json)
        return
    content: dict[str, Any] = {}
    model = sizes.llama()
    for name in names():
        method = lookup(name)
        content[name] = {
            "about": (method.__doc__ or "").strip().splitlines()[0],
            "paper": method.paper,
            "acts": method.acts,
            "kinds": list(method.kinds),
            "options": {
                f.name: {"default": f.default, "about": f.metadata.get("doc", "")}
                for f in dataclasses.fields(method)
            },
            "peft": method.peft.type or method.peft.beside if method.peft is not None else None,
            "llama_7b": sizes.size(model, method),
        }
    if as_json:
        print(json.dumps(content, indent=2))
        return
    count = Column("7B trains", justify="right", no_wrap=True, min_width=len("1,000,000,000"))
    table = Table("method", "acts at", "about", count, "where", "options")
    for name, about in content.items():
        options = ", ".join(f"{o}={v['default']}" for o, v in about["options"].items())
        found = about["llama_7b"]
        rule = found["rule"]
        where = rule.get("name") or rule.get("role") or rule.get("kind") or "-"
        place = found.get("reason") or (where if isinstance(where, str) else " ".join(where))
        row = (about["acts"], about["about"], f"{found['trainable']:,}", place, options)
        table.add_row(name, *map(escape, row))
    console.print(table)


def _support(as_json: bool) -> None:
    said, read = peft_support.said(), peft_support.read()
    if as_json:
        print(json.dumps({"said": said, "read": read}, indent=2))
        return
    table = Table("method", "PEFT's type", "at", "options", "kept in peftfx.json alone")
    for name, about in said.items():
        options = about["options"]
        table.add_row(
            name,
            about["type"] or "-",
            " ".join(about["kinds"]) or "-",
            ", ".join(f"{ours} = {theirs}" for ours, theirs in options.items() if theirs) or "-",
            ", ".join(ours for ours, theirs in options.items() if not theirs) or "-",
        )
    console.print(table)
    table = Table("PEFT's type", "options that are read", "passed over; any other is refused")
    for name, options in read.items():
        table.add_row(name, ", ".join(options["read"]), ", ".join(options["passed over"]))
    console.print(table)


@app.command()
def schema(
    file: Annotated[Path | None, typer.Argument(help="Write it there, for an editor.")] = None,
) -> None:
    """Print the JSON Schema of spec files, or write it to a file.

    An editor with yaml-language-server follows the line it tells of, at the top of a spec.
    """
    text = json.dumps(spec_schema(), indent=2)
    if file is None:
        print(text)
        return
    file.write_text(text + "\n")
    print(f"# yaml-language-server: $schema={file}")


@app.command()
def init(
    model: Model,
    method: Annotated[str, typer.Option("--method", help="See peftfx methods.")] = "lora",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Spec to write.")] = None,
    auto: Auto = "AutoModel",
) -> None:
    """Write a first spec for a model: the roles it has, and every option with its default."""
    text = draft(build(model, auto), method)
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise SpecError("the file exists", where=str(output), remedy="choose another name")
    output.write_text(text)
    console.print(f"written: {output}", markup=False, highlight=False)


@app.command("help")
def help_(
    error: Annotated[str, typer.Argument(help="Name of an error, as printed.")] = "",
) -> None:
    """Tell what an error means and what to do; all of them without a name."""
    print(section(error))
