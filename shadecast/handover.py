"""Which running stream goes on from another replica because its own is slow (design section 5, "Hand-over").

A stream that can go on after what its reader has had moves where that saves more than its beginning elsewhere costs:

    residual * item_s * (here - there)  >  MARGIN * there * cost_s  +  what it has paid before
                                 cost_s  =  beginning_s(prompt, had) * there

Items are tokens where these can be counted (`shadecast.tokens`). `here` and `there` are scores: relative times of a
stream on its own replica and on the other one, queues included (`shadecast.pick`). `residual` are the items that
streams which have given so many still give, `item_s` the seconds of an item at a score of 1. All of it is learned from
this router's own streams. At a cost of .1 s nearly every move from a slow replica pays, at 1 s few do: the test of the
cost is what makes hand-over safe (docs/decisions/0071).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from shadecast.calls import Call, Calls
from shadecast.least_squares import Fit
from shadecast.pick import PickTable
from shadecast.rescue import slow_replicas
from shadecast.types import RoutingTable

C = TypeVar("C", bound=Call)

_SLOW = 0.6
"""Of the median capacity: streams are handed over from slower replicas only."""
_BETTER = 2.0
"""Times the score here over the score there: less is within what queues and estimates are off by."""
_MARGIN = 4.0
"""Its own reader is not the only one who pays: a beginning delays all that is on the other replica, and what comes
there after it, the more the busier that is. Hence times the score there, too. Chosen by simulation."""
_LEAST_PATIENCE_S = 0.25
_PATIENCE = 3.0
"""Times the expected time of a beginning: then the reader goes on with its first replica."""


@dataclass(frozen=True, slots=True)
class Running(Generic[C]):
    """A stream on a slow replica."""

    call: C
    items: float
    """That its reader has had, from all replicas."""
    prompt: float = 1.0
    """Its size in units of work, where the deployment tells it."""
    paid_s: float = 0.0
    """What its moves so far have cost it."""


@dataclass(frozen=True, slots=True)
class Move(Generic[C]):
    """A stream that is worth handing over."""

    stream: Running[C]
    target: str
    cost_s: float
    """Until its next item there."""
    gain_s: float
    """What it saves, the cost not subtracted."""

    @property
    def patience_s(self) -> float:
        """How long its reader is kept waiting for the first item there."""
        return max(_PATIENCE * self.cost_s, _LEAST_PATIENCE_S)


class HandOver:
    """What one router knows of its streams, and which of them moves. Feed observations, then `best`."""

    __slots__ = ("beginnings", "item", "lengths")

    def __init__(self) -> None:
        self.lengths, self.beginnings, self.item = Lengths(), Beginnings(), ItemTime()

    def begun(self, prompt: float, had: float, first_item_s: float, score: float) -> None:
        """A stream has given its first item; see `Beginnings.add`."""
        self.beginnings.add(prompt, had, first_item_s, score, self.item.seconds)

    def choose(
        self,
        table: RoutingTable,
        picks: PickTable,
        calls: Calls[C],
        pick: Callable[[], int],
        look: Callable[[C], Running[C] | None],
    ) -> Move[C] | None:
        """The one stream that moves by a new table; `look` tells of a call whether it may, `pick` where new ones go."""
        slow = {r: score for r in slow_replicas(table, _SLOW) if (score := picks.score_within(r)) > 0.0}
        i = pick() if slow else -1
        if i < 0 or picks.ids[i] in slow:
            return None
        found = (look(call) for replica_id in slow for call in calls.running(replica_id))
        return self.best((stream for stream in found if stream is not None), slow, picks.ids[i], picks.score(i))

    def best(
        self, running: Iterable[Running[C]], here: Mapping[str, float], target: str, there: float
    ) -> Move[C] | None:
        """The stream that gains most for its length by going on on `target`, at a score of `there`; None if none does.

        `here` are the scores of the slow replicas for a stream that they hold.
        """
        item_s = self.item.seconds
        found: tuple[float, Move[C]] | None = None
        for stream in running:
            score = here.get(stream.call.replica_id, 0.0)
            if not there > 0.0 or not score >= _BETTER * there or not item_s > 0.0:
                continue
            residual = self.lengths.residual(stream.items)
            gain_s = residual * item_s * (score - there)
            cost_s = self.beginnings.seconds(stream.prompt, stream.items, item_s) * there
            share = (gain_s - _MARGIN * there * cost_s - stream.paid_s) / max(stream.items + residual, 1.0)
            if share > 0.0 and (found is None or share > found[0]):
                found = share, Move(stream, target, cost_s, gain_s)
        return found[1] if found is not None else None


# ---------------------------------------------------------------------- how much is left of a stream

_RATIO = math.log(1.25)
_BINS = 72
"""From 1 item to nine million, each 1.25 times the one before."""
_MOST_LENGTHS = 4000.0
_PRIOR = 5.0
"""Streams' worth of evidence that a stream goes on for as long as so far."""


