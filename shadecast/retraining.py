"""Self-retraining: when a forecaster is trained again, whether the result is promoted, whether it is taken back.

Errors are of the expected log headroom of the CPU, squared: what routing acts on, and the score that an expectation
makes least. They are compared in pairs, block by block of the same samples. Calendar times (`wall_s`) outlive a
restart; NaN is "never".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, Self

from shadecast.config import built_from, check_numbers
from shadecast.errors import ConfigError

OFF = "off"
EVERY_S: Mapping[str, float] = {"hourly": 3600.0, "daily": 86_400.0, "weekly": 604_800.0}
LOOKS_PER_INTERVAL = 24
"""How often a log that is too small is looked at, and how soon a failed training is tried again at first."""
LONGEST_WAIT = 7.0
"""In intervals: what failures and rollbacks in a row put off is not put off for longer."""
PROMOTE_ERRORS = 2.0
"""Standard errors by which a candidate must be better: a training is judged once, so one in 40 by chance."""
ROLL_BACK_ERRORS = 3.0
"""More than for a promotion, because a version on probation is looked at again and again."""


@dataclass(frozen=True, slots=True)
class RetrainPlan:
    """How often, on how much, and by which bounds. The defaults are what `shadecast up --retrain daily` takes."""

    every_s: float = EVERY_S["daily"]
    least_machine_hours: float = 2.0
    """That the log must hold; less says nothing of a fleet."""
    least_onsets: int = 50
    """That the log must hold: rises of others' CPU above .4 that stay. All of a forecast's value is in them."""
    least_new_fraction: float = 0.25
    """Part of both bounds that must have come since the last training."""
    block_s: float = 120.0
    """Length of the blocks that are compared: neighbouring samples are alike, blocks hardly."""
    least_blocks: int = 10
    """Without so many blocks nothing is promoted and nothing is rolled back."""
    least_gain: float = 0.0
    """What a candidate must be better by, beside the uncertainty, as a part of the champion's error. Below 0 a worse
    one passes, and onsets do not count: for trials of promotion and rollback."""
    least_harm: float = 0.02
    """What a new version must be worse by live, beside the uncertainty, as a part of the former champion's error. Of
    two equal versions 3 % are rolled back by chance in 180 looks (tests), 6 % without it. Below 0: for trials."""
    least_live_s: float = 600.0
    """So long a version is watched before it may be rolled back: many nodes make many blocks of the same minutes."""
    probation_s: float = 6 * 3600.0
    """So long a new version is compared with the former champion on live samples."""
    look_s: float = 30.0
    """How often the live errors are looked at."""

    def __post_init__(self) -> None:
        bounds = {
            "every_s": (1.0, 1e8),
            "least_machine_hours": (0.0, 1e6),
            "least_onsets": (0, 1e9),
            "least_new_fraction": (0.0, 1.0),
            "block_s": (1.0, 86_400.0),
            "least_blocks": (2, 1e6),
            "least_gain": (-1e6, 1.0),
            "least_harm": (-1e6, 1e6),
            "least_live_s": (0.0, 1e8),
            "probation_s": (0.0, 1e8),
            "look_s": (0.1, 3600.0),
        }
        check_numbers("retrain", self, bounds)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; raises ConfigError on unknown names or values out of bounds."""
        return built_from(cls, "retrain", values)


def every_s(text: str) -> float | None:
    """Seconds of `hourly`, `daily`, `weekly`; None for `off`. Raises ConfigError."""
    if text == OFF:
        return None
    if text not in EVERY_S:
        raise ConfigError(f"--retrain {text!r}: must be {OFF}, {', '.join(EVERY_S)}")
    return EVERY_S[text]


# ---------------------------------------------------------------- when


@dataclass(frozen=True, slots=True)
class Probation:
    """A version that was promoted by itself, and the champion before it."""

    version: str
    former: str
    since_wall_s: float


@dataclass(frozen=True, slots=True)
class Past:
    """What came of retraining so far."""

    tried_wall_s: float = math.nan
    """When the log was last looked at, or a training of it ended."""
    small: bool = False
    """Whether the log was too small then."""
    trained_wall_s: float = math.nan
    """When the last training that went well began: later rows are new."""
    failures: int = 0
    """In a row."""
    rollbacks: int = 0
    """In a row; a version that stays ends the row."""
    probation: Probation | None = None


def due_in_s(plan: RetrainPlan, past: Past, now_wall_s: float) -> float:
    """Seconds until the log is worth a look; infinite while a version is on probation.

    A clock that was set back makes it due now, once.
    """
    if past.probation is not None:
        return math.inf
    elapsed_s = now_wall_s - past.tried_wall_s
    if not elapsed_s >= 0.0:
        return 0.0
    return max(0.0, _wait_s(plan, past) - elapsed_s)


