"""`python -m bench.llm [--setting NAME] [--rule NAME] [--seeds N]`: rules side by side in front of simulated engines.

For each setting a table of all rules, the same requests for each; means over the seeds. Settings whose trace is not
there are left out, with the reason. Traces of other folders: `--traces`.

With `--joins`: a third replica joins two, and is let in with and without a trial by copies (`bench.llm.joining`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.llm.joining import ARMS, FIRST, TRAFFIC, Joined, compare
from bench.llm.routers import RULES
from bench.llm.run import Result, simulate
from bench.llm.settings import Setting, settings
from bench.llm.traffic import ceiling
from bench.results import code_version
from bench.simulate.report import machine

_SINGLE = [name for name, rule in RULES.items() if name.startswith("step 1, own x") or not name.startswith("step 1")]


def main(
    *,
    setting: Annotated[list[str] | None, typer.Option(help="only these; all else")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="only these; all else")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    first_seed: Annotated[int, typer.Option()] = 0,
    traces: Annotated[Path | None, typer.Option(help="folder of traces; default: traces of SHADECAST_DATA")] = None,
    load: Annotated[float, typer.Option(min=0.01, help="times each setting's own")] = 1.0,
    joins: Annotated[bool, typer.Option("--joins", help="how a newcomer is let in, instead of rules")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Compare rules."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    known = {each.name: each for each in settings(traces)}
    for name, names, what in ((setting, TRAFFIC if joins else known, "setting"), (rule, RULES, "rule")):
        if unknown := set(name or ()) - set(names):
            raise typer.BadParameter(f"{what} {sorted(unknown)}: unknown; known are {', '.join(names)}")
    rows = []
    if joins:
        tried = range(first_seed, first_seed + seeds)
        rows = [row for name in setting or TRAFFIC for row in _join(name, tried, load, console)]
    for each in [] if joins else [known[name] for name in setting or known]:
        if each.needs is not None and not each.needs.is_file():
            console.print(f"{each.name}: left out, {each.needs} is not there; give --traces or set SHADECAST_DATA")
            continue
        rules = rule or (list(RULES) if each.routers > 1 else _SINGLE)
        rows += _compare(each, rules, range(first_seed, first_seed + seeds), load, console)
    if json_file is not None:
        made = {"machine": machine(), "code": code_version(), "rows": rows}
        json_file.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")


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


def _compare(
    setting: Setting, rules: list[str], seeds: range, load: float, console: Console
) -> list[dict[str, object]]:
    found: dict[str, list[Result]] = {name: [] for name in rules}
    top = 0.0
    for seed in seeds:
        jobs = setting.make(seed, load)
        top = ceiling(jobs)
        for name in rules:
            found[name].append(
                simulate(RULES[name], jobs, setting.machine, setting.speeds, routers=setting.routers, seed=seed)
            )
    console.print(
        f"\n{setting.name}: {len(jobs)} requests, at most {top:.3f} of the prompts shared, {len(seeds)} seeds"
    )
    table = Table(
        "rule", "in SLO", "TTFT p50 s", "p99", "TPOT p50 ms", "p99", "mean time s", "hits", "believed", "busiest/mean"
    )
    for name, results in found.items():
        mean = {f.name: fmean(getattr(r, f.name) for r in results) for f in fields(Result)}
        table.add_row(
            name, f"{mean['in_slo']:.3f}", f"{mean['first_p50_s']:.2f}", f"{mean['first_p99_s']:.1f}",
            f"{mean['token_p50_ms']:.0f}", f"{mean['token_p99_ms']:.0f}", f"{mean['mean_s']:.2f}",
            f"{mean['hits']:.3f}", f"{mean['believed']:.3f}", f"{mean['busiest']:.2f}",
        )  # fmt: skip
    console.print(table)
    return [
        {"setting": setting.name, "rule": name, "seed": seed, **asdict(result)}
        for name, results in found.items()
        for seed, result in zip(seeds, results, strict=True)
    ]


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
