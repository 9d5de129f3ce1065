"""Mirrored pairs: complete once both halves are known, whichever is first; void if one of them says nothing.

Invariants: `done` is called at most once, and only if both halves have ended and neither says nothing; the times
compared are of the same work on both.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.pairs import MISSING, Pair
from shadecast.reading import Reading


def pair(reading=None):
    done = []
    return Pair("new", "a", 2.0, done.append, reading), done


def read(*times_s, late=()):
    """A stream whose items were there so long after its start; the reader was late to ask for some."""
    reading = Reading(0.0)
    for i, at_s in enumerate(times_s):
        last_s = times_s[i - 1] if i else 0.0
        reading.got(f"item {i}", at_s if i in late else last_s, at_s)
    return reading


@pytest.mark.parametrize("primary_first", [True, False])
def test_a_pair_is_complete_once_both_halves_are_known(primary_first):
    made, done = pair()
    made.shadow_in_flight = 1.0
    halves = [lambda: made.primary_done(2.0, ok=True), lambda: made.shadow_done(3.0)]
    first, second = halves if primary_first else reversed(halves)
    first()
    assert done == []
    second()
    assert done == [made]
    sample = made.sample(True)
    assert (sample.candidate_id, sample.primary_id) == ("new", "a")
    assert (sample.primary_s, sample.shadow_s) == (2.0, 3.0)
    assert (sample.primary_in_flight, sample.shadow_in_flight) == (2.0, 1.0)
    assert (sample.primary_ok, sample.shadow_ok, sample.answers_equal) == (True, True, True)


def test_only_the_first_end_of_a_primary_counts():
    made, done = pair()
    made.primary_done(2.0, ok=True)
    made.primary_done(9.0, ok=False)
    made.primary_done(None, ok=True)
    made.shadow_done(3.0)
    assert done == [made]
    assert (made.primary_s, made.primary_ok) == (2.0, True)


@pytest.mark.parametrize("order", ["primary void", "shadow void", "shadow before", "both"])
def test_a_half_that_says_nothing_voids_the_pair(order):
    made, done = pair()
    match order:
        case "primary void":
            made.primary_done(None, ok=True)
            made.shadow_done(3.0)
            made.primary_done(2.0, ok=True)
        case "shadow void":
            made.primary_done(2.0, ok=True)
            made.shadow_done(None)
        case "shadow before":
            made.shadow_done(None)
            made.primary_done(2.0, ok=True)
        case "both":
            made.shadow_done(None)
            made.primary_done(None, ok=True)
    assert done == []
    assert made.void


def test_failures_are_compared_by_the_whole_times():
    made, done = pair(read(0.5, 1.0))
    made.times_s = [0.2]
    made.shadow_ok = False
    made.shadow_done(9.0)
    made.primary_done(1.0, ok=True)
    assert done == [made]
    sample = made.sample(None)
    assert (sample.primary_s, sample.shadow_s, sample.shadow_ok) == (1.0, 9.0, False)


@pytest.mark.parametrize(
    ("primary", "late", "copy", "seconds"),
    [
        ((0.5, 1.0), (), (0.6, 1.2), (1.0, 1.2)),
        ((0.5, 1.0, 4.0), (), (0.6, 1.2), (1.0, 1.2)),
        ((0.5, 1.0), (), (0.6, 1.2, 9.0), (1.0, 1.2)),
        ((0.5, 1.0), (1,), (0.6, 1.2), (0.5, 0.6)),
        ((0.5, 1.0), (0, 1), (0.6, 1.2), None),
        ((), (), (0.6,), None),
        ((), (), (), (3.0, 2.0)),
    ],
    ids=[
        "same",
        "primary longer",
        "copy longer",
        "late to ask",
        "always late",
        "only the copy gave some",
        "both empty",
    ],
)
def test_streams_are_compared_over_the_last_item_of_both_whose_time_is_known(primary, late, copy, seconds):
    made, done = pair(read(*primary, late=late))
    made.times_s = list(copy)
    made.primary_done(3.0, ok=True)
    made.shadow_done(2.0)
    assert done == [made]
    sample = made.sample(None)
    assert (seconds is None) == (sample is None)
    if sample is not None:
        assert (sample.primary_s, sample.shadow_s) == seconds
        assert sample.shadow_ok


def test_an_empty_copy_of_a_stream_that_was_not_fails():
    made, done = pair(read(0.5))
    made.shadow_done(0.1)
    made.primary_done(0.6, ok=True)
    assert done == [made]
    assert not made.sample(None).shadow_ok


def test_answers_are_those_of_both_or_the_first_items_of_streams():
    made, _ = pair()
    assert made.answers() == (MISSING, MISSING)
    made.primary_answer, made.shadow_answer = 1, 2
    assert made.answers() == (1, 2)
    reading = Reading(0.0)
    reading.answers = ["x"]
    stream, _ = pair(reading)
    stream.shadow_answer = ["y"]
    assert stream.answers() == (["x"], ["y"])


def test_a_pair_that_is_not_complete_shows_nothing():
    made, _ = pair()
    assert made.sample(None) is None
    made.primary_done(1.0, ok=True)
    assert made.sample(None) is None


ENDS = st.one_of(
    st.tuples(st.just("primary"), st.none() | st.floats(0.0, 9.0), st.booleans()),
    st.tuples(st.just("shadow"), st.none() | st.floats(0.0, 9.0), st.just(True)),
)


@given(st.lists(ENDS, max_size=6), st.lists(st.floats(0.0, 9.0), max_size=4), st.none() | st.integers(0, 4))
def test_a_pair_is_done_once_at_most_and_only_if_both_halves_say_something(ends, copy, items):
    reading = None if items is None else read(*(float(i) for i in range(items)))
    made, done = pair(reading)
    made.times_s = copy
    said = {"primary": [], "shadow": []}
    for half, seconds, ok in ends:
        if half == "primary":
            made.primary_done(seconds, ok=ok)
        elif not said["shadow"]:  # a copy ends once
            made.shadow_done(seconds)
        else:
            continue
        said[half].append(seconds)
    both = bool(said["primary"] and said["shadow"])
    says_nothing = any(half and half[0] is None for half in said.values())
    assert len(done) == (both and not says_nothing)
    if done and (sample := made.sample(None)) is not None:
        assert not math.isnan(sample.primary_s)
        assert not math.isnan(sample.shadow_s)
