"""The net keeps its promises on shapes, order, state and learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.features import N_ANCHORS, N_FEATURES
from models.grid import N_HEADS
from models.lstm import ForecastNet, LstmConfig, pinball
from models.windows import batch_of
from shadecast.errors import ConfigError
from tests.models.conftest import wave


def random_inputs(batch: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    anchors = torch.rand(batch, time, N_HEADS, N_ANCHORS, generator=g)
    spread = torch.rand(batch, time, N_HEADS, generator=g) + 0.01
    return torch.randn(batch, time, N_FEATURES, generator=g), anchors, spread


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 60])
@pytest.mark.parametrize("config", [LstmConfig(), LstmConfig(hidden=4, layers=2, mlp=3)])
def test_shapes_over_a_grid(batch: int, time: int, config: LstmConfig) -> None:
    quantiles, state = ForecastNet(config)(*random_inputs(batch, time))
    assert quantiles.shape == (batch, time, N_HEADS, 3)
    assert state[0].shape == (config.layers, batch, config.hidden)


def test_quantiles_rise_whatever_the_weights() -> None:
    net = ForecastNet(LstmConfig(hidden=8, mlp=8))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=2.0)
    quantiles, _ = net(*random_inputs(4, 20))
    assert (quantiles.diff(dim=-1) >= 0).all()


def test_stepping_one_sample_at_a_time_equals_the_whole_window() -> None:
    net = ForecastNet(LstmConfig()).eval()
    inputs, anchors, spread = random_inputs(3, 60)
    with torch.inference_mode():
        whole, _ = net(inputs, anchors, spread)
        state = None
        for t in range(60):
            one, state = net(inputs[:, t : t + 1], anchors[:, t : t + 1], spread[:, t : t + 1], state)
            assert torch.allclose(one[:, 0], whole[:, t], atol=1e-5)


def test_an_untrained_net_stays_near_its_anchors() -> None:
    inputs, anchors, spread = random_inputs(2, 10)
    quantiles, _ = ForecastNet(LstmConfig())(inputs, anchors, spread)
    off = (quantiles[..., 1] - anchors[..., 0]).abs() / spread
    assert off.median() < 20.0
    assert torch.isfinite(quantiles).all()


def test_pinball_is_least_at_the_true_quantile() -> None:
    sample = torch.arange(1000, dtype=torch.float32)

    def loss(shift: float) -> float:
        q = torch.tensor([100.0 + shift, 500.0 + shift, 900.0 + shift]).expand(1000, 3)
        return float(pinball(q, sample).mean())

    assert loss(0.0) < min(loss(-50.0), loss(50.0))


def test_one_batch_can_be_overfitted() -> None:
    torch.manual_seed(0)
    net = ForecastNet(LstmConfig(hidden=16, mlp=16))
    batch = batch_of(list(wave(120, series=2)))
    rows = [torch.from_numpy(np.moveaxis(x, 2, 1).reshape(6, 120, *x.shape[3:])) for x in (batch.inputs, batch.anchors)]
    spread = torch.from_numpy(np.moveaxis(batch.spread, 2, 1).reshape(6, 120, -1))
    truth = torch.from_numpy(np.moveaxis(batch.truth, 2, 1).reshape(6, 120, -1))
    known = torch.isfinite(truth)
    known[:, :10] = False
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(80):
        optimiser.zero_grad()
        quantiles, _ = net(rows[0], rows[1], spread)
        gap = pinball(quantiles, truth.nan_to_num()).mean(-1) / spread
        loss = gap[known].mean()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["hidden", "layers", "mlp", "features"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 100_000])
def test_a_shape_out_of_bounds_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"lstm\.{name} = "):
        LstmConfig(**{name: value})  # type: ignore[arg-type]
