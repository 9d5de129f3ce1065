"""The gate: is this candidate sound, right, and of use? Design section 7.

`Trial` judges mirrored pairs and answers with a `Ruling` after every observation if asked; the error bounds hold
however often one asks (shadecast/sequential.py). What is looked at:

1. memory: out of it, or rising to its limit;
2. errors: an `ErrorGuard` rejects; a pass needs evidence against an excess of `UNSOUND`. A wrong answer is an error;
3. speed: D = ln(candidate / primary) - ln(load ratio). Only what is slower than `margin` is turned away; what is less
   slow takes less, by its capacity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shadecast.config import TrialConfig
from shadecast.pick import load_cost
from shadecast.sequential import BucketedMean, ErrorGuard, Interval, Soundness
from shadecast.types import PairedSample

BUCKET_S = 1.0
NEWCOMER_LIMIT = 3.0
"""Score of the error guard at which a newcomer is turned away, ln 20."""
_MOST_IN_FLIGHT = 1e6
"""More is a broken count: it must not swallow all other numbers."""
_FEW_BUCKETS = 3.0
"""With fewer seconds of pairs a candidate's speed is not known."""
_RISE = 0.02
"""Rise of a node's used memory, as a fraction, that is a candidate's doing."""
_NOTHING_LEFT = 0.98
"""Of a node's memory; beyond, nobody asks whose doing it is."""


