"""Disturbances that come back at a steady interval: when the next one is due, and how sure that is.

A job that runs every minute, a checkpoint, a pause of a second. The net remembers about a minute, and what it learned
elsewhere does not tell it when this node's job runs; a list of the last starts does. What is due is announced as any
event that is known (`actors.node_forecaster`), until a sample shows that it did not come, or is over.

A sample is the mean over a second, so an event of less than that is a fraction of one sample, or of two: how much of
them it fills says how long it was, and two also say when it began.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

SHORTEST_EVENT_S = 0.2
"""Of the whole node, that an event takes at least: what is less is noise."""
_LEAST_RISE = 0.06
"""Of the node, over what is usual there: less in a sample is no part of an event."""
_NOISES = 4.0
"""The same, in mean absolute deviations of the quiet samples."""
_OVER = 0.3
"""Of an event's greatest rise: what is less is not the event any more."""
_LEAST_LEVEL = 0.25
"""Rise that an event of several samples has at least, in the middle."""
_LONGEST_EVENT_S = 900.0
"""What lasts longer is how the node is now."""
_QUIET_HALF_LIFE = 10.0
"""Samples after which half of what is usual is forgotten."""
_FALLS = 0.3
"""Of a fall that is more than noise, learned with each sample: the node may have been in an event from the start."""
SHORTEST_S, LONGEST_S = 20.0, 3600.0
"""Intervals that are believed: shorter ones the net sees, longer ones would take hours to learn."""
_JITTER_S, _JITTER_EVENTS = 0.5, 2.0
"""How far a start is off its time before anything is known of it, and how many events that is worth."""
_LEAD_S, _LEAST_SLACK_S = 1.0, 0.5
"""So much earlier at least an event is expected, and so much later it may come: samples come at intervals."""
LATE_S = 2.0
"""So long after the latest start that is believed, samples have shown whether it came."""
_STEADY, _STEADY_S = 0.015, 1.3
"""Of an interval, and at least: how far a start may be off its time and still be one of the rhythm."""
_ALIKE, _ALIKE_S = 0.25, 0.5
"""Of a duration, and at least: how far two events may differ and still be of one kind."""
_MOST_NEEDED = 4
_KEPT = 8
_KINDS = 4
_REMEMBERED = 0.9
"""What an earlier expectation still counts for in the hit rate, with each one after it."""


_Samples = list[tuple[float, float, float]]
"""Begin, end, and rise over what is usual."""


@dataclass(frozen=True, slots=True)
class Event:
    """A known future load on this node, in the forecaster's clock. `strength` in [0, 1]: 1 takes the whole node."""

    starts_s: float
    ends_s: float
    strength: float


@dataclass(frozen=True, slots=True)
class _Past:
    started_s: float
    lasted_s: float
    level: float
    """The load that a sample shows in its midst; of one that is shorter than a second, what it takes of that second."""


