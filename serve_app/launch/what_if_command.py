"""`shadecast simulate`: the user's own requests and machines under one routing rule after another. Asks no cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from serve_app.launch.answers import JsonOption, answer, problems
from serve_app.launch.html_file import html_path, write_html
from serve_app.launch.times import duration_s
from serve_app.page.watch import to_json
from shadecast.errors import ConfigError

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
        float,
        typer.Option(
            min=0.0, show_default=False, help="Seconds that a request may take. [default: by its own time alone]"
        ),
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
    """Play your own requests under each routing rule.

    On your own machines, as their telemetry tells.
    """
    from bench.simulate import what_if  # noqa: PLC0415 - torch and pandas, which no other command needs
    from bench.simulate.own_machines import choose, read_machines  # noqa: PLC0415
    from bench.simulate.own_trace import Columns, Costs, read_trace  # noqa: PLC0415
    from serve_app.launch import what_if_view  # noqa: PLC0415

    most_s = duration_s(for_, "--for")
    specs = what_if.arms(_names(arms) or what_if.DEFAULT_ARMS, what_if.policies(policy or ()))
    page_file = html_path(html)
    columns = Columns(time_column, duration_column, size_column)
    with problems.status(f"Reading {trace}"):
        whole = read_trace(trace, Costs(prompt_token_s, token_s, mean_s), columns)
    own = whole.first(most_s)
    chosen = None
    if telemetry is not None:
        with problems.status(f"Reading {telemetry}"):
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
    notes = what_if_view.notes(setup, found, whole.length_s, seeds)
    if page_file is not None:
        write_html(page_file, what_if_view.page(setup, found, notes))
    if as_json:
        answer(**to_json(what_if_view.plain(setup, found, notes, seeds)), html=html or None)
        return
    width = max(Console().width, _LEAST_WIDTH)
    view = [
        *what_if_view.table_of(found, math.inf if wide else width),
        *(Padding(Text(note), (0, 0, 0, 2)) for note in notes),
    ]
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