class Verdict(StrEnum):
    """What the evidence says so far."""

    CONTINUE = "continue"
    """Not enough evidence yet."""
    FAVOURABLE = "favourable"
    """Sound, right and of use."""
    UNFAVOURABLE = "unfavourable"
    """Harmful, or of no use."""
    INCONCLUSIVE = "inconclusive"
    """Out of pairs or time without evidence of harm: go on with the smallest live step."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """A verdict, one sentence for people, and the numbers it rests on."""

    verdict: Verdict
    reason: str
    evidence: Mapping[str, float]


def load_factor(in_flight: float, slots: float, batch_half: float) -> float:
    """How much longer than alone a request takes with `in_flight` others on the replica (`pick.load_cost`).

    1 where the load or the curve is unknown: NaN or infinite `in_flight`, or neither `slots` nor `batch_half` given.
    With `batch_half`, one slot or none means that all requests batch.
    """
    if not 0.0 < in_flight < math.inf or not (0.0 < slots < math.inf or batch_half > 0.0):
        return 1.0
    in_flight = min(in_flight, _MOST_IN_FLIGHT)
    if batch_half > 0.0 and not 1.0 < slots < math.inf:
        slots = in_flight + 1.0
    return load_cost(in_flight + 1.0, slots, batch_half) / load_cost(1.0, slots, batch_half)


def memory_harm(before: float, now: float, limit: float) -> str:
    """Why a node's used memory, as fractions, ends a trial or a ramp, in words; "" if it does not, or is not known.

    One that was high already and stays so (a pinned model, a large cache) is nobody's doing.
    """
    if now > _NOTHING_LEFT or (now > limit and now - before > _RISE):
        return f"its node's memory rose from {before:.0%} to {now:.0%}; {limit:.0%} is the limit"
    return ""


class Trial:
    """Judges one candidate by mirrored pairs. `errors` is its guard, which outlives the trial.

    `batch_half` (b0) and `slots` (c) correct for load (see `load_factor`); slots = 0 or inf means no correction.
    """

    def __init__(
        self,
        config: TrialConfig,
        started_s: float,
        *,
        errors: ErrorGuard | None = None,
        batch_half: float = 0.0,
        slots: float = 1.0,
    ) -> None:
        self.config = config
        self.errors = errors if errors is not None else ErrorGuard()
        self.dropped = self.pairs = 0
        self._slots, self._batch_half = slots, batch_half
        self._started_s = self._latest_s = started_s if math.isfinite(started_s) else 0.0
        self._speed, self._single = BucketedMean(), BucketedMean()
        self._sound = Soundness()
        self._alone = {True: 0, False: 0}
        """Pairs that failed on one side only, by whether it was the candidate."""

    def _advance(self, now_s: float) -> float:
        """Seconds since the start; a clock that jumps back or is NaN stands still."""
        if now_s > self._latest_s and math.isfinite(now_s):
            self._latest_s = now_s
        return self._latest_s - self._started_s

    def observe(self, pair: PairedSample, now_s: float, *, usual_errors: float) -> None:
        """Add one pair, received at `now_s`. Impossible durations are dropped and counted; nothing raises.

        Errors count from the first pair on, speed after the warm-up and not where the candidate was cold. What fails on
        both sides is no error of the candidate's. A copy that failed may only speak against it: failing fast is no
        speed, a time-out is as slow as its deadline. `usual_errors` is the greatest error rate of the others that is
        taken for usual.
        """
        elapsed_s = self._advance(now_s)
        primary_ok, shadow_ok = pair.primary_ok, pair.shadow_ok
        if (primary_ok and not _possible(pair.primary_s)) or (shadow_ok and not _possible(pair.shadow_s)):
            self.dropped += 1
            return
        deadline_s = self.config.mirror_deadline_s
        if not shadow_ok and primary_ok and min(pair.primary_s, pair.shadow_s) >= 0.99 * deadline_s:
            self.dropped += 1  # the primary was not faster than the copy was allowed to be: nothing learned
            return
        self.pairs += 1
        wrong = primary_ok and shadow_ok and pair.answers_equal is False
        failed = wrong or not shadow_ok
        self._sound.add(failed, not primary_ok)
        if failed != (not primary_ok):
            self._alone[failed] += 1
        if primary_ok or not failed:
            self.errors.add(failed, usual_errors)
        if self.pairs > self.config.warmup_pairs and primary_ok and not pair.cold and _possible(pair.shadow_s):
            ratio = self._log_ratio(pair)
            if shadow_ok or ratio > 0.0:
                self._speed.add(int(elapsed_s / BUCKET_S), ratio)
                self._single.add(self.pairs, ratio)

    def _log_ratio(self, pair: PairedSample) -> float:
        load_shadow = load_factor(pair.shadow_in_flight, self._slots, self._batch_half)
        load_primary = load_factor(pair.primary_in_flight, self._slots, self._batch_half)
        return math.log(pair.shadow_s) - math.log(pair.primary_s) - math.log(load_shadow / load_primary)

    def rule(
        self, now_s: float, *, memory_before: float = math.nan, memory_now: float = math.nan, quiet_s: float = 0.0
    ) -> Ruling:
        """The ruling as of now; memory as a fraction of the candidate's node, NaN where it is not known.

        `quiet_s`: of the time since the start, without requests; time alone ends a trial only where there were some.
        """
        config, elapsed_s = self.config, self._advance(now_s) - quiet_s
        speed = self._speed.interval(config.alpha, config.mixture)
        evidence = self._numbers(speed, elapsed_s)
        harm = memory_harm(memory_before, memory_now, config.memory_limit) or self._harm(speed)
        if harm:
            return Ruling(Verdict.UNFAVOURABLE, harm, evidence)
        if self._sound.e_value >= 1.0 / config.alpha and self._is_of_use(speed):
            reason = f"{self._in_words(speed)}; {self._alone[True]} of {self.pairs} failed on it alone"
            return Ruling(Verdict.FAVOURABLE, reason, evidence)
        if self.pairs >= config.max_pairs or elapsed_s >= config.timeout_s:
            end = f"no proof after {self.pairs} pairs and {elapsed_s:.0f} s"
            if self.errors.score > 0.5 * NEWCOMER_LIMIT:
                return Ruling(Verdict.UNFAVOURABLE, f"{end}, and {self.errors.excess()}", evidence)
            if speed.count >= config.min_pairs and speed.mean > math.log(config.margin):
                return Ruling(Verdict.UNFAVOURABLE, f"{end}, and {self._in_words(speed)}", evidence)
            return Ruling(Verdict.INCONCLUSIVE, f"{end}, and no sign of harm", evidence)
        return Ruling(Verdict.CONTINUE, f"{self.pairs} pairs so far prove nothing", evidence)

    def missing(self) -> tuple[str, ...]:
        """What a good verdict still waits for, in words; empty where it is due."""
        config, found = self.config, []
        speed = self._speed.interval(config.alpha, config.mixture)
        if self._sound.e_value < 1.0 / config.alpha:
            found.append(
                "proof that it does not fail more often than the others: evidence "
                f"{self._sound.e_value:.2g} of {1.0 / config.alpha:.3g}"
            )
        if speed.count < 0.5 * config.min_pairs:
            found.append(f"its speed: {speed.count:.0f} of {math.ceil(0.5 * config.min_pairs)} judged pairs")
        if speed.buckets < _FEW_BUCKETS:
            found.append(f"its speed over time: pairs from {speed.buckets:.0f} of {_FEW_BUCKETS:g} seconds")
        elif speed.mean >= math.log(config.margin):
            found.append(f"a mean time below {config.margin:g} times the primaries': it is {math.exp(speed.mean):.2g}")
        return tuple(found)

    def left(self, now_s: float, quiet_s: float) -> tuple[int, float]:
        """Pairs, and seconds with requests, after which the trial ends at the latest."""
        elapsed_s = self._advance(now_s) - quiet_s
        return max(self.config.max_pairs - self.pairs, 0), max(self.config.timeout_s - elapsed_s, 0.0)

    def speed(self) -> float:
        """Of the candidate against the primaries, as judged so far: at most 1, and 1 while nothing is known."""
        mean = self._speed.interval(self.config.alpha, self.config.mixture).mean
        return 1.0 if math.isnan(mean) else math.exp(-max(mean, 0.0))

    def _harm(self, speed: Interval) -> str:
        """What speaks against the candidate, in words; "" if nothing does."""
        config = self.config
        if self.errors.score >= NEWCOMER_LIMIT:
            return self.errors.excess()
        for interval in (speed, self._single.interval(config.alpha, config.mixture)):
            if interval.count >= config.min_pairs and interval.lower > math.log(config.margin):
                return f"{self._in_words(interval)}, more than {config.margin:g} times as much"
        return ""

    def _is_of_use(self, speed: Interval) -> bool:
        enough = speed.buckets >= _FEW_BUCKETS and speed.count >= 0.5 * self.config.min_pairs
        return enough and speed.mean < math.log(self.config.margin)

    def _in_words(self, interval: Interval) -> str:
        low, mean, high = (_percent(value) for value in (interval.lower, interval.mean, interval.upper))
        return f"{interval.count:.0f} pairs judged: {mean} time than the primaries ({low} to {high})"

    def _numbers(self, speed: Interval, elapsed_s: float) -> dict[str, float]:
        return {
            "pairs": float(self.pairs),
            "judged": speed.count,
            "buckets": speed.buckets,
            "dropped": float(self.dropped),
            "elapsed_s": elapsed_s,
            "mean_log_ratio": speed.mean,
            "lower": speed.lower,
            "upper": speed.upper,
            "errors_shadow_only": float(self._alone[True]),
            "errors_primary_only": float(self._alone[False]),
            "error_score": self.errors.score,
            "sound_e_value": self._sound.e_value,
        }


def _possible(duration: float) -> bool:
    return 0.0 < duration < math.inf


def _percent(log_ratio: float) -> str:
    """A log ratio of durations as "12 % more" or "3 % less"."""
    if math.isnan(log_ratio) or math.isinf(log_ratio):
        return "unknown"
    change = math.expm1(min(log_ratio, 20.0))
    return f"{abs(change):.0%} {'more' if change >= 0.0 else 'less'}"
