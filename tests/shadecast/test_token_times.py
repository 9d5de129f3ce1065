"""What tokens should take, learned from live streams, and what a copy then says of a candidate.

The truth of these tests: the first token takes .05 s, a tenth of a millisecond for each token ahead, and 2 ms for each
other request; the next ones take 10 ms, and 1 ms for each other request.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.pairs import Pair
from shadecast.reading import Reading
from shadecast.token_pairs import TokenCopy
from shadecast.token_times import TokenTimes, Work, marked
from shadecast.tokens import TokenCount

NAN = math.nan


def first_s(ahead, others):
    return 0.05 + 1e-4 * ahead + 0.002 * others


def next_s(others):
    return 0.01 + 0.001 * others


def learned(streams=60, noise=0.0, tokens=1):
    rng, times = random.Random(3), TokenTimes()
    for _ in range(streams):
        ahead, others = rng.choice((1, 500, 4000, 12_000)), rng.randrange(8)
        begun_s = first_s(ahead, others) * rng.lognormvariate(0.0, noise) + (tokens - 1) * next_s(others)
        at_s = [begun_s + k * tokens * next_s(others) * rng.lognormvariate(0.0, noise) for k in range(8)]
        times.learn(Work(ahead, others), at_s, [tokens * (k + 1.0) for k in range(8)])
    return times


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("ahead", "others"), [(1, 0), (8000, 0), (8000, 6), (30_000, 2)])
def test_the_first_token_by_what_is_ahead_and_the_next_by_the_batch_however_many_come_at_once(tokens, ahead, others):
    expected_s = learned(tokens=tokens).expected_s(Work(ahead, others), 11.0)
    assert expected_s == pytest.approx(first_s(ahead, others) + 10 * next_s(others), rel=0.02)


def test_costs_are_known_after_some_streams_and_are_what_tokens_took():
    assert TokenTimes().costs() is None
    assert learned(streams=7).costs() is None
    costs = learned().costs()
    assert costs.prefill_s == pytest.approx(1e-4, rel=0.02)
    assert (costs.step_s, costs.sequence_s, costs.context_s) == pytest.approx((0.01, 0.001, 0.0), abs=1e-9)
    assert costs.answer_tokens == 8.0


def test_the_context_of_the_batch_costs_its_part():
    rng, times = random.Random(4), TokenTimes()
    for _ in range(60):
        others, context = rng.randrange(8), rng.choice((0.0, 20_000.0, 90_000.0))
        next_s = 0.01 + 0.001 * others + 5e-8 * context
        times.learn(Work(1000.0, others, context), [0.2, 0.2 + 10 * next_s], [1.0, 11.0], 300.0)
    costs = times.costs()
    assert (costs.step_s, costs.sequence_s) == pytest.approx((0.01, 0.001), rel=0.01)
    assert costs.context_s == pytest.approx(5e-8, rel=0.01)
    assert costs.answer_tokens == 300.0, "as long as they were told to be"


def test_where_prefill_cannot_be_told_apart_nothing_is_said():
    times = TokenTimes()
    for _ in range(30):
        times.learn(Work(0.0, 2.0), [0.2, 0.3], [1.0, 11.0])
    assert times.costs() is None


def test_nothing_is_expected_before_some_streams_were_seen():
    assert math.isnan(TokenTimes().expected_s(Work(100.0), 1.0))
    assert math.isnan(learned(streams=5).expected_s(Work(100.0), 1.0))
    assert not math.isnan(learned(streams=10).expected_s(Work(100.0), 1.0))


def test_an_answer_in_one_piece_says_nothing_of_its_beginning():
    times = TokenTimes()
    for _ in range(50):
        times.learn(Work(100.0), [9.0], [300.0])
    assert not times.known


def test_one_stream_that_was_held_up_hardly_changes_what_is_expected():
    times = learned()
    times.learn(Work(500.0, 2.0), [60.0, 61.0], [1.0, 2.0])
    assert times.expected_s(Work(8000.0, 2.0), 1.0) == pytest.approx(first_s(8000, 2), rel=0.25)


@pytest.mark.parametrize(
    ("times_s", "units", "found"),
    [
        ([0.5, 0.6, 0.7], [1, 9, 17], (0.7, 17)),
        ([0.5, 0.6, 0.7, 0.8], [1, 16, 17, 18], (0.6, 16)),
        ([0.5, 0.6, NAN], [1, 9, 17], (0.6, 9)),
        ([0.5, 0.6], [0, 2], (0.6, 2)),
        ([0.5], [300], (0.5, 300)),
        ([NAN, NAN], [1, 2], None),
        ([0.5], [0], None),
        ([], [], None),
    ],
)
def test_what_is_compared_ends_with_the_sixteenth_token_as_far_as_its_time_is_known(times_s, units, found):
    assert marked(times_s, units) == found


def chunk(tokens=1, finish=None):
    return {"choices": [{"delta": {"content": "word" * tokens}, "finish_reason": finish}]}


ERROR = {"error": {"message": "no", "code": 500}}


def pair(times, primary, copy, ahead=(1.0, 8000.0), others=(4.0, 0.0), **more):
    """A pair of streams that were read to these items: (seconds since the last one, item)."""
    done: list[Pair] = []
    reading, at_s = Reading(0.0), 0.0
    reading.count = TokenCount()
    for wait_s, item in primary:
        reading.got(item, at_s, at_s + wait_s)
        at_s += wait_s
    made = Pair("new", "a", others[0], done.append, reading, others[1])
    made.copy = TokenCopy(times, ahead, **more)
    made.copy.ended = True
    copy_s = 0.0
    for wait_s, item in copy:
        copy_s += wait_s
        made.times_s.append(copy_s)
        if made.copy.took(item):
            made.copy.ended = False
            break
    made.primary_done(at_s, ok=True)
    made.shadow_done(copy_s)
    assert done == [made]
    return made.sample(None)


def stream(ahead, others, slower=1.0, tokens=16, finish="length"):
    items = [(slower * first_s(ahead, others), chunk())]
    items += [(slower * next_s(others), chunk()) for _ in range(tokens - 2)]
    return [*items, (slower * next_s(others), chunk(finish=finish))]


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("ahead", "others"), [((1.0, 8000.0), (4.0, 0.0)), ((9000.0, 1.0), (0.0, 0.0)), ((500.0, 20_000.0), (7.0, 1.0))]
)
def test_a_copy_is_compared_for_the_same_cache_and_the_same_batch(slower, ahead, others):
    """A newcomer's cache is empty and its batch small: neither counts for or against it."""
    primary = stream(ahead[0], others[0])
    copy = stream(ahead[1], others[1], slower)
    sample = pair(learned(), primary, copy, ahead, others)
    assert sample.shadow_s / sample.primary_s == pytest.approx(slower, rel=0.03)
    assert (sample.primary_in_flight, sample.shadow_in_flight, sample.cold) == (0.0, 0.0, False)
    assert (sample.primary_ok, sample.shadow_ok) == (True, True)


