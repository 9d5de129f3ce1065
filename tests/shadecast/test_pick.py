"""The pick: shares, scores, fall-backs."""

import random
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.pick import PickTable, cost_table, load_cost
from shadecast.types import RoutingTable, State, TableRow

COST = cost_table(1.0, 0.0)


def table(*rows, routers=1, slots=1.0, batch_half=0.0):
    made = [
        TableRow(f"r{i}", f"n{i}", State.ACTIVE if share else State.INACTIVE, share, capacity, queue)
        for i, (share, capacity, queue) in enumerate(rows)
    ]
    return RoutingTable("app/d", 1, 1, routers, tuple(made), slots, batch_half)


def ids(count):
    return [f"r{i}" for i in range(count)]


def followed(picks, rng):
    i = picks.pick(rng.random)
    picks.commit(i)
    return i


def spread(picks, count=20_000, seed=1, choices=4):
    rng = random.Random(seed)
    return Counter(picks.pick(rng.random, choices) for _ in range(count))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.floats(0.0, 4.0), st.floats(-5.0, 1e6)),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 2**32),
)
def test_a_replica_without_a_share_is_never_picked_while_another_has_one(rows, seed):
    picks = PickTable(ids(len(rows)), table(*rows), {}, {}, COST)
    rng = random.Random(seed)
    chosen = {picks.pick(rng.random) for _ in range(50)}
    allowed = {i for i, row in enumerate(rows) if row[0] > 0.0} or set(range(len(rows)))
    assert chosen <= allowed


def test_a_share_is_the_fraction_of_picks_that_may_reach_a_replica():
    # the newcomer is far better than the others: it gets each pick that it is eligible for
    picks = PickTable(ids(5), table((1, 0.1, 0), (1, 0.1, 0), (1, 0.1, 0), (1, 0.1, 0), (0.1, 4.0, 0)), {}, {}, COST)
    share = spread(picks, choices=8)[4] / 20_000
    assert share == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)


@pytest.mark.parametrize("near", [[4], [3, 4]])
def test_a_share_holds_among_those_that_are_preferred_too(near):
    rows = [(1, 0.1, 0), (1, 0.1, 0), (1, 0.1, 0), (1, 0.1, 0), (0.1, 4.0, 0)]
    picks, rng = PickTable(ids(5), table(*rows), {}, {}, COST), random.Random(3)
    counts = Counter(picks.pick(rng.random, 4, -1, near) for _ in range(20_000))
    # with near = [4] a pick that finds it ineligible looks at all: at four draws of five, it has one more chance
    assert counts[4] / 20_000 == pytest.approx(0.1 if len(near) > 1 else 0.1 + 0.9 * 0.08, abs=0.02)
    assert len(near) == 1 or counts[3] + counts[4] == 20_000, "who is near and has its full share gets the rest"


def test_equal_replicas_are_picked_equally():
    counts = spread(PickTable(ids(4), table(*[(1, 1, 0)] * 4), {}, {}, COST))
    for i in range(4):
        assert counts[i] / 20_000 == pytest.approx(0.25, abs=0.015)


def test_where_all_are_looked_at_equals_take_turns_and_those_that_are_worse_are_left_out():
    picks = PickTable(ids(4), table((1, 1.0, 0), (1, 0.97, 0), (1, 0.5, 0), (1, 1.03, 0)), {}, {}, COST)
    rng = random.Random(1)
    turns = [followed(picks, rng) for _ in range(300)]
    assert all(set(turns[i : i + 3]) == {0, 1, 3} for i in range(298))


def test_where_none_is_eligible_most_of_the_time_replicas_take_turns_too():
    picks = PickTable(ids(4), table(*[(0.05, 1.0, 0)] * 4), {}, {}, COST)
    rng = random.Random(1)
    longest, run, before = 0, 0, -1
    for _ in range(2_000):
        i = followed(picks, rng)
        run = run + 1 if i == before else 1
        longest, before = max(longest, run), i
    assert longest <= 3


def test_capacities_within_a_tenth_do_not_herd():
    counts = spread(PickTable(ids(4), table((1, 1.0, 0), (1, 1.04, 0), (1, 0.98, 0), (1, 1.02, 0)), {}, {}, COST))
    assert min(counts.values()) > 4_000


def test_a_slow_replica_is_picked_only_when_the_others_are_busy():
    idle = PickTable(ids(2), table((1, 0.2, 0), (1, 1.0, 0)), {}, {}, COST)
    assert spread(idle, 200)[0] == 0
    busy = PickTable(ids(2), table((1, 0.2, 0), (1, 1.0, 9)), {}, {}, COST)
    assert spread(busy, 200)[1] == 0


