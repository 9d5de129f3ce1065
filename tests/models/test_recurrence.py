"""A list of the last starts tells when the next one is due; how often that was right says how much it counts."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.recurrence import LATE_S, Recurrence


def loads(starts, lasts_s, until_s, *, noise=0.03, seed=0, level=0.95, missing=()):
    """(second, load) of a node whose load is `level` from each start on, as samples of a second show it."""
    rng = random.Random(seed)
    for t in range(1, int(until_s) + 1):
        busy_s = sum(max(0.0, min(t, s + lasts_s) - max(t - 1.0, s)) for s in starts)
        load = min(max(0.1 + (level - 0.1) * busy_s + rng.uniform(-noise, noise), 0.0), 1.0)
        yield t, math.nan if t in missing else load


def feed(recurrence, starts, lasts_s=20.0, until_s=400.0, **how):
    """What was expected at every second."""
    seen = {}
    for t, load in loads(starts, lasts_s, until_s, **how):
        recurrence.step(float(t), load)
        seen[t] = recurrence.expected()
    return seen


def foreseen(seen, starts, ahead_s=3):
    """Of each start, the strength with which it was expected so many seconds before; 0 where it was not."""
    found = []
    for start in starts:
        events = [e for e in seen[int(start) - ahead_s] if e.starts_s <= start <= e.ends_s]
        found.append(max((e.strength for e in events), default=0.0))
    return found


def test_after_two_events_alike_the_third_is_due_when_it_comes():
    seen = feed(Recurrence(), [10.3, 70.3, 130.3, 190.3])
    assert all(not seen[t] for t in range(1, 90)), "one event says nothing"
    for start in (130.3, 190.3):
        (event,) = seen[int(start) - 5]
        assert start - 3.0 <= event.starts_s <= start
        assert start + 15.0 <= event.ends_s <= start + 20.0
        assert seen[int(start) + 10] == [event], "while it is there"
        assert seen[int(start) + 24][0].starts_s > start + 50.0, "the next one"


@pytest.mark.parametrize("period_s", [25.0, 60.0, 61.7, 300.0])
@pytest.mark.parametrize("lasts_s", [0.3, 1.0, 4.0, 20.0])
def test_any_steady_interval_is_found_whatever_its_phase(period_s, lasts_s):
    for phase in (0.0, 0.4, 0.9):
        starts = [12.0 + phase + k * period_s for k in range(8)]
        seen = feed(Recurrence(), starts, lasts_s, until_s=starts[-1] + 5.0)
        assert min(foreseen(seen, starts[2:])) > 0.0, phase


@pytest.mark.parametrize("lasts_s", [0.3, 1.0, 20.0])
def test_a_job_that_starts_early_or_late_is_nearly_always_expected(lasts_s):
    found = []
    for seed in range(20):
        rng = random.Random(seed)
        starts = [10.0 + 60.0 * k + rng.gauss(0.0, 0.5) for k in range(20)]
        seen = feed(Recurrence(), starts, lasts_s, until_s=starts[-1], seed=seed)
        found += foreseen(seen, starts[2:], ahead_s=4)
    assert sum(strength > 0.0 for strength in found) / len(found) > 0.85


def test_what_is_expected_counts_as_often_as_it_came():
    starts = [10.0 + 60.0 * k for k in range(12)]
    found = foreseen(feed(Recurrence(), starts, until_s=starts[-1]), starts[2:])
    assert found[0] == pytest.approx(0.95 / 2, abs=0.03), "half of what it took, before anything is known"
    assert found == sorted(found)
    assert found[-1] > 0.8


def test_a_short_event_takes_what_its_second_shows():
    for lasts_s, level in ((0.3, 0.37), (1.0, 0.98)):
        starts = [10.4 + 30.0 * k for k in range(4)]
        seen = feed(Recurrence(), starts, lasts_s, until_s=starts[-1], noise=0.01, level=1.0)
        assert foreseen(seen, starts[2:3])[0] == pytest.approx(level / 2, abs=0.06)


def test_what_has_stopped_is_soon_forgotten():
    starts = [10.0 + 30.0 * k for k in range(10)]
    seen = feed(Recurrence(), starts, 1.0, until_s=700.0)
    end_s = int(starts[-1])
    assert all(not seen[t] for t in range(end_s + 75, 700))
    strength = [max((e.strength for e in seen[t]), default=0.0) for t in (end_s + 28, end_s + 58)]
    assert strength[0] > strength[1] > 0.0, "it may have been late or left out once"


def test_one_that_is_left_out_once_does_not_end_a_rhythm_that_held():
    starts = [10.0 + 60.0 * k for k in range(9) if k != 6]
    found = foreseen(feed(Recurrence(), starts, until_s=starts[-1]), starts[2:])
    assert min(found) > 0.0
    assert found[5] > found[4] > found[0], "it is still right most of the time"


def test_a_rhythm_with_another_phase_is_learned_anew():
    starts = [10.0 + 60.0 * k for k in range(6)] + [340.0 + 60.0 * k for k in range(8)]
    found = foreseen(feed(Recurrence(), starts, 1.0, until_s=starts[-1]), starts)
    assert min(found[2:6]) > 0.0
    assert found[6] == 0.0
    assert min(found[-4:]) > 0.0


def test_what_was_expected_and_did_not_come_is_not_expected_again_on_so_little():
    recurrence = Recurrence()
    seen = feed(recurrence, [10.0, 70.0], until_s=300.0)
    assert seen[120]
    assert all(not seen[t] for t in range(136, 300)), "withdrawn as soon as it has not come"
    later = feed(recurrence, [10.0, 70.0], until_s=0.0)
    assert not later
    for t, load in loads([20.0, 80.0, 140.0], 20.0, 135.0):
        recurrence.step(300.0 + t, load)
    assert not recurrence.expected(), "two intervals are needed now"


@pytest.mark.parametrize("lasts_s", [0.5, 20.0])
def test_a_wrong_rhythm_costs_little(lasts_s):
    taken = total_s = 0.0
    for seed in range(20):
        rng = random.Random(seed)
        starts, at_s = [], 0.0
        while (at_s := at_s + rng.expovariate(1 / 60.0)) < 3500.0:
            starts.append(at_s)
            at_s += lasts_s + 5.0
        seen = feed(Recurrence(), starts, lasts_s, until_s=3600.0, seed=seed)
        taken += sum(e.strength for t, events in seen.items() for e in events if e.starts_s <= t < e.ends_s)
        total_s += 3600.0
    assert taken / total_s < 0.005


def test_one_that_is_over_early_is_not_announced_any_more():
    recurrence = Recurrence()
    feed(recurrence, [10.0, 70.0], lasts_s=20.0, until_s=125.0)
    for t in range(126, 145):
        recurrence.step(float(t), 0.95 if 130 < t <= 136 else 0.1)
        if t > 137:
            assert all(e.starts_s > 180.0 or e.ends_s < t + 20.0 for e in recurrence.expected())


def test_two_jobs_on_one_node_are_both_expected():
    long, short = [10.0 + 70.0 * k for k in range(8)], [45.0 + 70.0 * k + 3.0 * k for k in range(6)]
    both = {t: max(a, b) for (t, a), (_, b) in zip(loads(long, 20.0, 500), loads(short, 1.0, 500), strict=True)}
    recurrence, seen = Recurrence(), {}
    for t, load in both.items():
        recurrence.step(float(t), load)
        seen[t] = recurrence.expected()
    assert min(foreseen(seen, long[2:7])) > 0.0
    assert min(foreseen(seen, short[2:5])) > 0.0


def test_events_of_two_kinds_are_not_taken_for_one_that_recurs():
    recurrence = Recurrence()
    for start, lasts_s in ((10.0, 5.0), (70.0, 40.0)):
        for t in range(int(start) - 5, int(start + lasts_s) + 5):
            recurrence.step(float(t), 0.95 if start <= t - 1 < start + lasts_s else 0.1)
    assert not recurrence.expected()


def test_missing_samples_and_what_is_small_or_noise_teach_nothing():
    seen = feed(Recurrence(), [10.0, 70.0, 130.0], missing=(50, 71, 72, 100))
    (event,) = seen[125]
    assert event.starts_s <= 130.0 <= event.ends_s
    quiet = Recurrence()
    for t in range(600):
        quiet.step(float(t), 0.3 if t % 60 < 20 else 0.1)
        assert not quiet.expected()
    rng, noisy = random.Random(1), Recurrence()
    for t in range(3000):
        noisy.step(float(t), min(max(rng.gauss(0.5, 0.15), 0.0), 1.0))
        taken = [e.strength for e in noisy.expected() if e.starts_s <= t < e.ends_s]
        assert sum(taken) < 0.7


def test_a_node_that_is_always_half_busy_has_events_too():
    starts = [30.0 + 60.0 * k for k in range(6)]
    recurrence, seen = Recurrence(), {}
    for t, load in loads(starts, 10.0, starts[-1]):
        recurrence.step(float(t), 0.45 + 0.5 * load)
        seen[t] = recurrence.expected()
    assert min(foreseen(seen, starts[2:])) > 0.0


def test_a_level_that_stays_is_how_the_node_is_now():
    recurrence = Recurrence()
    for t in range(1000):
        recurrence.step(float(t), 0.1 if t < 20 else 0.6)
    starts = [30.0 + 60.0 * k for k in range(4)]
    seen = {}
    for t, load in loads(starts, 10.0, starts[-1]):
        recurrence.step(1000.0 + t, 0.6 + 0.4 * (load - 0.1) / 0.85)
        seen[t] = [e for e in recurrence.expected() if e.starts_s <= 1000.0 + starts[-1]]
    assert seen[int(starts[-1]) - 3]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(allow_nan=True, allow_infinity=True)), max_size=200))
@example([(0.0, 0.0), (17.0, 1.0), (3.0, 0.0), (22.0, 1.0), (30.0, 0.0)])  # the third would have begun in the second
def test_whatever_comes_an_expectation_has_an_end_and_a_possible_strength(samples):
    recurrence, now_s = Recurrence(), 0.0
    for gap_s, load in samples:
        now_s += gap_s
        recurrence.step(now_s, load)
        for event in recurrence.expected():
            assert event.starts_s < event.ends_s
            assert 0.0 <= event.strength <= 1.0
        assert len(recurrence.expected()) <= 4


def test_an_expectation_ends_when_it_has_not_come():
    recurrence = Recurrence()
    feed(recurrence, [10.0, 70.0], until_s=125.0)
    (event,) = recurrence.expected()
    for t in range(126, 200):
        recurrence.step(float(t), 0.1)
        if recurrence.expected():
            assert t <= event.starts_s + 2.0 * (130.0 - event.starts_s) + LATE_S + 1.0
    assert not recurrence.expected()
