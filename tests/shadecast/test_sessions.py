"""Where sessions live and when they move: `SessionMap`, a clock given by hand, several routers side by side."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shadecast.config import SessionConfig
from shadecast.rendezvous import session_key
from shadecast.sessions import IDLE_GAP_S, SessionMap, steady_weight

SECRET = b"s"
CONFIG = SessionConfig()
EQUAL = {f"r{i}": 1.0 for i in range(4)}
CALM = dict.fromkeys(EQUAL, 1.0)
HOT = CALM | {"r0": 10.0}


def _map(weights=EQUAL, scores=CALM, config: SessionConfig = CONFIG, drain_s: float = 30.0) -> SessionMap:
    sessions = SessionMap(config, SECRET, drain_s)
    sessions.update(weights, scores, 0.0)
    return sessions


def _look(sessions: SessionMap, count: int, now_s: float) -> dict[str, str | None]:
    return {f"s{i}": sessions.lookup(f"s{i}", now_s) for i in range(count)}


def _on(places: dict[str, str | None], replica_id: str) -> list[str]:
    return [k for k, v in places.items() if v == replica_id]


def test_routers_that_never_talk_place_new_sessions_alike():
    assert _look(_map(), 200, 1.0) == _look(_map(), 200, 5.0)


def test_no_session_leaves_at_once_a_replica_that_takes_traffic_whatever_the_weights_do():
    sessions = _map()
    before = _look(sessions, 200, 0.0)
    sessions.update({"r0": 0.05, "r1": 9.0, "r2": 0.3, "r3": 1.0, "new": 5.0}, CALM, 1.0)
    assert _look(sessions, 200, 1.0) == before
    assert sessions.moved == 0


def test_sessions_of_a_lost_replica_move_at_once_and_no_other_does():
    sessions = _map()
    before = _look(sessions, 200, 0.0)
    rest = {k: w for k, w in EQUAL.items() if k != "r2"}
    sessions.update(rest, CALM, 1.0)
    after = _look(sessions, 200, 1.0)
    for session, place in before.items():
        assert after[session] == place or place == "r2"
    assert "r2" not in after.values()
    assert sessions.moved == len(_on(before, "r2"))
    assert set(Counter(after[s] for s in _on(before, "r2"))) == set(rest)  # and not all to one


def test_a_router_that_restarts_finds_the_sessions_where_they_were():
    old = _map()
    before = _look(old, 200, 0.0)
    assert _look(_map(), 200, 50.0) == before


def test_a_small_difference_of_scores_moves_nobody():
    sessions = _map()
    before = _look(sessions, 200, 0.0)
    sessions.update(EQUAL, CALM | {"r0": 2.0 * 1.0 + CONFIG.migration_cost}, 1.0)  # at the limit, not beyond
    assert _look(sessions, 200, 100.0) == before


def test_a_hot_replica_loses_sessions_at_the_configured_rate_and_no_faster():
    sessions = _map()
    there = len(_on(_look(sessions, 4000, 0.0), "r0"))
    for tick in range(1, 41):
        now_s = tick * 0.5
        sessions.update(EQUAL, HOT, now_s)
        _look(sessions, 4000, now_s)
        elapsed_s = now_s - 0.5  # hot since the first tick
        assert sessions.moved <= there * CONFIG.moves_per_s * elapsed_s + there * CONFIG.moves_per_s + 1
    expected = there * CONFIG.moves_per_s * 19.5
    assert abs(sessions.moved - expected) < 5 * math.sqrt(expected)


def test_sessions_that_were_silent_do_not_leave_a_hot_replica_all_at_once():
    sessions = _map()
    there = len(_on(_look(sessions, 2000, 0.0), "r0"))
    sessions.update(EQUAL, HOT, 1.0)
    _look(sessions, 2000, 200.0)  # by now every one may go, but they all come at once
    assert 0 < sessions.moved <= there * CONFIG.moves_per_s + 1


def test_new_sessions_do_not_land_on_a_hot_replica():
    sessions = _map(scores=HOT)
    assert not _on(_look(sessions, 500, 1.0), "r0")


def test_when_most_replicas_are_hot_new_sessions_do_not_all_rush_to_the_rest():
    sessions = _map(scores={"r0": 10.0, "r1": 10.0, "r2": 10.0, "r3": 1.0})
    assert len(_on(_look(sessions, 1000, 1.0), "r3")) < 400


def test_an_idle_newcomer_on_its_first_step_makes_nobody_hot():
    weights, scores = EQUAL | {"new": 0.05}, dict.fromkeys(EQUAL, 4.0) | {"new": 1.0}
    sessions = _map(weights, scores)
    places = _look(sessions, 2000, 0.0)
    sessions.update(weights, scores, 1.0)
    assert _look(sessions, 2000, 60.0) == places
    assert len(_on(places, "new")) < 2000 * 0.05


def test_routers_that_saw_a_hot_replica_move_the_same_sessions_to_the_same_places():
    # every second a request of each session to one of the two routers, in turn
    one, two = _map(), _map()
    last: dict[str, str | None] = {}
    split = 0
    for now_s in range(41):
        for router in (one, two):
            router.update(EQUAL, HOT if now_s > 1 else CALM, float(now_s))
            places = _look(router, 400, float(now_s))
            split += sum(place != last.get(session, place) for session, place in places.items()) if now_s else 0
            last = places
    moved = max(one.moved, two.moved)
    assert moved > 50
    # a session that only one router has moved so far counts twice a second until the other follows
    assert split <= 6 * moved


def test_moved_sessions_do_not_come_back_when_the_replica_has_cooled():
    sessions = _map()
    _look(sessions, 400, 0.0)
    for now_s in range(1, 30):
        sessions.update(EQUAL, HOT, float(now_s))
        places = _look(sessions, 400, float(now_s))
    moved = sessions.moved
    assert moved > 0
    sessions.update(EQUAL, CALM, 31.0)
    assert _look(sessions, 400, 31.0) == places
    assert sessions.moved == moved


def test_draining_moves_new_sessions_then_idle_ones_then_live_ones():
    sessions = _map(drain_s=30.0)
    before = _on(_look(sessions, 2000, 0.0), "r1")
    idle, live = before[: len(before) // 2], before[len(before) // 2 :]
    for session in live:
        sessions.lookup(session, 20.0)
    rest = {k: w for k, w in EQUAL.items() if k != "r1"}
    sessions.update(rest, CALM, 20.5, draining=["r1"])
    assert all(sessions.lookup(f"new{i}", 20.6) != "r1" for i in range(500))
    assert IDLE_GAP_S < 20.6  # the idle ones were last heard of at 0
    assert all(sessions.lookup(session, 20.6) != "r1" for session in idle)
    staying = [session for session in live if sessions.lookup(session, 20.6) == "r1"]
    assert len(staying) >= 0.95 * len(live)
    left = []
    for tick in range(1, 31):
        now_s = 20.6 + tick
        sessions.update(rest, CALM, now_s, draining=["r1"])
        left.append(sum(sessions.lookup(session, now_s) != "r1" for session in live))
    steps = [b - a for a, b in itertools.pairwise(left)]
    assert max(steps) <= 2.0 / 30.0 * len(before) + 2
    assert left[-1] >= 0.95 * len(live)  # before the deadline
    sessions.update(rest, CALM, 60.0)  # the deadline: no longer draining, gone
    assert all(sessions.lookup(session, 60.0) != "r1" for session in live)


def test_when_everything_drains_sessions_stay_and_new_ones_are_told_so():
    sessions = _map()
    before = _look(sessions, 50, 0.0)
    sessions.update({}, {}, 1.0, draining=list(EQUAL))
    assert _look(sessions, 50, 60.0) == before
    assert sessions.lookup("a new one", 60.0) is None


def test_without_any_replica_there_is_no_place_and_no_error():
    sessions = SessionMap(CONFIG, SECRET)
    assert sessions.lookup("s", 0.0) is None
    sessions.update(EQUAL, CALM, 1.0)
    assert sessions.lookup("s", 1.0) in EQUAL
    sessions.update({}, {}, 2.0)
    assert sessions.lookup("s", 2.0) is None
    assert len(sessions) == 0


def test_two_routers_of_which_one_has_just_started_agree_within_a_minute_of_any_change():
    """Scaled from three to four and one weight doubled: the old router's sessions drift to where the new one looks."""
    old = _map()
    sessions = [f"s{i}" for i in range(1000)]
    began = {s: old.lookup(s, 0.0) for s in sessions}
    changed = {**EQUAL, "r9": 1.0, "r0": 2.0}
    new = SessionMap(CONFIG, SECRET)
    for each in (old, new):
        each.update(changed, CALM, 10.0)
    places, moved = dict(began), []
    for at_s in range(11, 71):
        before = dict(places)
        for s in sessions:
            if at_s > 60 or not s.endswith("7"):  # one in ten is silent meanwhile
                places[s] = old.lookup(s, float(at_s))
        moved.append(sum(places[s] != before[s] for s in sessions))
    assert places == {s: new.lookup(s, 70.0) for s in sessions}
    gone = sum(places[s] != began[s] for s in sessions)
    assert 200 < gone < 600
    assert max(moved[:49]) < 4 * gone / 50, "a few at a time"
    assert old.counts == new.counts
    for at_s in (100.0, 200.0):
        assert places == {s: old.lookup(s, at_s) for s in sessions}, "and then they stay"


