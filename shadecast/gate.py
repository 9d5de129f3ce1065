"""The gate: may this candidate take (more) live traffic? Design section 7.

`Trial` judges mirrored pairs, `Canary` live outcomes of what cannot be copied. Both answer with a `Ruling` after every
observation if asked; the error bounds hold however often one asks (shadecast/sequential.py). What is looked at:

1. hard guards: out of memory, memory near its limit, errors of the candidate alone among the first pairs, a rising p99
   of the primaries;
2. speed: D = ln(candidate / primary) - ln(load ratio), against the accepted slowdown `margin`, by an anytime-valid
   interval on bucket means of one second; gross slowness is judged without waiting for buckets;
3. errors: evidence for an excess above `error_margin` rejects; a pass needs evidence against a far higher excess;
4. tail: a sign test on requests that were very slow on one side only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from shadecast.config import TrialConfig
from shadecast.pick import load_cost
from shadecast.sequential import BucketedMean, ExcessErrors, Interval, sign_e_value
from shadecast.types import Outcome, PairedSample

BUCKET_S = 1.0
SLO_MULTIPLE = 4.0
"""A request misses when it takes this many times the running median of the primaries (per unit of cost)."""
TAIL_E_VALUE = 20.0
GROSS_RATIO = 2.0
"""Slower than this by single pairs rejects at once, although pairs within a second may share their noise."""
MEDIAN_WINDOW = 255
_MOST_IN_FLIGHT = 1e6
"""More is a broken count: it must not swallow all other numbers."""
UNMATCHED = 32
"""Outcomes that wait for a partner on the other side."""


class Verdict(StrEnum):
    """What the evidence says so far."""

    CONTINUE = "continue"
    """Not enough evidence yet."""
    FAVOURABLE = "favourable"
    """As fast and as sound as required."""
    UNFAVOURABLE = "unfavourable"
    """Harmful, or not shown to be harmless while its point estimate is harmful."""
    INCONCLUSIVE = "inconclusive"
    """Out of pairs or time without evidence of harm: go on with the smallest live step."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """A verdict, one sentence for people, and the numbers it rests on."""

    verdict: Verdict
    reason: str
    evidence: Mapping[str, float]
    merely_slow: bool = False
    """Unfavourable for speed alone: no error, no hard guard."""


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


class _RunningMedian:
    """Median of the last `MEDIAN_WINDOW` values; NaN before the fifth."""

    __slots__ = ("_order", "_sorted")

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        if len(self._order) == MEDIAN_WINDOW:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    @property
    def value(self) -> float:
        return self._sorted[len(self._sorted) // 2] if len(self._sorted) >= 5 else math.nan


class _Evidence:
    """What `Trial` and `Canary` share: the statistics, the clock of one trial, and the ruling."""

    def __init__(self, config: TrialConfig, started_s: float, alpha: float | None, short: bool, unit: str) -> None:
        self.config = config
        self.alpha = config.alpha if alpha is None or not 0.0 < alpha < 0.5 else alpha
        self.short = short
        self.dropped = 0
        self._unit = unit
        self._started_s = self._latest_s = started_s if math.isfinite(started_s) else 0.0
        self._speed = BucketedMean()
        self._single = BucketedMean()
        self._errors = ExcessErrors(config.error_margin)
        self._early_errors = False
        self._median = _RunningMedian()
        self._tail_worse = self._tail_better = 0

    def _advance(self, now_s: float) -> float:
        """Seconds since the start; a clock that jumps back or is NaN stands still."""
        if now_s > self._latest_s and math.isfinite(now_s):
            self._latest_s = now_s
        return self._latest_s - self._started_s

    def _note_errors(self, candidate_failed: bool, primary_failed: bool) -> None:
        errors = self._errors
        errors.add(candidate_failed, primary_failed)
        # primaries that fail by themselves raise the bar: such a service fails now and then on any replica
        bar = self.config.hard_errors * (1 + errors.primary_only)
        if errors.pairs <= self.config.hard_errors_window and errors.candidate_only >= bar:
            self._early_errors = True

    def _note_tail(self, candidate: float, primary: float) -> None:
        """Count a pair of durations (NaN: never ended well, a miss) of which only one missed the SLO."""
        limit = SLO_MULTIPLE * self._median.value
        if not math.isnan(limit):
            candidate_missed, primary_missed = not candidate <= limit, not primary <= limit
            self._tail_worse += candidate_missed and not primary_missed
            self._tail_better += primary_missed and not candidate_missed

    def _harm(self, speed: Interval, single: Interval) -> str:
        """The first guard that the candidate violates, in words; empty if none."""
        config, errors = self.config, self._errors
        if self._early_errors:
            return (
                f"{errors.candidate_only} errors of the candidate alone in its first {errors.pairs} {self._unit}; "
                f"{config.hard_errors} in {config.hard_errors_window} end a trial"
            )
        if errors.harm > 1.0 / self.alpha:
            return (
                f"the candidate alone failed {errors.candidate_only} of {errors.pairs} {self._unit}, the primaries "
                f"alone {errors.primary_only}; {config.error_margin:.1%} more is accepted"
            )
        if self._tail_worse > self._tail_better and self.tail_e_value > TAIL_E_VALUE:
            return (
                f"very slow (over {SLO_MULTIPLE:g} x the median) on the candidate alone {self._tail_worse} times, "
                f"on the primaries alone {self._tail_better} times"
            )
        for interval, ratio in ((speed, config.margin), (single, max(GROSS_RATIO, config.margin))):
            if interval.count >= config.min_pairs and interval.lower > math.log(ratio):
                return f"{self._in_words(interval)}, beyond the {config.margin - 1.0:.0%} that is accepted"
        return ""

    def _in_words(self, interval: Interval) -> str:
        low, mean, high = (_percent(value) for value in (interval.lower, interval.mean, interval.upper))
        return f"{interval.count:.0f} {self._unit} judged: {mean} time than the primaries ({low} to {high})"

    def _decide(self, elapsed_s: float, harm: str) -> Ruling:
        config, errors = self.config, self._errors
        speed = self._speed.interval(self.alpha, config.mixture)
        guarded = bool(harm)
        harm = harm or self._harm(speed, self._single.interval(self.alpha, config.mixture))
        evidence = self._numbers(speed, elapsed_s)
        if harm:
            merely_slow = not guarded and errors.candidate_only == 0
            return Ruling(Verdict.UNFAVOURABLE, harm, evidence, merely_slow)
        if self._passes(speed):
            reason = f"{self._in_words(speed)}; {errors.candidate_only} of {errors.pairs} failed on it alone"
            return Ruling(Verdict.FAVOURABLE, reason, evidence)
        if errors.pairs >= config.max_pairs or speed.count >= config.max_pairs or elapsed_s >= config.timeout_s:
            end = f"no proof after {errors.pairs} {self._unit} and {elapsed_s:.0f} s"
            if self._looks_harmful(speed):
                excess = f"{errors.excess:+.1%} errors"
                return Ruling(Verdict.UNFAVOURABLE, f"{end}, and {self._in_words(speed)}, {excess}", evidence)
            return Ruling(Verdict.INCONCLUSIVE, f"{end}, and no sign of harm", evidence)
        return Ruling(Verdict.CONTINUE, f"{errors.pairs} {self._unit} so far prove nothing", evidence)

    def _passes(self, speed: Interval) -> bool:
        config, errors = self.config, self._errors
        margin = math.log(config.margin)
        if self.short:
            # proven minutes ago: half the pairs, no error of its own, and one standard error instead of the interval
            enough = speed.count >= 0.5 * config.min_pairs and errors.candidate_only == 0
            return enough and speed.mean + speed.std_error < margin
        return speed.count >= config.min_pairs and speed.upper < margin and errors.sound >= 1.0 / self.alpha

    def _looks_harmful(self, speed: Interval) -> bool:
        """The point estimate at the end of a trial; one of few pairs must be a standard error beyond the margin."""
        slack = 0.0 if speed.count >= self.config.min_pairs else speed.std_error
        errors = self._errors
        failing = errors.candidate_only - errors.primary_only >= 2 and errors.excess > self.config.error_margin
        return failing or speed.mean - slack > math.log(self.config.margin)

    @property
    def tail_e_value(self) -> float:
        """Evidence that the candidate is very slow more (or less) often than the primaries."""
        return sign_e_value(self._tail_worse, self._tail_better)

    def _numbers(self, speed: Interval, elapsed_s: float) -> dict[str, float]:
        errors = self._errors
        return {
            "pairs": float(errors.pairs),
            "judged": speed.count,
            "buckets": speed.buckets,
            "dropped": float(self.dropped),
            "elapsed_s": elapsed_s,
            "mean_log_ratio": speed.mean,
            "lower": speed.lower,
            "upper": speed.upper,
            "errors_shadow_only": float(errors.candidate_only),
            "errors_primary_only": float(errors.primary_only),
            "error_harm_e_value": errors.harm,
            "error_sound_e_value": errors.sound,
            "tail_shadow_only": float(self._tail_worse),
            "tail_primary_only": float(self._tail_better),
            "tail_e_value": self.tail_e_value,
        }


class Trial(_Evidence):
    """Judges one candidate by mirrored pairs: one shadow trial, or one re-test (then with its own `alpha`).

    `batch_half` (b0) and `slots` (c) correct for load (see `load_factor`); slots = 0 or inf means no correction.
    `short` trials are for replicas that were ACTIVE minutes ago: half the pairs, weaker proof.
    """

    def __init__(
        self,
        config: TrialConfig,
        started_s: float,
        *,
        alpha: float | None = None,
        batch_half: float = 0.0,
        slots: float = 1.0,
        short: bool = False,
    ) -> None:
        super().__init__(config, started_s, alpha, short, "pairs")
        self._slots, self._batch_half = slots, batch_half

    def observe(
        self, pair: PairedSample, now_s: float, *, primary_log_speed: float = 0.0, candidate_log_speed: float = 0.0
    ) -> None:
        """Add one pair, received at `now_s`. Impossible durations are dropped and counted; nothing raises.

        Errors count from the first pair on, speed and tail after the warm-up. A copy that failed may only speak against
        the candidate: failing fast is no speed, a time-out is as slow as its deadline. The log speeds are what either
        machine is known to do against a usual one: both sides are judged by the time that a usual one would take.
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
        wrong = primary_ok and shadow_ok and pair.answers_equal is False
        self._note_errors(wrong or not shadow_ok, not primary_ok)
        primary_s = pair.primary_s * math.exp(primary_log_speed)
        shadow_s = pair.shadow_s * math.exp(candidate_log_speed) if _possible(pair.shadow_s) else math.nan
        if primary_ok:
            self._median.add(primary_s)
        if self._errors.pairs <= self.config.warmup_pairs:
            return
        if primary_ok and (shadow_ok or not math.isnan(shadow_s)):
            self._note_tail(shadow_s, primary_s)
            ratio = self._log_ratio(pair) + candidate_log_speed - primary_log_speed
            if shadow_ok or ratio > 0.0:
                self._speed.add(int(elapsed_s / BUCKET_S), ratio)
                self._single.add(self._errors.pairs, ratio)
        elif shadow_ok and _possible(pair.primary_s):
            self._note_tail(shadow_s, primary_s)

    def _log_ratio(self, pair: PairedSample) -> float:
        load_shadow = load_factor(pair.shadow_in_flight, self._slots, self._batch_half)
        load_primary = load_factor(pair.primary_in_flight, self._slots, self._batch_half)
        return math.log(pair.shadow_s) - math.log(pair.primary_s) - math.log(load_shadow / load_primary)

    def rule(
        self,
        now_s: float,
        *,
        candidate_memory_fraction: float = math.nan,
        primary_p99_rise: float = math.nan,
        candidate_out_of_memory: bool = False,
    ) -> Ruling:
        """The ruling as of now; NaN means that a guard's input is unknown and the guard does not judge."""
        config, harm = self.config, ""
        if candidate_out_of_memory:
            harm = "the candidate ran out of memory"
        elif candidate_memory_fraction > config.memory_limit:
            harm = f"the candidate's node uses {candidate_memory_fraction:.0%} of its memory"
            harm += f"; {config.memory_limit:.0%} ends a trial"
        elif primary_p99_rise > config.primary_rise:
            harm = f"the primaries' p99 rose by {primary_p99_rise:.0%} during the trial"
            harm += f"; {config.primary_rise:.0%} ends it"
        return self._decide(self._advance(now_s), harm)