def test_own_requests_since_the_table_count_for_half_of_what_the_others_did():
    picks = PickTable(ids(2), table((1, 1, 5), (1, 1, 8), routers=5), {"r0": 3}, {"r0": 1}, COST)
    # replica 0: 5 + (1 + 4/2) * (3 - 1) = 11 waiting, replica 1: 8
    assert picks.score(0) == pytest.approx(load_cost(12, 1, 0))
    assert picks.score(1) == pytest.approx(load_cost(9, 1, 0))
    picks.count(0, 1)
    assert picks.score(0) == pytest.approx(load_cost(6, 1, 0))


def test_what_a_replica_told_itself_replaces_the_tables_count():
    picks = PickTable(ids(2), table((1, 1, 5), (1, 1, 8)), {"r0": 1}, {}, COST, seen={"r0": (20.0, 1)})
    assert picks.score(0) == pytest.approx(load_cost(21, 1, 0))
    picks.note(1, 0.0)
    assert picks.score(1) == pytest.approx(load_cost(1, 1, 0))


@pytest.mark.parametrize("batch_half", [0.0, 8.0])
@pytest.mark.parametrize("slots", [1.0, 4.0, 32.0])
def test_load_costs_rise_with_every_request(slots, batch_half):
    costs = cost_table(slots, batch_half, 200)
    assert all(a < b for a, b in pairwise(costs))


def test_replicas_that_the_table_does_not_know_get_nothing_while_known_ones_live():
    picks = PickTable(["new", "r0"], table((1, 1, 0)), {}, {}, COST)
    assert set(spread(picks, 100)) == {1}


@pytest.mark.parametrize("made", [None, table((0, 1, 0)), RoutingTable("app/d", 1, 1, 1, ())])
def test_without_a_usable_table_all_that_live_are_eligible(made):
    picks = PickTable(ids(3), made, {}, {}, COST)
    assert set(spread(picks, 500)) == {0, 1, 2}


def test_no_replica_is_no_pick():
    picks = PickTable([], None, {}, {}, COST)
    assert picks.pick(random.random) == -1
    assert picks.power_of_two(random.random) == -1


def test_power_of_two_takes_the_shorter_own_queue():
    picks = PickTable(ids(2), None, {"r0": 5, "r1": 1}, {}, COST)
    rng = random.Random(1)
    assert {picks.power_of_two(rng.random) for _ in range(50)} == {1}


def test_a_stale_table_never_sends_everything_to_one_replica():
    # 16 equal replicas, one of which looks idle in a table that is never renewed: own requests correct it
    rows = [(1, 1, 0)] + [(1, 1, 2)] * 15
    picks = PickTable(ids(16), table(*rows, routers=1), {}, {}, COST)
    rng = random.Random(3)
    counts = Counter()
    for _ in range(64):
        i = picks.pick(rng.random)
        picks.count(i, picks.in_flight[i] + 1)
        counts[i] += 1
    assert max(counts.values()) <= 10


def test_a_full_replica_is_picked_only_where_all_are_full():
    made = table((1, 4.0, 8), (1, 0.1, 3), (1, 0.1, 3))
    some = PickTable(ids(3), made, {}, {}, COST, limits=[8, 8, 8])
    assert set(spread(some, 200)) == {1, 2}
    every = PickTable(ids(3), made, {}, {}, COST, limits=[8, 2, 2])
    assert sum(spread(every, 200).values()) == 200


def test_a_second_pick_leaves_out_the_first():
    for count in (1, 2, 4, 9):
        picks = PickTable(ids(count), table(*[(1, 1 + i, 0) for i in range(count)]), {}, {}, COST)
        rng = random.Random(count)
        for first in range(count):
            seconds = {picks.pick(rng.random, without=first) for _ in range(30)}
            assert first not in seconds
            assert (seconds == {-1}) == (count == 1)


def test_without_the_forecast_the_live_capacity_counts():
    rows = (
        TableRow("r0", "n", State.ACTIVE, 1.0, 1.0, 0.0, live_capacity=0.2),
        TableRow("r1", "n", State.ACTIVE, 1.0, 0.2, 0.0, live_capacity=1.0),
    )
    made = RoutingTable("app/d", 1, 1, 1, rows)
    assert set(spread(PickTable(ids(2), made, {}, {}, COST), 50)) == {0}
    assert set(spread(PickTable(ids(2), made, {}, {}, COST, live_only=True), 50)) == {1}


def test_a_pick_allocates_nothing_that_grows_with_the_replicas():
    def peak_bytes(count):
        rows = [(0.3 if i % 3 == 0 else 1.0, 1.0, 0) for i in range(count)]
        picks = PickTable(ids(count), table(*rows), {}, {}, COST)
        rng = random.Random(1)
        picks.pick(rng.random)
        tracemalloc.start()
        try:
            for _ in range(100):
                picks.pick(rng.random)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(2000) <= peak_bytes(8) + 256
