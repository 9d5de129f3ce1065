"""`python -m bench.llm [--setting NAME] [--rule NAME] [--seeds N]`: rules side by side in front of simulated engines.

For each setting a table of all rules, the same requests for each; means over the seeds. Settings whose trace is not
there are left out, with the reason. Traces of other folders: `--traces`. `--json` keeps a row for each run, and with
`--resume` runs that are there already are not run again; `--markdown` makes the page of all of them.

With `--joins`: a third replica joins two, and is let in with and without a trial by copies (`bench.llm.joining`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.llm.joining import ARMS, FIRST, TRAFFIC, Joined, compare
from bench.llm.page import by_rule, checks, write
from bench.llm.rules import RULES
from bench.llm.run import simulate
from bench.llm.settings import Setting, settings
from bench.results import code_version
from bench.simulate.report import machine


def main(
    *,
    setting: Annotated[list[str] | None, typer.Option(help="only these; all else")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="only these; all else")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    first_seed: Annotated[int, typer.Option()] = 0,
    traces: Annotated[Path | None, typer.Option(help="folder of traces; default: traces of SHADECAST_DATA")] = None,
    load: Annotated[float, typer.Option(min=0.01, help="times each setting's own")] = 1.0,
    joins: Annotated[bool, typer.Option("--joins", help="how a newcomer is let in, instead of rules")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep the rows that are there")] = False,
    markdown: Annotated[Path | None, typer.Option(help="write the page here")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Compare rules."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    known = {each.name: each for each in settings(traces)}
    for name, names, what in ((setting, TRAFFIC if joins else known, "setting"), (rule, RULES, "rule")):
        if unknown := set(name or ()) - set(names):
            raise typer.BadParameter(f"{what} {sorted(unknown)}: unknown; known are {', '.join(names)}")
    kept = (
        json.loads(json_file.read_text(encoding="utf-8"))["rows"]
        if resume and json_file and json_file.is_file()
        else []
    )
    rows: list[dict[str, Any]] = kept
    tried = range(first_seed, first_seed + seeds)
    if joins:
        rows = [row for name in setting or TRAFFIC for row in _join(name, tried, load, console)]
        _keep(json_file, rows)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for each in [known[name] for name in setting or known]:
            if each.needs is not None and not each.needs.is_file():
                console.print(f"{each.name}: left out, {each.needs} is not there; give --traces or set SHADECAST_DATA")
                continue
            done = {(row["rule"], row["seed"]) for row in rows if row["setting"] == each.name}
            rules = rule or [name for name, one in RULES.items() if each.routers > 1 or not one.several]
            todo = [_Run(each.name, traces, name, seed, load) for seed in tried for name in rules]
            todo = [run for run in todo if (run.rule, run.seed) not in done]
            for row in pool.map(_run, todo) if jobs > 1 else map(_run, todo):
                rows.append(row)
                _keep(json_file, rows)
            _print(each, rows, console)
    if markdown is not None:
        write(markdown, list(known.values()), rows, machine())
        console.print(f"wrote {markdown}")


@dataclass(frozen=True, slots=True)
class _Run:
    """One run by name: settings hold functions, which do not travel between processes."""

    setting: str
    traces: Path | None
    rule: str
    seed: int
    load: float


def _run(run: _Run) -> dict[str, Any]:
    setting = next(each for each in settings(run.traces) if each.name == run.setting)
    jobs = setting.make(run.seed, run.load)
    result = simulate(
        RULES[run.rule], jobs, setting.machine, setting.speeds, changes=setting.changes(run.seed, jobs[-1].at_s),
        routers=setting.routers, seed=run.seed,
    )  # fmt: skip
    return {"setting": run.setting, "rule": run.rule, "seed": run.seed, **asdict(result)}


def _keep(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    if path is not None:
        made = path.with_suffix(".new")
        made.write_text(
            json.dumps({"machine": machine(), "code": code_version(), "rows": rows}, indent=0) + "\n", encoding="utf-8"
        )
        made.replace(path)


def _print(setting: Setting, rows: Sequence[dict[str, Any]], console: Console) -> None:
    found = by_rule(rows, setting.name)
    table = Table("rule", "in SLO", "TTFT p50 s", "p99", "TPOT p50 ms", "mean time s", "hits")
    table.title = setting.name
    for name, metrics in found.items():
        slo, p50, p99, pace, mean, hits = (fmean(values) for values in metrics.values())
        table.add_row(name, f"{slo:.3f}", f"{p50:.2f}", f"{p99:.1f}", f"{pace:.1f}", f"{mean:.2f}", f"{hits:.3f}")
    console.print(table)
    for check in checks(setting, found):
        console.print("  " + check.line(), style="green" if check.met else "yellow", markup=False)


def _join(name: str, seeds: range, load: float, console: Console) -> list[dict[str, object]]:
    found = {seed: compare(name, seed, load) for seed in seeds}
    console.print(f"\n{name}: a third replica joins, {len(seeds)} seeds, the newcomer's first {FIRST} live requests")
    columns = "arm", "TTFT p50 s", "mean", "p99", "hits", "waited s", "copies", "took s", "all TTFT p50 s"
    table = Table(*columns, "p50 / untried", "mean / untried")
    for arm in ARMS:
        mean = {f.name: fmean(getattr(each[arm.name], f.name) for each in found.values()) for f in fields(Joined)}
        p50, whole = (
            median(getattr(each[arm.name], name) / getattr(each[ARMS[0].name], name) for each in found.values())
            for name in ("first_p50_s", "first_mean_s")
        )
        table.add_row(
            arm.name, f"{mean['first_p50_s']:.3f}", f"{mean['first_mean_s']:.3f}", f"{mean['first_p99_s']:.2f}",
            f"{mean['hits']:.3f}", f"{mean['waited_s']:.0f}", f"{mean['copies']:.0f}", f"{mean['took_s']:.0f}",
            f"{mean['all_p50_s']:.3f}", f"{p50:.2f}", f"{whole:.2f}",
        )  # fmt: skip
    console.print(table)
    return [
        {"setting": name, "arm": arm, "seed": seed, **asdict(joined)}
        for seed, arms in found.items()
        for arm, joined in arms.items()
    ]


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
