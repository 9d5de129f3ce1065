"""Where sessions live and when they move (design section 6).

A session that is not known here goes where weighted rendezvous hashing puts it (shadecast/rendezvous.py), so all
routers agree. A known one moves

- at once, if the replica is gone, or drains and the session has been idle;
- at a bounded rate, if the replica drains, or is hot: its score exceeds `repin_ratio` x the best + `migration_cost`;
- at the same rate to where a router that does not know it would look for it, after replicas or weights have changed.

While a replica is very slow, its sessions have a fallback, the same one for all requests of a session: they would be
caught with the replica, and a session that goes back finds its caches.

The bounded rate has two halves. Each session has a fixed rank in [0, 1) per replica, and those below a fraction that
grows by `moves_per_s` may go: so all routers move the same ones, to the same place. And a budget of the same rate, over
the sessions known here, keeps sessions that were silent for long from leaving all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shadecast.config import SessionConfig
from shadecast.pick import PickTable, table_scores
from shadecast.rendezvous import Rendezvous, session_key, unit
from shadecast.types import RoutingTable, State

IDLE_GAP_S = 10.0
"""A session silent for so long has little left in caches: it leaves a draining replica on its next request."""
_RANK_SALT = 0x5DEECE66D5DEECE6
_DRIFT_S = 50.0
"""So long after a change at the latest a session is where all routers look for it, once it is asked for."""
_FULL_MEMBER = 0.5
"""Only replicas with this much of the greatest weight say what the best score is: one on its first steps is idle."""
_WEIGHT_STEP = 1.5
_LONGEST_WAIT_S = 1.0


def steady_weight(held: float, wanted: float) -> float:
    """The session weight to publish: `held` until `wanted` differs by more than half, then `wanted`.

    Every change of a weight makes routers that do not know a session yet disagree with those that do, so weights must
    not follow a capacity estimate's noise. 0 (takes no sessions) holds at once, as does the first positive weight.
    """
    if not 0.0 < wanted < math.inf:
        return 0.0
    steady = 0.0 < held < math.inf and held / _WEIGHT_STEP <= wanted <= held * _WEIGHT_STEP
    return held if steady else wanted


def worth_waiting_s(config: SessionConfig, table: RoutingTable | None) -> float:
    """What a session's move costs, and a request may wait for its own replica; 0 while no request's time is known."""
    reference_s = table.reference_s if table is not None else 0.0
    return min(config.migration_cost * reference_s, _LONGEST_WAIT_S)


@dataclass(slots=True)
class _Leaving:
    """A replica that sessions leave at a bounded rate."""

    since_s: float
    moves_per_s: float
    drains: bool
    salt: int
    sessions: int
    """That were there when it began."""
    filled_s: float
    budget: float = 1.0


class SessionMap:
    """One router's sessions. `update` with each routing table, `lookup` with each request; both never raise."""

    __slots__ = (
        *(
            "_changed_s",
            "_config",
            "_cool",
            "_fallback",
            "_drain_s",
            "_latest_s",
            "_leaving",
            "_open",
            "_ring",
            "_secret",
            "_sessions",
        ),
        *("_takes", "counts", "moved", "on_moved"),
    )

    def __init__(self, config: SessionConfig, secret: bytes, drain_s: float = 30.0) -> None:
        """`secret` is the same on all routers of a cluster; a drain is over after `drain_s`."""
        self._secret = secret
        self.configure(config, drain_s)
        self._sessions: dict[int, tuple[str, float]] = {}
        """Key -> (replica, last request), oldest first."""
        self._open: frozenset[str] = frozenset()
        """Replicas that take traffic and that sessions have no reason to leave."""
        self._leaving: dict[str, _Leaving] = {}
        self._ring = self._cool = Rendezvous({}, secret)
        """Where unknown sessions and those that move are placed."""
        self._takes: dict[str, float] = {}
        """Weights of all that take sessions, hot or not."""
        self._fallback: tuple[Collection[str], dict[str, float], Rendezvous] = ((), self._takes, self._cool)
        """Replicas to avoid, the weights at that time, and a ring without those."""
        self._changed_s = -math.inf
        """When the places of unknown sessions changed last."""
        self._latest_s = 0.0
        self.counts: dict[str, int] = {}
        """Sessions known here per replica."""
        self.moved = 0
        self.on_moved: Callable[[Any, str, str], object] = lambda _request, _before, _after: None
        """Told of a session that moves: the request that `lookup` was given, and both replicas."""

    def __len__(self) -> int:
        return len(self._sessions)

    def configure(self, config: SessionConfig, drain_s: float) -> None:
        """Go by other settings from now on; every session stays where it is."""
        self._config, self._drain_s = config, max(drain_s, 1.0)

    def take(self, picks: PickTable, table: RoutingTable | None, now_s: float) -> None:
        """Go by a new table, or by other replicas that are alive."""
        rows = {row.replica_id: row for row in table.rows} if table is not None else {}
        weights = {
            replica_id: rows[replica_id].session_weight if replica_id in rows else 1.0
            for replica_id, share in zip(picks.ids, picks.share, strict=True)
            if share > 0.0
        }
        scores = table_scores(table) if table is not None else {}
        draining = [r for r in picks.ids if r in rows and rows[r].state is State.DRAINING]
        self.update(weights, scores, now_s, draining)

    def update(
        self,
        weights: Mapping[str, float],
        scores: Mapping[str, float],
        now_s: float,
        draining: Collection[str] = (),
    ) -> None:
        """Take a routing table's replicas, those alive only.

        `weights`: session weight of each replica that takes traffic. `scores`: predicted time of one more request on it
        (a missing or NaN score never moves a session). `draining`: replicas whose sessions are to leave.
        """
        now_s = self._now(now_s)
        takes = {k: w for k, w in weights.items() if 0.0 < w < math.inf and k not in draining}
        if takes != self._takes:
            self._takes = takes
        hot = self._hot(takes, scores)
        rates = dict.fromkeys(hot, self._config.moves_per_s)
        # twice as fast as the deadline asks: nearly all are gone when it comes
        rates |= dict.fromkeys(draining, max(self._config.moves_per_s, 2.0 / self._drain_s))
        self._leaving = {k: self._leave(k, rate, k not in hot, now_s) for k, rate in rates.items()}
        cool = {k: w for k, w in takes.items() if k not in hot}
        self._open = frozenset(cool)
        self._cool = self._placed(self._cool, cool)
        # where most of the capacity is hot, unknown sessions must not all rush to the rest
        minority = 2.0 * sum(cool.values()) < sum(takes.values())
        ring = self._placed(self._ring, takes) if minority else self._cool
        if ring.weights != self._ring.weights:
            self._changed_s = now_s
        self._ring = ring

    def _hot(self, takes: Mapping[str, float], scores: Mapping[str, float]) -> set[str]:
        known = {k: score for k in takes if math.isfinite(score := scores.get(k, math.nan))}
        full = _FULL_MEMBER * max(takes.values(), default=0.0)
        best = min((score for k, score in known.items() if takes[k] >= full), default=math.inf)
        limit = self._config.repin_ratio * best + self._config.migration_cost
        return {k for k, score in known.items() if score > limit}

    def _leave(self, replica_id: str, rate: float, drains: bool, now_s: float) -> _Leaving:
        before = self._leaving.get(replica_id)
        if before is not None and before.drains == drains:
            return before
        salt = session_key(replica_id, self._secret) ^ _RANK_SALT
        return _Leaving(now_s, rate, drains, salt, self.counts.get(replica_id, 0), now_s)

    def _placed(self, ring: Rendezvous, weights: Mapping[str, float]) -> Rendezvous:
        return ring if ring.weights == weights else Rendezvous(weights, self._secret)

    def lookup(
        self, session_id: str | bytes, now_s: float, away: Collection[str] = (), request: Any = None
    ) -> str | None:
        """The replica for the session's next request; None if no replica takes traffic. Remembers where it lives.

        A session that lives on one of `away`, which are very slow, stays there; its request goes to its fallback.
        """
        now_s = self._now(now_s)
        key = session_key(session_id, self._secret)
        held = self._sessions.pop(key, None)
        if held is None:
            self._forget(now_s)
            replica_id = self._ring.place(key)
            if replica_id is None:
                return None
            self.counts[replica_id] = self.counts.get(replica_id, 0) + 1
        else:
            replica_id = held[0]
            if replica_id not in self._open:
                replica_id = self._moved(key, replica_id, held[1], now_s, request)
                if replica_id is None:
                    return None
            elif held[1] < self._changed_s + _DRIFT_S:
                replica_id = self._drifted(key, replica_id, now_s, request)
        self._sessions[key] = (replica_id, now_s)
        return replica_id if replica_id not in away else self._around(away).place(key)

    def peek(
        self, session_id: str | bytes, _now_s: float, away: Collection[str] = (), _request: Any = None
    ) -> str | None:
        """Where a session lives, or would, for a request that must leave no trace: `lookup` that changes nothing."""
        key = session_key(session_id, self._secret)
        held = self._sessions.get(key)
        replica_id = held[0] if held is not None and held[0] in self._takes else self._ring.place(key)
        return replica_id if replica_id not in away else self._around(away).place(key)

    def _around(self, away: Collection[str]) -> Rendezvous:
        """Fallbacks: all but `away`, hot or not, so that they change no more often than `away` does."""
        avoided, before, ring = self._fallback
        if before is not self._takes or avoided != away:
            ring = Rendezvous({k: w for k, w in self._takes.items() if k not in away}, self._secret)
            self._fallback = (away, self._takes, ring)
        return ring

    def _now(self, now_s: float) -> float:
        """A clock that jumps back, or is NaN, stands still."""
        if now_s > self._latest_s and math.isfinite(now_s):
            self._latest_s = now_s
        return self._latest_s

    def _moved(self, key: int, held: str, last_s: float, now_s: float, request: Any) -> str | None:
        """The place of a session whose replica is not open: a new one, or the same if it must wait its turn."""
        leaving = self._leaving.get(held)
        if leaving is not None and not self._may_go(key, held, leaving, last_s, now_s):
            return held
        target = self._cool.place(key)
        if target is None and leaving is not None:
            return held  # nothing better is alive
        self._discount(held)
        if target is not None:
            self._note_move(held, target, request)
        return target

    def _note_move(self, held: str, target: str, request: Any) -> None:
        self.counts[target] = self.counts.get(target, 0) + 1
        self.moved += 1
        self.on_moved(request, held, target)

    def _drifted(self, key: int, held: str, now_s: float, request: Any) -> str:
        """The place of a session whose replica is open, but no more where others would look for it."""
        per_s = max(self._config.moves_per_s, 1.0 / _DRIFT_S) if self._config.moves_per_s else 0.0
        if unit(key, _RANK_SALT) >= per_s * (now_s - self._changed_s):
            return held
        target = self._ring.place(key)
        if target is None or target == held:
            return held
        self._discount(held)
        self._note_move(held, target, request)
        return target

    def _may_go(self, key: int, held: str, leaving: _Leaving, last_s: float, now_s: float) -> bool:
        if leaving.drains and now_s - last_s >= IDLE_GAP_S:
            return True
        if unit(key, leaving.salt) >= leaving.moves_per_s * (now_s - leaving.since_s):
            return False
        per_s = leaving.moves_per_s * max(leaving.sessions, self.counts.get(held, 0))
        leaving.budget = min(leaving.budget + per_s * (now_s - leaving.filled_s), max(per_s, 1.0))
        leaving.filled_s = now_s
        if leaving.budget < 1.0:
            return False
        leaving.budget -= 1.0
        return True

    def _discount(self, replica_id: str) -> None:
        left = self.counts.get(replica_id, 0) - 1
        if left > 0:
            self.counts[replica_id] = left
        else:
            self.counts.pop(replica_id, None)

    def _forget(self, now_s: float) -> None:
        """Make room for one more, the oldest first; two at a time, so that no request pays for many."""
        sessions, config = self._sessions, self._config
        for _ in range(2):
            if not sessions:
                return
            oldest = next(iter(sessions))
            replica_id, last_s = sessions[oldest]
            if len(sessions) < config.max_sessions and now_s - last_s <= config.idle_s:
                return
            del sessions[oldest]
            self._discount(replica_id)
