"""The gate's error bounds by Monte Carlo, on many paths at once, under continuous looking.

`_Many` repeats the arithmetic of `BucketedMean` and `critical_t` on arrays; one test holds it to the real `Trial`, so
that what the others measure is what the product does. Tolerances: a share of N paths has a standard error
sqrt(p (1 - p) / N); a bound is exceeded by three of them at most.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shadecast.config import TrialConfig
from shadecast.gate import NEWCOMER_LIMIT, Trial, Verdict
from shadecast.sequential import MAX_AUTOCORRELATION, MIN_BUCKETS, ErrorGuard, Soundness, critical_t
from shadecast.types import PairedSample

GATE = TrialConfig()
CONFIG = replace(GATE, timeout_s=86_400.0, margin=1.1)  # pairs end these trials, not time
MARGIN = math.log(CONFIG.margin)
SIGMA = 0.3
PATHS = 4000


class _Many:
    """`BucketedMean` for many paths that share their buckets."""

    def __init__(self, paths: int) -> None:
        self.bucket = -1
        self.open_w, self.open_v = 0.0, np.zeros(paths)
        self.prev_w, self.prev_m = 0.0, np.zeros(paths)
        self.w = self.q0 = self.c0 = 0.0
        self.wm, self.q1, self.q2, self.c1, self.c2 = (np.zeros(paths) for _ in range(5))

    def _with_open(self):
        w, m = self.open_w, self.open_v / self.open_w
        pair = w * self.prev_w
        return (
            *(self.w + w, self.wm + w * m, self.q0 + w * w, self.q1 + w * w * m, self.q2 + w * w * m * m),
            *(self.c0 + pair, self.c1 + pair * (m + self.prev_m), self.c2 + pair * m * self.prev_m),
        )

    def add(self, bucket: int, values: np.ndarray) -> None:
        if bucket != self.bucket and self.open_w:
            sums = self._with_open()
            self.prev_w, self.prev_m = self.open_w, self.open_v / self.open_w
            self.w, self.wm, self.q0, self.q1, self.q2, self.c0, self.c1, self.c2 = sums
            self.open_w, self.open_v = 0.0, np.zeros_like(self.open_v)
        self.bucket = bucket
        self.open_w += 1.0
        self.open_v = self.open_v + values

    def bounds(self, alpha: float, mixture: float) -> tuple[np.ndarray, np.ndarray]:
        w, wm, q0, q1, q2, c0, c1, c2 = self._with_open()
        mean, k = wm / w, w * w / q0
        if k < MIN_BUCKETS:
            return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
        g0 = q2 - 2 * mean * q1 + mean**2 * q0
        phi = np.clip((k * (c2 - mean * c1 + mean**2 * c0) / g0 + 1) / (k - 3), 0, MAX_AUTOCORRELATION)
        inflation = (1 + phi) / (1 - phi)
        error = np.sqrt(g0 / (1 - 1 / k) * inflation) / w
        g, degrees = 1 + w * mixture, k / inflation
        b = (np.sqrt(g) / (2 * alpha)) ** (2 / degrees)
        with np.errstate(invalid="ignore", divide="ignore"):
            reach = np.where((b < g) & (degrees > 1), np.sqrt((degrees - 1) * (b - 1) / (1 - b / g)), np.inf)
        return mean - reach * error, mean + reach * error


def _ar1(rng: np.random.Generator, paths: int, count: int, phi: float, sigma: float = SIGMA) -> np.ndarray:
    x = np.empty((paths, count))
    x[:, 0] = rng.standard_normal(paths) * sigma
    for i in range(1, count):
        x[:, i] = phi * x[:, i - 1] + math.sqrt(1 - phi * phi) * sigma * rng.standard_normal(paths)
    return x


def _decide(log_ratios: np.ndarray, pairs_per_s: int = 1, config: TrialConfig = CONFIG):
    """First decision on speed of each path, looking after every pair: (+1 favourable / -1 / 0 none, at which pair)."""
    paths, count = log_ratios.shape
    many, verdict, when = _Many(paths), np.zeros(paths), np.full(paths, count)
    for i in range(count):
        many.add(i // pairs_per_s, log_ratios[:, i])
        if i + 1 < config.min_pairs:
            continue
        lower, upper = many.bounds(config.alpha, config.mixture)
        new = np.where(upper < MARGIN, 1, np.where(lower > MARGIN, -1, 0)) * (verdict == 0)
        when[new != 0] = i + 1
        verdict += new
    return verdict, when


def _peeking_t_test(log_ratios: np.ndarray, config: TrialConfig = CONFIG) -> np.ndarray:
    """The habit to avoid: a paired t-test at level alpha a side, looked at after every pair."""
    n = np.arange(1, log_ratios.shape[1] + 1)
    mean = np.cumsum(log_ratios, 1) / n
    variance = (np.cumsum(log_ratios**2, 1) - n * mean**2) / np.maximum(n - 1, 1)
    t = (mean - MARGIN) / np.sqrt(np.maximum(variance, 1e-12) / n)
    decided = (np.abs(t) > stats.t.ppf(1 - config.alpha, np.maximum(n - 1, 1))) & (n >= config.min_pairs)
    return decided.any(axis=1)


def _at_most(share: float, bound: float, paths: int = PATHS) -> bool:
    return share <= bound + 3 * math.sqrt(bound * (1 - bound) / paths)


@pytest.mark.parametrize("pairs_per_s", [1, 4])
def test_the_vectorised_statistic_is_the_one_of_the_real_trial(pairs_per_s):
    rng = np.random.default_rng(11)
    config = replace(CONFIG, warmup_pairs=0)
    paths = MARGIN + rng.normal(0, 0.2, (40, 1)) + rng.normal(0, SIGMA, (40, 300))
    many, trials = _Many(len(paths)), [Trial(config, 0.0) for _ in paths]
    for i in range(paths.shape[1]):
        many.add(i // pairs_per_s, paths[:, i])
        now_s = (i + 0.5) / pairs_per_s
        for trial, path in zip(trials, paths, strict=True):
            trial.observe(PairedSample("c", "p", 1.0, math.exp(path[i]), 0, 0), now_s, usual_errors=0.01)
        if i % 60 == 59:
            evidence = [trial.rule(now_s).evidence for trial in trials]
            lower, upper = many.bounds(config.alpha, config.mixture)
            assert [each["lower"] for each in evidence] == pytest.approx(lower)
            assert [each["upper"] for each in evidence] == pytest.approx(upper)


def test_at_the_boundary_at_most_5_percent_are_wrongly_promoted_or_rejected_and_a_peeking_t_test_is_far_worse():
    noise = np.random.default_rng(1).normal(0, SIGMA, (PATHS, CONFIG.max_pairs))
    verdict, _ = _decide(noise + MARGIN)
    promoted, rejected = (verdict > 0).mean(), (verdict < 0).mean()
    assert _at_most(promoted, 0.05)
    assert _at_most(rejected, 0.05)
    assert _peeking_t_test(noise + MARGIN).mean() > 4 * (promoted + rejected)
    assert _peeking_t_test(noise + MARGIN).mean() > 0.4


def test_a_35_percent_slowdown_takes_about_35_pairs_and_an_equal_candidate_about_80():
    rng = np.random.default_rng(2)
    noise = rng.normal(0, SIGMA, (PATHS, CONFIG.max_pairs))
    slow, pairs_slow = _decide(noise + math.log(1.35))
    equal, pairs_equal = _decide(noise)
    assert (slow < 0).mean() > 0.995
    assert (equal > 0).mean() > 0.995
    # measured 33 and 81; the median of 4,000 has a standard error below 1
    assert 28 <= np.median(pairs_slow) <= 38
    assert 72 <= np.median(pairs_equal) <= 90


@pytest.mark.parametrize("phi", [0.3, 0.6])
def test_noise_correlated_from_pair_to_pair_does_not_break_the_bounds(phi):
    verdict, _ = _decide(_ar1(np.random.default_rng(3), PATHS, CONFIG.max_pairs, phi) + MARGIN)
    assert _at_most((verdict > 0).mean(), 0.05)
    assert _at_most((verdict < 0).mean(), 0.05)


def test_without_the_correction_correlated_noise_would_break_the_bounds():
    noise = _ar1(np.random.default_rng(4), PATHS, CONFIG.max_pairs, 0.6) + MARGIN
    n = np.arange(1, CONFIG.max_pairs + 1)
    mean = np.cumsum(noise, 1) / n
    error = np.sqrt(np.maximum(np.cumsum(noise**2, 1) / n - mean**2, 0) / n)
    reach = np.array([critical_t(k, k, CONFIG.alpha, CONFIG.mixture) for k in n])
    with np.errstate(invalid="ignore"):
        wrong = (np.abs(mean - MARGIN) > np.where(np.isfinite(reach), reach * error, np.inf)) & (n >= CONFIG.min_pairs)
    assert wrong.any(axis=1).mean() > 0.3


@pytest.mark.parametrize("pairs_per_s", [5, 20])
def test_noise_that_all_pairs_of_a_second_share_does_not_break_the_bounds(pairs_per_s):
    rng = np.random.default_rng(5)
    count = min(CONFIG.max_pairs, 120 * pairs_per_s)
    shared = _ar1(rng, PATHS, math.ceil(count / pairs_per_s), math.exp(-1.0), 0.15)
    own = rng.normal(0, SIGMA, (PATHS, count))
    verdict, _ = _decide(np.repeat(shared, pairs_per_s, axis=1)[:, :count] + own + MARGIN, pairs_per_s)
    assert _at_most((verdict > 0).mean(), 0.05)
    assert _at_most((verdict < 0).mean(), 0.05)


def test_heavy_tailed_log_ratios_do_not_break_the_bounds():
    noise = np.random.default_rng(6).standard_t(3, (PATHS, CONFIG.max_pairs)) * SIGMA / math.sqrt(3)
    verdict, _ = _decide(noise + MARGIN)
    assert _at_most((verdict > 0).mean(), 0.05)
    assert _at_most((verdict < 0).mean(), 0.05)


def test_with_many_buckets_the_interval_is_the_one_for_a_known_variance():
    n, r, alpha = 400.0, 0.02, 0.05
    known = math.sqrt(2 * (n * r + 1) / (n * r) * math.log(math.sqrt(n * r + 1) / (2 * alpha)))
    assert critical_t(n, 1e7, alpha, r) == pytest.approx(known, rel=1e-4)
    assert critical_t(n, 30, alpha, r) > known
    assert critical_t(n, 2, alpha, r) == math.inf


# ---------------------------------------------------------------- whole trials, and the ramp behind them


def _usual(rng: np.random.Generator, primary_failing: float, finished: int = 1000) -> float:
    """What `Fleet.usual_errors` says after so many requests of the others."""
    failed = rng.binomial(finished, primary_failing)
    return min(max((failed + 3.0 * math.sqrt(failed) + 3.0) / finished, 0.005), 0.8)


def _trial(
    rng: np.random.Generator,
    *,
    failing: float = 0.0,
    primary_failing: float = 0.0,
    slowdown: float = 1.0,
    sigma: float = 0.3,
    phi: float = 0.0,
    pairs_per_s: int = 5,
) -> tuple[Verdict, int, ErrorGuard, float]:
    """(verdict, pairs, guard, usual error rate) of one trial, looked at after every pair.

    `sigma` is the noise that all pairs of a second share, `phi` its correlation with the second before.
    """
    usual = _usual(rng, primary_failing)
    trial, shared = Trial(GATE, 0.0), sigma * rng.standard_normal()
    for i in range(GATE.max_pairs):
        if i % pairs_per_s == 0:
            shared = phi * shared + math.sqrt(1.0 - phi * phi) * sigma * rng.standard_normal()
        now_s, size_s = i / pairs_per_s, rng.lognormal(-2.0, 0.6)
        ratio = slowdown * math.exp(shared + 0.2 * rng.standard_normal())
        sound = (bool(rng.random() >= primary_failing), bool(rng.random() >= failing))
        pair = PairedSample("c", "p", size_s, size_s * ratio, 0.0, 0.0, *sound)
        trial.observe(pair, now_s, usual_errors=usual)
        verdict = trial.rule(now_s).verdict
        if verdict is not Verdict.CONTINUE:
            return verdict, i + 1, trial.errors, usual
    raise AssertionError("a trial ends")


def _came_onto_the_ramp(runs: int, seed: int, **options: float) -> float:
    rng = np.random.default_rng(seed)
    return sum(_trial(rng, **options)[0] is not Verdict.UNFAVOURABLE for _ in range(runs)) / runs


@pytest.mark.parametrize("primary_failing", [0.0, 0.02])
def test_a_newcomer_that_fails_20_percent_hardly_ever_comes_onto_the_ramp(primary_failing):
    runs = 3000
    assert _at_most(_came_onto_the_ramp(runs, 21, failing=0.2, primary_failing=primary_failing), 0.002, runs)


@pytest.mark.parametrize(("failing", "primary_failing"), [(0.1, 0.0), (0.12, 0.02)])
def test_a_newcomer_that_fails_10_percent_more_comes_onto_the_ramp_in_5_percent_of_trials_at_most(
    failing, primary_failing
):
    runs = 1000
    assert _at_most(_came_onto_the_ramp(runs, 22, failing=failing, primary_failing=primary_failing), 0.05, runs)


@pytest.mark.parametrize("primary_failing", [0.0, 0.02, 0.1])
@pytest.mark.parametrize(("sigma", "phi"), [(0.05, 0.0), (0.3, 0.0), (0.6, 0.0), (0.3, 0.6), (0.6, 0.6)])
def test_a_sound_newcomer_is_hardly_ever_rejected_and_needs_few_pairs(sigma, phi, primary_failing):
    """It fails as often as the primaries do. Where these fail, it takes more pairs to tell: that is arithmetic."""
    runs, rng = 1000, np.random.default_rng(23)
    trials = [
        _trial(rng, failing=primary_failing, primary_failing=primary_failing, sigma=sigma, phi=phi) for _ in range(runs)
    ]
    assert _at_most(sum(verdict is Verdict.UNFAVOURABLE for verdict, *_ in trials) / runs, 0.01, runs)
    pairs = np.median([pairs for _, pairs, *_ in trials])
    assert pairs <= {0.0: 35, 0.02: 46, 0.1: 150}[primary_failing]


@pytest.mark.parametrize("slowdown", [1.11, 2.0])
def test_a_slower_machine_is_let_in_as_soon_as_an_equal_one(slowdown):
    runs, rng = 300, np.random.default_rng(24)
    trials = [_trial(rng, slowdown=slowdown) for _ in range(runs)]
    assert _at_most(sum(verdict is not Verdict.FAVOURABLE for verdict, *_ in trials) / runs, 0.01, runs)
    assert np.median([pairs for _, pairs, *_ in trials]) <= 35


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_a_machine_that_is_far_too_slow_never_comes_onto_the_ramp(sigma):
    assert _came_onto_the_ramp(300, 25, slowdown=6.0, sigma=sigma) == 0.0


def test_of_a_newcomer_that_fails_5_percent_users_see_a_handful_of_errors():
    """Trial, ramp and first minutes of 2,000 requests on four replicas, of which it gets its share of each step."""
    runs, rng = 400, np.random.default_rng(26)
    seen, furthest = [], []
    for _ in range(runs):
        verdict, _, guard, usual = _trial(rng, failing=0.05)
        errors, step, on_step, share = 0, 0, 0, 0.0
        if verdict is not Verdict.UNFAVOURABLE:
            for _ in range(2000):
                share = GATE.ramp[step]
                if rng.random() >= share / 4.0:
                    continue
                failed = bool(rng.random() < 0.05)
                errors += failed
                on_step += 1
                guard.add(failed, usual)
                if guard.score >= NEWCOMER_LIMIT:
                    break
                if on_step >= 20 and guard.score <= 0.0 and step + 1 < len(GATE.ramp):
                    step, on_step = step + 1, 0
        seen.append(errors)
        furthest.append(share)
    assert np.mean(seen) <= 5.0
    assert np.quantile(seen, 0.95) <= 5.0
    assert np.mean(np.array(furthest) < 0.5) >= 0.9, "off the ramp before half of it"


def test_the_sound_e_value_rarely_exceeds_its_bound_where_the_candidate_is_unsound():
    rng, runs = np.random.default_rng(7), 400
    wrong = 0
    for _ in range(runs):
        evidence, seen = Soundness(), False
        for u in rng.random(400):
            evidence.add(u < 0.13, 0.13 <= u < 0.16)  # 13 % and 3 % alone: an excess of exactly 10 %
            seen |= evidence.e_value > 20
        wrong += seen
    assert _at_most(wrong / runs, 0.05, runs)


@pytest.mark.parametrize("usual", [0.005, 0.05, 0.3])
def test_the_error_guard_leaves_what_fails_as_usual_alone_and_finds_what_fails_more(usual):
    rng, guard = np.random.default_rng(8), ErrorGuard()
    highest = 0.0
    for u in rng.random(5000):
        guard.add(bool(u < usual / 2.0), usual)
        highest = max(highest, guard.score)
    assert highest < 9.0
    guard, requests = ErrorGuard(), 0
    while guard.score < 9.0:
        guard.add(bool(rng.random() < usual + 0.1), usual)
        requests += 1
    assert requests < 600
