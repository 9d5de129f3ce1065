"""`python -m bench.simulate --scenario NAME|all --seeds K [--quick] --json FILE`: measure, print, write.

Prints one table per scenario with 95 % intervals over seeds and writes rows {scenario, arm, seed, metric, value}.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bench.simulate.arms import ARMS
from bench.simulate.report import Row, machine, print_table, write_markdown
from bench.simulate.run import simulate
from bench.simulate.scenario import FAMILIES, Scenario, find

_SCALE_ARMS = ("random", "p2c_ray", "p2c_true", "prequal_tuned", "live_capacity", "shadecast")
"""The others take too long at 1,000 replicas, or say nothing new there."""


def _default_trace() -> Path:
    data = os.environ.get("SHADECAST_DATA") or str(Path(__file__).parents[2] / ".." / "shared" / "data")
    return Path(data) / "traces" / "AzureLLMInferenceTrace_code.csv.gz"


def _run(job: tuple[Scenario, str, int]) -> list[Row]:
    scenario, arm, seed = job
    metrics = simulate(scenario, ARMS[arm], seed)
    return [Row(scenario.name, arm, seed, metric, value) for metric, value in metrics.items()]


def _prepare(scenarios: list[Scenario], trace: Path | None, quick: bool, console: Console) -> list[Scenario]:
    ready = []
    for scenario in scenarios:
        chosen = scenario
        if scenario.name == "trace":
            path = trace or _default_trace()
            if not path.exists():
                if trace is not None:
                    raise FileNotFoundError(f"--trace {path}: no such file")
                console.print(f"trace: left out, {path} is not there; give --trace FILE or set SHADECAST_DATA")
                continue
            chosen = replace(scenario, trace=path)
        ready.append(chosen.quick() if quick else chosen)
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
        ready = _prepare(find(scenario), trace, quick, console)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"bench.simulate: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress, ProcessPoolExecutor(jobs) as pool:
        work = [(each, [arm for arm in names if each.replicas < 1000 or arm in _SCALE_ARMS or arms]) for each in ready]
        bar = progress.add_task("simulating", total=sum(len(own) * seeds for _, own in work))
        for each, own in work:
            mine: list[Row] = []
            todo = [(each, arm, seed) for seed in range(seeds) for arm in own]
            for found in pool.map(_run, todo) if jobs > 1 else map(_run, todo):
                mine += found
                progress.advance(bar)
            rows += mine
            print_table(console, each, mine, quick)
            if json_file is not None:
                json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=0) + "\n", encoding="utf-8")
    if markdown is not None:
        write_markdown(markdown, ready, rows, machine(), quick)
        console.print(f"wrote {markdown}")


if __name__ == "__main__":
    typer.run(main)