def test_where_sessions_are_not_to_move_they_do_not_drift():
    still = SessionMap(replace(CONFIG, moves_per_s=0.0), SECRET)
    still.update(EQUAL, CALM, 0.0)
    began = {f"s{i}": still.lookup(f"s{i}", 0.0) for i in range(200)}
    still.update({**EQUAL, "r9": 1.0}, CALM, 1.0)
    assert began == {s: still.lookup(s, 100.0) for s in began}


def test_sessions_of_a_replica_that_hardly_answers_make_a_detour_each_to_one_place_and_come_back():
    sessions = _map()
    before = _look(sessions, 200, 0.0)
    stuck = frozenset({"r0"})
    around = {s: sessions.lookup(s, 1.0, stuck) for s in before}
    assert {s: place for s, place in around.items() if before[s] != "r0"} == {
        s: place for s, place in before.items() if place != "r0"
    }
    detours = Counter(around[s] for s in _on(before, "r0"))
    assert set(detours) == {"r1", "r2", "r3"}
    assert max(detours.values()) < 2.5 * min(detours.values())
    assert {s: sessions.lookup(s, 2.0, stuck) for s in before} == around
    assert _look(sessions, 200, 3.0) == before
    assert sessions.moved == 0
    assert {sessions.lookup(s, 4.0, frozenset(EQUAL)) for s in before} == {None}, "anything will do"


