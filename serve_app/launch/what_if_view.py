"""What `shadecast simulate` tells: in a table and notes, for programs, and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from serve_app.launch import charts
from serve_app.launch.tables import Column, table
from shadecast.blocks import BLOCK_S

if TYPE_CHECKING:
    from bench.simulate.what_if import ArmResult, Comparison, Setup


# ---------------------------------------------------------------- what people read


def table_of(found: Comparison, width: float) -> list[RenderableType]:
    """For the terminal."""
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


def notes(setup: Setup, found: Comparison, whole_s: float, seeds: int) -> list[str]:
    """What must be known to read the numbers; `whole_s` is the length of the whole trace."""
    trace, machines = setup.trace, setup.machines
    part = f", the first of {whole_s / 60:.0f} min (--for)" if trace.length_s < whole_s - 1.0 else ""
    served = f"{setup.slots} requests at once" + (
        f", speed halved at {setup.batch_half:g} together" if setup.batch_half else ", which do not slow each other"
    )
    lines = [
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
        lines.insert(0, f"OVERLOAD: {found.load:.2f} x what the replicas can do comes: no rule can serve that in time")
    if found.too_little:
        lines.insert(0, f"no intervals: {found.too_little}")
    else:
        lines.append(
            f"intervals: {BLOCK_S:g} s blocks of arrivals drawn anew 1,000 times; other days may differ by more"
        )
    if late := [row.arm for row in found.arms if row.unfinished]:
        lines.append(f"not all requests had ended two minutes after the last one came: {', '.join(late)}")
    return lines


# ---------------------------------------------------------------- what programs read, and the page


def plain(setup: Setup, found: Comparison, lines: Sequence[str], seeds: int) -> dict[str, Any]:
    """For `--json`."""
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
        "notes": list(lines),
    }


def page(setup: Setup, found: Comparison, lines: Sequence[str]) -> str:
    """One HTML file."""
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
        charts.notes([*lines, *(f"{r.arm}: {r.meaning}" for r in rows if r.meaning)]),
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
