"""What happens to the machines: piecewise constant speed over time, memory, and the events behind them."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from bench.recordings import IDLE, Recording, held_apart
from models.grid import CHANNELS

_STEP_S = 0.25
"""Ramps are stairs of this length."""
_CPU, _MEMORY = CHANNELS.index("cpu"), CHANNELS.index("memory")
_CALM_MEMORY = IDLE[_MEMORY]
_CLIMB_S = 10.0
_LEAST_SPEED = 0.05
"""Beside a recorded job that takes all of a machine: the scheduler leaves everybody something."""
_LEAD_S = 1000.0
"""Recordings begin so long before the run, so that it does not begin with all machines idle."""


@dataclass(frozen=True, slots=True)
class Event:
    """A disturbance of one node: from `start_s` (first change) to `end_s` (nominal again)."""

    kind: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class NodeTrace:
    """Speed of one node. `speeds[k]` holds from `times_s[k]` until the next; 1 is nominal, 0 is down."""

    times_s: list[float] = field(default_factory=lambda: [0.0])
    speeds: list[float] = field(default_factory=lambda: [1.0])
    events: list[Event] = field(default_factory=list)
    downs_s: list[tuple[float, float]] = field(default_factory=list)
    """(down, up) of each time that the replica is away."""
    memory_climbs: bool = False
    """Memory runs full over the 10 s before the replica goes down."""
    visible: bool = True
    """Whether telemetry sees the slowness as exogenous load; a weak or cold machine shows nothing."""
    plays: list[tuple[float, Recording]] = field(default_factory=list)
    """(start, recording) of each recorded job, in order; `speeds` follow its CPU, telemetry shows all of its channels.
    """
    _served: list[float] = field(default_factory=list)

    def play(self, start_s: float, recording: Recording) -> None:
        """Append a recorded job; what lies before time 0 is left out."""
        self.plays.append((start_s, recording))
        for k, row in enumerate(recording.rows):
            if start_s + k + 1 > 0.0:
                self.set_from(max(start_s + k, 0.0), max(1.0 - row[_CPU], _LEAST_SPEED))
        end_s = start_s + recording.length_s
        if end_s > 0.0:
            self.set_from(end_s, 1.0)
            self.events.append(Event("recording", start_s, end_s))

    def shown(self, time_s: float) -> tuple[float, ...] | None:
        """The row of the recorded job at that time, in the order of CHANNELS; None where none plays."""
        k = bisect_right(self.plays, time_s, key=lambda play: play[0]) - 1
        if k < 0:
            return None
        start_s, recording = self.plays[k]
        second = int(time_s - start_s)
        return recording.rows[second] if second < len(recording.rows) else None

    def set_from(self, time_s: float, speed: float) -> None:
        """Append a change; times must not go back."""
        if time_s < self.times_s[-1]:
            raise ValueError(f"speed change at {time_s} s: must not be before the last one at {self.times_s[-1]} s")
        if time_s == self.times_s[-1]:
            self.speeds[-1] = speed
        else:
            self.times_s.append(time_s)
            self.speeds.append(speed)

    def speed_at(self, time_s: float) -> float:
        """Speed at one moment."""
        return self.speeds[max(bisect_right(self.times_s, time_s) - 1, 0)]

    def served(self, time_s: float) -> float:
        """Integral of the speed from 0 to `time_s`."""
        served = self._served
        if len(served) != len(self.times_s):
            served.clear()
            total = 0.0
            for k, start_s in enumerate(self.times_s):
                if k:
                    total += (start_s - self.times_s[k - 1]) * self.speeds[k - 1]
                served.append(total)
        k = max(bisect_right(self.times_s, time_s) - 1, 0)
        return served[k] + (time_s - self.times_s[k]) * self.speeds[k]

    def when_served(self, total: float) -> float:
        """The time at which `served` reaches `total`; infinity if it never does."""
        if total > self.served(self.times_s[-1]):
            if self.speeds[-1] <= 0.0:
                return float("inf")
            return self.times_s[-1] + (total - self._served[-1]) / self.speeds[-1]
        k = max(bisect_right(self._served, total) - 1, 0)
        while k and self.speeds[k] <= 0.0:
            k -= 1
        return self.times_s[k] + (total - self._served[k]) / self.speeds[k] if self.speeds[k] > 0.0 else float("inf")

    def mean_speed(self, from_s: float, to_s: float) -> float:
        """Mean speed over an interval of positive length."""
        return (self.served(to_s) - self.served(from_s)) / (to_s - from_s)

    def memory_at(self, time_s: float) -> float:
        """Memory fraction: as recorded, or climbs to 1 over the 10 s before a crash, calm otherwise."""
        if self.plays:
            row = self.shown(time_s)
            return row[_MEMORY] if row is not None else _CALM_MEMORY
        for down_s, up_s in self.downs_s if self.memory_climbs else ():
            if down_s - _CLIMB_S <= time_s < down_s:
                return 1.0 - (1.0 - _CALM_MEMORY) * (down_s - time_s) / _CLIMB_S
            if down_s <= time_s < up_s:
                return 1.0
        return _CALM_MEMORY


Disturb = Callable[[NodeTrace, random.Random, float, int], None]
"""(trace, rng, horizon_s, node index): writes a node's disturbances up to the horizon."""


