"""`python -m bench.live --scenario NAME|all --arms A,B --seeds K --json FILE [--resume]`: measure, print, write.

Prints one table per scenario with 95 % intervals over seeds and writes rows {scenario, arm, seed, metric, value,
code} after every single run. `--clean` removes what a killed run left behind.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.live import run, state
from bench.live.arms import ARMS, find_arms
from bench.live.cgroups import LabError
from bench.live.chaos import chaos_scenario
from bench.live.cluster import IsolatedWorld, UnisolatedWorld
from bench.live.faults import runs_on
from bench.live.hosts import missing
from bench.live.report import print_table, write_markdown
from bench.live.scenario import SCENARIOS, find_scenarios
from bench.live.soak import soak_scenario

_DEFAULT_ARMS = "default,round_robin,consistent_hash,capacity_queue,prequal,live_capacity,shadecast,oracle"


def main(
    *,
    scenario: Annotated[str, typer.Option(help=f"all, soak, chaos, or with commas: {', '.join(SCENARIOS)}")] = "all",
    arms: Annotated[str, typer.Option(help=f"comma separated; known: {', '.join(ARMS)}")] = _DEFAULT_ARMS,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="seeds 0 .. K-1 for every arm")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of the K seeds")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here, after every run")] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows of the file and run only what is missing")] = False,
    renew: Annotated[bool, typer.Option(help="with --resume: run again what is of older code")] = False,
    quick: Annotated[bool, typer.Option(help="a third of the requests: a p99 means little (tables say so)")] = False,
    series: Annotated[Path, typer.Option(help="latencies and states over time, for the pictures")] = Path(
        ".shadecast/live"
    ),
    markdown: Annotated[Path | None, typer.Option(help="write a report with plots here")] = None,
    unisolated: Annotated[bool, typer.Option(help="without root: raylets that share this machine")] = False,
    minutes: Annotated[float, typer.Option(min=1.0, max=600.0, help="of the soak")] = 30.0,
    streams: Annotated[int, typer.Option(min=500, max=1_000_000, help="of chaos")] = 10_000,
    clean: Annotated[bool, typer.Option(help="remove what a killed run left behind, and end")] = False,
) -> None:
    """Run the live benchmark."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if clean:
            console.print(f"removed what was left of {len(state.clean())} labs", highlight=False)
            return
        made = {"soak": lambda: soak_scenario(minutes, 0), "chaos": lambda: chaos_scenario(streams, 0)}
        wanted = [made[scenario]()] if scenario in made else find_scenarios(scenario)
        chosen = find_arms(arms)
        _check(json_file, resume=resume, unisolated=unisolated)
    except LabError as error:
        console.print(f"bench.live: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end as on Ctrl-C: with everything removed
    rows = run.Rows(json_file, resume=resume, renew=renew)
    failures: list[str] = []
    started_s = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        bar = shown.add_task("starting", total=None)

        def say(text: str) -> None:
            shown.update(bar, description=text, completed=0, total=None)
            if not sys.stdout.isatty() or text.startswith("FAILED"):
                console.print(f"{time.monotonic() - started_s:7.0f} s  {text}", highlight=False, markup=False)

        def advance(done: int, of: int) -> None:
            shown.update(bar, completed=done, total=of)

        bench = run.Bench(rows, series, run.Progress(say, advance), unisolated=unisolated)
        try:
            for each in wanted:
                if not runs_on(each, UnisolatedWorld if unisolated else IsolatedWorld):
                    console.print(f"{each.name}: left out, it needs isolated hosts", highlight=False)
                    continue
                ready = each.shortened() if quick else each
                try:
                    failures += bench.scenario(ready, chosen, range(first_seed, first_seed + seeds))
                except LabError as error:
                    failures.append(str(error))
                    say(f"FAILED {error}")
                print_table(console, each, rows.rows)
        finally:
            left = bench.close()
    if left:
        failures.append("left behind: " + ", ".join(left))
        console.print(failures[-1], style="red", markup=False)
    if markdown is not None:
        write_markdown(markdown, rows.rows, series)
        console.print(f"wrote {markdown}", highlight=False)
    if failures:
        console.print(f"{len(failures)} runs failed; the same command with --resume tries them again", style="red")
        raise typer.Exit(1)


def _check(json_file: Path | None, *, resume: bool, unisolated: bool) -> None:
    """Raises LabError, saying what to do, before anything is started."""
    if json_file is not None and json_file.exists() and not resume:
        raise LabError(f"--json {json_file}: is there already; give --resume to go on, or another name")
    if not unisolated and (lacking := missing()):
        raise LabError(
            "isolated hosts need " + "; ".join(lacking) + ". Or give --unisolated: the same scenarios on raylets "
            "that share this machine, without those that need quotas or links; it shows behaviour, not numbers."
        )


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
