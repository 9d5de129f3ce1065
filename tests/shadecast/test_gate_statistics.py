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
from shadecast.gate import Trial, Verdict
from shadecast.sequential import MAX_AUTOCORRELATION, MIN_BUCKETS, ExcessErrors, critical_t, sign_e_value
from shadecast.types import PairedSample

CONFIG = replace(TrialConfig(), timeout_s=86_400.0)  # pairs end these trials, not time
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


def _feed(trial: Trial, log_ratios: np.ndarray, pairs_per_s: int) -> tuple[Verdict, int]:
    verdict = Verdict.CONTINUE
    for i, ratio in enumerate(log_ratios):
        now_s = i / pairs_per_s + 0.5 / pairs_per_s
        trial.observe(PairedSample("c", "p", 1.0, math.exp(ratio), 0, 0), now_s)
        verdict = trial.rule(now_s).verdict
        if verdict is not Verdict.CONTINUE:
            return verdict, i + 1
    return verdict, len(log_ratios)


@pytest.mark.parametrize("pairs_per_s", [1, 4])
def test_the_vectorised_statistic_is_the_one_of_the_real_trial(pairs_per_s):
    rng = np.random.default_rng(11)
    config = replace(CONFIG, warmup_pairs=0, error_margin=0.5)  # only speed decides
    paths = MARGIN + rng.normal(0, 0.2, (40, 1)) + rng.normal(0, SIGMA, (40, 300))
    verdicts, when = _decide(paths, pairs_per_s, config)
    names = {1: Verdict.FAVOURABLE, -1: Verdict.UNFAVOURABLE, 0: Verdict.CONTINUE}
    for path, verdict, at in zip(paths, verdicts, when, strict=True):
        assert _feed(Trial(config, 0.0), path, pairs_per_s) == (names[int(verdict)], at)
    assert len(set(verdicts)) == 3 or pairs_per_s == 4


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


def _promotion_probability(failing: float, config: TrialConfig = CONFIG) -> tuple[float, float]:
    """(promoted, rejected) by errors alone, exactly: the e-values depend on the counts, so a lattice of counts does it.

    Speed is taken to allow promotion from the first possible pair on, which is an upper bound.
    """
    states, promoted, rejected = {0: (1.0, ExcessErrors(config.error_margin))}, 0.0, 0.0
    for n in range(1, config.max_pairs + 1):
        following: dict[int, tuple[float, ExcessErrors]] = {}
        for errors, (probability, evidence) in states.items():
            for failed, chance in ((False, 1 - failing), (True, failing)):
                at = errors + failed
                if at in following:
                    following[at] = (following[at][0] + probability * chance, following[at][1])
                else:
                    following[at] = (probability * chance, _plus(evidence, failed))
        states = {}
        for errors, (probability, evidence) in following.items():
            early = n <= config.hard_errors_window and errors >= config.hard_errors
            if early or evidence.harm > 1 / config.alpha:
                rejected += probability
            elif n >= config.min_pairs and evidence.sound >= 1 / config.alpha:
                promoted += probability
            elif probability > 1e-12:
                states[errors] = (probability, evidence)
    return promoted, rejected


def _plus(evidence: ExcessErrors, failed: bool) -> ExcessErrors:
    copy = ExcessErrors(evidence.margin)
    for i in range(evidence.pairs):
        copy.add(i < evidence.candidate_only, False)
    copy.add(failed, False)
    return copy


def test_a_candidate_that_fails_20_percent_is_promoted_with_probability_below_a_thousandth():
    promoted, rejected = _promotion_probability(0.2)
    assert promoted < 0.001
    assert rejected > 0.998


def test_a_candidate_that_fails_10_percent_is_promoted_with_probability_below_5_percent():
    assert _promotion_probability(0.1)[0] < 0.05


def test_a_candidate_that_fails_1_in_200_is_hardly_ever_rejected_for_it():
    promoted, rejected = _promotion_probability(0.005)
    assert promoted > 0.99
    assert rejected < 0.01


def test_error_e_values_rarely_exceed_their_bound_under_their_null_hypotheses():
    rng = np.random.default_rng(7)
    harm_wrong = sound_wrong = 0
    runs = 400
    for _ in range(runs):
        at_margin, at_unsound = ExcessErrors(0.02), ExcessErrors(0.02)
        seen_harm = seen_sound = False
        for u in rng.random(400):
            at_margin.add(u < 0.05, 0.05 <= u < 0.08)  # 5 % and 3 % alone: an excess of exactly 2 %
            at_unsound.add(u < at_unsound.unsound, False)
            seen_harm |= at_margin.harm > 20
            seen_sound |= at_unsound.sound > 20
        harm_wrong += seen_harm
        sound_wrong += seen_sound
    assert _at_most(harm_wrong / runs, 0.05, runs)
    assert _at_most(sound_wrong / runs, 0.05, runs)


def test_the_sign_e_value_has_mean_one_under_equality_and_rarely_exceeds_its_bound():
    for n in (1, 5, 17):
        mean = sum(math.comb(n, b) * 0.5**n * sign_e_value(b, n - b) for b in range(n + 1))
        assert mean == pytest.approx(1.0)
    worse = np.cumsum(np.random.default_rng(8).random((2000, 200)) < 0.5, axis=1)
    n = np.arange(1, 201)
    exceeded = np.array(
        [[sign_e_value(int(b), int(k - b)) > 20 for b, k in zip(row, n, strict=True)] for row in worse[:300]]
    )
    assert _at_most(exceeded.any(axis=1).mean(), 0.05, 300)
