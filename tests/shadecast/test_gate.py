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
from shadecast.gate import Canary, Ruling, Trial, Verdict, load_factor
from shadecast.types import Outcome, PairedSample

CONFIG = TrialConfig()
NAN = math.nan


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
    assert min(n for _, n in rulings) == 38  # the least number of pairs without an error that proves enough
    assert np.median([n for _, n in rulings]) <= 42


@pytest.mark.parametrize("every_s", [1.0, 0.2, 0.05])
def test_a_newcomer_that_is_5_times_slower_is_rejected_within_about_25_pairs(every_s):
    rulings = [_run(seed, 5.0, every_s=every_s) for seed in range(60)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([n for _, n in rulings]) <= 25
    assert max(n for _, n in rulings) <= 40


def test_a_newcomer_that_is_35_percent_slower_is_never_promoted():
    verdicts = _verdicts(100, slowdown=1.35)
    assert verdicts == {Verdict.UNFAVOURABLE: 100}


def test_a_newcomer_that_fails_20_percent_is_rejected_within_tens_of_pairs():
    rulings = [_run(seed, failing=0.2) for seed in range(200)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([n for _, n in rulings]) <= 12


def test_a_newcomer_that_answers_wrong_is_rejected_although_it_is_fast_and_never_fails():
    ruling, n = _run(1, 0.9, wrong=1.0)
    assert (ruling.verdict, n) == (Verdict.UNFAVOURABLE, CONFIG.hard_errors)
    assert "errors" in ruling.reason
    assert _verdicts(100, slowdown=0.9, wrong=0.2) == {Verdict.UNFAVOURABLE: 100}


def test_requests_that_fail_on_both_sides_are_not_held_against_the_newcomer():
    verdicts = _verdicts(40, together=0.3)
    assert verdicts[Verdict.UNFAVOURABLE] == 0
    assert verdicts[Verdict.FAVOURABLE] >= 30  # a third of the pairs say nothing on speed; some run out of time


def test_a_newcomer_that_fails_as_often_as_the_primaries_by_itself_is_mostly_let_through():
    verdicts = _verdicts(200, failing=0.05, primary_failing=0.05)
    assert verdicts[Verdict.UNFAVOURABLE] <= 60
    assert verdicts[Verdict.FAVOURABLE] > verdicts[Verdict.UNFAVOURABLE]


def test_rare_stalls_are_found_by_the_tail_guard_although_the_mean_is_fine():
    guarded = Trial(CONFIG, 0.0)
    for i in range(100):
        guarded.observe(_pair(0.1, 3.0 if i % 8 == 7 else 0.05), 0.0)  # one bucket: speed cannot judge
    ruling = guarded.rule(1.0)
    assert ruling.verdict is Verdict.UNFAVOURABLE
    assert "very slow" in ruling.reason
    assert ruling.evidence["tail_e_value"] > 20


def test_stalls_on_both_sides_do_not_trip_the_tail_guard():
    trial = Trial(CONFIG, 0.0)
    for i in range(200):
        trial.observe(_pair(3.0 if i % 8 == 7 else 0.1, 3.0 if i % 8 == 3 else 0.1), 0.0)
    assert trial.rule(1.0).verdict is Verdict.CONTINUE


def test_the_first_pairs_are_not_judged_on_speed_but_on_errors():
    trial = Trial(CONFIG, 0.0)
    for i in range(CONFIG.warmup_pairs):
        trial.observe(_pair(0.1, 50.0), float(i))
    assert trial.rule(5.0).evidence["judged"] == 0
    trial.observe(_pair(0.1, NAN, shadow_ok=False), 5.0)
    trial.observe(_pair(0.1, NAN, shadow_ok=False), 5.1)
    assert trial.rule(5.2).verdict is Verdict.UNFAVOURABLE


@pytest.mark.parametrize(
    ("guard", "word"),
    [
        ({"candidate_out_of_memory": True}, "ran out of memory"),
        ({"candidate_memory_fraction": 0.95}, "95% of its memory"),
        ({"primary_p99_rise": 0.2}, "p99 rose by 20%"),
    ],
)
def test_each_hard_guard_ends_the_trial_at_once_and_says_why(guard, word):
    ruling = Trial(CONFIG, 0.0).rule(0.1, **guard)
    assert ruling.verdict is Verdict.UNFAVOURABLE
    assert word in ruling.reason


def test_unknown_guard_inputs_do_not_judge():
    ruling = Trial(CONFIG, 0.0).rule(0.1, candidate_memory_fraction=NAN, primary_p99_rise=NAN)
    assert ruling.verdict is Verdict.CONTINUE


def test_a_trial_without_traffic_ends_inconclusive_and_does_not_starve():
    trial = Trial(CONFIG, 100.0)
    assert trial.rule(100.0 + CONFIG.timeout_s - 1).verdict is Verdict.CONTINUE
    ruling = trial.rule(100.0 + CONFIG.timeout_s)
    assert ruling.verdict is Verdict.INCONCLUSIVE
    assert "no sign of harm" in ruling.reason


def test_a_trial_that_runs_out_is_rejected_only_if_its_point_estimate_is_harmful():
    for slowdown, verdict in ((1.25, Verdict.UNFAVOURABLE), (1.0, Verdict.INCONCLUSIVE)):
        trial = Trial(CONFIG, 0.0)
        rng = np.random.default_rng(0)
        noise = rng.normal(0, 0.5, 40)
        for i, x in enumerate(noise - noise[5:].mean()):
            trial.observe(_pair(0.1, 0.1 * slowdown * math.exp(x)), 2.0 * i)
            assert trial.rule(2.0 * i).verdict is Verdict.CONTINUE
        assert trial.rule(CONFIG.timeout_s).verdict is verdict


def test_a_few_noisy_pairs_are_not_enough_to_reject_at_the_end():
    trial = Trial(CONFIG, 0.0)
    for i, ratio in enumerate([1.0] * CONFIG.warmup_pairs + [0.5, 2.9, 0.8, 1.9]):
        trial.observe(_pair(0.1, 0.1 * ratio), float(i))
    assert trial.rule(CONFIG.timeout_s).verdict is Verdict.INCONCLUSIVE


def test_an_idle_shadow_that_is_twice_as_slow_does_not_look_as_fast_as_a_loaded_primary():
    for options in ({"slots": 2.0}, {"batch_half": 4.0}):
        trial = Trial(CONFIG, 0.0, **options)
        others = 5.0 if "batch_half" in options else 3.0
        factor = load_factor(others, options.get("slots", 1.0), options.get("batch_half", 0.0))
        assert factor > 1.9
        ruling = trial.rule(0.0)
        rng = np.random.default_rng(5)
        for i in range(200):
            size_s = float(rng.lognormal(-2, 0.5))
            noise = float(np.exp(rng.normal(0, 0.2)))
            trial.observe(_pair(size_s * factor, size_s * 2.0 * noise, primary_in_flight=others), float(i) * 0.5)
            ruling = trial.rule(float(i) * 0.5)
            if ruling.verdict is not Verdict.CONTINUE:
                break
        assert ruling.verdict is Verdict.UNFAVOURABLE


def test_the_load_factor_follows_the_published_curves():
    assert load_factor(0.0, 1.0, 16.0) == 1.0
    assert load_factor(16.0, 1.0, 16.0) == pytest.approx((1 + 17 / 16) / (1 + 1 / 16))
    assert load_factor(3.0, 4.0, 0.0) == pytest.approx(1.0, abs=0.04)  # a free slot: no wait
    assert load_factor(7.0, 4.0, 0.0) == pytest.approx(2.0, rel=0.05)  # one full round of waiting
    for unknown in (NAN, math.inf, -3.0):
        assert load_factor(unknown, 1.0, 0.0) == 1.0
    assert load_factor(50.0, 0.0, 0.0) == 1.0  # no curve known: no correction


def test_a_short_trial_of_a_proven_replica_takes_a_fraction_of_the_pairs_and_still_stops_a_bad_one():
    good = [_run(seed, short=True) for seed in range(40)]
    assert sum(ruling.verdict is Verdict.FAVOURABLE for ruling, _ in good) >= 37
    assert np.median([n for _, n in good]) <= 25
    assert _verdicts(40, slowdown=2.0, short=True) == {Verdict.UNFAVOURABLE: 40}
    assert _verdicts(40, failing=0.5, short=True) == {Verdict.UNFAVOURABLE: 40}


def test_a_smaller_alpha_asks_for_more_pairs():
    usual = np.median([_run(seed)[1] for seed in range(30)])
    strict = np.median([_run(seed, alpha=0.01)[1] for seed in range(30)])
    assert strict > usual


def test_a_copy_that_fails_fast_never_counts_as_fast():
    config = replace(CONFIG, hard_errors=100, hard_errors_window=1, warmup_pairs=0)
    trial = Trial(config, 0.0)
    for i in range(10):
        trial.observe(_pair(1.0, 0.001, shadow_ok=False), float(i))
    assert trial.rule(10.0).evidence["judged"] == 0


def test_a_copy_cut_off_at_its_deadline_counts_as_slow_and_failed_unless_the_primary_took_as_long():
    config = replace(CONFIG, warmup_pairs=0)
    trial = Trial(config, 0.0)
    trial.observe(_pair(1.0, config.mirror_deadline_s, shadow_ok=False), 0.0)
    evidence = trial.rule(1.0).evidence
    assert evidence["errors_shadow_only"] == 1
    assert evidence["mean_log_ratio"] == pytest.approx(math.log(config.mirror_deadline_s))
    trial.observe(_pair(40.0, config.mirror_deadline_s, shadow_ok=False), 1.0)
    assert trial.rule(1.0).evidence["errors_shadow_only"] == 1


_ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(_ANY, _ANY, _ANY, _ANY, st.booleans(), st.booleans(), _ANY), max_size=60), _ANY)
@settings(max_examples=150, deadline=None)
def test_no_pair_and_no_clock_whatever_they_hold_make_a_trial_raise(rows, started_s):
    trial = Trial(CONFIG, started_s, batch_half=4.0)
    for primary_s, shadow_s, n_primary, n_shadow, primary_ok, shadow_ok, now_s in rows:
        trial.observe(_pair(primary_s, shadow_s, primary_in_flight=n_primary, shadow_in_flight=n_shadow,
                            primary_ok=primary_ok, shadow_ok=shadow_ok), now_s)  # fmt: skip
        ruling = trial.rule(now_s)
        assert ruling.reason
        assert ruling.evidence["pairs"] + ruling.evidence["dropped"] <= len(rows)


