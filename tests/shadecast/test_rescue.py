"""Which replicas are slow by a table, what is taken off them, and for how long one that does not answer is left out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.calls import Call
from shadecast.rescue import (
    STREAM_COST,
    VERY_SLOW,
    Ejections,
    Patience,
    Stalled,
    StreamPatience,
    budget,
    is_alone_unresponsive,
    slow_replicas,
    worth_moving,
    worth_resuming,
)
from shadecast.types import RoutingTable, State, TableRow


def table(*capacities, reference_s=0.0):
    """Rows r0, r1, ... of (capacity, live capacity)."""
    rows = tuple(
        TableRow(f"r{i}", "node", State.ACTIVE, 1.0, capacity, 0.0, live_capacity=live)
        for i, (capacity, live) in enumerate(capacities)
    )
    return RoutingTable("app/model", 1, 1, 1, rows, reference_s=reference_s)


@pytest.mark.parametrize(
    ("capacities", "slow", "very_slow"),
    [
        ([(0.05, 0.01), (1.0, 1.0), (0.9, 1.1)], {"r0"}, {"r0"}),
        ([(0.2, 0.2), (1.0, 1.0), (0.9, 1.1)], {"r0"}, set()),
        ([(0.05, 0.0), (1.0, 0.0), (0.9, 0.0)], {"r0"}, {"r0"}),
        ([(0.05, 1.0), (1.0, 1.0), (0.9, 1.1)], {"r0"}, {"r0"}),
        ([(0.3, 0.3), (1.0, 1.0), (0.9, 1.1)], set(), set()),
        ([(0.02, 0.02), (0.28, 0.04), (0.47, 0.04)], set(), set()),
        ([(0.05, 0.01)], set(), set()),
    ],
    ids=["hog", "slow", "live unknown", "vetoed", "slower", "all have more work to do", "alone"],
)
def test_a_slow_replica_is_far_slower_than_the_others(capacities, slow, very_slow):
    found = slow_replicas(table(*capacities))
    assert set(found) == slow
    assert all(found[f"r{i}"] == capacity for i, (capacity, _) in enumerate(capacities) if f"r{i}" in slow)
    assert set(slow_replicas(table(*capacities), VERY_SLOW)) == very_slow


def test_replicas_without_traffic_do_not_say_what_is_slow_and_may_be_so_themselves():
    rows = [TableRow(f"r{i}", "node", State.ACTIVE, 1.0, 1.0) for i in range(2)]
    rows += [TableRow(f"t{i}", "node", State.SHADOWING, 0.0, 0.01) for i in range(9)]
    assert set(slow_replicas(RoutingTable("app/model", 1, 1, 1, tuple(rows)))) == {f"t{i}" for i in range(9)}


# ------------------------------------------------------------------ streams


def patience(*ended):
    made = StreamPatience()
    for stream in ended:
        made.ended(*stream)
    return made


@pytest.mark.parametrize(
    ("ended", "before_first_s", "after_s"),
    [
        ([], math.inf, math.inf),
        ([(0.5, 11, 2.5)], 2.0, 0.8),
        ([(0.5, 1, 0.5)], 2.0, math.inf),
        ([(0.01, 11, 0.11)], 0.25, 0.25),
        ([(math.nan, 11, 2.5)], math.inf, math.inf),
        ([(0.5, 0, 0.5)], math.inf, math.inf),
        ([(0.5, 11, 0.4)], 2.0, 0.25),
    ],
    ids=["nothing known", "usual", "one item", "fast", "late reader", "empty", "odd clock"],
)
def test_patience_follows_what_streams_usually_take(ended, before_first_s, after_s):
    made = patience(*ended)
    assert made.limit_s(0) == pytest.approx(before_first_s)
    assert made.limit_s(5) == pytest.approx(after_s)


@pytest.mark.parametrize(("per_item", "limit_s"), [(1.0, 0.4), (5.0, 2.0), (0.1, 0.25)])
def test_a_stream_has_as_much_patience_as_its_items_have_tokens(per_item, limit_s):
    """A stream of single tokens, .1 s each, and one of the same pace with ten at a time, agree."""
    for ended in ((0.5, 11, 1.5), (0.5, 11, 10.5, 10.0)):
        assert patience(ended).limit_s(3, per_item) == pytest.approx(limit_s)


def test_one_slow_stream_hardly_changes_the_patience():
    made = patience(*[(0.5, 11, 2.5)] * 50)
    before_s = made.limit_s(1)
    made.ended(0.5, 11, 4.5)
    assert before_s < made.limit_s(1) < 1.1 * before_s


def call(replica_id, since_s=0.0, others=0.0, cost=1.0):
    made = Call()
    made.replica_id, made.since_s, made.others, made.cost = replica_id, since_s, others, cost
    return made


def test_streams_that_wait_beyond_the_patience_on_a_slow_replica_go_on_elsewhere_the_longest_first():
    usual = patience((0.5, 11, 2.5))
    soon, long = call("r0"), call("r0")
    stalled = [
        Stalled(soon, 0.9, 3),
        Stalled(call("r0"), 0.7, 3),  # within the patience
        Stalled(call("r0"), 1.9, 0),  # so is this, before its first item
        Stalled(long, 5.0, 1),
        Stalled(call("r1"), 9.0, 1),  # elsewhere
    ]
    bad = slow_replicas(table((0.05, 0.01), (1.0, 1.0), (0.9, 1.1)))
    assert worth_resuming(stalled, usual, bad) == [long, soon]
    well = slow_replicas(table((0.5, 0.5), (1.0, 1.0), (0.9, 1.1)))
    assert worth_resuming(stalled, usual, well) == []


def test_without_a_budget_nothing_is_done_twice():
    none = budget(0.0)
    for _ in range(1000):
        none.request()
    assert not none.take(cost=STREAM_COST)


def test_eight_second_attempts_or_eighty_streams_are_saved_up_and_a_fraction_of_the_requests_is_earned():
    made = budget(0.01)
    assert [made.take() for _ in range(9)] == [True] * 8 + [False]
    for _ in range(101):
        made.request()
    assert [made.take(cost=STREAM_COST) for _ in range(11)] == [True] * 10 + [False]
    for _ in range(10_000):
        made.request()
    assert [made.take() for _ in range(9)] == [True] * 8 + [False], "no more than that is saved up"


# ------------------------------------------------------------------ single answers


@pytest.mark.parametrize(
    ("age_s", "others", "cost", "reference_s", "best", "moves"),
    [
        (0.5, 0.0, 1.0, 0.1, 1.0, True),
        (0.05, 0.0, 1.0, 0.1, 1.0, False),
        (0.5, 0.0, 1.0, 0.0, 1.0, False),
        (0.5, 0.0, 1.0, 0.1, 30.0, False),
        (4.9, 0.0, 1.0, 0.1, 1.0, True),
        (0.5, 0.0, 8.0, 0.1, 1.0, False),
        (math.inf, 0.0, 1.0, 0.1, 1.0, False),
        (math.nan, 0.0, 1.0, 0.1, 1.0, False),
    ],
    ids=["stuck", "young", "no reference", "nowhere better", "nearly done, perhaps", "costly", "no age", "odd age"],
)
def test_a_call_moves_where_starting_anew_takes_half_the_time_that_is_left(
    age_s, others, cost, reference_s, best, moves
):
    bad = table((0.02, 0.01), (1.0, 1.0), (0.9, 1.1), reference_s=reference_s)
    stuck = call("r0", -age_s, others, cost)
    found = worth_moving([stuck, call("r1", -age_s)], bad, {"r0": 0.1, "r1": best, "r2": best}, 0.0)
    assert found == ([stuck] if moves else [])


def test_calls_that_gain_most_move_first_and_nothing_moves_to_slow_replicas_alone():
    bad = table((0.02, 0.01), (1.0, 1.0), (0.9, 1.1), reference_s=0.1)
    calls = [call("r0", -0.5), call("r0", -0.5, others=7.0), call("r0", -0.2, cost=1.5)]
    found = worth_moving(calls, bad, {"r1": 1.0, "r2": 1.0}, 0.0)
    assert found == [calls[1], calls[2], calls[0]]
    assert worth_moving(calls, bad, {"r0": 1.0}, 0.0) == []
    assert worth_moving(calls, bad, {}, 0.0) == []


# ------------------------------------------------------------------ replicas that do not answer


def test_patience_with_acceptance_follows_what_it_usually_takes_and_one_slow_answer_counts_little():
    made = Patience()
    assert made.limit_s == 0.25
    made.accepted(100.0)
    assert made.limit_s == 0.25
    for _ in range(500):
        made.accepted(0.1)
    assert made.limit_s == pytest.approx(1.0, rel=0.01)
    assert made.is_over(1.1, math.inf)
    assert not made.is_over(1.1, 0.5), "its streams go on: it is busy"
    assert made.is_over(3.1, 0.5)


@pytest.mark.parametrize(
    ("others", "slow", "ejected", "alone"),
    [
        ("b", "", "", True),
        ("b", "", "b", False),
        ("bc", "", "", True),
        ("bc", "b", "", False),
        ("bcd", "b", "", True),
        ("bcd", "b", "c", False),
        ("bcd", "", "bc", False),
        ("bcd", "a", "a", True),
        ("bcde", "b", "c", False),
        ("", "", "", False),
    ],
)
def test_an_unresponsive_replica_is_left_only_where_most_of_the_others_are_well(others, slow, ejected, alone):
    assert is_alone_unresponsive(others, slow, ejected) is alone


def test_an_ejection_is_twice_as_long_each_time_in_a_row_up_to_four_until_the_replica_answers():
    ejections, now_s, lengths = Ejections(), 100.0, []
    for _ in range(6):
        until_s = ejections.eject("a", now_s)
        assert ejections.eject("a", now_s + 0.1) == until_s, "nothing new is learned within one"
        assert ejections.at(now_s) == {"a"}
        assert ejections.at(until_s) == frozenset()
        lengths.append(until_s - now_s)
        now_s = until_s + 1.0
    assert lengths == [1.5, 3.0, 6.0, 12.0, 12.0, 12.0]
    assert ejections.accepted("a")
    assert not ejections.accepted("a")
    assert not ejections
    assert ejections.eject("a", now_s) == now_s + 1.5


def test_replicas_that_are_gone_are_not_held():
    ejections = Ejections()
    ejections.eject("a", 0.0)
    ejections.eject("b", 0.0)
    ejections.keep({"b"})
    assert ejections.at(1.0) == {"b"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 5.0), st.booleans()), max_size=30))
def test_no_ejection_is_longer_than_twelve_seconds_and_an_answer_ends_it(steps):
    ejections, now_s = Ejections(), 0.0
    for replica_id, passes_s, answers in steps:
        now_s += passes_s
        if answers:
            ejections.accepted(replica_id)
            assert replica_id not in ejections.at(now_s)
        else:
            assert now_s < ejections.eject(replica_id, now_s) <= now_s + 12.0
    assert ejections.at(now_s + 12.0) == frozenset()