@dataclass(slots=True)
class _Kind:
    """Events alike, and when the next one is due.

    Where what was expected did not come, the rhythm goes on for one interval if it has held more often than not, and
    then is given up.
    """

    past: list[tuple[int, _Past]] = field(default_factory=list)
    """Number in the rhythm and event, oldest first."""
    strays: list[_Past] = field(default_factory=list)
    """Those that came since at other times: perhaps another rhythm."""
    due: Event | None = None
    latest_s: float = math.nan
    """What is due and has not begun by then was a mistake."""
    hits: float = 0.0
    misses: float = 0.0
    _skipped: int = 0

    @property
    def hit_rate(self) -> float:
        """Of what was expected lately, the part that came: the mean of a beta distribution, one half before any."""
        return (self.hits + 1.0) / (self.hits + self.misses + 2.0)

    def is_like(self, event: _Past) -> bool:
        """Whether the event is one of this kind."""
        last = self.strays[-1] if self.strays else self.past[-1][1]
        longest = max(last.lasted_s, event.lasted_s)
        return abs(last.lasted_s - event.lasted_s) <= max(_ALIKE * longest, _ALIKE_S)

    def take(self, event: _Past, needed: int) -> bool:
        """One of this kind is over: when is the next one, if it takes `needed` steady intervals? Whether it was due."""
        was_due = self.due is not None
        if self.due is not None:
            if not self.due.starts_s <= event.started_s <= self.latest_s:
                self.strays = [*self.strays[1 - _KEPT :], event]
                return False
            self._count(hit=True)
        number = self.past[-1][0] + 1 + self._skipped if self.past else 0
        self.past, self.strays, self._skipped = [*self.past[1 - _KEPT :], (number, event)], [], 0
        self.due = self._next(needed)
        return was_due

    def expire(self, now_s: float, began_s: float | None, needed: int) -> bool:
        """What was due and has not come was a mistake. `began_s`: of what is under way. Whether the rhythm is over."""
        if self.due is None or now_s <= self.latest_s + LATE_S:
            return False
        if began_s is not None and self.due.starts_s <= began_s <= self.latest_s:
            return False  # it has come, or something like it
        self._count(hit=False)
        over = bool(self._skipped) or self.hits <= self.misses
        if over:
            self.past, self.strays = list(enumerate(self.strays or [self.past[-1][1]])), []
        self._skipped = 0 if over else 1
        self.due = self._next(needed + 1 if over else needed)
        if self.due is not None and self.latest_s < now_s:
            self.due = None  # its time is over, too: nothing was heard of the node
        return over

    def _count(self, *, hit: bool) -> None:
        self.hits = _REMEMBERED * self.hits + hit
        self.misses = _REMEMBERED * self.misses + (not hit)

    def _next(self, needed: int) -> Event | None:
        """What the longest steady rhythm up to the last event says; None without one that is long enough."""
        for first in range(len(self.past) - needed):
            rhythm = self.past[first:]
            interval_s, at_s, off_s = _fit(rhythm, rhythm[-1][0] + 1 + self._skipped)
            if not SHORTEST_S <= interval_s <= LONGEST_S or max(off_s) > max(_STEADY * interval_s, _STEADY_S):
                continue
            known = len(rhythm)
            jitter = (_JITTER_EVENTS * _JITTER_S**2 + sum(x * x for x in off_s)) / (_JITTER_EVENTS + known - 2)
            slack_s = 2.0 * math.sqrt(jitter * (1.0 + (4.0 * known + 2.0) / (known * (known - 1.0))))
            self.latest_s = at_s + max(slack_s, _LEAST_SLACK_S)
            lasts_s = min(event.lasted_s for _, event in rhythm)
            ends_s = max(at_s + lasts_s - slack_s, self.latest_s + min(lasts_s, 1.0))
            level = min(event.level for _, event in rhythm)
            strength = min(max(level, 0.0), 1.0) * self.hit_rate
            return Event(at_s - max(slack_s, _LEAD_S), ends_s, strength)
        return None


def _fit(rhythm: list[tuple[int, _Past]], number: int) -> tuple[float, float, list[float]]:
    """Interval, start of the event of that number, and how far off each start is: a straight line by least squares."""
    mean_n = sum(n for n, _ in rhythm) / len(rhythm)
    mean_s = sum(event.started_s for _, event in rhythm) / len(rhythm)
    spread = sum((n - mean_n) ** 2 for n, _ in rhythm)
    interval_s = sum((n - mean_n) * (event.started_s - mean_s) for n, event in rhythm) / spread
    off_s = [abs(event.started_s - mean_s - interval_s * (n - mean_n)) for n, event in rhythm]
    return interval_s, mean_s + interval_s * (number - mean_n), off_s


