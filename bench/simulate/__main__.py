"""`python -m bench.simulate --scenario NAME|all --seeds K [--quick] --json FILE`: measure, print, write.

Prints one table per scenario with 95 % intervals over seeds and writes rows {scenario, arm, seed, metric, value, code}.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bench.recordings import held_apart, shared_data
from bench.results import Row, code_version
from bench.simulate.arms import ALWAYS, ARMS
from bench.simulate.report import machine, print_table, write_markdown
from bench.simulate.run import simulate
from bench.simulate.scenario import FAMILIES, Scenario, find


def _default_trace() -> Path:
    return shared_data() / "traces" / "AzureLLMInferenceTrace_code.csv.gz"


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, by name, because scenarios hold functions that do not travel between processes."""

    scenario: str
    trace: Path | None
    quick: bool
    arm: str
    seed: int


def _load(name: str, trace: Path | None, quick: bool) -> Scenario:
    scenario = replace(find(name, exact=True)[0], trace=trace)
    if scenario.recorded:
        scenario = replace(scenario, note=f"{scenario.note}: {held_apart().note()}")
    return scenario.quick() if quick else scenario


def _run(job: _Job) -> list[Row]:
    scenario = _load(job.scenario, job.trace, job.quick)
    metrics = simulate(scenario, ARMS[job.arm], job.seed)
    return [Row(scenario.name, job.arm, job.seed, metric, value, code_version()) for metric, value in metrics.items()]


def _prepare(name: str, trace: Path | None, console: Console) -> list[tuple[str, Path | None]]:
    """Names of the scenarios to run, with the trace file of those that replay one."""
    ready: list[tuple[str, Path | None]] = []
    for scenario in find(name):
        if scenario.name != "trace":
            ready.append((scenario.name, None))
            continue
        path = trace or _default_trace()
        if path.exists():
            ready.append((scenario.name, path))
        elif trace is not None:
            raise FileNotFoundError(f"--trace {path}: no such file")
        else:
            console.print(f"trace: left out, {path} is not there; give --trace FILE or set SHADECAST_DATA")
    return ready


def _check_arms(names: list[str]) -> None:
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms {name!r}: unknown; known are {', '.join(ARMS)}")


def main(
    *,
    scenario: Annotated[
        str, typer.Option(help=f"all, one of {', '.join(FAMILIES)}, or one variant (name@value)")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 .. K-1 for every arm")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="the first of the K seeds")] = 0,
    arms: Annotated[str, typer.Option(help=f"comma separated; default all: {', '.join(ARMS)}")] = "",
    quick: Annotated[bool, typer.Option(help="a fifth of the time (says so in the table)")] = False,
    trace: Annotated[Path | None, typer.Option(help="Azure csv(.gz) or Mooncake jsonl(.gz) for scenario trace")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write a report with plots here")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Run the simulator."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    names = [name.strip() for name in arms.split(",") if name.strip()] or list(ARMS)
    try:
        _check_arms(names)
        ready = _prepare(scenario, trace, console)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"bench.simulate: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    rows: list[Row] = []
    done: list[Scenario] = []
    with Progress(console=console, transient=True) as progress, ProcessPoolExecutor(jobs) as pool:
        for name, path in ready:
            each = _load(name, path, quick)
            own = [arm for arm in names if arms or arm in (each.arms or ALWAYS)]
            todo = [_Job(name, path, quick, arm, seed) for seed in range(first_seed, first_seed + seeds) for arm in own]
            bar = progress.add_task(name, total=len(todo))
            mine: list[Row] = []
            for found in pool.map(_run, todo) if jobs > 1 else map(_run, todo):
                mine += found
                progress.advance(bar)
            rows += mine
            done.append(each)
            print_table(console, each, mine, quick)
            if json_file is not None:
                json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=0) + "\n", encoding="utf-8")
    if markdown is not None:
        write_markdown(markdown, done, rows, machine(), quick)
        console.print(f"wrote {markdown}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