def test_answers_of_different_length_are_compared_too():
    sample = pair(learned(), stream(1.0, 4.0, tokens=4, finish="stop"), stream(8000.0, 0.0))
    assert sample.shadow_s / sample.primary_s == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("more", [{}, {"comparable": False}])
def test_where_nothing_can_be_expected_the_speed_is_not_judged_and_errors_are(more):
    times = learned() if more else TokenTimes()
    sample = pair(times, stream(1.0, 4.0), stream(8000.0, 0.0), **more)
    assert sample.cold
    failed = pair(times, stream(1.0, 4.0), [(0.1, ERROR)], **more)
    assert (failed.primary_ok, failed.shadow_ok) == (True, False)


@pytest.mark.parametrize(
    ("primary", "copy", "oks"),
    [
        ([chunk(16)], [chunk(16)], (True, True)),
        ([chunk(3, "stop")], [chunk(2, "stop")], (True, True)),
        ([chunk(16)], [chunk(2, "stop")], (True, True)),
        ([chunk(3, "stop")], [chunk(16)], (True, True)),
        ([chunk(16)], [ERROR], (True, False)),
        ([chunk(16)], [chunk(2), ERROR], (True, False)),
        ([chunk(16)], [chunk(2, "error")], (True, False)),
        ([chunk(16)], [chunk(2, "abort")], (True, False)),
        ([chunk(16)], [chunk(0, "stop")], (True, False)),
        ([chunk(16)], ["<html>502</html>"], (True, False)),
        ([chunk(16)], [chunk(2)], (True, False)),
        ([chunk(3)], [chunk(2)], (True, True)),
        ([chunk(0, "stop")], [chunk(0, "stop")], (True, True)),
        ([ERROR], [ERROR], (False, False)),
        ([ERROR], [chunk(16)], (False, True)),
    ],
)
def test_texts_are_not_compared_but_errors_ends_and_validity_are(primary, copy, oks):
    sample = pair(learned(), [(0.1, item) for item in primary], [(0.1, item) for item in copy], needs_reason=True)
    if sample is None:
        assert oks == (True, True), "of empty answers there is no time to compare"
    else:
        assert (sample.primary_ok, sample.shadow_ok) == oks


def test_where_answers_have_no_reasons_a_copy_needs_none():
    assert pair(learned(), [(0.1, chunk(16))], [(0.1, chunk(2))]).shadow_ok


@given(
    st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 100.0), st.floats(0.0, 100.0)), max_size=30),
    st.floats(0.0, 1e6),
    st.floats(1.0, 100.0),
)
def test_what_is_expected_is_positive_or_unknown(streams, ahead, tokens):
    times = TokenTimes()
    for ahead_tokens, others, seconds in streams:
        times.learn(Work(ahead_tokens, others), [seconds, 2 * seconds], [1.0, 2.0])
    expected_s = times.expected_s(Work(ahead), tokens)
    assert math.isnan(expected_s) or expected_s > 0.0
