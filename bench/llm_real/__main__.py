"""`python -m bench.llm_real --json FILE [--markdown PAGE] [--resume]`: routers in front of real vLLM engines on CPUs.

Serve's default, Ray's prefix router and ours, in turn, each with the same requests and engines of its own: two replicas
of a tiny random model under `ray.serve.llm`. Scenarios: conversations with shared beginnings, calm and with hogs beside
one replica; and a third replica that joins two. A run takes three minutes and is written at once; `--resume` leaves out
what the file has. It needs vLLM's CPU build (examples/llm/install.sh) and 10 GB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.llm_real.arms import ARMS, SCENARIOS, Scenario
from bench.llm_real.report import checks, rows_of, tables, write_page
from bench.simulate.report import machine
from examples.llm.serving import missing

_RUN_S = 420.0
"""A run that takes longer has failed."""


def main(
    *,
    scenario: Annotated[str, typer.Option(help="names, with commas")] = ",".join(SCENARIOS),
    arms: Annotated[str, typer.Option(help="names, with semicolons; default: those of each scenario")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="runs and rows, written after each run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep the runs of --json, and leave them out")] = False,
    page_only: Annotated[bool, typer.Option("--page-only", help="run nothing; show what --json has")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="phases of a few seconds, to see whether it works")] = False,
    markdown: Annotated[Path | None, typer.Option(help="write the page here")] = None,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare routers with real engines."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    wanted_arms = [name.strip() for name in arms.split(";") if name.strip()]
    names = [name.strip() for name in scenario.split(",") if name.strip()]
    for given, known, what in ((names, SCENARIOS, "scenario"), (wanted_arms, ARMS, "arm")):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{what} {sorted(unknown)}: unknown; known are {', '.join(known)}")
    kept: dict[str, Any] = {"machine": {}, "runs": []}
    if json_file is not None and json_file.exists() and (resume or page_only):
        kept = json.loads(json_file.read_text(encoding="utf-8"))
    if not page_only and (what := missing()):
        console.print(what, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2)
    if child is not None:
        _one(SCENARIOS[names[0]].quick() if quick else SCENARIOS[names[0]], wanted_arms[0], first_seed, child, console)
        return
    runs: list[dict[str, Any]] = kept["runs"]
    failed = 0
    todo = [
        (name, arm, seed)
        for seed in range(first_seed, first_seed + seeds)
        for name in names
        for arm in _rotated([arm for arm in SCENARIOS[name].arms if not wanted_arms or arm in wanted_arms], seed)
    ]
    have = {(run["scenario"], run["arm"], run["seed"]) for run in runs}
    for name, arm, seed in [] if page_only else [each for each in todo if each not in have]:
        console.print(f"{name}, {arm}, seed {seed}")
        run = _in_a_process(name, arm, seed, ["--quick"] if quick else [])
        if run is None:
            failed += 1
            console.print("  failed: left out; --resume tries it again")
            continue
        runs.append(run)
        if json_file is not None:
            made = {**machine(), **{package: version(package) for package in ("ray", "vllm", "torch")}}
            rows = [row.as_dict() for each in runs for row in rows_of(each)]
            text = json.dumps({"machine": made, "rows": rows, "runs": runs}, separators=(",", ":"))
            json_file.write_text(text.replace('},{"scenario"', '},\n{"scenario"') + "\n", encoding="utf-8")
            kept["machine"] = made
    for of, phase, table in tables(runs):
        shown = Table(*table[0], title=f"{of.name}, {phase}", title_justify="left")
        for line in table[1:]:
            shown.add_row(*line)
        console.print(shown)
    for check in checks(runs):
        console.print(check.line(), highlight=False)
    if markdown is not None:
        write_page(markdown, kept["machine"], runs)
    if failed:
        raise typer.Exit(1)


def _rotated(arms: list[str], seed: int) -> list[str]:
    """The order rotates by seed: a machine that becomes busier is not one arm's fault."""
    at = seed % len(arms) if arms else 0
    return arms[at:] + arms[:at]


def _in_a_process(scenario: str, arm: str, seed: int, more: list[str]) -> dict[str, Any] | None:
    """A run in a process of its own: Ray and vLLM leave threads and settings behind."""
    with tempfile.TemporaryDirectory(prefix="llm-real-") as folder:
        told = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench.llm_real", "--scenario", scenario, "--arms", arm]
        command += ["--first-seed", str(seed), "--child", str(told), *more]
        try:
            subprocess.run(command, check=True, timeout=_RUN_S)  # noqa: S603 - ourselves
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
        return json.loads(told.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _one(scenario: Scenario, arm: str, seed: int, told: Path, console: Console) -> None:
    from bench.llm_real.run import run  # noqa: PLC0415 - it starts Ray
    from examples.llm.model import make_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="tiny-llm-") as model, tempfile.TemporaryDirectory() as folder:
        make_model(Path(model))
        found = run(scenario, ARMS[arm], seed, Path(model), folder=Path(folder), console=console)
    told.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
