"""`python -m bench.summary`: write docs/benchmarks/README.md, summary.json and their pictures from the committed rows.

`--outdated-by 0062 --scenario hog,calm` says first that a decision has changed what our rows of these scenarios show:
they are kept, and marked, until they are run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.live.arms import ARMS
from bench.results import is_older
from bench.summary.entries import read_all
from bench.summary.page import PICTURES, document, page

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def main(
    *,
    docs: Annotated[Path, typer.Option(help="folder of rows, where the page goes, too")] = DOCS,
    outdated_by: Annotated[str, typer.Option(help="number of a decision; with --scenario")] = "",
    scenario: Annotated[str, typer.Option(help="live scenarios with commas, whose rows of ours it makes old")] = "",
) -> None:
    """Write the page."""
    from bench.summary.plots import draw  # noqa: PLC0415 - matplotlib is slow to import

    if bool(outdated_by) != bool(scenario):
        raise typer.BadParameter("--outdated-by and --scenario go together")
    if outdated_by:
        typer.echo(f"marked {mark(docs / 'live.json', outdated_by, scenario.split(','))} rows")
    summary = read_all(docs)
    if not summary.entries:
        raise typer.BadParameter(f"--docs {docs}: no row files there; live.json, micro.json, ... are looked for")
    draw(docs, summary)
    (docs / "README.md").write_text(page(summary), encoding="utf-8")
    (docs / "summary.json").write_text(document(summary), encoding="utf-8")
    typer.echo(f"wrote README.md, summary.json and {', '.join(PICTURES)} in {docs}: {len(summary.entries)} values")


def mark(path: Path, decision: str, scenarios: list[str]) -> int:
    """Say in the rows of our arms that `decision` came after them; how many. Older marks stay."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if unknown := set(scenarios) - {row["scenario"] for row in rows}:
        raise typer.BadParameter(f"--scenario {', '.join(sorted(unknown))}: no rows in {path.name}")
    marked = 0
    for row in rows:
        ours = row["arm"] in ARMS and ARMS[row["arm"]].ours
        if (ours or row["arm"] == "oracle") and row["scenario"] in scenarios and not is_older(row["code"]):
            row["code"] = f"before {decision}"
            marked += 1
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return marked


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
