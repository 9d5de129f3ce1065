"""Recorded telemetry of machines that the shipped model has not seen, to be played again as load beside a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from models.grid import CHANNELS, Array
from models.registry import SHIPPED
from models.series import Series, read_folder

_CLOUD = "lumos"
"""The public source to play: cloud machines, one sample a second. Of the others one is sampled every 5 s and one is
idle for 93 % of the time, in recordings that are longer than a run."""
_OWN = SHIPPED.parent / "data"
_PART_S = 99
"""Median length of the public recordings."""
_HOLD_OUT = 0.25
"""As `train`: of our own recordings the last session, later than all that was trained on."""
LINK_BYTES_PER_S = 1.25e9
"""Network is recorded in bytes; of this link it is a fraction."""
_USUAL_MEMORY = 0.45
_MOST_MEMORY = 0.9
"""No recorded job ended because memory ran out."""
IDLE = (0.0, _USUAL_MEMORY, 0.001, 500.0, 0.1, 0.0)
"""What a machine shows between two recordings, in the order of CHANNELS."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded job: `rows[k]` is what second k showed, in the order of CHANNELS, nothing missing."""

    name: str
    rows: tuple[tuple[float, ...], ...]

    @property
    def length_s(self) -> float:
        """How long it plays."""
        return float(len(self.rows))


@dataclass(frozen=True, slots=True)
class HeldApart:
    """The recordings of one source, none of which the shipped model was trained on."""

    source: str
    recordings: tuple[Recording, ...]

    def note(self) -> str:
        """For titles: what was played."""
        machines = len({each.name.rsplit("/", 1)[0] for each in self.recordings})
        return f"{len(self.recordings)} recordings of {machines} machines, source {self.source}"


def shared_data() -> Path:
    """The folder of public data: SHADECAST_DATA, else beside the project."""
    return Path(os.environ.get("SHADECAST_DATA") or Path(__file__).resolve().parents[1] / ".." / "shared" / "data")


@cache
def held_apart() -> HeldApart:
    """Public recordings of cloud machines where they are there, else our own session that was kept for judging."""
    folder = shared_data() / "telemetry"
    if (folder / f"{_CLOUD}_1s.parquet").exists():
        return HeldApart(_CLOUD, _recordings(read_folder(folder, [_CLOUD])))
    return own_held_apart()


@cache
def own_held_apart() -> HeldApart:
    """The session of our own recordings that training never sees, in parts as long as the public jobs."""
    from train.dataset import split_machines  # noqa: PLC0415 - torch only where it is needed

    held = split_machines(read_folder(_OWN), _HOLD_OUT, 0).held
    parts = [
        replace(s, recording=f"{s.recording}-{low}", values=s.values[low : low + _PART_S])
        for s in held
        for low in range(0, len(s.values) - _PART_S + 1, _PART_S)
    ]
    return HeldApart("own", _recordings(parts))


def _recordings(series: list[Series]) -> tuple[Recording, ...]:
    found = [
        Recording(f"{s.machine}/{s.recording}", tuple(tuple(map(float, row)) for row in playable(s.values)))
        for s in sorted(series, key=lambda s: (s.machine, s.recording, s.began_wall_s))
        if s.period_s == 1.0
    ]
    if not found:
        raise ValueError("no recording with one sample a second to play")
    return tuple(found)


def playable(values: Array) -> Array:
    """Channels [second, channel] as a machine would show them: holes hold the last value, network is a fraction.

    Public recordings count the page cache as memory, so that their level does not say what is free: memory starts
    where it is between recordings and changes as recorded.
    """
    rows = np.array(values, np.float64)
    idle = np.asarray(IDLE)
    memory, network = CHANNELS.index("memory"), CHANNELS.index("network")
    rows[:, network] = np.minimum(
        rows[:, network] / (LINK_BYTES_PER_S if np.nanmax(rows[:, network]) > 1.0 else 1.0), 1.0
    )
    known = rows[np.isfinite(rows[:, memory]), memory]
    rows[:, memory] = np.clip(_USUAL_MEMORY + rows[:, memory] - (known[0] if len(known) else 0.0), 0.0, _MOST_MEMORY)
    before = idle
    for row in rows:
        missing = ~np.isfinite(row)
        row[missing] = before[missing]
        before = row
    return rows
