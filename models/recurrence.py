"""Disturbances that come back at a steady interval: when the next one is due.

A job that runs every minute, a checkpoint, a compaction. The net remembers about a minute, and what it learned
elsewhere does not tell it when this node's job runs; a list of the last starts does. What is due is announced as any
event that is known (`actors.node_forecaster`), until a sample shows that it did not come, or is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

HIGH, LOW = 0.5, 0.3
"""Of the node: an event begins at or above the one and is over at or below the other."""
CONFIRMED_S = 2.0
"""What is shorter is noise."""
SHORTEST_S, LONGEST_S = 20.0, 3600.0
"""Intervals that are believed: shorter ones the net sees, longer ones would take hours to learn."""
_JITTER_S = 1.0
"""A start is known to the sample at best."""
_STEADY = 0.02
"""Of an interval: how far two may differ and still be one."""
_ALIKE = 0.25
"""Of a duration: how far two events may differ and still be one kind."""
STRONGEST = 0.5
"""Of the node, that an expectation takes away at most: it may be wrong, on several nodes at once. Where others are free
the half is enough to keep requests off the node; where they are not, they must not get all that it had."""
_MOST_NEEDED = 4
_KEPT = 8


@dataclass(frozen=True, slots=True)
class Event:
    """A known future load on this node, in the forecaster's clock. `strength` in [0, 1]: 1 takes the whole node."""

    starts_s: float
    ends_s: float
    strength: float


@dataclass(slots=True)
class _Past:
    started_s: float
    lasted_s: float
    level: float


@dataclass(slots=True)
class Recurrence:
    """Watches one node's exogenous load. Feed each sample by `step`; `due` is the next start that is expected.

    One interval between two events alike is enough to expect a third. Each one that was expected and did not come
    raises by one how many steady intervals in a row it takes, up to four.
    """

    needed: int = 1
    _past: list[_Past] = field(default_factory=list)
    """Events that are over, oldest first."""
    _started_s: float | None = None
    """Of the event under way."""
    _levels: list[float] = field(default_factory=list)
    _last: tuple[float, float] = (math.nan, 0.0)
    """Time and load of the last sample."""
    _due: Event | None = None
    _latest_s: float = math.nan
    """What is due and has not begun by then was a mistake."""

    def step(self, now_s: float, load: float) -> None:
        """The load, a fraction of the node, since the last sample; NaN teaches nothing."""
        if math.isfinite(load):
            self._watch(now_s, load)
        self._expire(now_s)

    def due(self) -> Event | None:
        """The next event that is expected, or is under way as expected; None where nothing is."""
        return self._due

    def _watch(self, now_s: float, load: float) -> None:
        """An event begins, goes on, or is over."""
        before_s, before = self._last
        self._last = (now_s, load)
        if self._started_s is None:
            if load >= HIGH:
                since_s = now_s - before_s if before_s < now_s else 0.0
                self._started_s = now_s - since_s * min(max((load - before) / max(1.0 - before, 1e-3), 0.0), 1.0)
                self._levels = []
            return
        if load > LOW:
            self._levels.append(load)
            return
        lasted_s = before_s - self._started_s
        started_s, self._started_s = self._started_s, None
        if lasted_s >= CONFIRMED_S:
            self._end(_Past(started_s, lasted_s, median(self._levels or [before])))

    def _end(self, event: _Past) -> None:
        """An event is over: was it expected, and when is the next one?"""
        if self._due is not None and self._due.starts_s <= event.started_s <= self._latest_s:
            self.needed = max(self.needed - 1, 1)
        self._past = [*self._past[1 - _KEPT :], event]
        self._due = self._next()

    def _expire(self, now_s: float) -> None:
        """What was due and has not come was a mistake: start anew, and ask for more."""
        if self._due is None or now_s <= self._latest_s + CONFIRMED_S:
            return
        if self._started_s is not None and self._started_s >= self._due.starts_s:
            return  # it has come, or something like it
        self._due, self._past = None, []
        self.needed = min(self.needed + 1, _MOST_NEEDED)

    def _next(self) -> Event | None:
        last = self._past[-self.needed - 1 :]
        if len(last) <= self.needed:
            return None
        intervals = [b.started_s - a.started_s for a, b in pairwise(last)]
        mean_s = sum(intervals) / len(intervals)
        off_s = max(abs(interval - mean_s) for interval in intervals)
        longest = max(event.lasted_s for event in last)
        alike = longest - min(event.lasted_s for event in last) <= max(_ALIKE * longest, 2.0 * _JITTER_S)
        steady = off_s <= max(_STEADY * mean_s, 2.0 * _JITTER_S)
        if not (alike and steady and SHORTEST_S <= mean_s <= LONGEST_S):
            return None
        at_s, slack_s = last[-1].started_s + mean_s, _JITTER_S + off_s
        self._latest_s = at_s + slack_s
        shortest_s = min(event.lasted_s for event in last)
        ends_s = at_s + max(shortest_s - slack_s, slack_s)
        strength = min(event.level for event in last)
        return Event(at_s - slack_s, ends_s, min(max(strength, 0.0), STRONGEST))
