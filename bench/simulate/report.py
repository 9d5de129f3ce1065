"""Tables, intervals, the page with plots."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.results import Check, Row, by_arm, interval
from bench.simulate.arms import ARMS
from bench.simulate.scenario import Scenario
from bench.simulate.targets import checks

_COLUMNS = (
    ("slo_miss_fraction", "SLO misses %", 100.0, 2),
    ("p50_s", "p50 s", 1.0, 3),
    ("p99_s", "p99 s", 1.0, 3),
    ("p999_s", "p99.9 s", 1.0, 3),
    ("p50_slowdown", "p50 slowdown", 1.0, 2),
    ("p99_slowdown", "p99 slowdown", 1.0, 2),
    ("lost_requests", "lost", 1.0, 0),
    ("moved_sessions", "moved", 1.0, 0),
    ("error_fraction", "errors %", 100.0, 2),
    ("decision_us", "decision us", 1.0, 1),
)
_ALWAYS = {"slo_miss_fraction", "p50_s", "p99_s", "p999_s", "decision_us"}


def _shown(found: dict[str, dict[str, list[float]]]) -> list[tuple[str, str, float, int]]:
    return [
        column
        for column in _COLUMNS
        if column[0] in _ALWAYS
        or column[0].endswith("slowdown")
        or any(any(metrics.get(column[0], ())) for metrics in found.values())
    ]


def _cell(values: Sequence[float], scale: float, digits: int) -> str:
    mean, half = interval([value * scale for value in values])
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def print_table(console: Console, scenario: Scenario, rows: Sequence[Row], quick: bool) -> None:
    """One scenario's table, and how it stands to the targets."""
    found = by_arm(rows, scenario.name, ARMS)
    seeds = max((len(metrics["p50_s"]) for metrics in found.values()), default=0)
    title = f"{scenario.name}: {scenario.note}; load {scenario.load:g}, {seeds} seeds" + (", QUICK" if quick else "")
    table = Table(title=title, title_justify="left")
    columns = _shown(found)
    table.add_column("arm")
    for _, label, _, _ in columns:
        table.add_column(label, justify="right")
    for arm, metrics in found.items():
        table.add_row(arm, *(_cell(metrics[name], scale, digits) for name, _, scale, digits in columns))
    console.print(table)
    for check in checks(scenario.name, found):
        console.print("  " + check.line(), style="green" if check.met else "yellow", markup=False)


def machine() -> dict[str, str]:
    """Where and with what the numbers were made."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def write_markdown(
    path: Path, scenarios: Sequence[Scenario], rows: Sequence[Row], made: dict[str, str], quick: bool
) -> None:
    """The page: how to read it, one section with table and plot per scenario, the targets on top."""
    from bench.simulate.plots import plot_loads, plot_scenario  # noqa: PLC0415 - matplotlib only when asked for

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = path.parent / "simulation"
    pictures.mkdir(exist_ok=True)
    verdicts: list[tuple[Scenario, Check]] = []
    sections: list[str] = []
    for scenario in scenarios:
        found = by_arm(rows, scenario.name, ARMS)
        if not found:
            continue
        columns = _shown(found)
        verdicts += [(scenario, check) for check in checks(scenario.name, found)]
        lines = [f"### {scenario.name}", "", f"{scenario.note}; load {scenario.load:g}.", ""]
        lines += ["| arm | " + " | ".join(label for _, label, _, _ in columns) + " |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for arm, metrics in found.items():
            cells = " | ".join(_cell(metrics[name], scale, digits) for name, _, scale, digits in columns)
            lines += [f"| {arm} | {cells} |"]
        picture = pictures / f"{scenario.name.replace('@', '-')}.png"
        plot_scenario(picture, scenario, found)
        sections += [*lines, "", f"![{scenario.name}](simulation/{picture.name})", ""]
    loads = [s for s in scenarios if s.name.startswith("tokens-antagonist")]
    if len(loads) > 1:
        plot_loads(pictures / "loads.png", loads, rows)
        sections += ["### Over the load", "", "![load](simulation/loads.png)", ""]
    seeds = len({row.seed for row in rows})
    about = ", ".join(f"{key} {value}" for key, value in made.items())
    head = [
        "# Simulation",
        "",
        "Made by `make bench-sim`; do not edit below the notes. "
        f"{seeds} seeds, ± is the half width of the 95 % interval over seeds; {about}."
        + (" QUICK: a fifth of the usual time." if quick else ""),
        "",
        *_notes(path),
        "## Targets",
        "",
        "| scenario | target | measured | met |",
        "|---|---|---|---|",
        *(f"| {scenario.name} | {check.text} | {check.measured} | {'yes' if check.met else '**no**'} |"
          for scenario, check in verdicts),
        "",
        "## Results",
        "",
    ]  # fmt: skip
    path.write_text("\n".join([*head, *sections]) + "\n", encoding="utf-8")


def _notes(path: Path) -> list[str]:
    """Hand-written notes that live beside the page and survive its making."""
    notes = path.with_name("simulation-notes.md")
    return [*notes.read_text(encoding="utf-8").rstrip().splitlines(), ""] if notes.exists() else []
