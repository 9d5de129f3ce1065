"""The model at work: one node or many, gaps, floods of nonsense, long runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from models.forecaster import Model, OnlineForecaster, forecast_of
from models.grid import CHANNELS, N_HORIZONS, N_TARGETS
from models.registry import Registry
from tests.models.conftest import small_model, wave


def test_many_series_side_by_side_forecast_as_each_does_alone(model: Model) -> None:
    values = wave(90, series=3)
    together = OnlineForecaster(model, series=3, ceiling=(1.0, 1.0, math.inf))
    alone = [OnlineForecaster(model, ceiling=(1.0, 1.0, math.inf)) for _ in range(3)]
    for t in range(90):
        whole = together.step(values[:, t])
        for i, one in enumerate(alone):
            single = one.step(values[i : i + 1, t])
            assert np.allclose(single.quantiles[0], whole.quantiles[i], rtol=1e-3, atol=1e-4)
            assert np.allclose(single.gated[0], whole.gated[i], rtol=1e-3, atol=1e-4)


def test_quantiles_rise_and_stay_in_bounds_whatever_is_fed() -> None:
    rng = np.random.default_rng(3)
    forecaster = OnlineForecaster(small_model(seed=5))
    kinds = [0.0, 1.0, math.nan, math.inf, -5.0, 1e30, 0.5]
    for _ in range(150):
        values = rng.choice(kinds, size=(1, len(CHANNELS))).astype(np.float32)
        prediction = forecaster.step(values)
        for table in (prediction.quantiles, prediction.gated):
            assert np.isfinite(table).all()
            assert (np.diff(table, axis=-1) >= 0).all()
            assert table.min() >= 0
            assert table.max() <= 1


def test_a_closed_gate_means_the_best_baseline(model: Model) -> None:
    forecaster = OnlineForecaster(model, ceiling=(1.0, 1.0, math.inf))
    for v in wave(80)[0]:
        prediction = forecaster.step(v[None])
    assert (prediction.gate == 0).all()
    experts = forecaster.experts[0]
    for t in range(N_TARGETS):
        for h in range(N_HORIZONS):
            assert any(np.allclose(prediction.gated[0, t, h], experts[t, e, h]) for e in range(1, experts.shape[1]))


def test_a_proven_model_starts_with_an_open_gate() -> None:
    forecaster = OnlineForecaster(small_model(prior=0.3))
    assert forecaster.step(wave(1)[:, 0]).gate == pytest.approx(1.0)


def test_a_message_leaves_out_resources_that_are_unknown(model: Model) -> None:
    forecaster = OnlineForecaster(model)
    values = wave(40)
    values[..., 2] = np.nan
    for v in values[0]:
        prediction = forecaster.step(v[None])
    forecast = forecast_of(prediction, "x")
    assert forecast is not None
    assert set(forecast.quantiles) == {"cpu", "memory"}


def test_swapping_versions_keeps_the_features_and_drops_the_verdicts(model: Model) -> None:
    forecaster = OnlineForecaster(model)
    for v in np.clip(wave(80)[0], 0, 1):
        forecaster.step(v[None])
    forecaster.swap(replace(small_model("next", prior=0.5), version="next"))
    prediction = forecaster.step(np.clip(wave(81)[:, 80], 0, 1))
    assert prediction.ready[0].all()
    assert prediction.gate == pytest.approx(1.0)


def test_half_an_hour_of_samples_is_forecast_as_well_at_its_end_as_at_its_start() -> None:
    registry = Registry()
    forecaster = OnlineForecaster(registry.load(registry.champion()), series=4)
    values = wave(600, series=4)
    values[..., 2] /= 1e8
    early: list[float] = []
    late: list[float] = []
    for t in range(1800):
        now = values[:, t % 600]
        prediction = forecaster.step(now)
        if 300 <= t < 580:
            early.append(float(np.abs(prediction.quantiles[:, 0, 0, 1] - values[:, (t + 1) % 600, 0]).mean()))
        if 1500 <= t < 1780 and t % 600 < 580:
            late.append(float(np.abs(prediction.quantiles[:, 0, 0, 1] - values[:, (t + 1) % 600, 0]).mean()))
    assert np.mean(late) < 1.5 * np.mean(early) + 0.01


def test_an_alarm_is_a_median_beyond_the_mark_on_a_node_that_is_well() -> None:
    forecaster = OnlineForecaster(small_model(seed=5))
    seen = set()
    for t in range(300):
        values = np.full((1, len(CHANNELS)), 0.1, np.float32)
        values[0, 0] = 0.95 if t % 30 < 10 else 0.1
        prediction = forecaster.step(values)
        says = bool((prediction.quantiles[0, 0, :, 1] > 0.4).any())
        well = values[0, 0] <= 0.4
        assert bool(prediction.alarm[0]) == (says and well)
        seen.add((says, bool(well)))
    assert (True, False) in seen
    assert (False, True) in seen or (True, True) in seen
