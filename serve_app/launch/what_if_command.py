"""`shadecast simulate`: the user's own requests and machines under one routing rule after another. Asks no cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from serve_app.launch import charts
from serve_app.launch.answers import JsonOption, answer, problems
from serve_app.launch.html_file import html_path, write_html
from serve_app.launch.tables import Column, table
from serve_app.launch.times import duration_s
from serve_app.page.watch import to_json
from shadecast.blocks import BLOCK_S
from shadecast.errors import ConfigError

if TYPE_CHECKING:
    from bench.simulate.what_if import ArmResult, Comparison, Setup

_FIRST = "1h"
_LEAST_WIDTH, _WIDE = 80, 200


def simulate(  # noqa: PLR0917 - options of a command are named by the user
    trace: Annotated[
        Path, typer.Option(metavar="FILE", help="Requests: Azure CSV, Mooncake JSONL, or any CSV with times; or .gz.")
    ],
    telemetry: Annotated[
        Path | None,
        typer.Option(
            metavar="LOG", help="Telemetry log, or a Parquet file that `train` reads. [default: calm machines]"
        ),
    ] = None,
    html: Annotated[
        str, typer.Option(metavar="FILE", help='The page with plots; it needs no internet. "": none.')
    ] = "shadecast-simulate.html",
    replicas: Annotated[
        int | None, typer.Option(min=1, max=1000, help="[default: as many as the log has machines, else 4]")
    ] = None,
    machines: Annotated[
        str, typer.Option(metavar="NAME,...", help="Machines of the log, one a replica. [default: the first ones]")
    ] = "",
    routers: Annotated[int, typer.Option(min=1, max=256, help="Processes that route, each by its own counts.")] = 2,
    slots: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Requests at once on a replica. [default: 4; tokens: 32]")
    ] = None,
    batch: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=4096.0, help="Batch at which a replica's speed halves; 0: none. [default: 0; tokens: 16]"
        ),
    ] = None,
    load_factor: Annotated[float, typer.Option(min=0.01, max=100.0, help="Times the trace's own rate.")] = 1.0,
    for_: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="Only the trace's first 90s, 10m, 2h.")
    ] = _FIRST,
    slo: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a request may take. [default: by its own time alone]")
    ] = 0.0,
    arms: Annotated[
        str, typer.Option(metavar="NAME,...", help="Routing rules to compare. [default: the five of docs/what_if.md]")
    ] = "",
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:section.key=value,...", help="Shadecast with other settings; may be given often."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each rule.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes.")] = 1,
    time_column: Annotated[str, typer.Option(help="Of a plain CSV. [default: timestamp, time, ...]")] = "",
    duration_column: Annotated[
        str, typer.Option(help="Seconds on an idle replica. [default: duration_s, duration]")
    ] = "",
    size_column: Annotated[
        str, typer.Option(help="What time is in proportion to. [default: size, tokens, bytes]")
    ] = "",
    mean_s: Annotated[
        float, typer.Option(min=0.001, max=3600.0, help="Mean time on an idle replica, where the trace has none.")
    ] = 0.1,
    token_s: Annotated[float, typer.Option(min=1e-6, max=10.0, help="For a generated token.")] = 0.02,
    prompt_token_s: Annotated[float, typer.Option(min=0.0, max=10.0, help="For a token of a prompt.")] = 0.0001,
    wide: Annotated[bool, typer.Option("--wide", help="All columns, however narrow the terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Play your own trace on your own machines' telemetry: what each routing rule would have done."""
    from bench.simulate import what_if  # noqa: PLC0415 - torch and pandas, which no other command needs
    from bench.simulate.own_machines import choose, read_machines  # noqa: PLC0415
    from bench.simulate.own_trace import Columns, Costs, read_trace  # noqa: PLC0415

    most_s = duration_s(for_, "--for")
    specs = what_if.arms(_names(arms) or what_if.DEFAULT_ARMS, what_if.policies(policy or ()))
    page_file = html_path(html)
    columns = Columns(time_column, duration_column, size_column)
    whole = read_trace(trace, Costs(prompt_token_s, token_s, mean_s), columns)
    own = whole.first(most_s)
    chosen = None
    if telemetry is not None:
        series, named = read_machines(telemetry), _names(machines)
        replicas = replicas or len(named or {each.machine for each in series})
        began_s, length_s = own.began_wall_s - what_if.LEAD_S, own.length_s / load_factor + what_if.LEAD_S
        chosen = choose(series, replicas, named, began_s, length_s)
    elif machines:
        raise ConfigError("--machines: names machines of a telemetry log; give --telemetry, too")
    setup = what_if.Setup(
        own,
        chosen,
        replicas or 4,
        routers,
        slots or (32 if own.streams else 4),
        (16.0 if own.streams else 0.0) if batch is None else batch,
        load_factor,
        slo,
    )
    with _progress(len(specs) * seeds) as told:
        found = what_if.compare(setup, specs, seeds, jobs, told)
    notes = _notes(setup, found, whole.length_s, seeds)
    if page_file is not None:
        write_html(page_file, _page(setup, found, notes))
    if as_json:
        answer(**to_json(_plain(setup, found, notes, seeds)), html=html or None)
        return
    width = max(Console().width, _LEAST_WIDTH)
    view = [*_table(found, math.inf if wide else width), *(Padding(Text(note), (0, 0, 0, 2)) for note in notes)]
    Console(width=_WIDE if wide else width).print(*view, sep="\n", highlight=False)
    if page_file is not None:
        Console().print(f"Wrote {page_file}", markup=False, highlight=False, soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _progress(runs: int) -> Iterator[Any]:
    """A bar on stderr."""
    columns = (TextColumn("Simulating"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=problems, transient=True) as progress:
        bar = progress.add_task("", total=runs)
        yield lambda done: progress.update(bar, completed=done)


# ---------------------------------------------------------------- what people read


def _table(found: Comparison, width: float) -> list[RenderableType]:
    rows = found.arms
    columns = [
        Column("rule", [row.arm for row in rows]),
        Column("SLO misses", [_missed(row) for row in rows], 0, True),
        Column("p50 s", [f"{row.p50_s:.3g}" for row in rows], 0, True),
        Column("p99 s", [f"{row.p99_s:.3g}" for row in rows], 0, True),
        Column("p99.9 s", [f"{row.p999_s:.3g}" for row in rows], 2, True),
        Column("mean s", [f"{row.mean_s:.3g}" for row in rows], 1, True),
        Column("time saved", [_saved(row, found) for row in rows], 0, True),
    ]
    return table(f"Time saved is against {found.base}; in brackets 95 % intervals", columns, width)


def _missed(row: ArmResult) -> str:
    return _share(row.slo_miss_fraction, row.slo_miss_bounds)


def _saved(row: ArmResult, found: Comparison) -> str:
    return "-" if row.arm == found.base else _share(row.saved_fraction, row.saved_bounds)


def _share(value: float, bounds: tuple[float, float] | None) -> str:
    text = f"{100 * value:.3g} %"
    return f"{text} [{100 * bounds[0]:.3g}, {100 * bounds[1]:.3g}]" if bounds else text


def _notes(setup: Setup, found: Comparison, whole_s: float, seeds: int) -> list[str]:
    trace, machines = setup.trace, setup.machines
    part = f", the first of {whole_s / 60:.0f} min (--for)" if trace.length_s < whole_s - 1.0 else ""
    served = f"{setup.slots} requests at once" + (
        f", speed halved at {setup.batch_half:g} together" if setup.batch_half else ", which do not slow each other"
    )
    notes = [
        f"{trace.name}: {len(trace.at_s)} requests in {trace.length_s / 60:.1f} min{part}, at {setup.load_factor:g} x "
        f"their rate, {seeds} {'runs' if seeds > 1 else 'run'} of each rule",
        *trace.notes,
        f"{setup.replicas} replicas, each on a machine of its own: {served}; {setup.routers} routers; load "
        f"{found.load:.2f} of what they can do",
        f"a machine serves with what others leave of its CPU by the log, 5 % at least; {machines.note}"
        if machines is not None
        else "no telemetry was given: no machine is disturbed",
        f"SLO: {setup.slo()}",
        "a simulation: no network, no cold starts, no failures; all rules see the same requests and machines",
    ]
    if found.load >= 1.0:
        notes.insert(0, f"OVERLOAD: {found.load:.2f} x what the replicas can do comes: no rule can serve that in time")
    if found.too_little:
        notes.insert(0, f"no intervals: {found.too_little}")
    else:
        notes.append(
            f"intervals: {BLOCK_S:g} s blocks of arrivals drawn anew 1,000 times; other days may differ by more"
        )
    if late := [row.arm for row in found.arms if row.unfinished]:
        notes.append(f"not all requests had ended two minutes after the last one came: {', '.join(late)}")
    return notes


# ---------------------------------------------------------------- what programs read, and the page


def _plain(setup: Setup, found: Comparison, notes: Sequence[str], seeds: int) -> dict[str, Any]:
    trace, machines = setup.trace, setup.machines
    return {
        "trace": {
            "name": trace.name,
            "requests": len(trace.at_s),
            "length_s": trace.length_s,
            "sizes": trace.sizes,
            "mean_work_s": trace.mean_s,
        },
        "machines": [machine.name for machine in machines.chosen] if machines is not None else None,
        "replicas": setup.replicas,
        "routers": setup.routers,
        "slots": setup.slots,
        "batch_half": setup.batch_half,
        "load_factor": setup.load_factor,
        "load": found.load,
        "slo": setup.slo(),
        "seeds": seeds,
        "base": found.base,
        "too_little": found.too_little or None,
        "arms": [asdict(arm) for arm in found.arms],
        "rate_by_block": found.rate_by_block,
        "free_by_block": [{"machine": name, "free": free} for name, free in found.free_by_block],
        "block_s": BLOCK_S,
        "notes": list(notes),
    }


def _page(setup: Setup, found: Comparison, notes: Sequence[str]) -> str:
    rows = found.arms
    over = [BLOCK_S * k / 60.0 for k in range(len(found.rate_by_block))]
    cells = [
        (r.arm, _missed(r), f"{r.p50_s:.3g}", f"{r.p99_s:.3g}", f"{r.p999_s:.3g}", f"{r.mean_s:.3g}", _saved(r, found))
        for r in rows
    ]
    headings = ("rule", "SLO misses", "p50 s", "p99 s", "p99.9 s", "mean s", f"time saved against {found.base}")
    missed = [(r.arm, 100 * r.slo_miss_fraction, _times(r.slo_miss_bounds, 100.0)) for r in rows]
    tails = [(r.arm, [(x, 100 * y) for x, y in r.tail]) for r in rows]
    means = [(r.arm, list(zip(over, r.mean_by_block_s, strict=True))) for r in rows]
    parts = [
        charts.table(headings, cells),
        charts.notes([*notes, *(f"{r.arm}: {r.meaning}" for r in rows if r.meaning)]),
        charts.bars("SLO misses", missed, "per cent of the requests; lines are 95 % intervals"),
        charts.bars("99th percentile of the latency", [(r.arm, r.p99_s, r.p99_bounds_s) for r in rows], "seconds"),
        charts.lines("How many requests take longer", tails, "latency, s", "per cent", log_x=True, log_y=True),
        charts.lines("Latency over time", means, "minutes", "mean of each half minute, s", log_y=True),
        charts.lines(
            "Requests", [("all", list(zip(over, found.rate_by_block, strict=True)))], "minutes", "requests a second"
        ),
    ]
    if found.free_by_block:
        free = [(name, list(zip(over, values, strict=True))) for name, values in found.free_by_block[:12]]
        parts.append(charts.lines("What others leave of each machine's CPU", free, "minutes", "fraction", high=1.0))
    return charts.page(f"What if: {setup.trace.name}", parts)


def _times(bounds: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return (bounds[0] * factor, bounds[1] * factor) if bounds else None
