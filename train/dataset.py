"""From telemetry to training pieces: split by machine, made-up series beside real ones, units by source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from models.series import Series, TelemetryError
from train.augment import made_up
from train.loop import WARM_UP, Pieces, join, pieces_of, source_weight, units_of

MADE_UP_LENGTH = 480


@dataclass(frozen=True, slots=True)
class Split:
    """Series to train on and series of machines or times that training never sees.

    `until_wall_s` is, for each source that was split by time, the end of what is trained on.
    """

    train: list[Series]
    held: list[Series]
    until_wall_s: Mapping[str, float] = field(default_factory=dict)


def split_machines(series: Sequence[Series], fraction: float, seed: int) -> Split:
    """Hold out about `fraction` of the machines of every source, at least one where there are two.

    A source with one machine is split by time instead: its last recordings are held out. So is one that tells calendar
    time: nodes of one cluster share their load, and often their host, so that a machine held out would not be unknown
    as long as its neighbours at the same time are trained on.
    """
    train: list[Series] = []
    held: list[Series] = []
    until_wall_s: dict[str, float] = {}
    for source in sorted({s.source for s in series}):
        mine = [s for s in series if s.source == source]
        if all(math.isfinite(s.began_wall_s) for s in mine):
            before, after, until_wall_s[source] = split_time(mine, fraction, seed)
            train += before
            held += after
            continue
        machines = sorted({s.machine for s in mine}, key=lambda m: shuffled(m, seed))
        count = round(fraction * len(machines))
        out = set(machines[: min(max(1, count), len(machines) - 1)])
        if out:
            held += [s for s in mine if s.machine in out]
            train += [s for s in mine if s.machine not in out]
        else:
            last = max(1, round(fraction * len(mine))) if len(mine) > 1 else 0
            train += mine[: len(mine) - last]
            held += mine[len(mine) - last :]
    return Split(train, held, until_wall_s)


def split_time(series: Sequence[Series], fraction: float, seed: int) -> tuple[list[Series], list[Series], float]:
    """(train, held, the calendar time between them): all of `held` is later than all of `train`.

    Whole sessions (recordings that overlap in time) are held out, the last ones, about `fraction` of them. A single
    session is cut: machines held out count after `1 - fraction` of the time, the others before.
    """
    sessions: list[list[Series]] = []
    end_s = -math.inf
    for s in sorted(series, key=lambda s: s.began_wall_s):
        if s.began_wall_s > end_s:
            sessions.append([])
        sessions[-1].append(s)
        end_s = max(end_s, s.ended_wall_s)
    if len(sessions) > 1:
        last = min(max(1, round(fraction * len(sessions))), len(sessions) - 1)
        before, after = ([s for one in some for s in one] for some in (sessions[:-last], sessions[-last:]))
        return before, after, min(s.began_wall_s for s in after)
    machines = sorted({s.machine for s in series}, key=lambda m: shuffled(m, seed))
    out = set(machines[: max(1, round(fraction * len(machines)))])
    kept = [s for s in series if s.machine not in out] or list(series)
    began_s = min(s.began_wall_s for s in series)
    cut_s = began_s + (1.0 - fraction) * (end_s - began_s)
    return parts(kept, -math.inf, cut_s), parts([s for s in series if s.machine in out], cut_s, math.inf), cut_s


def parts(series: Sequence[Series], from_s: float, to_s: float) -> list[Series]:
    """What of each series lies between two calendar times; all of one that does not tell them."""
    found = []
    for s in series:
        if not math.isfinite(s.began_wall_s):
            found.append(s)
            continue
        at_s = s.began_wall_s + s.period_s * np.arange(len(s.values))
        inside = np.flatnonzero((at_s >= from_s) & (at_s < to_s))
        if len(inside):
            low, high = int(inside[0]), int(inside[-1]) + 1
            more = None if s.extended is None else s.extended[low:high]
            found.append(replace(s, values=s.values[low:high], began_wall_s=float(at_s[low]), extended=more))
    return found


def split_recordings(series: Sequence[Series], fraction: float, seed: int) -> tuple[list[Series], list[Series]]:
    """(fit, check): some recordings of every source left out of fitting, machines shared."""
    fit: list[Series] = []
    check: list[Series] = []
    for source in sorted({s.source for s in series}):
        mine = sorted((s for s in series if s.source == source), key=lambda s: shuffled(s.machine + s.recording, seed))
        count = min(max(1, round(fraction * len(mine))), len(mine) - 1)
        check += mine[:count]
        fit += mine[count:]
    return fit, check


def shuffled(name: str, seed: int) -> str:
    """A key to sort names by, in an order that depends on the seed alone."""
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()


def real_pieces(series: Sequence[Series], length: int, *, extended: bool = False) -> list[Pieces]:
    """Pieces of recorded series; each source has its own global unit of loss."""
    parts = []
    for source in sorted({s.source for s in series}):
        mine = [s for s in series if s.source == source and len(s.values) > 2 * WARM_UP]
        if mine:
            parts.append(pieces_of(mine, units_of(mine), length, extended=extended))
    return parts


def made_up_pieces(count: int, length: int, seed: int, first: int = 0, *, extended: bool = False) -> list[Pieces]:
    """Pieces of the made-up series `first` to `first + count`; each series is its own world and has its own unit.

    A series depends on the seed and its number only, however the work is shared out. They have no further channels: of
    them a net learns to do without.
    """
    parts = []
    for start in range(first, first + count, 64):
        numbers = range(start, min(start + 64, first + count))
        drawn = [made_up(np.random.default_rng([seed, 7, i]), MADE_UP_LENGTH, f"made-up-{i}") for i in numbers]
        group = [s for s, _ in drawn]
        units = np.stack([units_of([s]) for s in group])
        parts.append(pieces_of(group, units, length, [a for _, a in drawn], extended=extended))
    return parts


def pieces(series: Sequence[Series], made_up_count: int, length: int, seed: int, *, extended: bool = False) -> Pieces:
    """Everything one training run sees; raises TelemetryError where that is nothing."""
    parts = real_pieces(series, length, extended=extended)
    if made_up_count:
        parts.append(join(made_up_pieces(made_up_count, length, seed, extended=extended)))
    if not parts:
        raise TelemetryError("no series of at least 20 samples to train on; record more, or allow made-up series")
    largest = max(len(p) for p in parts)
    return join([replace(p, weight=p.weight * np.float32(source_weight(len(p), largest))) for p in parts])


def data_hash(series: Sequence[Series]) -> str:
    """Fingerprint of the recorded values, for the card."""
    digest = hashlib.sha256()
    for s in sorted(series, key=lambda s: (s.source, s.machine, s.recording)):
        digest.update(f"{s.source}/{s.machine}/{s.recording}/{s.period_s}".encode())
        digest.update(np.ascontiguousarray(s.values).tobytes())
    return digest.hexdigest()
