"""Which replicas have collapsed under their requests, by a table, and which of their streams go on elsewhere."""

import math

import pytest

from shadecast.config import BalanceConfig
from shadecast.rescue import Stalled, StreamPatience, collapsed, hardly_answering, is_alone_silent, worth_resuming
from shadecast.types import RoutingTable, State, TableRow

CONFIG = BalanceConfig()


def table(*capacities):
    """Rows r0, r1, ... of (capacity, live capacity)."""
    rows = tuple(
        TableRow(f"r{i}", "node", State.ACTIVE, 1.0, capacity, 0.0, live_capacity=live)
        for i, (capacity, live) in enumerate(capacities)
    )
    return RoutingTable("app/model", 1, 1, 1, rows)


@pytest.mark.parametrize(
    ("capacities", "slow", "silent"),
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
def test_a_collapsed_replica_is_far_slower_than_the_others(capacities, slow, silent):
    assert set(collapsed(table(*capacities), CONFIG)) == slow
    assert hardly_answering(table(*capacities), CONFIG) == silent


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


def test_one_slow_stream_hardly_changes_the_patience():
    made = patience(*[(0.5, 11, 2.5)] * 50)
    before_s = made.limit_s(1)
    made.ended(0.5, 11, 4.5)
    assert before_s < made.limit_s(1) < 1.1 * before_s


def test_streams_that_wait_beyond_the_patience_on_a_collapsed_replica_go_on_elsewhere_the_longest_first():
    usual = patience((0.5, 11, 2.5))
    stalled = [
        Stalled("soon", "r0", 0.9, 3),
        Stalled("patient", "r0", 0.7, 3),
        Stalled("first item", "r0", 1.9, 0),
        Stalled("long", "r0", 5.0, 1),
        Stalled("elsewhere", "r1", 9.0, 1),
    ]
    bad = table((0.05, 0.01), (1.0, 1.0), (0.9, 1.1))
    assert [each.request_id for each in worth_resuming(stalled, usual, bad, CONFIG)] == ["long", "soon"]
    well = table((0.5, 0.5), (1.0, 1.0), (0.9, 1.1))
    assert worth_resuming(stalled, usual, well, CONFIG) == []
    assert worth_resuming(stalled, usual, bad, BalanceConfig(rescue_fraction=0.0)) == []


@pytest.mark.parametrize(
    ("others", "slow", "silent", "alone"),
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
def test_a_silent_replica_is_left_only_where_most_of_the_others_are_well(others, slow, silent, alone):
    assert is_alone_silent(others, slow, silent) is alone