def _wait_s(plan: RetrainPlan, past: Past) -> float:
    wait_s = plan.every_s
    if past.failures:
        wait_s = _doubled(plan.every_s / LOOKS_PER_INTERVAL, past.failures - 1, plan)
    elif past.small:
        wait_s = plan.every_s / LOOKS_PER_INTERVAL
    if past.rollbacks and not past.small:
        wait_s = max(wait_s, _doubled(plan.every_s, past.rollbacks, plan))
    return wait_s


def _doubled(first_s: float, times: int, plan: RetrainPlan) -> float:
    return min(first_s * 2.0 ** min(times, 64), LONGEST_WAIT * plan.every_s)


@dataclass(frozen=True, slots=True)
class LogContent:
    """What a log holds, and how much of it has come since the last training."""

    machine_hours: float
    onsets: int
    new_machine_hours: float
    new_onsets: int


def too_small(plan: RetrainPlan, log: LogContent) -> str:
    """Why a log is not worth a training, "" where it is. What has not been trained on yet is all new."""
    part = plan.least_new_fraction
    bounds = (
        ("the log holds", log.machine_hours, plan.least_machine_hours, log.onsets, plan.least_onsets),
        (
            "since the last training came",
            log.new_machine_hours,
            part * plan.least_machine_hours,
            log.new_onsets,
            part * plan.least_onsets,
        ),
    )
    for where, hours, least_hours, onsets, least_onsets in bounds:
        if hours < least_hours or onsets < least_onsets:
            return (
                f"{where} {hours:.3g} machine hours with {onsets} onsets, "
                f"{least_hours:.3g} with {math.ceil(least_onsets)} are needed"
            )
    return ""


# ---------------------------------------------------------------- whether


@dataclass(frozen=True, slots=True)
class Block:
    """The same samples of one machine judged for two forecasts: sums of their errors."""

    samples: float
    reference: float
    other: float


@dataclass(frozen=True, slots=True)
class Gain:
    """How much lower the other's error is, as a part of the reference's, and the standard error of that."""

    gain: float
    error: float
    blocks: int