class Canary(_Evidence):
    """Judges one candidate by live outcomes, against those of the other replicas over the same time (unpaired).

    Speed: per bucket (at least a second, and until both sides have an outcome) the difference of mean log
    load-corrected durations per unit of work, weighted by 1 / (1/n_candidate + 1/n_others). Errors and tail: each
    outcome of the candidate is matched with the nearest outcome in time of another replica, and judged as in `Trial`.
    Requests that began before the canary did say nothing on speed: a candidate that has just begun has finished only
    short ones, and would look fast beside replicas that finish long ones too.
    """

    def __init__(
        self,
        config: TrialConfig,
        started_s: float,
        *,
        alpha: float | None = None,
        batch_half: float = 0.0,
        slots: float = 1.0,
    ) -> None:
        super().__init__(config, started_s, alpha, False, "requests")
        self._slots, self._batch_half = slots, batch_half
        self._opened_s = 0.0
        self._bucket = 0
        self._sums = {True: [0.0, 0.0], False: [0.0, 0.0]}  # candidate? -> count, sum of log durations
        self._waiting: deque[tuple[bool, float, bool]] = deque()  # all of one side: candidate?, duration, ok
        self._candidate_outcomes = 0

    def observe(self, *, candidate: bool, outcome: Outcome, now_s: float, log_speed: float = 0.0) -> None:
        """Add one finished live request. Impossible durations are dropped and counted; nothing raises.

        `log_speed` is what the replica is known to do against a usual one: the time of a usual one is judged.
        """
        elapsed_s = self._advance(now_s)
        work = outcome.cost if outcome.cost != 1.0 else float(max(outcome.items, 1))
        duration = outcome.duration_s / work * math.exp(log_speed) if _possible(work) else math.nan
        if outcome.ok and not _possible(duration):
            self.dropped += 1
            return
        self._candidate_outcomes += candidate
        timed = outcome.ok and outcome.duration_s <= elapsed_s
        if timed:
            side = self._sums[candidate]
            side[0] += 1.0
            load = load_factor(outcome.in_flight_at_start, self._slots, self._batch_half)
            side[1] += math.log(duration) - math.log(load)
            if not candidate:
                self._median.add(duration)
        self._match(candidate, duration if timed else math.nan, outcome.ok)
        self._close_bucket(elapsed_s)

    def _match(self, candidate: bool, duration: float, ok: bool) -> None:
        """Pair an outcome with one of the other side; a NaN `duration` says nothing on the tail."""
        waiting = self._waiting
        if not waiting or waiting[0][0] == candidate:
            waiting.append((candidate, duration, ok))
            if len(waiting) > UNMATCHED:
                waiting.popleft()
            return
        # the newest of the many others is the nearest in time; of candidates that wait, the oldest has waited longest
        _, partner_duration, partner_ok = waiting.pop() if candidate else waiting.popleft()
        mine, other = (duration, ok), (partner_duration, partner_ok)
        (mine_s, mine_ok), (other_s, other_ok) = (mine, other) if candidate else (other, mine)
        self._note_errors(not mine_ok, not other_ok)
        if self._errors.pairs > self.config.warmup_pairs and not math.isnan(mine_s + other_s):
            self._note_tail(mine_s, other_s)

    def _close_bucket(self, elapsed_s: float) -> None:
        (n_mine, sum_mine), (n_others, sum_others) = self._sums[True], self._sums[False]
        if elapsed_s - self._opened_s < BUCKET_S or not n_mine or not n_others:
            return
        if self._errors.pairs > self.config.warmup_pairs:
            weight = 1.0 / (1.0 / n_mine + 1.0 / n_others)
            self._bucket += 1
            self._speed.add(self._bucket, sum_mine / n_mine - sum_others / n_others, weight)
        self._sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        self._opened_s = elapsed_s

    def rule(self, now_s: float) -> Ruling:
        """The ruling as of now."""
        elapsed_s = self._advance(now_s)
        self._close_bucket(elapsed_s)
        ruling = self._decide(elapsed_s, "")
        return replace(ruling, evidence={**ruling.evidence, "candidate_outcomes": float(self._candidate_outcomes)})


def _possible(duration: float) -> bool:
    return 0.0 < duration < math.inf


def _percent(log_ratio: float) -> str:
    """A log ratio of durations as "12 % more" or "3 % less"."""
    if math.isnan(log_ratio) or math.isinf(log_ratio):
        return "unknown"
    change = math.expm1(min(log_ratio, 20.0))
    return f"{abs(change):.0%} {'more' if change >= 0.0 else 'less'}"