@given(st.lists(st.tuples(st.booleans(), _ANY, _ANY, st.booleans(), _ANY, _ANY), max_size=60), _ANY)
@settings(max_examples=150, deadline=None)
def test_no_outcome_and_no_clock_whatever_they_hold_make_a_canary_raise(rows, started_s):
    canary = Canary(CONFIG, started_s, slots=2.0)
    for candidate, duration_s, others, ok, cost, now_s in rows:
        canary.observe(candidate=candidate, outcome=Outcome(duration_s, others, ok, cost), now_s=now_s)
        assert canary.rule(now_s).reason


@pytest.mark.parametrize("extreme", [5e-324, 1e308])
def test_the_most_extreme_finite_numbers_raise_nothing_and_leave_the_evidence_finite(extreme):
    trial, canary = Trial(CONFIG, 0.0, batch_half=1e-9), Canary(CONFIG, 0.0, slots=1.0)
    for i in range(30):
        trial.observe(_pair(1.0 / extreme if extreme > 1 else 1e308, extreme, primary_in_flight=1e308), float(i))
        canary.observe(candidate=bool(i % 2), outcome=Outcome(extreme, 1e308), now_s=float(i))
        assert trial.rule(float(i)).reason
        assert canary.rule(float(i)).reason
    assert math.isfinite(trial.rule(30.0).evidence["mean_log_ratio"])


