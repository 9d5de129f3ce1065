"""Tables, targets, the page."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.live.arms import ARMS
from bench.live.scenario import SCENARIOS, Scenario
from bench.live.targets import baseline, checks
from bench.results import Check, Row, by_arm, comparable, interval, is_older

_COLUMNS = (
    ("p50_s", "p50 ms", 1000.0, 0),
    ("p90_s", "p90 ms", 1000.0, 0),
    ("p99_s", "p99 ms", 1000.0, 0),
    ("p999_s", "p99.9 ms", 1000.0, 0),
    ("fault_p99_s", "p99 in fault ms", 1000.0, 0),
    ("first_item_p99_s", "first item p99 ms", 1000.0, 0),
    ("item_slowdown_p99", "item slowdown p99", 1.0, 2),
    ("slo_miss_fraction", "SLO misses %", 100.0, 2),
    ("goodput_per_s", "goodput /s", 1.0, 1),
    ("errors", "errors", 1.0, 1),
    ("lost", "lost", 1.0, 1),
    ("stream_moves", "streams gone on elsewhere", 1.0, 0),
    ("sessions_moved", "moved", 1.0, 0),
    ("session_stay_fraction_well", "stay %", 100.0, 2),
    ("share_bad_node", "bad node %", 100.0, 1),
    ("avoided_s", "avoided s", 1.0, 1),
    ("used_again_s", "used again s", 1.0, 1),
    ("newcomer_first_answer_s", "newcomer's first answer s", 1.0, 1),
    ("newcomer_full_share_s", "its full share s", 1.0, 1),
    ("newcomer_share", "its part of a fair share", 1.0, 2),
    ("mirrored_fraction", "mirrored %", 100.0, 1),
    ("driver_cpu_ms_per_request", "router+client CPU ms/req", 1.0, 2),
    ("coordinator_cpu_fraction", "coordinator CPU %", 100.0, 1),
    ("coordinator_rss_bytes", "coordinator MB", 1e-6, 0),
    ("forecasters_cpu_fraction", "forecaster CPU %", 100.0, 2),
    ("forecasters_rss_bytes", "forecaster MB", 1e-6, 0),
)
_PRINTED = {"p50_s", "p99_s", "p999_s", "slo_miss_fraction", "errors"}
_HIDDEN_IN_TERMINAL = {"p90_s", "goodput_per_s", "coordinator_rss_bytes", "forecasters_rss_bytes", "lost"}

Found = Mapping[str, Mapping[str, Sequence[float]]]
"""arm -> metric -> values over seeds."""


def _shown(found: Found) -> list[tuple[str, str, float, int]]:
    return [
        column
        for column in _COLUMNS
        if column[0] in _PRINTED or any(any(metrics.get(column[0], ())) for metrics in found.values())
    ]


def _cell(values: Sequence[float], scale: float, digits: int) -> str:
    known = [value * scale for value in values]
    if not known:
        return ""
    mean, half = interval(known)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(known) > 1 else f"{mean:.{digits}f}"


def _title(scenario: Scenario, found: Found) -> str:
    seeds = max((len(metrics["requests"]) for metrics in found.values()), default=0)
    counts = [value for metrics in found.values() for value in metrics["requests"]]
    quick = ", QUICK: too few requests for a p99 to mean much" if min(counts) < 0.8 * scenario.requests else ""
    load = f"{scenario.rate_per_s:g}/s, {np.mean(counts):.0f} requests per arm and seed"
    return f"{scenario.note}; {load}, {seeds} seeds{quick}"


def _checks(name: str, found: Found, rows: Sequence[Row]) -> list[Check]:
    """Against the targets, and against the baseline's runs of the same seeds."""
    seeds = {row.seed for row in rows if row.scenario == name}
    return checks(name, found, by_arm([row for row in rows if row.seed in seeds], baseline(name), ARMS))


def print_table(console: Console, scenario: Scenario, rows: Sequence[Row]) -> None:
    """One scenario's table with intervals over seeds, and how it stands to the targets."""
    rows = comparable(rows)
    found = by_arm(rows, scenario.name, ARMS)
    if not found:
        return
    table = Table(title=f"{scenario.name}: {_title(scenario, found)}", title_justify="left")
    columns = [column for column in _shown(found) if column[0] not in _HIDDEN_IN_TERMINAL]
    table.add_column("arm", no_wrap=True)
    for _, label, _, _ in columns:
        table.add_column(label, justify="right")
    for arm, metrics in found.items():
        table.add_row(arm, *(_cell(metrics.get(name, ()), scale, digits) for name, _, scale, digits in columns))
    console.print(table)
    for check in _checks(scenario.name, found, rows):
        console.print("  " + check.line(), style="green" if check.met else "yellow", markup=False)


