"""A user's own machines: the telemetry log of their nodes, or any table that `train` reads, played second by second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.recordings import IDLE, LINK_BYTES_PER_S, Recording
from bench.simulate.nodes import NodeTrace
from models.grid import CHANNELS, Array
from models.series import Series, TelemetryError, read_folder, series_of, source_of
from shadecast.errors import ConfigError

_CPU, _NETWORK = CHANNELS.index("cpu"), CHANNELS.index("network")
_LEAST_OVERLAP = 0.5
"""Of a trace's time that the log must cover to be played by the calendar."""
_LEAST_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine's recorded pieces: (start, recording) in seconds after the log's common start, in order."""

    name: str
    pieces: tuple[tuple[float, Recording], ...]
    length_s: float


@dataclass(frozen=True, slots=True)
class Machines:
    """What the replicas' machines show while the trace is played."""

    chosen: tuple[Machine, ...]
    repeated: bool
    """Where the log is shorter than the trace, it begins again."""
    note: str

    def nodes(self, until_s: float) -> list[NodeTrace]:
        """One trace of speed and telemetry for each machine."""
        return [_node(machine, until_s, repeated=self.repeated) for machine in self.chosen]


def read_machines(path: Path) -> list[Series]:
    """The series of a telemetry log's folder, or of one Parquet file. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"--telemetry {path}: no such file or folder")
    try:
        if path.is_dir():
            found = read_folder(path)
        else:
            found = list(series_of(pd.read_parquet(path, partitioning=None), source_of(path, path.parent)))
    except (TelemetryError, OSError, ValueError, KeyError) as error:
        text = str(error)
        raise ConfigError(f"--telemetry {text if text.startswith(str(path)) else f'{path}: {text}'}") from None
    found = [series for series in found if len(series.values) * series.period_s >= _LEAST_S]
    if not found:
        raise ConfigError(f"--telemetry {path}: holds no {_LEAST_S:g} s of one machine without a gap")
    if not any(np.isfinite(series.values[:, _CPU]).any() for series in found):
        raise ConfigError(f"--telemetry {path}: tells no machine's CPU")
    return found


def choose(
    series: Sequence[Series], replicas: int, names: Sequence[str], began_wall_s: float, length_s: float
) -> Machines:
    """The machines of the replicas, one each: those named, else the first of the log by name. Raises ConfigError.

    Where trace and log tell calendar time and share most of it, the log is played as it was then; else both begin
    together.
    """
    by_machine: dict[str, list[Series]] = {}
    for each in sorted(series, key=lambda each: (each.machine, each.began_wall_s, each.recording)):
        by_machine.setdefault(each.machine, []).append(each)
    for name in names:
        if name not in by_machine:
            raise ConfigError(f"--machines {name!r}: not in the log; it has {_some(by_machine)}")
    wanted = list(names) or list(by_machine)[:replicas]
    if len(wanted) < replicas:
        what = f"--machines names {len(names)} machines" if names else f"the telemetry has {len(by_machine)} machines"
        raise ConfigError(
            f"--replicas {replicas}: {what}, and each replica needs one of its own: "
            "give fewer replicas, or more machines"
        )
    pools = {name: by_machine[name] for name in wanted[:replicas]}
    calendar = all(math.isfinite(each.began_wall_s) for pool in pools.values() for each in pool)
    if calendar and math.isfinite(began_wall_s):
        shared = [_overlap_s(pool, began_wall_s, began_wall_s + length_s) / length_s for pool in pools.values()]
        if min(shared) >= _LEAST_OVERLAP:
            chosen = tuple(_machine(name, pool, began_wall_s) for name, pool in pools.items())
            return Machines(chosen, False, "the log is played as it was at the time of the trace")
    start_s = max(pool[0].began_wall_s for pool in pools.values()) if calendar else math.nan
    if calendar and all(_overlap_s(pool, start_s, math.inf) >= _LEAST_S for pool in pools.values()):
        note = "trace and log do not tell the same time: both begin together, the machines as they were to each other"
    else:
        start_s, note = math.nan, "trace and log begin together, each machine at its own first sample"
    chosen = tuple(_machine(name, pool, start_s) for name, pool in pools.items())
    repeated = any(machine.length_s < length_s for machine in chosen)
    if repeated:
        note += "; where the log is shorter than the trace, it begins again"
    return Machines(chosen, repeated, note)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _overlap_s(pool: Sequence[Series], from_s: float, to_s: float) -> float:
    return sum(max(min(each.ended_wall_s, to_s) - max(each.began_wall_s, from_s), 0.0) for each in pool)


def _machine(name: str, pool: Sequence[Series], start_wall_s: float) -> Machine:
    """`start_wall_s` is where its time 0 lies; NaN: its pieces follow each other without the gaps between them."""
    pieces: list[tuple[float, Recording]] = []
    end_s = -math.inf
    for each in pool:
        recording = Recording(f"{name}/{each.recording}", _rows(each))
        at_s = each.began_wall_s - start_wall_s if math.isfinite(start_wall_s) else max(end_s, 0.0)
        at_s = float(round(at_s))
        if at_s < 0.0:
            recording = Recording(recording.name, recording.rows[int(-at_s) :])
            at_s = 0.0
        if at_s < end_s or not recording.rows:
            continue  # a second recorder of the same machine, or over before it begins
        pieces.append((at_s, recording))
        end_s = at_s + recording.length_s
    return Machine(name, tuple(pieces), max(end_s, 0.0))


def _rows(series: Series) -> tuple[tuple[float, ...], ...]:
    """[second][channel]: holes hold the last value; network as a fraction of its link."""
    values = np.array(series.values, np.float64)
    network = values[:, _NETWORK]
    if np.nanmax(np.append(network, 0.0)) > 1.0:
        values[:, _NETWORK] = np.minimum(network / LINK_BYTES_PER_S, 1.0)
    return tuple(tuple(map(float, row)) for row in _each_second(filled(values), series.period_s))


def filled(values: Array) -> Array:
    """[sample, channel] with the last known value where one is missing, that of an idle machine before the first."""
    before = np.asarray(IDLE)
    rows = np.array(values)
    for row in rows:
        missing = ~np.isfinite(row)
        row[missing] = before[missing]
        before = row
    return rows


def _each_second(rows: Array, period_s: float) -> Array:
    seconds = max(int(len(rows) * period_s), 1)
    at = np.minimum((np.arange(seconds) / period_s).astype(int), len(rows) - 1)
    return np.asarray(rows[at])


def _node(machine: Machine, until_s: float, *, repeated: bool) -> NodeTrace:
    trace = NodeTrace()
    lap_s = 0.0
    while lap_s < until_s:
        for at_s, recording in machine.pieces:
            if lap_s + at_s < until_s:
                trace.play(lap_s + at_s, recording)
        if not repeated or machine.length_s <= 0.0:
            break
        lap_s += machine.length_s
    return trace