def test_impossible_durations_are_dropped_and_counted():
    trial = Trial(CONFIG, 0.0)
    for bad in (NAN, -1.0, 0.0, math.inf):
        trial.observe(_pair(bad, 0.1), 0.0)
        trial.observe(_pair(0.1, bad), 0.0)
    assert trial.rule(1.0).evidence["dropped"] == 8
    assert trial.rule(1.0).evidence["pairs"] == 0


def test_a_clock_that_jumps_back_does_not_end_or_lengthen_a_trial():
    trial = Trial(CONFIG, 50.0)
    assert trial.rule(60.0).verdict is Verdict.CONTINUE
    assert trial.rule(-1e9).evidence["elapsed_s"] == 10.0


# ---------------------------------------------------------------- the canary


def _live(
    seed: int,
    slowdown: float = 1.0,
    *,
    failing: float = 0.0,
    others_failing: float = 0.0,
    outage: bool = False,
    candidate_per_s: float = 2.0,
    others_per_s: float = 10.0,
    sigma: float = 0.6,
    config: TrialConfig = CONFIG,
) -> tuple[Ruling, int]:
    """Live outcomes of unequal requests: the candidate's and, over the same time, those of the others."""
    rng = np.random.default_rng(seed)
    canary, now_s, seen = Canary(config, 0.0), 0.0, 0
    while True:
        now_s += float(rng.exponential(1.0 / (candidate_per_s + others_per_s)))
        candidate = bool(rng.random() < candidate_per_s / (candidate_per_s + others_per_s))
        down = outage and 20.0 < now_s < 25.0
        seen += candidate
        ok = not down and bool(rng.random() >= (failing if candidate else others_failing))
        duration_s = float(rng.lognormal(-2.0, sigma)) * (slowdown if candidate else 1.0)
        canary.observe(candidate=candidate, outcome=Outcome(duration_s, 0.0, ok), now_s=now_s)
        ruling = canary.rule(now_s)
        if ruling.verdict is not Verdict.CONTINUE:
            return ruling, seen