def machine() -> str:
    """Where and with what the numbers were made."""
    import ray  # noqa: PLC0415 - slow to import, needed for the page only

    return (
        f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores shared by all hosts, "
        f"python {platform.python_version()}, ray {ray.__version__}"
    )


def write_markdown(path: Path, rows: Sequence[Row], series: Path | None) -> None:
    """The page: targets on top, then one section with table and pictures per scenario."""
    from bench.live.plots import plot_scenario  # noqa: PLC0415 - matplotlib only when asked for

    rows = comparable(rows)
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    verdicts: list[tuple[str, Check]] = []
    sections: list[str] = []
    names = [*SCENARIOS, *dict.fromkeys(row.scenario for row in rows if row.scenario not in SCENARIOS)]
    for name in names:
        found = by_arm(rows, name, ARMS)
        if not found:
            continue
        verdicts += [(name, check) for check in _checks(name, found, rows)]
        columns = _shown(found)
        about = _title(SCENARIOS[name], found) if name in SCENARIOS else ""
        lines = [
            f"### {name}",
            "",
            f"{about}.",
            "",
            "| arm | " + " | ".join(label for _, label, _, _ in columns) + " |",
        ]
        lines += ["|---|" + "---:|" * len(columns)]
        for arm, metrics in found.items():
            cells = (_cell(metrics.get(metric, ()), scale, digits) for metric, _, scale, digits in columns)
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        kinds = _errors(found)
        lines += ["", f"Errors: {kinds}."] if kinds else []
        lines += ["", _made(name, rows)]
        if series is not None:
            for picture in plot_scenario(pictures, name, list(found), series):
                lines += ["", f"![{name}]({pictures.name}/{picture.name})"]
        sections += [*lines, ""]
    seeds = len({row.seed for row in rows})
    head = [
        "# Live clusters",
        "",
        f"Made by `make bench-live`; do not edit. {seeds} seeds; ± is the half width of the 95 % interval over seeds. "
        f"{machine()}. Each host has its own network, processes and files, each worker a quota of a quarter of a core. "
        "Latencies count from the time at which a request was due. Arms run in turn on the same cluster with the same "
        "arrivals, the order rotates by seed. The control plane runs beside every arm.",
        "",
        *_notes(path),
        "## Targets",
        "",
        "| scenario | target | measured | met |",
        "|---|---|---|---|",
        *(f"| {n} | {c.text} | {c.measured} | {'yes' if c.met else '**no**'} |" for n, c in verdicts),
        "",
        "## Results",
        "",
    ]
    path.write_text("\n".join([*head, *sections]), encoding="utf-8")


def _notes(path: Path) -> list[str]:
    """Hand-written notes that live beside the page and survive its making."""
    notes = path.with_name(f"{path.stem}-notes.md")
    return [*notes.read_text(encoding="utf-8").rstrip().splitlines(), ""] if notes.exists() else []


def _made(name: str, rows: Sequence[Row]) -> str:
    """Seeds and code of each arm."""
    runs: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if row.scenario == name:
            runs.setdefault((row.arm, row.code), set()).add(row.seed)
    order = {arm: i for i, arm in enumerate(ARMS)}
    told = sorted(runs.items(), key=lambda run: (order.get(run[0][0], len(order)), run[0][1]))
    text = "; ".join(f"{arm} {', '.join(map(str, sorted(seeds)))} ({code or 'unknown'})" for (arm, code), seeds in told)
    since = any(is_older(code) for _, code in runs)
    return f"Seeds (code): {text}." + (' "before" names a decision that has changed our part since.' if since else "")


def _errors(found: Found) -> str:
    """Errors by kind, over all seeds."""
    parts = []
    for arm, metrics in found.items():
        kinds = {m.removeprefix("errors_"): sum(v) for m, v in metrics.items() if m.startswith("errors_")}
        if kinds:
            parts.append(f"{arm} " + ", ".join(f"{count:.0f} {kind}" for kind, count in sorted(kinds.items())))
    return "; ".join(parts)
