"""The command line: ``peftfx plan | explain | check | train | kernels | tune | …``.

Exit codes: 0 all is well, 1 a check failed, 2 bad input, with the error as it would be raised.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from peftfx.errors import PeftfxError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


def main() -> None:
    """Entry point of the ``peftfx`` script."""
    from peftfx.cli import adapters, doctor, kernels, show, train

    # importing them adds their commands
    assert adapters and doctor and kernels and show and train
    try:
        app()
    except PeftfxError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(2)
