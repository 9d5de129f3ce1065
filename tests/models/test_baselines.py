"""Baselines are what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from models.baselines import NAMES, Baselines, Ridge, fit_ridge, residual_quantiles
from models.grid import N_HORIZONS, N_TARGETS, STEPS
from tests.models.conftest import wave


def flat() -> tuple[Ridge, ...]:
    return (Ridge(np.zeros((N_HORIZONS, 60), np.float32), np.zeros(N_HORIZONS, np.float32)),) * N_TARGETS


def test_last_value_mean_and_ewma_by_hand() -> None:
    baselines = Baselines(1, flat())
    for t in range(40):
        out = baselines.step(np.full((1, N_TARGETS), float(t), np.float32))
    assert out.shape == (1, N_TARGETS, len(NAMES), N_HORIZONS)
    assert out[0, 0, NAMES.index("last_value")] == pytest.approx(39.0)
    assert out[0, 0, NAMES.index("mean10")] == pytest.approx(34.5)
    keep = 0.5 ** (1 / 5)
    assert out[0, 0, NAMES.index("ewma")] == pytest.approx(39 - keep / (1 - keep), abs=0.05)
    assert out[0, 0, NAMES.index("ridge60")] == pytest.approx(39.0)


def test_a_missing_sample_repeats_the_last_value() -> None:
    baselines = Baselines(1, flat())
    baselines.step(np.full((1, N_TARGETS), 3.0, np.float32))
    out = baselines.step(np.full((1, N_TARGETS), np.nan, np.float32))
    assert out[..., 0, :] == pytest.approx(3.0)


def test_the_usual_error_is_each_baselines_own_and_starts_as_the_nodes_change() -> None:
    baselines, scale = Baselines(1, flat()), np.full((1, N_TARGETS, N_HORIZONS), 7.0, np.float32)
    baselines.step(np.zeros((1, N_TARGETS), np.float32))
    assert baselines.usual_error(scale) == pytest.approx(7.0)
    for t in range(1, 200):
        baselines.step(np.full((1, N_TARGETS), float(t), np.float32))
    error = baselines.usual_error(np.full_like(scale, 1.0))[0, 0]
    assert error[NAMES.index("last_value")] == pytest.approx(STEPS, rel=1e-3)
    assert error[NAMES.index("mean10"), -1] == pytest.approx(14.5, rel=0.05)


def test_ridge_recovers_an_autoregression() -> None:
    rng = np.random.default_rng(0)
    x = np.zeros(6000)
    for t in range(2, len(x)):
        x[t] = 1.6 * x[t - 1] - 0.8 * x[t - 2] + rng.standard_normal()
    ridge = fit_ridge([x.astype(np.float32)], penalty=0.01)
    lags = np.stack([x[t - 59 : t + 1] for t in range(4000, 5900)]).astype(np.float32)
    one = 1.6 * lags[:, -1] - 0.8 * lags[:, -2]
    assert np.abs(ridge.predict(lags)[:, 0] - one).mean() < 0.15
    truth = np.stack([x[4000 + h : 5900 + h] for h in STEPS], axis=1)
    assert (np.abs(truth - ridge.predict(lags)).mean(axis=0) < np.abs(truth - lags[:, -1:]).mean(axis=0)).all()


def test_ridge_without_data_is_the_last_value() -> None:
    ridge = fit_ridge([np.zeros(10, np.float32)])
    assert ridge.predict(np.arange(60, dtype=np.float32)[None])[0] == pytest.approx(59.0)


def test_windows_with_a_missing_sample_teach_ridge_nothing() -> None:
    x = wave(400)[0, :, 0]
    broken = x.copy()
    broken[200] = np.nan
    whole, cut = fit_ridge([x[:200], x[201:]]), fit_ridge([broken])
    assert cut.weight == pytest.approx(whole.weight, abs=1e-4)


def test_residual_quantiles_are_those_of_the_residuals() -> None:
    truth = np.arange(1001, dtype=np.float32)[:, None] * np.ones((1, N_HORIZONS), np.float32)
    out = residual_quantiles(truth, np.zeros_like(truth))
    assert out[0] == pytest.approx([100, 500, 900])
