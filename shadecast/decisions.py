"""Decisions of a router that are kept so that somebody can ask about them: which replicas, their scores, and why.

Few are kept: the first of every second, and those that are special (waited, came back, were refused or sent again,
whose session moved). Of each special kind `Limit` lets through so many a second, so that a busy router pays as little
as a quiet one. `Ring` holds the last ones. Nothing leaves the router unless it is asked for (`answer`).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from heapq import nsmallest
from typing import Any

from shadecast.messages import number_of
from shadecast.pick import PickTable
from shadecast.prefix_score import Comparison
from shadecast.types import RoutingTable

_SPECIAL_PER_S, _SPECIAL_AT_ONCE = 10.0, 20.0
_KEPT, _KEPT_SPECIAL = 128, 32
"""Usual ones, and special ones of each kind: many of one kind must not push out the few of another."""
MOST_CANDIDATES = 8
_FEW = 64
"""Of more replicas, the best of those that were not drawn are not looked for: it takes too long."""
MOST_BYTES = 32_768
"""Of one router's answer."""
_LONGEST_ID = 128
"""Clients choose the ids of their requests."""
QUESTIONS = 8
"""That are open at a time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as one decision saw it."""

    replica_id: str
    node_id: str
    looked_at: bool
    """Drawn and compared; the others are the best of those that were not."""
    score: float
    """cost / capacity: relative time of one more request there; the least wins."""
    cost: float
    """g(n) of `shadecast.pick`, of one more than the queue."""
    queue: float
    """Requests of all routers there, as this one estimated."""
    mine: int
    """This router's own."""
    capacity: float
    """That the score was made with."""
    live_capacity: float
    """Without the forecast; 0 where it is not known."""
    share: float
    """Fraction of the picks for which it is eligible."""
    state: str
    out: str = ""
    """Why it could not be taken: "full", "ejected", "not eligible"; "" if it could."""
    cached_tokens: float = math.nan
    """Of the request's prompt, in its cache; this and the next two NaN where no prompt chose, or not between it."""
    waiting_tokens: float = math.nan
    """Of other prompts, sent there and not computed yet."""
    prefix_score: float = math.nan
    """By `shadecast.prefix_score`, which chose in place of `score`; the least wins."""

    @property
    def forecast_factor(self) -> float:
        """What the forecast, or a veto, does to the capacity; NaN where that is not known."""
        return self.capacity / self.live_capacity if self.live_capacity > 0.0 else math.nan


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one request in one router."""

    request_id: str
    method: str
    at_s: float
    level: str
    """The rung of the fail-open ladder that it was decided on."""
    chosen: str
    """"" where it was refused."""
    special: str = ""
    """"", or what made it special: "waited", "came back", "refused", "retried", "moved", "resumed", "session moved"."""
    detail: str = ""
    """The reason in words."""
    session: bool = False
    """It belongs to a session, which has a replica of its own."""
    model: str = ""
    """Multiplexed model that it asked for."""
    prompt_tokens: int = 0
    """Of its prompt, by which it was placed; 0 where no prompt chose."""
    waited_s: float = 0.0
    of_copy: bool = False
    """Somebody's code called it while it handled a copy."""
    copied_to: str = ""
    """Replica on trial that got a copy."""
    eligible: int = 0
    """Replicas that might have been drawn, of `alive`."""
    alive: int = 0
    candidates: tuple[Candidate, ...] = ()


class Limit:
    """How many special decisions of one kind are kept."""

    def __init__(self) -> None:
        self._left, self._filled_s = _SPECIAL_AT_ONCE, 0.0

    def take(self, now_s: float) -> bool:
        """Whether one more is kept."""
        self._left = min(self._left + max(now_s - self._filled_s, 0.0) * _SPECIAL_PER_S, _SPECIAL_AT_ONCE)
        self._filled_s = now_s
        kept = self._left >= 1.0
        self._left -= kept
        return kept