def test_memory_is_bounded_and_the_oldest_sessions_are_forgotten_first():
    sessions = _map(config=replace(CONFIG, max_sessions=100))
    _look(sessions, 100, 0.0)
    sessions.lookup("s0", 1.0)  # used again: young
    for i in range(50):
        sessions.lookup(f"more{i}", 2.0)
    assert len(sessions) == 100
    assert sum(sessions.counts.values()) == 100
    sessions.update({"other": 1.0}, {}, 3.0)
    before = sessions.moved
    sessions.lookup("s0", 3.0)
    assert sessions.moved == before + 1  # it was still known


def test_sessions_not_heard_of_are_forgotten_in_time():
    sessions = _map()
    _look(sessions, 100, 0.0)
    for i in range(60):
        sessions.lookup(f"more{i}", CONFIG.idle_s + 1.0)
    assert len(sessions) == 60


def test_a_published_weight_ignores_noise_and_follows_change():
    assert steady_weight(1.0, 1.3) == 1.0
    assert steady_weight(1.0, 0.7) == 1.0
    assert steady_weight(1.0, 1.6) == 1.6
    assert steady_weight(1.0, 0.6) == 0.6
    assert steady_weight(1.0, 0.0) == 0.0
    assert steady_weight(0.0, 0.4) == 0.4
    assert steady_weight(math.nan, 0.4) == 0.4
    assert steady_weight(1.0, math.nan) == 0.0


_ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.dictionaries(st.text(max_size=3), _ANY, max_size=5),
    st.dictionaries(st.text(max_size=3), _ANY, max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.tuples(st.text(max_size=4), _ANY), max_size=20),
    _ANY,
)
@settings(max_examples=150, deadline=None)
def test_no_table_no_clock_and_no_id_whatever_they_hold_raise(weights, scores, draining, lookups, now_s):
    sessions = SessionMap(CONFIG, SECRET)
    sessions.update(EQUAL, CALM, 0.0)
    for session, at_s in lookups:
        sessions.lookup(session, at_s)
    sessions.update(weights, scores, now_s, draining)
    for session, at_s in lookups:
        assert sessions.lookup(session, at_s) in {None, *weights, *draining}


class Routers(RuleBasedStateMachine):
    """Joins, leaves, drains, heat and time in any order.

    1. A lookup gives a replica that takes traffic or drains, whenever there is one that takes traffic.
    2. A session moves only if its replica is gone, drains or is hot, or to where a new router would look for it.
    3. The counts per replica are those of the sessions remembered.
    4. A new session never lands on a draining replica.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"r0": 1.0, "r1": 2.0}
        self.draining: set[str] = set()
        self.scores: dict[str, float] = {}
        self.now_s = 0.0
        self.sessions = SessionMap(replace(CONFIG, max_sessions=30), SECRET)
        self.waiting: dict[str, str] = {}
        self.fresh = 0
        self._update()

    def _update(self) -> None:
        takes = {k: w for k, w in self.weights.items() if k not in self.draining}
        self.sessions.update(takes, self.scores, self.now_s, self.draining & self.weights.keys())

    def _home(self, session: str) -> str | None:
        started = SessionMap(CONFIG, SECRET)
        takes = {k: w for k, w in self.weights.items() if k not in self.draining}
        started.update(takes, self.scores, self.now_s, self.draining & self.weights.keys())
        return started.lookup(session, self.now_s)

    @rule(i=st.integers(0, 6), weight=st.floats(0.1, 4.0))
    def join_or_change_weight(self, i, weight):
        self.weights[f"r{i}"] = weight
        self._update()

    @rule(i=st.integers(0, 6))
    def leave(self, i):
        self.weights.pop(f"r{i}", None)
        self.draining.discard(f"r{i}")
        self._update()

    @rule(i=st.integers(0, 6), on=st.booleans())
    def drain(self, i, on):
        (self.draining.add if on else self.draining.discard)(f"r{i}")
        self._update()

    @rule(i=st.integers(0, 6), score=st.sampled_from([1.0, 1.5, 20.0]))
    def heat(self, i, score):
        self.scores[f"r{i}"] = score
        self._update()

    @rule(dt=st.floats(0.0, 40.0))
    def wait(self, dt):
        self.now_s += dt
        self._update()

    @rule(i=st.integers(0, 25))
    def request(self, i):
        session = f"s{i}"
        if session_key(session, SECRET) not in self.sessions._sessions:
            self.waiting.pop(session, None)  # forgotten: too old, or too many
        place = self.sessions.lookup(session, self.now_s)
        takes = self.weights.keys() - self.draining
        if takes:
            assert place in self.weights
        before = self.waiting.get(session)
        if before is not None and place != before and before in takes:
            was_hot = self.scores.get(before, 1.0) > 2.0
            assert was_hot or place == self._home(session)
        if place is None:
            self.waiting.pop(session, None)
        else:
            self.waiting[session] = place

    @rule()
    def new_session(self):
        self.fresh += 1
        place = self.sessions.lookup(f"fresh{self.fresh}", self.now_s)
        assert place is None or place in self.weights.keys() - self.draining

    @invariant()
    def counts_are_true(self):
        held = Counter(replica_id for replica_id, _ in self.sessions._sessions.values())
        assert dict(held) == self.sessions.counts
        assert len(self.sessions) <= 30

    @rule()
    def forget_all(self):
        self.now_s += 10 * CONFIG.idle_s
        self.waiting.clear()
        self.sessions = SessionMap(replace(CONFIG, max_sessions=30), SECRET)
        self._update()


Routers.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRouters = Routers.TestCase
