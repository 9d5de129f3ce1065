"""What commands print for programs: one JSON object on stdout, errors too. docs/answers.schema.json describes each."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

SCHEMA = 1
"""Grows when a field goes away or means something else; new fields may come at any time."""
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object (docs/command_line.md).")]

problems = Console(stderr=True)


def answer(**fields: Any) -> None:
    """Print an answer."""
    print(json.dumps({"schema": SCHEMA, **fields}, allow_nan=False), flush=True)


def failed(reason: str, code: int) -> int:
    """Say why a command fails: a line on stderr and, where JSON is wanted, an object on stdout. Returns `code`."""
    problems.print(f"shadecast: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv[1:]:
        answer(error=reason, exit_code=code)
    return code