class Ring:
    """The last decisions that were kept."""

    def __init__(self, size: int = _KEPT) -> None:
        self._kinds = {"": deque[Decision](maxlen=size)}
        self._limits: dict[str, Limit] = {}

    def __len__(self) -> int:
        return sum(map(len, self._kinds.values()))

    def wants(self, special: str, now_s: float) -> bool:
        """Whether one more special decision of that kind is to be kept; counts it."""
        limit = self._limits.get(special)
        if limit is None:
            limit = self._limits[special] = Limit()
        return limit.take(now_s)

    def add(self, decision: Decision) -> None:
        """Keep it; the oldest of its kind goes."""
        decision = replace(decision, request_id=decision.request_id[:_LONGEST_ID])
        kind = self._kinds.get(decision.special)
        if kind is None:
            kind = self._kinds[decision.special] = deque(maxlen=_KEPT_SPECIAL)
        kind.append(decision)

    def copied(self, request_id: str, candidate_id: str) -> None:
        """A request was copied to a replica on trial; it was decided a moment ago, if it is here."""
        for kept in self._kinds.values():
            if kept and kept[-1].request_id == request_id[:_LONGEST_ID]:
                kept[-1] = replace(kept[-1], copied_to=candidate_id)

    def last(self) -> Iterator[Decision]:
        """All, the newest first."""
        newest_first = (decision for kind in reversed(self._kinds.values()) for decision in reversed(kind))
        yield from sorted(newest_first, key=lambda d: -d.at_s)

    def of(self, request_id: str) -> list[Decision]:
        """Those of one request, the newest first: one that was sent again has several."""
        return [decision for decision in self.last() if decision.request_id == request_id[:_LONGEST_ID]]


# ---------------------------------------------------------------- what a decision has seen


class _Noted(Sequence[int]):
    """A pool that notes what is drawn from it."""

    def __init__(self, pool: Sequence[int]) -> None:
        self._pool = pool
        self.drawn: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, k: Any) -> Any:
        i = self._pool[k]
        self.drawn[i] = None
        return i


def looked_at(
    picks: PickTable, draws: Sequence[float], choices: int, without: int, pool: Sequence[int] | None
) -> tuple[int, ...]:
    """The indices that a pick with these draws has compared: the same pick again, before anything has changed."""
    of = picks.pool if pool is None else pool
    if len(of) <= choices:
        return tuple(of)  # all of them
    noted, left = _Noted(of), iter(draws)
    with suppress(StopIteration):  # none was eligible, and it would try once more
        picks.pick(lambda: next(left), choices, without, noted)
    return tuple(noted.drawn)


def candidates(
    picks: PickTable,
    table: RoutingTable | None,
    seen: Collection[int],
    chosen: str = "",
    *,
    ejected: Collection[str] = (),
    nodes: Mapping[str, str] | None = None,
    counted: bool = True,
    compared: Comparison | None = None,
) -> tuple[Candidate, ...]:
    """Those that were looked at, the chosen one, and the best of the others; each with what its score is made of.

    `nodes` are those of the replicas that are alive: the table need not know them. `counted`: the chosen one's calls
    have the request already, and are shown as they were before. `compared`: by the request's prompt.
    """
    prompts = {load.replica_id: load for load in compared.loads} if compared is not None else {}
    at = picks.index.get(chosen, -1)
    shown = dict.fromkeys([*([at] if at >= 0 else []), *sorted(seen, key=lambda i: picks.scores[i])][:MOST_CANDIDATES])
    if len(shown) < MOST_CANDIDATES and (not seen or len(picks.pool) <= _FEW):
        others = (i for i in picks.pool if i not in shown)
        shown |= dict.fromkeys(nsmallest(MOST_CANDIDATES - len(shown), others, key=lambda i: picks.scores[i]))
    wanted = {picks.ids[i] for i in shown}
    rows = {row.replica_id: row for row in (table.rows if table is not None else ()) if row.replica_id in wanted}
    found = []
    for i in shown:
        replica_id = picks.ids[i]
        row, parts = rows.get(replica_id), picks.parts(i, less := int(counted and i == at))
        share = picks.share[i]
        out = "ejected" if replica_id in ejected else "full" if parts.full else ""
        found.append(
            Candidate(
                replica_id,
                row.node_id if row is not None else (nodes or {}).get(replica_id, ""),
                i in seen,
                parts.cost / parts.capacity,
                parts.cost,
                parts.queue,
                picks.in_flight[i] - less,
                parts.capacity,
                row.live_capacity if row is not None else 0.0,
                share,
                row.state.value if row is not None else "",
                out if share > 0.0 else "not eligible",
            )
        )
        if compared is not None and (load := prompts.get(replica_id)) is not None:
            cached, score = float(compared.cached_tokens(load)), compared.score(load)
            found[-1] = replace(found[-1], cached_tokens=cached, waiting_tokens=load.pending_tokens, prefix_score=score)
    return tuple(found)


