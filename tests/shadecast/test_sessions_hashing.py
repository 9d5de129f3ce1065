"""Properties of weighted rendezvous hashing: agreement, minimal disruption, balance, bounded cost."""

from __future__ import annotations

import math
import timeit

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shadecast.rendezvous import Rendezvous, session_key, unit

SECRET = b"only the routers know"
KEYS = [session_key(f"session-{i}", SECRET) for i in range(400)]
WEIGHTS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.floats(0.05, 8.0, allow_nan=False), min_size=1, max_size=24
)


def _places(weights: dict[str, float], keys: list[int] = KEYS) -> list[str | None]:
    ring = Rendezvous(weights, SECRET)
    return [ring.place(key) for key in keys]


@given(WEIGHTS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_routers_agree_whatever_the_order_in_which_they_learned_of_the_replicas(weights, random):
    shuffled = list(weights.items())
    random.shuffle(shuffled)
    assert _places(weights) == _places(dict(shuffled))


@given(WEIGHTS, st.data())
@settings(max_examples=40, deadline=None)
def test_a_replica_that_leaves_moves_only_its_own_sessions(weights, data):
    gone = data.draw(st.sampled_from(sorted(weights)))
    rest = {k: w for k, w in weights.items() if k != gone}
    for before, after in zip(_places(weights), _places(rest), strict=True):
        assert after == before or before == gone


@given(WEIGHTS, st.floats(0.05, 8.0))
@settings(max_examples=40, deadline=None)
def test_a_replica_that_joins_takes_sessions_and_moves_none_between_the_others(weights, weight):
    joined = weights | {"the newcomer": weight}
    for before, after in zip(_places(weights), _places(joined), strict=True):
        assert after in (before, "the newcomer")


@given(WEIGHTS, st.data(), st.floats(0.05, 8.0))
@settings(max_examples=40, deadline=None)
def test_a_change_of_weight_moves_sessions_only_to_the_replica_that_gains_or_from_the_one_that_loses(
    weights, data, weight
):
    changed = data.draw(st.sampled_from(sorted(weights)))
    for before, after in zip(_places(weights), _places(weights | {changed: weight}), strict=True):
        if before != after:
            assert (after if weight > weights[changed] else before) == changed


def test_a_leave_and_a_join_move_a_fair_share_and_no_more():
    keys = [session_key(f"{i}", SECRET) for i in range(20_000)]
    weights = {f"r{i}": 1.0 for i in range(10)}
    places = np.array(_places(weights, keys))
    joined = np.array(_places(weights | {"new": 1.0}, keys))
    share = (places != joined).mean()
    assert abs(share - 1 / 11) < 4 * math.sqrt(1 / 11 * 10 / 11 / len(keys))


def test_sessions_spread_in_proportion_to_the_weights():
    for count in (5, 40):  # plain loop, numpy
        weights = {f"replica-{i}": 0.2 + (i % 5) for i in range(count)}
        keys = [session_key(f"{i}", SECRET) for i in range(20_000)]
        places = _places(weights, keys)
        total = sum(weights.values())
        expected = [len(keys) * w / total for w in weights.values()]
        observed = [places.count(k) for k in weights]
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_sessions_of_a_lost_replica_spread_over_the_others_in_proportion():
    weights = {f"r{i}": 1.0 + i % 3 for i in range(6)}
    keys = [session_key(f"{i}", SECRET) for i in range(40_000)]
    ring = Rendezvous(weights, SECRET)
    orphans = [key for key in keys if ring.place(key) == "r2"]
    rest = {k: w for k, w in weights.items() if k != "r2"}
    places = _places(rest, orphans)
    expected = [len(orphans) * w / sum(rest.values()) for w in rest.values()]
    assert stats.chisquare([places.count(k) for k in rest], expected).pvalue > 1e-4


def test_the_load_of_the_fullest_replica_is_bounded_as_for_independent_throws():
    # the maximum of m Poisson counts lies near mean + sqrt(2 mean ln m) (Raab and Steger 1998)
    keys = [session_key(f"{i}", SECRET) for i in range(50_000)]
    weights = {f"r{i}": 1.0 for i in range(100)}
    places = _places(weights, keys)
    mean = len(keys) / len(weights)
    fullest = max(places.count(k) for k in weights)
    assert fullest < mean + 1.5 * math.sqrt(2 * mean * math.log(len(weights)))


def test_the_plain_loop_and_numpy_place_alike(monkeypatch):
    weights = {f"r{i}": 0.1 + i % 7 for i in range(15)}
    by_loop = _places(weights)
    monkeypatch.setattr("shadecast.rendezvous._LOOP_UP_TO", 0)
    assert _places(weights) == by_loop


def test_without_the_secret_a_client_cannot_tell_where_a_session_goes():
    weights = {f"r{i}": 1.0 for i in range(4)}
    here = _places(weights)
    other = Rendezvous(weights, b"another secret")
    there = [other.place(session_key(f"session-{i}", b"another secret")) for i in range(len(KEYS))]
    agreement = sum(a == b for a, b in zip(here, there, strict=True)) / len(KEYS)
    assert abs(agreement - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(KEYS))


def test_ids_that_differ_only_a_little_land_independently():
    weights = {"a": 1.0, "b": 1.0}
    ring = Rendezvous(weights, SECRET)
    places = np.array([ring.place(session_key(f"user-{i:06d}", SECRET)) == "a" for i in range(20_000)])
    same = (places[1:] == places[:-1]).mean()
    assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(len(places))


def test_replicas_without_a_usable_weight_get_no_session():
    weights = {"good": 1.0, "zero": 0.0, "nan": math.nan, "negative": -1.0, "infinite": math.inf}
    assert set(_places(weights)) == {"good"}
    assert _places({"zero": 0.0}, KEYS[:3]) == [None, None, None]


@given(st.one_of(st.text(), st.binary()), st.binary(max_size=100))
@settings(deadline=None)
def test_any_session_id_and_any_secret_give_a_64_bit_key(session_id, secret):
    key = session_key(session_id, secret)
    assert 0 <= key < 2**64
    assert key == session_key(session_id, secret)
    assert 0.0 <= unit(key, 17) < 1.0


def test_a_session_id_of_a_megabyte_costs_no_more_than_a_few_short_ones():
    short = min(timeit.repeat(lambda: session_key("x" * 20, SECRET), number=300, repeat=5))
    for huge in ("x" * 1_000_000, "\ud800" * 1_000_000, b"x" * 1_000_000):
        assert min(timeit.repeat(lambda huge=huge: session_key(huge, SECRET), number=300, repeat=5)) < 30 * short
    ends = {session_key("x" * 999_999 + "y", SECRET), session_key("y" + "x" * 999_999, SECRET)}
    assert len(ends | {session_key("x" * 1_000_000, SECRET), session_key("x" * 1_000_001, SECRET)}) == 4


def test_a_thousand_replicas_cost_little_more_than_eight():
    few = Rendezvous({f"r{i}": 1.0 for i in range(8)}, SECRET)
    many = Rendezvous({f"r{i}": 1.0 for i in range(1000)}, SECRET)
    cost = [
        min(timeit.repeat(lambda r=ring: [r.place(k) for k in KEYS[:50]], number=3, repeat=7)) for ring in (few, many)
    ]
    assert cost[1] < 20 * cost[0]  # measured 4
