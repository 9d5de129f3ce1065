"""A small untrained model and series that models are tested with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.baselines import LAGS, NAMES, Ridge
from models.forecaster import Model
from models.grid import CHANNELS, N_HORIZONS, N_TARGETS, Array
from models.lstm import ForecastNet, LstmConfig
from shadecast.types import QUANTILES


def wave(length: int, seed: int = 0, series: int = 1) -> Array:
    """[series, time, channel]: a periodic CPU with noise, a slow memory ramp, bursty network in bytes per second."""
    rng = np.random.default_rng(seed)
    t = np.arange(length)[None]
    cpu = 0.4 + 0.3 * np.sin(t / 3 + rng.uniform(0, 6, (series, 1))) + 0.02 * rng.standard_normal((series, length))
    memory = 0.3 + 0.0005 * t + 1e-4 * rng.standard_normal((series, length))
    network = 1e6 * np.exp(rng.standard_normal((series, length)))
    rest = [100 + 50 * cpu, 2 * cpu, np.full_like(cpu, np.nan)]
    values = np.stack([np.clip(cpu, 0, 1), memory, network, *rest], axis=-1)
    assert values.shape[-1] == len(CHANNELS)
    return values.astype(np.float32)


def small_model(version: str = "small", prior: float = np.nan, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    zero = Ridge(np.zeros((N_HORIZONS, LAGS), np.float32), np.zeros(N_HORIZONS, np.float32))
    residuals = np.zeros((N_TARGETS, len(NAMES), N_HORIZONS, len(QUANTILES)), np.float32)
    residuals[..., 0], residuals[..., 2] = -1.0, 1.0
    net = ForecastNet(LstmConfig(hidden=8, mlp=8)).eval()
    return Model(version, net, (zero,) * N_TARGETS, residuals, np.full((N_TARGETS, N_HORIZONS), prior, np.float32))


@pytest.fixture
def model() -> Model:
    return small_model()