# ---------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody wants to know of all routers: one request's decisions, or the last ones."""

    number: int
    request_id: str = ""
    """"": the last ones."""
    most: int = 10


def questions(received: Any) -> tuple[Question, ...]:
    """Questions of a message; what is none is left out, however it looks."""
    found = []
    for each in received if isinstance(received, (list, tuple)) else ():
        values = each if isinstance(each, Mapping) else {}
        number, request_id, most = values.get("number"), values.get("request_id", ""), values.get("most", 10)
        if isinstance(number, int) and isinstance(request_id, str) and isinstance(most, int):
            found.append(Question(number, request_id, most))
    return tuple(found[:QUESTIONS])


def answer(ring: Ring, question: Question, now_s: float) -> dict[str, Any]:
    """What a router says to a question, within MOST_BYTES: the newest first, plain values."""
    fitting: Iterable[Decision] = ring.of(question.request_id) if question.request_id else ring.last()
    told: list[dict[str, Any]] = []
    left = MOST_BYTES
    for decision in fitting:
        plain = to_plain(decision, now_s)
        left -= len(json.dumps(plain))
        if left < 0 or len(told) >= question.most:
            break
        told.append(plain)
    return {"number": question.number, "kept": len(ring), "decisions": told}


def to_plain(decision: Decision, now_s: float) -> dict[str, Any]:
    """As JSON values; None is "not known"."""
    plain = asdict(decision)
    plain["ago_s"] = max(now_s - plain.pop("at_s"), 0.0)
    for values, candidate in zip(plain["candidates"], decision.candidates, strict=True):
        values["forecast_factor"] = candidate.forecast_factor
    return {
        name: [{k: _finite(v) for k, v in each.items()} for each in value] if name == "candidates" else _finite(value)
        for name, value in plain.items()
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(answered: Any, at_most: int = 4 * MOST_BYTES) -> list[dict[str, Any]]:
    """Decisions of a router's answer as they may be shown: known names and plain values; what is none is left out."""
    found: list[dict[str, Any]] = []
    received = answered.get("decisions") if isinstance(answered, Mapping) else None
    for each in received if isinstance(received, (list, tuple)) else ():
        if not isinstance(each, Mapping) or not isinstance(each.get("candidates"), (list, tuple)):
            continue
        plain = _plain(each, _DECISION)
        plain["candidates"] = [_plain(c, _CANDIDATE) for c in each["candidates"] if isinstance(c, Mapping)]
        plain["candidates"] = plain["candidates"][: 2 * MOST_CANDIDATES]
        at_most -= len(json.dumps(plain))
        if at_most < 0:
            break
        found.append(plain)
    return found


_Read = Callable[[Any], Any]


def _text(value: Any) -> str:
    return value[:400] if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    read = number_of(value)
    return read if math.isfinite(read) else None


def _count(value: Any) -> int:
    read = number_of(value)
    return int(read) if math.isfinite(read) else 0


_DECISION: Mapping[str, _Read] = {
    **dict.fromkeys(("request_id", "method", "level", "chosen", "special", "detail", "model", "copied_to"), _text),
    **dict.fromkeys(("session", "of_copy"), bool),
    **dict.fromkeys(("ago_s", "waited_s"), _number),
    **dict.fromkeys(("eligible", "alive", "prompt_tokens"), _count),
}
_CANDIDATE: Mapping[str, _Read] = {
    **dict.fromkeys(("replica_id", "node_id", "state", "out"), _text),
    **dict.fromkeys(
        ("score", "cost", "queue", "capacity", "live_capacity", "forecast_factor", "share"),
        _number,
    ),
    **dict.fromkeys(("cached_tokens", "waiting_tokens", "prefix_score"), _number),
    "looked_at": bool,
    "mine": _count,
}


def _plain(values: Mapping[str, Any], kinds: Mapping[str, _Read]) -> dict[str, Any]:
    return {name: read(values.get(name)) for name, read in kinds.items()}