def test_an_equal_replica_is_hardly_ever_rejected_by_the_canary():
    rulings = [_live(seed)[0] for seed in range(60)]
    assert sum(r.verdict is Verdict.UNFAVOURABLE for r in rulings) <= 3


def test_at_the_boundary_the_canary_is_wrong_in_at_most_5_percent_a_side():
    runs = 120
    config = replace(CONFIG, timeout_s=60.0)
    rulings = [_live(seed, CONFIG.margin, config=config, others_per_s=6.0)[0] for seed in range(runs)]
    allowed = runs * (0.05 + 3 * math.sqrt(0.05 * 0.95 / runs))
    assert sum(r.verdict is Verdict.FAVOURABLE for r in rulings) <= allowed
    assert sum(r.verdict is Verdict.UNFAVOURABLE and r.evidence["elapsed_s"] < 60.0 for r in rulings) <= allowed


def test_a_replica_twice_as_slow_is_rejected_by_the_canary_in_about_a_hundred_requests():
    rulings = [_live(seed, 2.0) for seed in range(30)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([seen for _, seen in rulings]) <= 110


def test_a_replica_that_fails_20_percent_is_rejected_by_the_canary():
    rulings = [_live(seed, failing=0.2) for seed in range(60)]
    assert {ruling.verdict for ruling, _ in rulings} == {Verdict.UNFAVOURABLE}
    assert np.median([seen for _, seen in rulings]) <= 15


def test_an_outage_that_all_replicas_share_is_not_held_against_the_candidate():
    rulings = [_live(seed, outage=True)[0] for seed in range(40)]
    assert sum(r.verdict is Verdict.UNFAVOURABLE for r in rulings) <= 4


def test_requests_of_unequal_size_compare_by_their_cost_or_items():
    canary = Canary(CONFIG, 0.0)
    rng = np.random.default_rng(1)
    ruling = canary.rule(0.0)
    for i in range(2000):
        items = 200 if i % 2 else 10  # the candidate gets the long ones
        duration_s = items * 0.01 * float(np.exp(rng.normal(0, 0.2)))
        canary.observe(candidate=bool(i % 2), outcome=Outcome(duration_s, 0.0, items=items), now_s=i * 0.1)
        ruling = canary.rule(i * 0.1)
        if ruling.verdict is not Verdict.CONTINUE:
            break
    assert ruling.verdict is Verdict.FAVOURABLE


def test_a_candidate_that_has_just_begun_does_not_look_fast_because_only_its_short_requests_have_ended():
    means = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        # three replicas for ever, the candidate from 0 on; requests of 10 s (log-normal), one a second on each
        ends = []
        for replica in range(4):
            begun = 0.0 if replica == 0 else -60.0
            while begun < 12.0:
                duration_s = float(rng.lognormal(2.0, 0.8))
                ends.append((begun + duration_s, replica == 0, duration_s))
                begun += float(rng.exponential(0.5))
        canary = Canary(CONFIG, 0.0)
        for now_s, candidate, duration_s in sorted(ends):
            if 0.0 < now_s < 12.0:
                canary.observe(candidate=candidate, outcome=Outcome(duration_s, 0.0), now_s=now_s)
        means.append(canary.rule(12.0).evidence["mean_log_ratio"])
    # equal replicas: without the care for the beginning the mean was -0.54
    assert abs(np.nanmean(means)) < 3 * np.nanstd(means) / math.sqrt(len(means)) + 0.02


def test_without_other_replicas_the_canary_cannot_judge_speed_and_ends_inconclusive():
    canary = Canary(CONFIG, 0.0)
    for i in range(100):
        canary.observe(candidate=True, outcome=Outcome(0.1, 0.0), now_s=float(i))
    ruling = canary.rule(CONFIG.timeout_s)
    assert ruling.verdict is Verdict.INCONCLUSIVE
    assert ruling.evidence["candidate_outcomes"] == 100