@dataclass(slots=True)
class Recurrence:
    """Watches one node's exogenous load. Feed each sample by `step`; `expected` is what is due, of each kind of event.

    How much of the node an expectation takes is what such events took, times the part of this kind's expectations that
    came: a rhythm that is wrong costs less and less, one that holds counts nearly in full.

    One interval between two events alike is enough to expect a third. After each rhythm, of whatever kind, that had to
    be given up it takes one steady interval more, up to four: on this node much looks alike that does not recur.
    """

    needed: int = 1
    _kinds: list[_Kind] = field(default_factory=list)
    """The one whose last event is the newest at the end."""
    _usual: float = math.nan
    """Load without an event."""
    _noise: float = 0.0
    _began_s: float | None = None
    """Of the event under way."""
    _run: _Samples = field(default_factory=list)
    _before: tuple[float, float, float] | None = None
    """The last quiet sample, which may hold an event's first moment."""
    _last_s: float = math.nan

    def step(self, now_s: float, load: float) -> None:
        """The load, a fraction of the node, since the last sample; NaN teaches nothing."""
        if math.isfinite(load):
            self._watch(now_s, min(max(load, 0.0), 1.0))
        for kind in self._kinds:
            if kind.expire(now_s, self._began_s, self.needed):
                self.needed = min(self.needed + 1, _MOST_NEEDED)

    def expected(self) -> list[Event]:
        """What is due next, or is under way as expected, of each kind that has a rhythm."""
        return [kind.due for kind in self._kinds if kind.due is not None]

    def _watch(self, now_s: float, load: float) -> None:
        """An event begins, goes on, or is over."""
        before_s, self._last_s = self._last_s, now_s
        if math.isnan(self._usual):
            self._usual = load
            return
        rise = load - self._usual
        floor = max(_LEAST_RISE, _NOISES * self._noise)
        if self._run:
            floor = max(floor, _OVER * max(r for _, _, r in self._run))
        if rise < floor:
            if self._run:
                self._end([self._before, (before_s, now_s, rise)], floor / 2.0)
            self._before = (before_s, now_s, rise)
            self._learn_usual(load, floor)
            return
        if not self._run:
            whole = max(1.0 - self._usual, 1e-3)
            self._began_s = now_s - (now_s - before_s) * min(rise / whole, 1.0)
        self._run.append((before_s, now_s, rise))
        if now_s - self._run[0][0] > _LONGEST_EVENT_S:
            self._run, self._began_s, self._usual = [], None, load

    def _learn_usual(self, load: float, floor: float) -> None:
        part, off = 1.0 - 0.5 ** (1.0 / _QUIET_HALF_LIFE), load - self._usual
        self._noise += part * (min(abs(off), floor) - self._noise)
        self._usual += (part if off > -floor else _FALLS) * off

    def _end(self, edges: list[tuple[float, float, float] | None], least: float) -> None:
        """An event is over: which kind is it of? A rise of `least` in the samples around it is part of it."""
        run, self._run, self._began_s = self._run, [], None
        first, last = ([edge] if edge is not None and edge[2] > least else [] for edge in edges)
        event = _event_of(first, run, last, self._usual)
        if event is None:
            return
        kind = next((k for k in reversed(self._kinds) if k.is_like(event)), None) or _Kind()
        self._kinds = [*[k for k in self._kinds if k is not kind][1 - _KINDS :], kind]
        if kind.take(event, self.needed):
            self.needed = max(self.needed - 1, 1)


def _event_of(first: _Samples, run: _Samples, last: _Samples, usual: float) -> _Past | None:
    """The event that these samples show, with those around it that hold a part of it; None if it took too little.

    Of one or two samples nobody knows how high the load was within them: it is taken to have been the whole node.
    """
    rise = median(r for _, _, r in run[1:-1]) if len(run) > 2 else max(1.0 - usual, 1e-3)
    run = [*first, *run, *last]
    took_s = sum((to_s - from_s) * r for from_s, to_s, r in run)
    if rise < _LEAST_LEVEL or took_s < SHORTEST_EVENT_S * max(1.0 - usual, 1e-3):
        return None
    filled_s = [(to_s - from_s) * min(r / rise, 1.0) for from_s, to_s, r in run]
    if len(run) == 1:
        (from_s, to_s, _), lasted_s = run[0], filled_s[0]
        started_s = (from_s + to_s - lasted_s) / 2.0
    else:
        started_s = run[0][1] - filled_s[0]
        lasted_s = run[-1][0] + filled_s[-1] - started_s
    return _Past(started_s, lasted_s, usual + rise * min(lasted_s, 1.0))
