"""What shared machines do: patterns of load for made-up series, and jobs in phases for recordings.

A pattern takes a numpy Generator and a length and returns a schedule in [0, 1] per second. Parameters are drawn wide on
purpose: the model has to read a node's habits from its last minutes, not remember these ones.

A machine that is recorded rests for half of the time and runs jobs of some of the `KINDS` (`train.jobs` does their
work). It has habits: the kinds that it runs, how long their phases take and how much they ask for. Each job differs a
little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from models.grid import Array

Rng = np.random.Generator
Pattern = Callable[[Rng, int], Array]


def bursts(rng: Rng, length: int) -> Array:
    """On and off with heavy-tailed stays: interactive work, batch jobs."""
    out, at, on = np.zeros(length), 0, rng.random() < 0.5
    mean_on_s, mean_off_s = np.exp(rng.uniform(np.log(2), np.log(30), 2))
    while at < length:
        stay = 1 + int(min((mean_on_s if on else mean_off_s) * rng.pareto(2.0) * 1.0, length))
        out[at : at + stay] = rng.uniform(0.3, 1.0) if on else 0.0
        at, on = at + stay, not on
    return out


def periodic(rng: Rng, length: int) -> Array:
    """A job that comes back: micro-batches, cron, garbage collection. Period 3-40 s, jittered, duty 0.1-0.6."""
    period_s, duty = np.exp(rng.uniform(np.log(3), np.log(40))), rng.uniform(0.1, 0.6)
    level, jitter = rng.uniform(0.2, 1.0), rng.choice([0.0, 0.03, 0.1])
    starts = np.cumsum(period_s * (1 + jitter * rng.standard_normal(int(length / period_s * 2) + 3)))
    t = np.arange(length)[:, None]
    since = t - np.concatenate([[-rng.uniform(0, period_s)], starts])[None, :]
    since = np.where(since >= 0, since, np.inf).min(axis=1)
    return np.asarray(level * np.clip(duty * period_s - since, 0.0, 1.0))


def wander(rng: Rng, length: int) -> Array:
    """A level that drifts and reverts slowly (Ornstein-Uhlenbeck): many small users."""
    centre, half_life_s, noise = (
        rng.uniform(0.05, 0.9),
        np.exp(rng.uniform(np.log(5), np.log(120))),
        rng.uniform(0.02, 0.3),
    )
    keep = 0.5 ** (1 / half_life_s)
    shocks = rng.standard_t(4, length) * noise * np.sqrt(1 - keep**2)
    out, x = np.empty(length), 0.0
    for i, shock in enumerate(shocks):
        x = keep * x + shock
        out[i] = centre + x
    return np.clip(out, 0.0, 1.0)


def steps(rng: Rng, length: int) -> Array:
    """Plateaus: stages of a job. Some go up or down over a few seconds."""
    out, at, level = np.zeros(length), 0, rng.random()
    while at < length:
        stay, new = 1 + int(rng.exponential(25.0)), rng.random() * rng.choice([0.3, 1.0])
        ramp = np.clip(np.arange(1, stay + 1) / rng.choice([1.0, 1.0, 4.0, 12.0]), 0.0, 1.0)
        out[at : at + stay] = (level + (new - level) * ramp)[: length - at]
        at, level = at + stay, new
    return out


def ramps(rng: Rng, length: int) -> Array:
    """Slow climbs and a fall: leaks, filling caches, growing queues."""
    out, at = np.zeros(length), 0
    low = rng.uniform(0.0, 0.5)
    while at < length:
        climb = 5 + int(rng.exponential(60.0))
        top = rng.uniform(low, 1.0)
        piece = np.concatenate([np.linspace(low, top, climb), np.full(int(rng.exponential(10.0)), top)])
        out[at : at + len(piece)] = piece[: length - at]
        at += len(piece)
    return out


def idle(rng: Rng, length: int) -> Array:
    """Nearly nothing, with rare short spikes: housekeeping."""
    out = np.abs(rng.standard_normal(length)) * rng.uniform(0.001, 0.02)
    spikes = rng.random(length) < rng.uniform(0.005, 0.1)
    return np.clip(out + spikes * rng.pareto(2.0, length) * rng.uniform(0.02, 0.3), 0.0, 1.0)


def pulses(rng: Rng, length: int) -> Array:
    """Batches at a steady beat whose sizes differ: streaming jobs, pollers. The beat is certain, the height is not."""
    period_s, jitter = np.exp(rng.uniform(np.log(2), np.log(30))), rng.choice([0.0, 0.0, 0.02])
    if rng.random() < 0.6:
        period_s = float(round(period_s))  # people choose whole seconds
    count = int(length / period_s) + 3
    spread, memory = rng.uniform(0.1, 1.2), rng.choice([0.0, 0.5, 0.9])
    heights = rng.standard_normal(count)
    for i in range(1, count):
        heights[i] = memory * heights[i - 1] + np.sqrt(1 - memory**2) * heights[i]
    heights = np.exp(spread * heights - spread**2 / 2) * rng.uniform(0.05, 0.8)
    starts = (np.arange(count) + rng.random()) * period_s + jitter * period_s * rng.standard_normal(count)
    lasts = np.exp(rng.uniform(np.log(0.3), np.log(0.5 * period_s)))
    t = np.arange(length)[:, None]
    # share of each second that each batch covers; larger batches last longer
    ends = starts + lasts * (heights / heights.mean()) ** rng.choice([0.0, 0.5])
    covered = np.clip(np.minimum(t + 1, ends) - np.maximum(t, starts), 0.0, 1.0)
    return np.asarray(np.clip((covered * heights).sum(axis=1), 0.0, 1.0))


def phases(rng: Rng, length: int) -> Array:
    """Jobs after one another, each in phases: read, compute at full speed, write, pause."""
    out, at = np.zeros(length), 0
    full = rng.uniform(0.6, 1.6)  # more than 1 is demand that the cores cannot meet
    while at < length:
        for level, mean_s in ((rng.uniform(0.1, 0.6), 4.0), (full, 25.0), (rng.uniform(0.2, 0.9), 8.0), (0.02, 6.0)):
            lasts = 1 + int(rng.exponential(mean_s))
            wiggle = 1 + 0.15 * rng.standard_normal(max(0, min(lasts, length - at)))
            out[at : at + lasts] = level * wiggle
            at += lasts
    return np.clip(out, 0.0, 1.0)


PATTERNS: dict[str, Pattern] = {
    "bursts": bursts,
    "periodic": periodic,
    "wander": wander,
    "steps": steps,
    "ramps": ramps,
    "idle": idle,
    "pulses": pulses,
    "phases": phases,
}


def mixture(rng: Rng, length: int) -> Array:
    """One pattern, or two laid over each other."""
    names = list(PATTERNS)
    out = PATTERNS[str(rng.choice(names))](rng, length)
    if rng.random() < 0.4:
        out = out + rng.uniform(0.1, 0.7) * PATTERNS[str(rng.choice(names))](rng, length)
    return np.clip(out, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class PhaseLaw:
    """Bounds of one phase over all machines: how long it takes, and which share of the machine's CPU it asks for."""

    name: str
    seconds: tuple[float, float]
    intensity: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one job."""

    name: str
    seconds: float
    intensity: float


@dataclass(frozen=True, slots=True)
class Job:
    """What a machine does next: nothing for `pause_s`, then these phases."""

    pause_s: float
    kind: str
    seed: int
    phases: tuple[Phase, ...]


_CALM, _HARD = (0.05, 0.3), (0.75, 1.0)
KINDS: Mapping[str, tuple[PhaseLaw, ...]] = {
    "mapreduce": (
        PhaseLaw("read", (1.5, 5.0), _CALM),
        PhaseLaw("sort", (2.0, 8.0), _HARD),
        PhaseLaw("shuffle", (1.5, 5.0), (0.3, 0.8)),
        PhaseLaw("reduce", (2.0, 8.0), (0.6, 1.0)),
    ),
    "compile": (
        PhaseLaw("configure", (1.5, 5.0), _CALM),
        PhaseLaw("compile", (4.0, 15.0), _HARD),
        PhaseLaw("link", (1.0, 3.0), (0.5, 1.0)),
    ),
    "model_load": (
        PhaseLaw("download", (2.0, 6.0), _CALM),
        PhaseLaw("load", (1.5, 4.0), (0.4, 0.9)),
        PhaseLaw("warm_up", (2.5, 6.0), _HARD),
        PhaseLaw("serve", (3.0, 8.0), _CALM),
    ),
    "checkpoint": (
        PhaseLaw("gather", (1.0, 4.0), _CALM),
        PhaseLaw("serialise", (2.5, 7.0), _HARD),
        PhaseLaw("write", (1.0, 4.0), (0.2, 0.6)),
    ),
    "compaction": (
        PhaseLaw("scan", (1.5, 5.0), _CALM),
        PhaseLaw("merge", (3.0, 10.0), _HARD),
        PhaseLaw("vacuum", (1.5, 5.0), (0.4, 0.9)),
    ),
    "garbage_collection": (
        PhaseLaw("fill", (3.0, 9.0), (0.1, 0.35)),
        PhaseLaw("collect", (2.5, 5.0), (0.8, 1.0)),
    ),
    "backup": (
        PhaseLaw("list", (1.0, 4.0), _CALM),
        PhaseLaw("archive", (3.0, 12.0), (0.6, 1.0)),
        PhaseLaw("verify", (1.0, 4.0), (0.3, 0.7)),
    ),
    "cron": (PhaseLaw("run", (2.5, 5.0), (0.6, 1.0)),),
    "service": (
        PhaseLaw("morning", (4.0, 10.0), (0.05, 0.35)),
        PhaseLaw("noon", (5.0, 15.0), (0.6, 0.95)),
        PhaseLaw("evening", (4.0, 8.0), (0.05, 0.35)),
    ),
    "training": (
        PhaseLaw("load_data", (1.5, 4.0), _CALM),
        PhaseLaw("steps", (6.0, 18.0), _HARD),
        PhaseLaw("evaluate", (2.0, 5.0), (0.4, 0.8)),
    ),
}
SHORTEST_PAUSE_S = 6.0
"""An onset counts after 5 s of quiet."""


def kinds_of(seed: int, machine: int) -> tuple[str, ...]:
    """The kinds of job that one machine runs: four to seven of all."""
    rng = np.random.default_rng([seed, machine, 1])
    return tuple(sorted(rng.choice(list(KINDS), int(rng.integers(4, 8)), replace=False).tolist()))


def jobs_of(seed: int, machine: int) -> Iterator[Job]:
    """What one machine does, without end, the same for the same seed and machine; it rests for half of the time."""
    rng = np.random.default_rng([seed, machine, 2])
    kinds = kinds_of(seed, machine)
    habits = {
        law: (float(np.exp(rng.uniform(*np.log(law.seconds)))), float(rng.uniform(*law.intensity)))
        for kind in kinds
        for law in KINDS[kind]
    }
    often = rng.dirichlet(np.full(len(kinds), 2.0))
    busy_s = float(sum(p * sum(habits[law][0] for law in KINDS[k]) for p, k in zip(often, kinds, strict=True)))
    spread = float(rng.choice([0.15, 0.3, 0.5]))
    regular = rng.random() < 0.3  # a machine whose jobs come at an interval
    while True:
        kind = str(rng.choice(kinds, p=often))
        rest_s = max(busy_s - SHORTEST_PAUSE_S, 1.0)
        extra_s = rest_s * float(rng.lognormal(-0.005, 0.1) if regular else rng.exponential())
        yield Job(SHORTEST_PAUSE_S + extra_s, kind, int(rng.integers(2**31)), _phases(rng, KINDS[kind], habits, spread))


def _phases(
    rng: Rng, laws: tuple[PhaseLaw, ...], habits: Mapping[PhaseLaw, tuple[float, float]], spread: float
) -> tuple[Phase, ...]:
    """A job of these habits: durations vary by `spread` around them, intensities a little."""
    drawn = []
    for law in laws:
        usual_s, usual = habits[law]
        seconds = usual_s * float(rng.lognormal(-(spread**2) / 2, spread))
        intensity = float(np.clip(usual + 0.05 * rng.standard_normal(), *law.intensity))
        drawn.append(Phase(law.name, round(max(seconds, 0.5), 2), round(intensity, 3)))
    return tuple(drawn)
