"""Onsets are counted as routing meets them; forecasts of them are judged by numbers that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.series import Series
from shadecast.capacity import log_headroom
from tests.models.conftest import small_model, wave
from train.backtest import onset_rows
from train.evaluate import instants, judge, onset_truth, scaled_baselines
from train.onsets import chance_above, cold, headroom_error, onset_within, onsets, recall_at_precision

LOW, HIGH = 0.1, 0.8


def test_an_onset_stays_for_two_samples_and_comes_from_below() -> None:
    load = np.array([HIGH, HIGH, LOW, HIGH, LOW, LOW, 0.41, 0.41, HIGH, LOW, HIGH])
    assert np.flatnonzero(onsets(load)).tolist() == [6]


def test_an_instant_is_cold_after_five_seconds_of_quiet() -> None:
    load = np.array([LOW] * 6 + [HIGH] + [LOW] * 6)
    assert np.flatnonzero(cold(load, 1.0)).tolist() == [4, 5, 11, 12]
    assert np.flatnonzero(cold(load, 5.0)).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    load[9] = math.nan
    assert np.flatnonzero(cold(load, 1.0)).tolist() == [4, 5], "what is missing is not known to be quiet"


def test_whether_an_onset_comes_within_a_time_is_unknown_near_the_end_and_around_holes() -> None:
    load = np.array([LOW, LOW, LOW, HIGH, HIGH, LOW, LOW, LOW])
    assert onset_within(load, 1)[:6].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert np.isnan(onset_within(load, 1)[6:]).all()
    assert onset_within(load, 2)[:5].tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    load[4] = math.nan
    assert np.isnan(onset_within(load, 2)[[1, 2, 3]]).all()
    assert onset_within(load, 2)[0] != 1.0


def test_the_chance_of_a_level_is_read_between_the_quantiles_and_falls_off_beyond_them() -> None:
    table = np.array([[0.2, 0.4, 0.6], [0.0, 0.2, 0.6], [0.3, 0.5, 0.9], [0.0, 0.1, 0.2], [0.6, 0.7, 0.8]])
    chance = chance_above(table)
    assert chance[0] == pytest.approx(0.5)
    assert chance[1] == pytest.approx(1 - 0.7)  # half way from the median to the .9 quantile
    assert chance[2] == pytest.approx(1 - 0.3)
    # density at the .9 quantile .4/.1 = 4 a unit, so .1 exp(-4/.1 x .2)
    assert chance[3] == pytest.approx(0.1 * math.exp(-40 * 0.2))
    assert chance[4] == pytest.approx(1 - 0.1 * math.exp(-40 * 0.2))
    assert chance_above(np.array([0.3, 0.3, 0.3])) == pytest.approx(0.0)
    assert chance_above(np.array([0.5, 0.5, 0.5])) == pytest.approx(1.0)


def test_recall_is_that_of_the_lowest_threshold_that_is_still_precise_enough() -> None:
    came = np.array([1, 1, 0, 1, 0, 0, 1, 0], float)
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    # precision by threshold: 1, 1, .67, .75, .6, .5, .57, .5: three of four events
    assert recall_at_precision(score, came) == 0.75
    assert recall_at_precision(score, came, 0.8) == 0.5
    assert recall_at_precision(np.zeros(8), came) == 0.0, "a forecast that says the same of all warns of all or none"
    assert math.isnan(recall_at_precision(score, np.zeros(8)))


def test_equal_scores_are_warned_of_together() -> None:
    came = np.array([1, 1, 0, 0, 0], float)
    assert recall_at_precision(np.array([0.9, 0.5, 0.5, 0.5, 0.1]), came) == 0.5
    assert recall_at_precision(np.array([0.9, 0.5, 0.5, 0.5, 0.1])[[1, 2, 3, 4, 0]], came[[1, 2, 3, 4, 0]]) == 0.5


def test_the_headroom_error_is_that_of_the_expected_log_headroom() -> None:
    quantiles = np.array([[0.1, 0.5, 0.9], [0.2, 0.2, 0.2], [0.0, math.nan, 0.1]])
    truth = np.array([0.5, 0.2, 0.3])
    expected = 0.3 * log_headroom(0.1) + 0.4 * log_headroom(0.5) + 0.3 * log_headroom(0.9)
    assert headroom_error(quantiles, truth) == pytest.approx(abs(expected - log_headroom(0.5)) / 2)
    assert headroom_error(np.ones((1, 3)), np.ones(1)) == 0.0, "a full machine has the least headroom that counts"
    assert math.isnan(headroom_error(quantiles, np.full(3, np.nan)))


def blocks(seed: int = 0, length: int = 400) -> Series:
    """Twenty seconds of rest, ten of work."""
    values = wave(length, seed)[0]
    values[:, 0] = np.where(np.arange(length) % 30 < 20, LOW, HIGH)
    return Series("blocks", "m", str(seed), 1.0, values)


def test_truth_of_onsets_lies_beside_the_instants_that_models_are_judged_at() -> None:
    series = [blocks(), blocks(1, 200)]
    calm, came = onset_truth(series)
    seen = instants(series)
    assert len(calm) == len(came) == len(seen.truth) == len(judge(small_model(), series).truth)
    assert (seen.lags[calm, 0, -5:] <= 0.4).all()
    one = came[:, 0] == 1.0
    assert one.any()
    assert (seen.truth[one, 0, 0] == np.float32(HIGH)).all()
    assert (seen.lags[one, 0, -1] == np.float32(LOW)).all()


def test_rows_of_onsets_tell_a_forecast_that_knows_from_one_that_does_not() -> None:
    series = [blocks()]
    truth = instants(series).truth
    knows = np.repeat(np.nan_to_num(truth)[..., None], 3, axis=-1) + np.array([-0.01, 0.0, 0.01])
    blind = np.full_like(knows, LOW) + np.array([-0.01, 0.0, 0.01])
    rows = onset_rows("blocks", series, {"knows": knows, "blind": blind})
    found = {(r["model"], r["horizon_s"]): r["value"] for r in rows if r["metric"] == "onset_recall_p70"}
    assert {h for _, h in found} == {1.0, 2.0, 3.0, 5.0, 8.0, 10.0}
    assert [found["knows", h] for h in (1.0, 2.0, 3.0)] == [1.0, 1.0, 1.0]
    assert [found["blind", h] for h in (1.0, 2.0, 3.0)] == [0.0, 0.0, 0.0]


def test_a_meter_that_stood_still_and_then_moves_does_not_blow_up_the_baselines_residuals() -> None:
    """A network that was silent at first: its first byte is no multiple of how far off one usually is."""
    values = wave(100)[0]
    values[:, 2] = np.where(np.arange(100) < 75, 0.0, 1e6)
    _, residuals = scaled_baselines([Series("silent", "m", "0", 1.0, values)])
    assert np.isfinite(residuals).all()
    assert np.abs(residuals).max() <= 100.0