class Lengths:
    """Lengths of streams that have ended, in a histogram of equal ratios; old ones fade."""

    __slots__ = ("_count", "_sum", "_total")

    def __init__(self) -> None:
        self._count, self._sum, self._total = [0.0] * _BINS, [0.0] * _BINS, 0.0

    def add(self, items: float) -> None:
        """A stream has ended well, after so many items."""
        if not 1 <= items < _LARGEST:
            return
        at = _bin(items)
        self._count[at] += 1.0
        self._sum[at] += items
        self._total += 1.0
        if self._total > _MOST_LENGTHS:
            self._count = [count / 2.0 for count in self._count]
            self._sum = [total / 2.0 for total in self._sum]
            self._total /= 2.0

    def residual(self, had: float) -> float:
        """Items to come of a stream that has given `had`: the mean of longer ones, as far as there were any."""
        own = _bin(max(had, 1))
        low, high = math.exp(own * _RATIO), math.exp((own + 1) * _RATIO)
        part = self._count[own] * min(max((high - had) / (high - low), 0.0), 1.0) if had else self._count[own]
        longer = part + sum(self._count[own + 1 :])
        further = part * max(high - had, 0.0) / 2.0 + sum(self._sum[own + 1 :]) - had * sum(self._count[own + 1 :])
        if not had:
            further = sum(self._sum)
        return (further + _PRIOR * had) / (longer + _PRIOR)


def _bin(items: float) -> int:
    return min(int(math.log(items) / _RATIO), _BINS - 1)


# ---------------------------------------------------------------------- how long an item takes

_KEEP_TIME = 0.998
"""Of an observation's weight after the next one: some five hundred seconds of streams."""


class ItemTime:
    """Seconds from one item of a stream to the next at a score of 1."""

    __slots__ = ("_scored", "_seconds")

    def __init__(self) -> None:
        self._scored = self._seconds = 0.0

    def add(self, items: float, seconds: float, score: float) -> None:
        """Streams gave `items` in `seconds` of waiting for them, on a replica of that score."""
        if items < 0 or not 0.0 <= seconds < math.inf or not 0.0 < score < math.inf:
            return
        self._scored = _KEEP_TIME * self._scored + items * score
        self._seconds = _KEEP_TIME * self._seconds + seconds

    @property
    def seconds(self) -> float:
        """0 while it is not known."""
        return self._seconds / self._scored if self._scored > 0.0 else 0.0


# ---------------------------------------------------------------------- what a beginning costs

_ENOUGH = 5
"""Moved streams whose beginnings were seen, before their cost counts as known."""
_LARGEST = 1e9
"""Seconds, units of a prompt or items that can be true."""
_OUTLIER = 4.0
"""Times what is expected: a longer beginning counts as so long, lest one that was unlucky decide."""


class Beginnings:
    """Time to the first item, at a score of 1: of new streams by their prompt, of moved ones by what they had, too.

    Until enough moved streams were seen, the items that one has had are taken to be made once more, which is as much as
    a beginning can cost; beyond the most items that were seen they are taken so for ever.
    """

    __slots__ = ("_moved", "_moved_count", "_new", "_seen")

    def __init__(self) -> None:
        self._new, self._moved = Fit(2), Fit(3)
        self._moved_count, self._seen = 0, 0.0

    @property
    def known(self) -> bool:
        """Whether enough moved streams were seen."""
        return self._moved_count >= _ENOUGH

    def add(self, prompt: float, had: float, first_item_s: float, score: float, item_s: float) -> None:
        """A stream has given its first item after so long, on a replica of that score; a moved one began after `had`.

        For one that was given up meanwhile, how long it was waited for.
        """
        at_one_s = first_item_s / score if score > 0.0 else math.nan
        if not (0.0 <= at_one_s < _LARGEST and 0.0 <= prompt < _LARGEST and 0 <= had < _LARGEST):
            return
        if not had:
            limit_s = _OUTLIER * self._new.predict((1.0, prompt)) if self._new.count >= _ENOUGH else math.inf
            self._new.add((1.0, prompt), min(at_one_s, limit_s))
            return
        limit_s = max(_OUTLIER * self.seconds(prompt, had, item_s), self._most(prompt, had, item_s))
        self._moved.add((1.0, prompt, had), min(at_one_s, limit_s) if self.known else at_one_s)
        self._moved_count += 1
        self._seen = max(self._seen, had)

    def seconds(self, prompt: float, had: float, item_s: float) -> float:
        """Expected, at a score of 1, for a stream whose items take `item_s` there; infinite while nothing is known."""
        if not self.known or not had:
            return self._most(prompt, had, item_s)
        seen = min(had, self._seen)
        return self._moved.predict((1.0, prompt, seen)) + (had - seen) * item_s

    def _most(self, prompt: float, had: float, item_s: float) -> float:
        return self._new.predict((1.0, prompt)) + had * item_s if self._new.count >= _ENOUGH else math.inf
