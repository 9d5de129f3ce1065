"""`python -m bench.live --clean`: remove what labs whose driver is gone left behind."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from bench.live import state


def main(*, clean: Annotated[bool, typer.Option(help="remove what a killed run left behind")] = False) -> None:
    """Run the live benchmark."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if clean:
        console.print(f"removed what was left of {len(state.clean())} labs", highlight=False)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