@cache
def availability(disturb: Disturb) -> float:
    """Mean speed of nodes under a disturbance: what is left of the nominal capacity."""
    length_s, nodes = 4000.0, 64
    total = 0.0
    for node in range(nodes):
        trace = NodeTrace()
        disturb(trace, random.Random(f"availability/{node}"), length_s, node)
        total += trace.mean_speed(0.0, length_s)
    return total / nodes


def calm(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
    """Nothing happens."""


def antagonists(low: float, shortest_s: float, longest_s: float, every_s: float) -> Disturb:
    """A noisy neighbour comes after a pause of mean `every_s`, stays U(shortest, longest) and leaves `low`."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        now_s = rng.expovariate(1.0 / every_s)
        while now_s < horizon_s:
            end_s = now_s + rng.uniform(shortest_s, longest_s)
            trace.set_from(now_s, low)
            trace.set_from(end_s, 1.0)
            trace.events.append(Event("antagonist", now_s, end_s))
            now_s = end_s + rng.expovariate(1.0 / every_s)

    return disturb


def ramps(low: float, down_s: float, plateau_s: float, every_s: float) -> Disturb:
    """Throttling after a pause of mean `every_s`: down to `low` over `down_s`, `plateau_s` there, back at once."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        now_s = rng.expovariate(1.0 / every_s)
        while now_s < horizon_s:
            _fall(trace, now_s, down_s, 1.0, low)
            end_s = now_s + down_s + plateau_s
            trace.set_from(end_s, 1.0)
            trace.events.append(Event("ramp", now_s, end_s))
            now_s = end_s + rng.expovariate(1.0 / every_s)

    return disturb


def crashes(every_s: float, down_s: float, slow_s: float, low: float, warned: bool = True) -> Disturb:
    """The node dies after a mean of `every_s` up, for `down_s`; if `warned`, memory climbs and speed falls first."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        now_s = _CLIMB_S + rng.expovariate(1.0 / (every_s - _CLIMB_S))
        while now_s < horizon_s:
            if warned:
                _fall(trace, now_s - slow_s, slow_s, 1.0, low)
                trace.memory_climbs = True
            trace.downs_s.append((now_s, now_s + down_s))
            trace.set_from(now_s, 0.0)
            trace.set_from(now_s + down_s, 1.0)
            trace.events.append(Event("crash", now_s, now_s + down_s))
            now_s += down_s + _CLIMB_S + rng.expovariate(1.0 / (every_s - _CLIMB_S))

    return disturb


def pauses(speed: float, length_s: float, every_s: float) -> Disturb:
    """A scheduled pause (checkpoint, garbage collection) every `every_s`, each node at its own moment."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        now_s = rng.uniform(1.0, every_s)
        while now_s < horizon_s:
            trace.set_from(now_s, speed)
            trace.set_from(now_s + length_s, 1.0)
            trace.events.append(Event("pause", now_s, now_s + length_s))
            now_s += every_s

    return disturb


def periodic(low: float, length_s: float, shortest_s: float, longest_s: float, jitter_s: float) -> Disturb:
    """A neighbour that comes at a steady interval, each node's own, stays `length_s` and leaves `low`.

    Starts are off by a normal error of spread `jitter_s`, which does not add up.
    """

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        every_s = rng.uniform(shortest_s, longest_s)
        due_s = rng.uniform(0.0, every_s)
        while due_s < horizon_s:
            start_s = max(due_s + rng.gauss(0.0, jitter_s), trace.times_s[-1])
            trace.set_from(start_s, low)
            trace.set_from(start_s + length_s, 1.0)
            trace.events.append(Event("periodic", start_s, start_s + length_s))
            due_s += every_s

    return disturb


def replays(pause_s: float) -> Disturb:
    """Recorded jobs of machines that no model has seen, one after another, after pauses of mean `pause_s`."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        recordings = held_apart().recordings
        now_s = rng.expovariate(1.0 / pause_s) - _LEAD_S
        while now_s < horizon_s:
            recording = recordings[rng.randrange(len(recordings))]
            if now_s + recording.length_s > 0.0:
                trace.play(now_s, recording)
            now_s += recording.length_s + rng.expovariate(1.0 / pause_s)

    return disturb


def restarts(speeds: Sequence[float], every_s: float, down_s: float, cold_s: float, cold: float) -> Disturb:
    """Unequal machines whose replica restarts about every `every_s`, is away and then runs at `cold` of its speed."""

    def disturb(trace: NodeTrace, rng: random.Random, horizon_s: float, node: int) -> None:
        speed = speeds[node % len(speeds)]
        trace.visible = False
        trace.set_from(0.0, speed)
        mean_gap_s = every_s - down_s - cold_s
        now_s = rng.expovariate(1.0 / mean_gap_s)
        while now_s < horizon_s:
            trace.set_from(now_s, 0.0)
            trace.set_from(now_s + down_s, cold * speed)
            trace.set_from(now_s + down_s + cold_s, speed)
            trace.downs_s.append((now_s, now_s + down_s))
            trace.events.append(Event("restart", now_s, now_s + down_s + cold_s))
            now_s += down_s + cold_s + rng.expovariate(1.0 / mean_gap_s)

    return disturb


def _fall(trace: NodeTrace, start_s: float, length_s: float, high: float, low: float) -> None:
    steps = max(int(length_s / _STEP_S), 1)
    for k in range(steps):
        trace.set_from(start_s + k * length_s / steps, high + (low - high) * (k + 1) / steps)
