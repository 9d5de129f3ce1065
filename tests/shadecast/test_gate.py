"""What the gate does with candidates of every kind, through the public interface and with seeds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadecast.config import TrialConfig
from shadecast.gate import Ruling, Trial, Verdict, load_factor, memory_harm
from shadecast.types import PairedSample

CONFIG = TrialConfig()
NAN = math.nan
USUAL = 0.005


def _pair(primary_s: float, shadow_s: float, **more) -> PairedSample:
    values = {"primary_in_flight": 0.0, "shadow_in_flight": 0.0} | more
    return PairedSample("candidate", "primary", primary_s, shadow_s, **values)


def _run(
    seed: int,
    slowdown: float = 1.0,
    *,
    failing: float = 0.0,
    wrong: float = 0.0,
    primary_failing: float = 0.0,
    together: float = 0.0,
    every_s: float = 0.5,
    sigma: float = 0.3,
    usual: float = USUAL,
    config: TrialConfig = CONFIG,
    **options,
) -> tuple[Ruling, int]:
    """A trial to its end: requests of log-normal size, the candidate `slowdown` times slower on the same ones."""
    rng = np.random.default_rng(seed)
    trial, n = Trial(config, 0.0, **options), 0
    while True:
        n += 1
        size_s = float(rng.lognormal(-2.0, 0.6))
        both = rng.random() < together
        trial.observe(
            _pair(
                size_s,
                size_s * slowdown * float(np.exp(rng.normal(0, sigma))),
                shadow_ok=not both and rng.random() >= failing,
                primary_ok=not both and rng.random() >= primary_failing,
                answers_equal=bool(rng.random() >= wrong),
            ),
            n * every_s,
            usual_errors=usual,
        )
        ruling = trial.rule(n * every_s)
        if ruling.verdict is not Verdict.CONTINUE:
            return ruling, n


def _verdicts(runs: int, **options) -> Counter[Verdict]:
    return Counter(_run(seed, **options)[0].verdict for seed in range(runs))


def test_an_equal_newcomer_passes():
    assert _verdicts(60)[Verdict.FAVOURABLE] >= 57


def test_a_faster_newcomer_passes_as_soon_as_enough_pairs_show_that_it_does_not_fail():
    rulings = [_run(seed, 0.5) for seed in range(30)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.FAVOURABLE}
    assert min(n for _, n in rulings) == 34  # the least number of pairs without an error that proves enough
    assert np.median([n for _, n in rulings]) <= 35


@pytest.mark.parametrize("every_s", [1.0, 0.2, 0.05])
def test_a_newcomer_that_is_8_times_slower_is_rejected_within_about_25_pairs(every_s):
    rulings = [_run(seed, 8.0, every_s=every_s) for seed in range(60)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([n for _, n in rulings]) <= 25
    assert max(n for _, n in rulings) <= 40


def test_a_newcomer_that_fails_20_percent_is_rejected_within_tens_of_pairs():
    rulings = [_run(seed, failing=0.2) for seed in range(200)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([n for _, n in rulings]) <= 12


def test_a_newcomer_that_answers_wrong_is_rejected_although_it_is_fast_and_never_fails():
    ruling, n = _run(1, 0.9, wrong=1.0)
    assert (ruling.verdict, n) == (Verdict.UNFAVOURABLE, 2)
    assert "2 of its last 2 requests failed" in ruling.reason
    assert _verdicts(100, slowdown=0.9, wrong=0.2) == {Verdict.UNFAVOURABLE: 100}


def test_requests_that_fail_on_both_sides_are_not_held_against_the_newcomer():
    verdicts = _verdicts(40, together=0.3)
    assert verdicts[Verdict.UNFAVOURABLE] == 0
    assert verdicts[Verdict.FAVOURABLE] >= 30  # a third of the pairs say nothing on speed; some run out of time


def test_the_first_pairs_are_not_judged_on_speed_but_on_errors():
    trial = Trial(CONFIG, 0.0)
    for i in range(CONFIG.warmup_pairs):
        trial.observe(_pair(0.1, 50.0), float(i), usual_errors=USUAL)
    assert trial.rule(5.0).evidence["judged"] == 0
    trial.observe(_pair(0.1, NAN, shadow_ok=False), 5.0, usual_errors=USUAL)
    trial.observe(_pair(0.1, NAN, shadow_ok=False), 5.1, usual_errors=USUAL)
    assert trial.rule(5.2).verdict is Verdict.UNFAVOURABLE


@pytest.mark.parametrize(
    ("before", "now", "harmful"),
    [
        (0.3, 0.95, True),
        (0.94, 0.945, False),  # a pinned model: it was so before
        (0.91, 0.935, True),
        (0.97, 0.99, True),  # nothing is left
        (0.3, 0.9, False),
        (NAN, NAN, False),
        (NAN, 0.95, False),
    ],
)
def test_memory_that_rises_to_its_limit_ends_a_trial_and_says_why(before, now, harmful):
    ruling = Trial(CONFIG, 0.0).rule(0.1, memory_before=before, memory_now=now)
    assert (ruling.verdict is Verdict.UNFAVOURABLE) == harmful == bool(memory_harm(before, now, CONFIG.memory_limit))
    assert ("memory rose" in ruling.reason) == harmful


def test_a_candidate_that_has_to_load_what_the_primaries_have_is_not_judged_by_the_time_of_that():
    """Twelve ids, room for three: nearly every copy begins with a load of half a second."""
    trial = Trial(CONFIG, 0.0)
    for i in range(100):
        cold = i % 4 != 0
        pair = _pair(0.05, 0.55 if cold else 0.05, cold=cold)
        trial.observe(pair, i * 0.2, usual_errors=USUAL)
        if (ruling := trial.rule(i * 0.2)).verdict is not Verdict.CONTINUE:
            break
    assert ruling.verdict is Verdict.FAVOURABLE
    assert ruling.evidence["judged"] < 30


def test_a_trial_without_traffic_ends_inconclusive_and_does_not_starve():
    trial = Trial(CONFIG, 100.0)
    assert trial.rule(100.0 + CONFIG.timeout_s - 1).verdict is Verdict.CONTINUE
    ruling = trial.rule(100.0 + CONFIG.timeout_s)
    assert ruling.verdict is Verdict.INCONCLUSIVE
    assert "no sign of harm" in ruling.reason


def test_a_trial_that_runs_out_is_rejected_only_if_its_point_estimate_is_harmful():
    for slowdown, verdict in ((4.4, Verdict.UNFAVOURABLE), (3.6, Verdict.INCONCLUSIVE)):
        trial = Trial(CONFIG, 0.0)
        rng = np.random.default_rng(0)
        noise = rng.normal(0, 0.5, 28)
        for i, x in enumerate(noise - noise[5:].mean()):
            trial.observe(_pair(0.1, 0.1 * slowdown * math.exp(x)), 1.0 * i, usual_errors=USUAL)
            assert trial.rule(1.0 * i).verdict is Verdict.CONTINUE
        assert trial.rule(CONFIG.timeout_s).verdict is verdict


def test_a_few_noisy_pairs_are_not_enough_to_reject_at_the_end():
    trial = Trial(CONFIG, 0.0)
    for i, ratio in enumerate([1.0] * CONFIG.warmup_pairs + [2.0, 11.0, 3.0, 8.0]):
        trial.observe(_pair(0.1, 0.1 * ratio), float(i), usual_errors=USUAL)
    assert trial.rule(CONFIG.timeout_s).verdict is Verdict.INCONCLUSIVE


def test_an_idle_shadow_that_is_twice_as_slow_does_not_look_as_fast_as_a_loaded_primary():
    for options in ({"slots": 2.0}, {"batch_half": 4.0}):
        trial = Trial(CONFIG, 0.0, **options)
        others = 5.0 if "batch_half" in options else 3.0
        factor = load_factor(others, options.get("slots", 1.0), options.get("batch_half", 0.0))
        assert factor > 1.9
        rng = np.random.default_rng(5)
        for i in range(200):
            size_s = float(rng.lognormal(-2, 0.5))
            noise = float(np.exp(rng.normal(0, 0.2)))
            pair = _pair(size_s * factor, size_s * 2.0 * noise, primary_in_flight=others)
            trial.observe(pair, float(i) * 0.1, usual_errors=USUAL)
        found = trial.rule(20.0).evidence
        assert found["lower"] < math.log(2.0) < found["upper"]
        assert found["mean_log_ratio"] == pytest.approx(math.log(2.0), abs=0.05)


def test_the_load_factor_follows_the_published_curves():
    assert load_factor(0.0, 1.0, 16.0) == 1.0
    assert load_factor(16.0, 1.0, 16.0) == pytest.approx((1 + 17 / 16) / (1 + 1 / 16))
    assert load_factor(3.0, 4.0, 0.0) == pytest.approx(1.0, abs=0.04)  # a free slot: no wait
    assert load_factor(7.0, 4.0, 0.0) == pytest.approx(2.0, rel=0.05)  # one full round of waiting
    for unknown in (NAN, math.inf, -3.0):
        assert load_factor(unknown, 1.0, 0.0) == 1.0
    assert load_factor(50.0, 0.0, 0.0) == 1.0  # no curve known: no correction


def test_a_smaller_alpha_asks_for_more_pairs():
    usual = np.median([_run(seed)[1] for seed in range(30)])
    strict = np.median([_run(seed, config=replace(CONFIG, alpha=0.01))[1] for seed in range(30)])
    assert strict > usual


def test_a_copy_that_fails_fast_never_counts_as_fast():
    config = replace(CONFIG, warmup_pairs=0)
    trial = Trial(config, 0.0)
    for i in range(10):
        trial.observe(_pair(1.0, 0.001, shadow_ok=False), float(i), usual_errors=USUAL)
    assert trial.rule(10.0).evidence["judged"] == 0


def test_a_copy_cut_off_at_its_deadline_counts_as_slow_and_failed_unless_the_primary_took_as_long():
    config = replace(CONFIG, warmup_pairs=0)
    trial = Trial(config, 0.0)
    trial.observe(_pair(1.0, config.mirror_deadline_s, shadow_ok=False), 0.0, usual_errors=USUAL)
    evidence = trial.rule(1.0).evidence
    assert evidence["errors_shadow_only"] == 1
    assert evidence["mean_log_ratio"] == pytest.approx(math.log(config.mirror_deadline_s))
    trial.observe(_pair(40.0, config.mirror_deadline_s, shadow_ok=False), 1.0, usual_errors=USUAL)
    assert trial.rule(1.0).evidence["errors_shadow_only"] == 1


_ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(_ANY, _ANY, _ANY, _ANY, st.booleans(), st.booleans(), _ANY), max_size=60), _ANY)
@settings(max_examples=150, deadline=None)
def test_no_pair_and_no_clock_whatever_they_hold_make_a_trial_raise(rows, started_s):
    trial = Trial(CONFIG, started_s, batch_half=4.0)
    for primary_s, shadow_s, n_primary, n_shadow, primary_ok, shadow_ok, now_s in rows:
        trial.observe(_pair(primary_s, shadow_s, primary_in_flight=n_primary, shadow_in_flight=n_shadow,
                            primary_ok=primary_ok, shadow_ok=shadow_ok), now_s, usual_errors=USUAL)  # fmt: skip
        ruling = trial.rule(now_s)
        assert ruling.reason
        assert ruling.evidence["pairs"] + ruling.evidence["dropped"] <= len(rows)


@pytest.mark.parametrize("extreme", [5e-324, 1e308])
def test_the_most_extreme_finite_numbers_raise_nothing_and_leave_the_evidence_finite(extreme):
    trial = Trial(CONFIG, 0.0, batch_half=1e-9)
    for i in range(30):
        trial.observe(
            _pair(1.0 / extreme if extreme > 1 else 1e308, extreme, primary_in_flight=1e308),
            float(i),
            usual_errors=USUAL,
        )
        assert trial.rule(float(i)).reason
    assert math.isfinite(trial.rule(30.0).evidence["mean_log_ratio"])


def test_impossible_durations_are_dropped_and_counted():
    trial = Trial(CONFIG, 0.0)
    for bad in (NAN, -1.0, 0.0, math.inf):
        trial.observe(_pair(bad, 0.1), 0.0, usual_errors=USUAL)
        trial.observe(_pair(0.1, bad), 0.0, usual_errors=USUAL)
    assert trial.rule(1.0).evidence["dropped"] == 8
    assert trial.rule(1.0).evidence["pairs"] == 0


def test_a_clock_that_jumps_back_does_not_end_or_lengthen_a_trial():
    trial = Trial(CONFIG, 50.0)
    assert trial.rule(60.0).verdict is Verdict.CONTINUE
    assert trial.rule(-1e9).evidence["elapsed_s"] == 10.0
