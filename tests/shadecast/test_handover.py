"""Which stream is handed over: only one that saves more than its beginning elsewhere costs, by what was seen.

Invariants:

1. Nothing moves before lengths, item times and beginnings of this deployment's streams were seen.
2. What moves saves more than its cost, for itself and for those that it delays, and all that it has paid before.
3. A cost has no negative part, and is never taken for less than nothing.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadecast.calls import Call, Calls, Event
from shadecast.handover import Beginnings, HandOver, ItemTime, Lengths, Running
from shadecast.pick import PickTable, cost_table
from shadecast.types import RoutingTable, State, TableRow

# ------------------------------------------------------------------ lengths


def test_without_any_length_a_stream_is_expected_to_last_as_long_as_so_far():
    lengths = Lengths()
    assert [lengths.residual(had) for had in (0, 1, 10, 1000)] == pytest.approx([0, 1, 10, 1000])


@pytest.mark.parametrize("had", [0, 5, 50, 150, 300])
def test_what_is_left_is_the_mean_of_the_streams_that_were_longer(had):
    rng, lengths = random.Random(1), Lengths()
    seen = [max(round(rng.lognormvariate(4.8, 0.9)), 1) for _ in range(3000)]
    for items in seen:
        lengths.add(items)
    longer = [items - had for items in seen if items > had]
    assert lengths.residual(had) == pytest.approx(sum(longer) / len(longer), rel=0.1)


def test_beyond_the_longest_stream_that_was_seen_it_is_as_long_as_so_far_again():
    lengths = Lengths()
    for _ in range(100):
        lengths.add(50)
    assert lengths.residual(1000) == pytest.approx(1000)
    assert lengths.residual(20) == pytest.approx(30, rel=0.1)


def test_lengths_follow_what_streams_are_now():
    lengths = Lengths()
    for items in [20] * 20_000 + [200] * 20_000:
        lengths.add(items)
    assert lengths.residual(0) == pytest.approx(200, rel=0.15)


@given(st.lists(st.integers(-1, 10**7), max_size=30), st.integers(0, 10**8))
def test_what_is_left_is_never_negative_and_never_endless(seen, had):
    lengths = Lengths()
    for items in seen:
        lengths.add(items)
    assert 0.0 <= lengths.residual(had) <= max([*seen, 0]) * 1.25 + had + 1


# ------------------------------------------------------------------ item times


def test_an_item_takes_what_streams_take_at_their_scores():
    item = ItemTime()
    assert item.seconds == 0.0
    for score in (1.0, 2.0, 4.0):
        item.add(10, 10 * 0.02 * score, score)
    assert item.seconds == pytest.approx(0.02)


@pytest.mark.parametrize("odd", [(1, math.nan, 1.0), (1, math.inf, 1.0), (1, -1.0, 1.0), (1, 1.0, 0.0), (-1, 1.0, 1.0)])
def test_what_cannot_be_an_item_time_is_none(odd):
    item = ItemTime()
    item.add(10, 0.2, 1.0)
    item.add(*odd)
    assert item.seconds == pytest.approx(0.02)


# ------------------------------------------------------------------ costs

ITEM_S = 0.02


def begun(new=20, moved=(), prompt=1.0):
    """Beginnings of new streams of .1 s, and of moved ones, (had, seconds) each, all at a score of 2."""
    made = Beginnings()
    for _ in range(new):
        made.add(prompt, 0, 0.2, 2.0, ITEM_S)
    for had, seconds in moved:
        made.add(prompt, had, 2.0 * seconds, 2.0, ITEM_S)
    return made


def test_a_cost_is_endless_until_beginnings_were_seen():
    assert Beginnings().seconds(1.0, 10, ITEM_S) == math.inf
    assert begun(new=4).seconds(1.0, 10, ITEM_S) == math.inf


def test_until_moved_streams_were_seen_a_cost_is_all_that_a_beginning_can_cost():
    assert begun().seconds(1.0, 100, ITEM_S) == pytest.approx(0.1 + 100 * ITEM_S)
    assert begun(moved=[(10, 0.1)] * 4).seconds(1.0, 100, ITEM_S) == pytest.approx(0.1 + 100 * ITEM_S)


@pytest.mark.parametrize(
    ("base_s", "per_item_s"), [(0.1, 0.0), (0.3, 0.0), (1.0, 0.0), (0.05, 0.001), (0.0, 0.02)], ids=str
)
def test_the_cost_of_a_beginning_is_learned_from_those_that_were_seen(base_s, per_item_s):
    rng = random.Random(3)
    hads = [rng.randrange(1, 400) for _ in range(60)]
    made = begun(moved=[(had, (base_s + per_item_s * had) * rng.uniform(0.8, 1.2)) for had in hads])
    for had in (1, 100, 390):
        expected = base_s + per_item_s * had
        assert made.seconds(1.0, had, ITEM_S) == pytest.approx(expected, rel=0.2, abs=0.02)


def test_prompt_and_items_are_parts_of_the_cost_each():
    rng, made = random.Random(4), Beginnings()
    for _ in range(200):
        prompt, had = rng.randrange(10, 5000), rng.choice([0, rng.randrange(1, 400)])
        made.add(prompt, had, 0.05 + 0.0001 * (prompt + had), 1.0, ITEM_S)
    assert made.seconds(1000, 0, ITEM_S) == pytest.approx(0.15, rel=0.1)
    assert made.seconds(4000, 300, ITEM_S) == pytest.approx(0.48, rel=0.1)


def test_beyond_the_most_items_that_were_seen_each_further_one_may_have_to_be_made_again():
    made = begun(moved=[(had, 0.1) for had in range(1, 51)])
    assert made.seconds(1.0, 50, ITEM_S) == pytest.approx(0.1, rel=0.05)
    assert made.seconds(1.0, 150, ITEM_S) == pytest.approx(0.1 + 100 * ITEM_S, rel=0.05)


def test_one_unlucky_beginning_hardly_changes_the_cost():
    usual = [(had, 0.1) for had in range(1, 51)]
    assert begun(moved=[*usual, (25, 60.0)]).seconds(1.0, 25, ITEM_S) < 0.13


def test_a_cost_that_has_become_another_is_learned_anew():
    rng = random.Random(5)
    hads = [rng.randrange(1, 400) for _ in range(200)]
    made = begun(moved=[*((had, 0.1) for had in hads), *((had, 1.0) for had in hads)])
    assert made.seconds(1.0, 200, ITEM_S) == pytest.approx(1.0, rel=0.1)


SECONDS = st.one_of(st.floats(0.0, 1e4), st.sampled_from([math.nan, math.inf, -1.0]))
SEEN = st.tuples(st.floats(0.0, 1e5), st.integers(0, 10**5), SECONDS, st.floats(0.0, 1e4))


@settings(max_examples=200, deadline=None)
@given(st.lists(SEEN, max_size=40), st.floats(0.0, 1e5), st.integers(0, 10**6))
def test_a_cost_is_never_negative_whatever_was_seen(seen, prompt, had):
    made = Beginnings()
    for observation in seen:
        made.add(*observation, ITEM_S)
    assert made.seconds(prompt, had, ITEM_S) >= 0.0


# ------------------------------------------------------------------ the decision


def call(replica_id="slow"):
    made = Call()
    made.replica_id = replica_id
    return made


def learned(cost_s=0.1, lengths=(200,) * 100):
    """That of streams of .02 s an item, whose beginnings cost `cost_s`, at a score of 1."""
    made = HandOver()
    for items in lengths:
        made.lengths.add(items)
        made.item.add(items, items * ITEM_S, 1.0)
        made.begun(1.0, 0, ITEM_S, 1.0)
    for had in range(10, 210, 10):
        made.begun(1.0, had, cost_s, 1.0)
    return made


def test_nothing_moves_before_anything_is_known():
    assert HandOver().best([Running(call(), 100)], {"slow": 50.0}, "well", 1.0) is None


def test_before_any_stream_has_ended_one_without_an_item_stays():
    hand_over = HandOver()
    for _ in range(10):
        hand_over.item.add(10, 0.2, 1.0)
        hand_over.begun(1.0, 0, 0.1, 1.0)
    assert hand_over.best([Running(call(), 0)], {"slow": 50.0}, "well", 1.0) is None


@pytest.mark.parametrize(
    ("cost_s", "here", "there", "items", "paid_s", "moves"),
    [
        (0.1, 5.0, 2.0, 100, 0.0, True),
        (0.1, 3.9, 2.0, 100, 0.0, False),
        (1.0, 5.0, 2.0, 100, 0.0, False),
        (1.0, 5.0, 0.8, 100, 0.0, True),
        (0.1, 5.0, 2.0, 100, 4.5, False),
        (0.1, 5.0, 0.0, 100, 0.0, False),
    ],
    ids=["pays", "not twice as good", "costs more", "costs less where nobody is", "has paid for it", "no score"],
)
def test_a_stream_moves_where_that_saves_more_than_it_costs(cost_s, here, there, items, paid_s, moves):
    found = learned(cost_s).best([Running(call(), items, 1.0, paid_s)], {"slow": here}, "well", there)
    assert (found is not None) == moves
    if found is not None:
        assert found.target == "well"
        assert found.cost_s == pytest.approx(cost_s * there, rel=0.1)


def test_of_many_streams_the_one_that_gains_most_for_its_length_moves_and_only_that():
    hand_over = learned(lengths=[random.Random(k).randrange(10, 400) for k in range(300)])
    streams = [Running(call(), items) for items in (300, 20, 390)] + [Running(call("elsewhere"), 20)]
    found = hand_over.best(streams, {"slow": 5.0}, "well", 2.0)
    assert found is not None
    assert found.stream is streams[1]


SCORES = st.floats(0.1, 100.0)


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.001, 10.0), st.lists(st.integers(1, 1000), min_size=1, max_size=30), SCORES, SCORES,
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0.0, 50.0)), max_size=8),
)  # fmt: skip
def test_whatever_moves_saves_more_than_it_costs_anybody_and_all_that_it_has_paid(
    cost_s, lengths, here, there, streams
):
    hand_over = learned(cost_s, lengths)
    running = [Running(call(), items, 1.0, paid_s) for items, paid_s in streams]
    found = hand_over.best(running, {"slow": here}, "well", there)
    if found is None:
        return
    assert here >= 2.0 * there
    assert found.gain_s > 4.0 * there * found.cost_s + found.stream.paid_s
    assert found.patience_s >= found.cost_s
    gain_s = hand_over.lengths.residual(found.stream.items) * hand_over.item.seconds * (here - there)
    assert found.gain_s == pytest.approx(gain_s)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1.0, 3.0, 9.0]), min_size=2, max_size=60))
def test_a_stream_between_two_replicas_that_change_places_pays_less_than_it_hopes_to_save(scores):
    """It does not go to and fro: each further move must save what all those before have cost, and more."""
    hand_over = learned(0.5)
    stream, paid_s, moves = call(), 0.0, 0
    for k, (here, there) in enumerate(pairwise(scores)):
        move = hand_over.best([Running(stream, 50 + k, 1.0, paid_s)], {"slow": here}, "well", there)
        if move is not None:
            paid_s, moves = paid_s + move.cost_s, moves + 1
            assert paid_s < move.gain_s
    most_s = hand_over.lengths.residual(50) * ITEM_S * 9.0 + 0.5 * 3.0
    assert paid_s < most_s
    assert moves <= most_s / 0.5


# ------------------------------------------------------------------ by a table


def world(**capacities):
    rows = tuple(TableRow(name, "node", State.ACTIVE, 1.0, capacity, 0.0) for name, capacity in capacities.items())
    table = RoutingTable("app/model", 1, 1, 1, rows, slots=32.0, batch_half=16.0)
    calls = Calls()
    for _ in range(3):
        stream = Call()
        for event, facts in ((Event.CHOOSE, {"replica_id": "a"}), (Event.SEND, {}), (Event.ACCEPT, {})):
            calls.handle(stream, event, 0.0, **facts)
    picks = PickTable(list(capacities), table, calls.all_in_flight(), {}, cost_table(32.0, 16.0))
    return table, picks, calls


@pytest.mark.parametrize(
    ("capacities", "target", "moves"),
    [
        ({"a": 0.3, "b": 1.0, "c": 1.0}, 1, True),
        ({"a": 0.7, "b": 1.0, "c": 1.0}, 1, False),
        ({"a": 0.3, "b": 0.3, "c": 0.3}, 1, False),
        ({"a": 0.1, "b": 0.3, "c": 1.0, "d": 1.0}, 1, False),
        ({"a": 0.3, "b": 1.0, "c": 1.0}, -1, False),
    ],
    ids=["slow", "slower", "all alike", "to another slow one", "no place"],
)
def test_streams_move_from_replicas_far_below_the_median_to_those_that_are_not(capacities, target, moves):
    table, picks, calls = world(**capacities)
    found = learned().choose(table, picks, calls, lambda: target, lambda call: Running(call, 20))
    assert (found is not None) == moves
    if found is not None:
        assert (found.stream.call.replica_id, found.target) == ("a", "b")


def test_a_call_that_may_not_move_is_left_out():
    table, picks, calls = world(a=0.3, b=1.0, c=1.0)
    assert learned().choose(table, picks, calls, lambda: 1, lambda call: None) is None


def test_nobody_draws_a_replica_where_none_is_slow():
    table, picks, calls = world(a=1.0, b=1.0, c=1.0)

    def pick():
        raise AssertionError("a table without a slow replica costs no pick")

    assert learned().choose(table, picks, calls, pick, lambda call: Running(call, 20)) is None
