"""When a fleet's forecaster is trained again, whether the result is promoted, and whether it is taken back.

Invariants: 1. nothing starts while a version is on probation; 2. no wait is longer than seven intervals; 3. failures
and rollbacks in a row never shorten a wait; 4. without enough blocks nothing is promoted and nothing is rolled back;
5. what is worse on its own blocks is never promoted, what is better live is never rolled back.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.errors import ConfigError
from shadecast.retraining import (
    LONGEST_WAIT,
    Block,
    Comparison,
    Gain,
    Live,
    LiveBook,
    LiveErrors,
    LogContent,
    Past,
    Probation,
    RetrainPlan,
    after_failure,
    after_look,
    after_probation,
    after_training,
    due_in_s,
    every_s,
    paired,
    past_of,
    plain,
    rule_live,
    rule_promotion,
    too_small,
)

PLAN = RetrainPlan()
HOUR_S, DAY_S = 3600.0, 86_400.0
NOW_S = 1_800_000_000.0
PROBATION = Probation("new", "old", NOW_S)


@pytest.mark.parametrize(
    ("text", "seconds"), [("off", None), ("hourly", HOUR_S), ("daily", DAY_S), ("weekly", 7 * DAY_S)]
)
def test_the_option_says_how_often(text: str, seconds: float | None) -> None:
    assert every_s(text) == seconds


@pytest.mark.parametrize("text", ["", "Daily", "sometimes", "3600"])
def test_another_word_is_one_error_that_names_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--retrain .*: must be off, hourly, daily, weekly"):
        every_s(text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"least_machine_hours": -1}, r"retrain\.least_machine_hours = -1: must be a number from 0 to"),
        ({"least_blocks": 1}, r"retrain\.least_blocks = 1: must be a number from 2"),
        ({"every_s": math.nan}, r"retrain\.every_s = nan"),
        ({"every_s": "daily"}, r"retrain\.every_s = 'daily'"),
        ({"least_onset": 5}, r"retrain\.least_onset: unknown setting; known are .*least_onsets"),
    ],
)
def test_a_wrong_setting_is_one_error_with_its_name_value_and_bound(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RetrainPlan.from_mapping(values)


@pytest.mark.parametrize(
    ("past", "hours"),
    [
        (Past(), 0.0),
        (Past(tried_wall_s=NOW_S), 24.0),
        (Past(tried_wall_s=NOW_S - 20 * HOUR_S), 4.0),
        (Past(tried_wall_s=NOW_S - 30 * HOUR_S), 0.0),
        (Past(tried_wall_s=NOW_S, small=True), 1.0),
        (Past(tried_wall_s=NOW_S, failures=1), 1.0),
        (Past(tried_wall_s=NOW_S, failures=2), 2.0),
        (Past(tried_wall_s=NOW_S, failures=5), 16.0),
        (Past(tried_wall_s=NOW_S, failures=500), 7 * 24.0),
        (Past(tried_wall_s=NOW_S, rollbacks=1), 48.0),
        (Past(tried_wall_s=NOW_S, rollbacks=2), 96.0),
        (Past(tried_wall_s=NOW_S, rollbacks=1, failures=1), 48.0),
        (Past(tried_wall_s=NOW_S, rollbacks=9), 7 * 24.0),
        (Past(tried_wall_s=NOW_S + 1e6), 0.0),  # the clock was set back
        (Past(tried_wall_s=NOW_S - 1e6, probation=PROBATION), math.inf),
    ],
)
def test_daily_waits(past: Past, hours: float) -> None:
    assert due_in_s(PLAN, past, NOW_S) == pytest.approx(hours * HOUR_S)


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.booleans(),
    st.floats(0, 1e7),
    st.sampled_from([1.0, HOUR_S, DAY_S, 7 * DAY_S]),
)
def test_failures_and_rollbacks_never_shorten_a_wait_nor_put_off_for_more_than_seven_intervals(
    failures: int, rollbacks: int, small: bool, elapsed_s: float, interval_s: float
) -> None:
    plan = replace(PLAN, every_s=interval_s)
    past = Past(tried_wall_s=NOW_S - elapsed_s, small=small, failures=failures, rollbacks=rollbacks)
    wait_s = due_in_s(plan, past, NOW_S)
    assert 0.0 <= wait_s <= LONGEST_WAIT * interval_s
    if failures:
        assert due_in_s(plan, replace(past, failures=failures + 1), NOW_S) >= wait_s
    assert due_in_s(plan, replace(past, rollbacks=rollbacks + 1), NOW_S) >= wait_s


@given(st.lists(st.sampled_from(["look", "fail", "train", "promote", "keep", "roll back"]), max_size=30))
def test_whatever_happens_it_is_due_again_and_can_be_kept_as_json(events: list[str]) -> None:
    past, now_s = Past(), NOW_S
    for event in events:
        now_s += 1000.0
        match event:
            case "look":
                past = after_look(past, now_s)
            case "fail":
                past = after_failure(past, now_s)
            case "train":
                past = after_training(past, now_s - 500.0, now_s, None)
            case "promote":
                past = after_training(past, now_s - 500.0, now_s, Probation("v", "w", now_s))
            case _:
                past = after_probation(past, now_s, rolled_back=event == "roll back")
        assert plain(past_of(json.loads(json.dumps(plain(past))))) == plain(past)
        assert (due_in_s(PLAN, past, now_s) == math.inf) == (past.probation is not None)


@pytest.mark.parametrize("kept", [None, 3, {"failures": 1, "no_such": 2}, {"probation": {"version": "v"}}])
def test_what_was_kept_and_cannot_be_read_is_nothing(kept: object) -> None:
    assert plain(past_of(kept)) == plain(Past())


def test_after_a_rollback_the_next_training_waits_and_one_that_stays_ends_that() -> None:
    promoted = after_training(Past(), NOW_S - 600.0, NOW_S, PROBATION)
    back = after_probation(promoted, NOW_S + 1000.0, rolled_back=True)
    assert due_in_s(PLAN, back, NOW_S + 1000.0) == 2 * DAY_S, "not promoted again at once"
    stays = after_probation(replace(promoted, rollbacks=3), NOW_S + 6 * HOUR_S, rolled_back=False)
    assert due_in_s(PLAN, stays, NOW_S + 6 * HOUR_S) == 18 * HOUR_S, "a day after the training, as if nothing were"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (LogContent(2.0, 50, 2.0, 50), ""),
        (LogContent(1.99, 500, 1.99, 500), "the log holds 1.99 machine hours with 500 onsets, 2 with 50 are needed"),
        (LogContent(100.0, 49, 100.0, 49), "the log holds 100 machine hours with 49 onsets"),
        (LogContent(100.0, 500, 0.5, 13), ""),
        (LogContent(100.0, 500, 0.4, 20), "since the last training came 0.4 machine hours with 20 onsets, 0.5 with 13"),
        (LogContent(100.0, 500, 24.0, 12), "since the last training came 24 machine hours with 12 onsets"),
    ],
)
def test_a_log_is_trained_on_from_two_machine_hours_with_fifty_onsets_of_which_a_quarter_are_new(
    log: LogContent, words: str
) -> None:
    assert too_small(PLAN, log).startswith(words)
    assert bool(too_small(PLAN, log)) == bool(words)


def test_lower_bounds_are_taken_from_the_plan() -> None:
    plan = replace(PLAN, least_machine_hours=0.01, least_onsets=0)
    assert not too_small(plan, LogContent(0.01, 0, 0.01, 0))


# ---------------------------------------------------------------- pairs


def test_the_gain_is_the_part_of_the_error_that_is_saved_and_its_error_that_of_a_ratio() -> None:
    blocks = [Block(1, 10.0, 8.0), Block(1, 20.0, 18.0), Block(1, 30.0, 22.0)]
    found = paired(blocks)
    ratio = 12.0 / 60.0
    squares = sum((d - ratio * r) ** 2 for d, r in ((2.0, 10.0), (2.0, 20.0), (8.0, 30.0)))
    assert found == Gain(pytest.approx(ratio), pytest.approx(math.sqrt(1.5 * squares) / 60.0), 3)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), max_size=40))
def test_twice_the_unit_is_the_same_gain_and_equal_forecasts_gain_nothing(errors: list[tuple[float, float]]) -> None:
    once = paired([Block(1.0, a, b) for a, b in errors])
    twice = paired([Block(1.0, 2 * a, 2 * b) for a, b in errors])
    assert (twice.gain, twice.error) == (pytest.approx(once.gain), pytest.approx(once.error))
    assert paired([Block(1.0, a, a) for a, _ in errors]).gain == 0.0
    assert once.gain <= 1.0


def test_the_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    rng, inside, runs = random.Random(1), 0, 400
    for _ in range(runs):
        scale = [rng.expovariate(1.0) + 0.1 for _ in range(40)]
        blocks = [Block(1.0, s, s * (0.9 + rng.gauss(0.0, 0.2))) for s in scale]
        found = paired(blocks)
        inside += abs(found.gain - 0.1) <= 2.0 * found.error
    assert 0.90 <= inside / runs <= 0.98


# ---------------------------------------------------------------- promotion


def comparison(
    gain: float, error: float, blocks: int = 30, candidate: float = 0.5, champion: float = 0.5
) -> Comparison:
    return Comparison(Gain(gain, error, blocks), candidate, champion, 0.05)


@pytest.mark.parametrize(
    ("found", "promoted", "words"),
    [
        (comparison(0.10, 0.04), True, "headroom error lower by 10.0 % (+-4.0), onset recall 0.50 against 0.50"),
        (comparison(0.08, 0.04), False, "not by more than the uncertainty"),
        (comparison(-0.10, 0.01), False, "not by more than the uncertainty"),
        (comparison(0.10, 0.04, blocks=9), False, "9 blocks were held out, 10 are needed"),
        (comparison(0.10, math.inf), False, "the champion was never wrong"),
        (comparison(0.10, 0.04, candidate=0.41), True, ""),
        (comparison(0.10, 0.04, candidate=0.39), False, "foresees fewer onsets"),
        (comparison(0.10, 0.04, candidate=0.9), True, ""),
        (comparison(0.10, 0.04, candidate=math.nan), False, "no onset came"),
        (replace(comparison(0.10, 0.04), recall_error=math.inf), False, "no onset came"),
    ],
)
def test_a_candidate_must_expect_headroom_better_and_foresee_onsets_no_worse(
    found: Comparison, promoted: bool, words: str
) -> None:
    ruling = rule_promotion(PLAN, found)
    assert ruling.yes is promoted
    assert words in ruling.reason


def test_a_trial_of_promotion_lets_a_worse_one_pass_only_where_the_plan_says_so() -> None:
    worse = comparison(-0.5, 0.01, candidate=0.0)
    assert not rule_promotion(PLAN, worse).yes
    assert "least_gain is below 0" in rule_promotion(replace(PLAN, least_gain=-10.0), worse).reason
    assert not rule_promotion(replace(PLAN, least_gain=0.2), comparison(0.25, 0.04)).yes, "above 0 it asks for more"


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), max_size=60),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_what_is_worse_or_too_short_is_never_promoted(
    errors: list[tuple[float, float]], candidate: float, champion: float
) -> None:
    gain = paired([Block(1.0, a, b) for a, b in errors])
    if rule_promotion(PLAN, Comparison(gain, candidate, champion, 0.1)).yes:
        assert sum(b for _, b in errors) < sum(a for a, _ in errors)
        assert len(errors) >= PLAN.least_blocks
        assert candidate >= champion - 0.2 - 1e-9


# ---------------------------------------------------------------- live


@pytest.mark.parametrize(
    ("found", "elapsed_s", "becomes"),
    [
        (Gain(-0.10, 0.01, 30), 600.0, Live.ROLL_BACK),
        (Gain(-0.10, 0.01, 30), 1e9, Live.ROLL_BACK),
        (Gain(-0.10, 0.01, 30), 599.0, Live.WATCH),
        (Gain(-0.10, 0.04, 30), 600.0, Live.WATCH),
        (Gain(-0.019, 0.001, 30), 600.0, Live.WATCH),
        (Gain(-0.049, 0.01, 30), 600.0, Live.WATCH),
        (Gain(-0.051, 0.01, 30), 600.0, Live.ROLL_BACK),
        (Gain(-0.10, 0.01, 9), 600.0, Live.WATCH),
        (Gain(0.10, 0.01, 30), 600.0, Live.WATCH),
        (Gain(0.10, 0.01, 30), PLAN.probation_s, Live.KEEP),
        (Gain(0.0, math.inf, 0), PLAN.probation_s, Live.KEEP),
        (Gain(0.0, 0.01, 30), -5.0, Live.KEEP),  # the clock was set back: nothing is watched for ever
    ],
)
def test_on_probation(found: Gain, elapsed_s: float, becomes: Live) -> None:
    assert rule_live(PLAN, found, elapsed_s)[0] is becomes


def test_a_trial_of_rollback_takes_a_better_one_back_only_where_the_plan_says_so() -> None:
    better = Gain(0.5, 0.01, 30)
    assert rule_live(PLAN, better, 600.0)[0] is Live.WATCH
    assert rule_live(replace(PLAN, least_harm=-10.0), better, 600.0)[0] is Live.ROLL_BACK
    assert rule_live(replace(PLAN, least_harm=-10.0), replace(better, blocks=9), 600.0)[0] is Live.WATCH


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), max_size=60), st.floats(0, 1e6))
def test_what_is_no_worse_live_is_never_rolled_back(errors: list[tuple[float, float]], elapsed_s: float) -> None:
    found = paired([Block(1.0, a, b) for a, b in errors])
    if rule_live(PLAN, found, elapsed_s)[0] is Live.ROLL_BACK:
        assert sum(b for _, b in errors) > sum(a for a, _ in errors)
        assert len(errors) >= PLAN.least_blocks


def watched(rng: random.Random, worse: float, looks: int) -> bool:
    """Whether a version that is that much worse is rolled back within so many looks, one block each."""
    blocks: list[Block] = []
    for _ in range(looks):
        reference = rng.expovariate(1.0) + 0.05
        blocks.append(Block(120.0, reference, reference * (1.0 + worse + rng.gauss(0.0, 0.15))))
        if rule_live(PLAN, paired(blocks), 600.0)[0] is Live.ROLL_BACK:
            return True
    return False


def test_equal_versions_are_seldom_rolled_back_and_one_that_is_a_tenth_worse_nearly_always() -> None:
    """180 looks: six hours of one node. The rule is asked at every look, so more than one in 740 are by chance."""
    rng, runs = random.Random(7), 300
    assert sum(watched(rng, 0.0, 180) for _ in range(runs)) / runs <= 0.05
    assert sum(watched(rng, 0.1, 180) for _ in range(runs)) / runs >= 0.97


def reading(seconds: float, new: float, old: float, last: float = 0.0, **values: str) -> LiveErrors:
    versions = {"champion_version": "new", "challenger_version": "old"} | values
    return LiveErrors("n1", seconds, champion=new, challenger=old, last_value=last, **versions)


def test_live_blocks_are_differences_of_the_sums_once_a_node_has_gone_on_long_enough() -> None:
    book = LiveBook(PROBATION, block_s=120.0)
    for seconds in (0.0, 60.0, 120.0, 180.0, 260.0):
        book.take([reading(seconds, 0.2 * seconds, 0.1 * seconds)])
    assert book.blocks == [Block(120.0, pytest.approx(12.0), pytest.approx(24.0)), Block(140.0, 14.0, 28.0)]


def test_where_the_former_champion_is_not_in_shadow_the_last_value_is_the_reference() -> None:
    book = LiveBook(PROBATION, block_s=10.0)
    for seconds in (0.0, 10.0):
        book.take([reading(seconds, seconds, math.nan, 3.0 * seconds, challenger_version="operators")])
    assert book.blocks == [Block(10.0, 30.0, 10.0)]


def test_a_forecaster_that_starts_anew_or_runs_another_version_makes_no_block() -> None:
    book = LiveBook(PROBATION, block_s=10.0)
    book.take([reading(500.0, 50.0, 50.0)])
    book.take([reading(20.0, 2.0, 2.0)])
    book.take([reading(40.0, 4.0, 4.0, champion_version="another")])
    book.take([reading(60.0, 6.0, 6.0)])
    book.take([reading(80.0, 8.0, 8.0, challenger_version="")])
    assert book.blocks == []
