"""Telemetry tables as contiguous series: nothing downstream looks across a gap or from one recording into another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.grid import CHANNELS, EXTENDED, Array
from models.schema import REQUIRED_COLUMNS
from shadecast.errors import ShadecastError

MAX_HOLE = 3
"""Up to so many missing samples in a row stay in a series as NaN; a longer gap ends it."""
CLOCK_STEP_S = 60.0
"""Where calendar and monotonic time part by so much, the clock was set or the machine slept: a series ends there."""


class TelemetryError(ShadecastError, ValueError):
    """A telemetry file lacks what training and judging need."""


@dataclass(frozen=True, slots=True)
class Series:
    """One uninterrupted recording: `values` [time, channel] on a grid of `period_s`, NaN where missing.

    `extended` [time, channel] are the further channels, None where the recording has none of them.
    `began_wall_s` is the calendar time of its first row, NaN where the file does not tell.
    """

    source: str
    machine: str
    recording: str
    period_s: float
    values: Array
    began_wall_s: float = math.nan
    extended: Array | None = None

    @property
    def all_values(self) -> Array:
        """[time, channel]: `values`, and behind them the further channels, NaN where there are none."""
        missing = np.full((len(self.values), len(EXTENDED)), np.nan, np.float32)
        return np.concatenate([self.values, missing if self.extended is None else self.extended], axis=1)

    @property
    def ended_wall_s(self) -> float:
        """Calendar time of the last row."""
        return self.began_wall_s + (len(self.values) - 1) * self.period_s


def series_of(frame: pd.DataFrame, source: str) -> Iterator[Series]:
    """Cut a telemetry table into series. Raises TelemetryError naming the columns that are missing."""
    missing = [name for name in REQUIRED_COLUMNS if name not in frame.columns]
    if missing:
        raise TelemetryError(
            f"{source}: no column {', '.join(missing)}; a telemetry file has {', '.join(REQUIRED_COLUMNS)}"
        )
    for (machine, recording), group in frame.groupby(["machine", "recording"], sort=True, observed=True):
        rows = group[np.isfinite(group["t_s"])].sort_values("t_s").drop_duplicates("t_s")
        t_s = rows["t_s"].to_numpy(np.float64)
        if len(t_s) < 2:
            continue
        period_s = sampling_period_s(t_s)
        slot = np.round((t_s - t_s[0]) / period_s).astype(np.int64)
        values = np.concatenate([channels_of(rows), extended_of(rows)], axis=1)
        wall_s = rows["wall_s"].to_numpy(np.float64) if "wall_s" in rows.columns else None
        fresh = np.concatenate([[True], np.diff(slot) > 0])
        slot, values = slot[fresh], values[fresh]
        breaks = np.diff(slot) > MAX_HOLE + 1
        if wall_s is not None:
            breaks |= np.abs(np.diff((wall_s - t_s)[fresh])) > CLOCK_STEP_S
        for part in np.split(np.arange(len(slot)), np.flatnonzero(breaks) + 1):
            grid = np.full((slot[part[-1]] - slot[part[0]] + 1, values.shape[1]), np.nan, np.float32)
            grid[slot[part] - slot[part[0]]] = values[part]
            began_wall_s = float(wall_s[fresh][part[0]]) if wall_s is not None else math.nan
            usual, more = np.ascontiguousarray(grid[:, : len(CHANNELS)]), grid[:, len(CHANNELS) :]
            extended = more if np.isfinite(more).any() else None
            yield Series(source, str(machine), str(recording), period_s, usual, began_wall_s, extended)


def sampling_period_s(t_s: NDArray[np.float64]) -> float:
    """Whole seconds, or hundredths where something samples faster than that."""
    middle_s = float(np.median(np.diff(t_s)))
    return float(round(middle_s)) if middle_s > 0.75 else max(0.01, round(middle_s, 2))


def channels_of(rows: pd.DataFrame) -> Array:
    """Values [time, channel]: the exogenous parts where the log has them, else totals; greater network direction."""

    column = partial(_column, rows)

    def first_known(*options: Array) -> Array:
        return next((o for o in options if np.isfinite(o).any()), options[-1])

    cpu = first_known(column("cpu_background_fraction"), column("cpu_fraction"))
    greater = np.fmax(column("net_rx_bytes_per_s"), column("net_tx_bytes_per_s"))
    network = first_known(column("network_background_fraction"), greater)
    values = np.stack(
        [
            np.clip(cpu, 0.0, 1.0),
            np.clip(column("memory_fraction"), 0.0, 1.0),
            np.maximum(network, 0.0),
            column("context_switches_per_s"),
            column("load1"),
            column("disk_busy_fraction"),
        ],
        axis=1,
    )
    values[~np.isfinite(values)] = np.nan
    return values.astype(np.float32)


def extended_of(rows: pd.DataFrame) -> Array:
    """The further channels [time, channel], in the order of `EXTENDED`; NaN where the table lacks them."""
    names = ("process_starts_per_s", "runnable", "blocked", "system_fraction", "io_wait_fraction")
    values = np.stack([_column(rows, n) for n in (*names, "page_faults_per_s", "io_bytes_per_s")], axis=1)
    values[~np.isfinite(values)] = np.nan
    return np.asarray(np.maximum(values, 0.0), np.float32)


def _column(rows: pd.DataFrame, name: str) -> Array:
    if name not in rows.columns:
        return np.full(len(rows), np.nan, np.float32)
    return pd.to_numeric(rows[name], errors="coerce").to_numpy(np.float32)


def source_of(path: Path, folder: Path) -> str:
    """Name of the source that a file below `folder` belongs to."""
    parts = path.parts[len(folder.parts) :] if path.is_relative_to(folder) else path.parts
    return "own" if any(part.startswith("node=") for part in parts) else path.stem.split("_")[0]


def telemetry_files(folder: Path) -> list[Path]:
    """The Parquet files below a folder, sorted; what begins with a dot or an underscore is none."""
    return sorted(p for p in folder.rglob("*.parquet") if not p.name.startswith((".", "_")))


def read_folder(folder: Path, names: Sequence[str] | None = None) -> list[Series]:
    """All series of the Parquet files below a folder.

    A source is the first part of a file's name (`lumos_1s.parquet` -> `lumos`); the partitioned log of our own
    forecasters is the source `own`. Raises TelemetryError where there is nothing, or a file cannot be read.
    """
    files = telemetry_files(folder)
    if not files:
        raise TelemetryError(f"{folder}: no *.parquet telemetry here; `shadecast up --telemetry-log FOLDER` writes it")
    found: list[Series] = []
    frames: dict[str, list[pd.DataFrame]] = {}
    for path in files:
        source = source_of(path, folder)
        if names is not None and source not in names:
            continue
        try:
            frames.setdefault(source, []).append(pd.read_parquet(path, partitioning=None))
        except (OSError, ValueError) as error:
            raise TelemetryError(f"{path}: cannot be read as Parquet ({error}); delete or replace it") from None
    for source, parts in frames.items():
        found.extend(series_of(pd.concat(parts, ignore_index=True), source))
    return found
