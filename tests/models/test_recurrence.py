"""A list of the last starts tells when the next one is due, and learns to be silent where it was wrong."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.recurrence import CONFIRMED_S, STRONGEST, Recurrence
from shadecast.capacity import VETO_SPEED, outlook
from shadecast.types import HORIZONS_S, Forecast, NodeSnapshot


def feed(recurrence, starts, lasts_s=20.0, until_s=400.0, *, noise=0.03, seed=0, level=0.95, missing=()):
    """One sample a second of a node whose load is `level` from each start on; what was due at every second."""
    rng = random.Random(seed)
    seen = {}
    for t in range(1, int(until_s) + 1):
        busy_s = sum(max(0.0, min(t, s + lasts_s) - max(t - 1.0, s)) for s in starts)
        load = min(max(0.1 + (level - 0.1) * busy_s + rng.uniform(-noise, noise), 0.0), 1.0)
        recurrence.step(float(t), math.nan if t in missing else load)
        seen[t] = recurrence.due()
    return seen


def test_after_two_events_alike_the_third_is_due_when_it_comes():
    seen = feed(Recurrence(), [10.3, 70.3, 130.3, 190.3])
    assert all(seen[t] is None for t in range(1, 90)), "one event says nothing"
    for start in (130.3, 190.3):
        event = seen[int(start) - 5]
        assert start - 3.0 <= event.starts_s <= start
        assert start + 15.0 <= event.ends_s <= start + 20.0
        assert event.strength == 0.5, "an expectation may be wrong: never more than half of the node"
        assert seen[int(start) + 10] == event, "while it is there"
        assert seen[int(start) + 24].starts_s > start + 50.0, "the next one"


@pytest.mark.parametrize("period_s", [25.0, 60.0, 61.7, 300.0])
@pytest.mark.parametrize("lasts_s", [4.0, 12.0])
def test_any_steady_interval_is_found_whatever_its_phase(period_s, lasts_s):
    for phase in (0.0, 0.4, 0.9):
        starts = [12.0 + phase + k * period_s for k in range(8)]
        seen = feed(Recurrence(), starts, lasts_s, until_s=starts[-1] + 5.0)
        for start in starts[2:]:
            event = seen[int(start) - 3]
            assert event is not None
            assert event.starts_s <= start <= event.ends_s


def test_a_job_that_starts_a_little_early_or_late_is_still_expected():
    rng = random.Random(3)
    starts = [10.0 + 60.0 * k + rng.uniform(-0.5, 0.5) for k in range(8)]
    seen = feed(Recurrence(), starts, until_s=starts[-1])
    hit = [(e := seen[int(s) - 3]) is not None and e.starts_s <= s <= e.ends_s for s in starts[2:]]
    assert all(hit)


def test_what_was_expected_and_did_not_come_is_not_expected_again_on_so_little():
    recurrence = Recurrence()
    seen = feed(recurrence, [10.0, 70.0], until_s=300.0)
    assert seen[120] is not None
    assert all(seen[t] is None for t in range(134, 300)), "withdrawn as soon as it has not come"
    assert recurrence.needed == 2
    later = feed(Recurrence(needed=2), [10.0, 70.0, 130.0, 190.0], until_s=200.0)
    assert all(later[t] is None for t in range(1, 150)), "two intervals are needed now"
    assert later[185] is not None


def test_a_period_that_holds_earns_trust_back():
    recurrence = Recurrence(needed=3)
    feed(recurrence, [10.0 + 60.0 * k for k in range(8)], until_s=480.0)
    assert recurrence.needed == 1


def test_random_disturbances_are_hardly_ever_expected():
    announced_s = total_s = 0.0
    for seed in range(20):
        rng = random.Random(seed)
        starts, at_s = [], 0.0
        while (at_s := at_s + rng.expovariate(1 / 60.0)) < 3500.0:
            starts.append(at_s)
            at_s += 25.0
        seen = feed(Recurrence(), starts, 20.0, until_s=3600.0, seed=seed)
        announced_s += sum(e is not None and e.starts_s <= t < e.ends_s for t, e in seen.items())
        total_s += 3600.0
    assert announced_s / total_s < 0.005


def test_one_that_is_over_early_is_not_announced_any_more():
    recurrence = Recurrence()
    feed(recurrence, [10.0, 70.0], lasts_s=20.0, until_s=125.0)
    for t in range(126, 145):
        recurrence.step(float(t), 0.95 if 130 < t <= 136 else 0.1)
        if t > 137:
            assert recurrence.due() is None or recurrence.due().starts_s > 180.0


def test_events_of_two_kinds_are_not_taken_for_one_that_recurs():
    recurrence = Recurrence()
    for start, lasts_s in ((10.0, 5.0), (70.0, 40.0)):
        for t in range(int(start) - 5, int(start + lasts_s) + 5):
            recurrence.step(float(t), 0.95 if start <= t - 1 < start + lasts_s else 0.1)
    assert recurrence.due() is None


def test_missing_samples_and_noise_below_the_mark_teach_nothing():
    seen = feed(Recurrence(), [10.0, 70.0, 130.0], missing=(50, 71, 72, 100))
    event = seen[125]
    assert event is not None
    assert event.starts_s <= 130.0 <= event.ends_s
    quiet = Recurrence()
    for t in range(600):
        quiet.step(float(t), 0.45 if t % 60 < 20 else 0.1)
    assert quiet.due() is None


def test_a_single_loud_sample_is_no_event():
    recurrence = Recurrence()
    for t in range(600):
        recurrence.step(float(t), 0.95 if t % 60 == 0 else 0.1)
    assert recurrence.due() is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.floats(allow_nan=True, allow_infinity=True)), max_size=200))
@example([(0.0, 0.0), (17.0, 1.0), (3.0, 0.0), (22.0, 1.0), (30.0, 0.0)])  # the third would have begun in the second
def test_whatever_comes_an_expectation_has_an_end_and_a_possible_strength(samples):
    recurrence, now_s = Recurrence(), 0.0
    for gap_s, load in samples:
        now_s += gap_s
        recurrence.step(now_s, load)
        event = recurrence.due()
        if event is not None:
            assert event.starts_s < event.ends_s
            assert now_s <= recurrence._latest_s + CONFIRMED_S or recurrence._started_s is not None
            assert 0.0 <= event.strength <= 0.5
        assert 1 <= recurrence.needed <= 4


@pytest.mark.parametrize("background", [0.0, 0.15, 0.3])
def test_an_expectation_makes_a_node_second_choice_and_never_leaves_its_load_to_the_others(background):
    """In a lab whose runs were as long as each other, three nodes of four expected the next one; the fourth drowned."""
    row = tuple((STRONGEST,) * 3 for _ in HORIZONS_S)
    idle = tuple((0.0,) * 3 for _ in HORIZONS_S)
    forecast = Forecast({"cpu": row, "memory": idle, "network": idle}, gate={"cpu": 1.0})
    snapshot = NodeSnapshot(background, background, 0.0, 0.0, 0.0, 0.0, 0.0)
    view = outlook(forecast, snapshot, (1.0, 0.0, 0.0), 0.0, 0.02)
    part = math.exp(view.log_change)
    assert 0.5 <= part <= 0.9
    assert view.worst_log_speed > math.log(VETO_SPEED)