def paired(blocks: Sequence[Block]) -> Gain:
    """The ratio estimator over blocks (Cochran, Sampling Techniques, 1977, chapter 6): R = sum d / sum r, d = r - o.

    Its variance is n / (n - 1) * sum (d - R r)^2 / (sum r)^2. The error is infinite for less than two blocks, and where
    the reference is never wrong.
    """
    total = math.fsum(b.reference for b in blocks)
    if len(blocks) < 2 or not total > 0.0:
        return Gain(0.0, math.inf, len(blocks))
    ratio = math.fsum(b.reference - b.other for b in blocks) / total
    squares = math.fsum((b.reference - b.other - ratio * b.reference) ** 2 for b in blocks)
    return Gain(ratio, math.sqrt(len(blocks) / (len(blocks) - 1) * squares) / total, len(blocks))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate beside the champion on times and machines that neither was trained on.

    Recalls of onsets at a precision of .7 are means over horizons; NaN: no onset came.
    """

    headroom: Gain
    candidate_recall: float
    champion_recall: float
    recall_error: float
    """Standard error of the difference."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """A decision in words."""

    yes: bool
    reason: str


def rule_promotion(plan: RetrainPlan, found: Comparison) -> Ruling:
    """Promote what expects headroom better, and foresees onsets no worse, each by more than its uncertainty."""
    gain, error, blocks = found.headroom.gain, found.headroom.error, found.headroom.blocks
    if blocks < plan.least_blocks:
        return Ruling(False, f"{blocks} blocks were held out, {plan.least_blocks} are needed")
    if not math.isfinite(error):
        return Ruling(False, "the champion was never wrong on what was held out")
    said = f"headroom error lower by {100 * gain:.1f} % (+-{100 * error:.1f})"
    if gain - plan.least_gain <= PROMOTE_ERRORS * error:
        return Ruling(False, f"{said}: not by more than the uncertainty")
    if plan.least_gain < 0.0:
        return Ruling(True, f"{said}; onsets do not count, because least_gain is below 0")
    worse = found.champion_recall - found.candidate_recall
    if not math.isfinite(worse) or not math.isfinite(found.recall_error):
        return Ruling(False, f"{said}, but no onset came in what was held out")
    said += (
        f", onset recall {found.candidate_recall:.2f} against {found.champion_recall:.2f} (+-{found.recall_error:.2f})"
    )
    if worse > PROMOTE_ERRORS * found.recall_error:
        return Ruling(False, f"{said}: it foresees fewer onsets")
    return Ruling(True, said)


class Live(Enum):
    """What becomes of a version on probation."""

    WATCH = "watch"
    KEEP = "keep"
    ROLL_BACK = "roll back"


def rule_live(plan: RetrainPlan, found: Gain, elapsed_s: float) -> tuple[Live, str]:
    """Roll back what is worse live than the former champion; after the probation it stays.

    `found` is over blocks of live samples: `reference` is the former champion's error, `other` the new version's.
    """
    said = f"live headroom error {100 * -found.gain:+.1f} % (+-{100 * found.error:.1f}, {found.blocks} blocks)"
    if found.blocks < plan.least_blocks or not math.isfinite(found.error):
        said = f"{found.blocks} of {plan.least_blocks} blocks of live samples"
    elif not 0.0 <= elapsed_s < plan.least_live_s and -found.gain - ROLL_BACK_ERRORS * found.error > plan.least_harm:
        return Live.ROLL_BACK, said
    if 0.0 <= elapsed_s < plan.probation_s:
        return Live.WATCH, said
    return Live.KEEP, said


@dataclass(frozen=True, slots=True)
class LiveErrors:
    """What a node's forecaster tells: sums of errors since it runs these versions, over the same samples.

    `challenger` is NaN where none runs in shadow.
    """

    node: str
    seconds: float
    champion_version: str
    challenger_version: str
    champion: float
    challenger: float
    last_value: float


@dataclass(slots=True)
class LiveBook:
    """Blocks of one probation: readings in, differences of the sums once a node has gone on for `block_s`.

    The reference is the former champion where it runs in shadow, else (an operator has something else in shadow) the
    last value.
    """

    probation: Probation
    block_s: float
    blocks: list[Block] = field(default_factory=list)
    _last: dict[str, LiveErrors] = field(default_factory=dict)

    def take(self, readings: Iterable[LiveErrors]) -> None:
        """A round of readings; those of other versions, or of a forecaster that has started anew, begin a block."""
        for new in readings:
            if new.champion_version != self.probation.version:
                self._last.pop(new.node, None)
                continue
            old = self._last.get(new.node)
            if old is None or old.challenger_version != new.challenger_version or new.seconds < old.seconds:
                self._last[new.node] = new
                continue
            if new.seconds - old.seconds < self.block_s:
                continue
            self._last[new.node] = new
            shadowed = new.challenger_version == self.probation.former
            reference = new.challenger - old.challenger if shadowed else new.last_value - old.last_value
            block = Block(new.seconds - old.seconds, reference, new.champion - old.champion)
            if math.isfinite(block.reference) and math.isfinite(block.other):
                self.blocks.append(block)


# ---------------------------------------------------------------- what follows


def after_look(past: Past, now_wall_s: float) -> Past:
    """The log was too small."""
    return replace(past, tried_wall_s=now_wall_s, small=True, failures=0)


def after_failure(past: Past, now_wall_s: float) -> Past:
    """A training failed."""
    return replace(past, tried_wall_s=now_wall_s, small=False, failures=past.failures + 1)


def after_training(past: Past, began_wall_s: float, now_wall_s: float, probation: Probation | None) -> Past:
    """A training went well; `probation` where its version was promoted."""
    return replace(
        past, tried_wall_s=now_wall_s, small=False, failures=0, trained_wall_s=began_wall_s, probation=probation
    )


def after_probation(past: Past, now_wall_s: float, *, rolled_back: bool) -> Past:
    """A version stays, or was taken back: then the next training waits, twice as long each time."""
    rollbacks = past.rollbacks + 1 if rolled_back else 0
    tried_wall_s = now_wall_s if rolled_back else past.tried_wall_s
    return replace(past, tried_wall_s=tried_wall_s, rollbacks=rollbacks, probation=None, small=False)


def plain(past: Past) -> dict[str, Any]:
    """As JSON values, to be kept."""
    values: dict[str, Any] = {f.name: getattr(past, f.name) for f in fields(past)}
    values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
    if past.probation is not None:
        values["probation"] = {f.name: getattr(past.probation, f.name) for f in fields(past.probation)}
    return values


def past_of(values: Any) -> Past:
    """What was kept; nothing where that cannot be read."""
    try:
        found: dict[str, Any] = {
            k: math.nan if v is None and k.endswith("wall_s") else v for k, v in dict(values).items()
        }
        if found.get("probation") is not None:
            found["probation"] = Probation(**found["probation"])
        return Past(**found)
    except (TypeError, ValueError):
        return Past()
