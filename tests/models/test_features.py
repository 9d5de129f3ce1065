"""Features are causal, free of units, finite whatever comes, and exact where they claim to be."""

from __future__ import annotations

import numpy as np
import pytest

from models.features import ANCHORS, N_ANCHORS, N_EXTENDED_FEATURES, N_FEATURES, Features, Running, Step
from models.grid import CHANNELS, EXTENDED, N_HEADS, N_HORIZONS, N_TARGETS, STEPS, Array
from tests.models.conftest import wave


def run(values: Array) -> list[Step]:
    features = Features(len(values))
    return [features.step(values[:, t]) for t in range(values.shape[1])]


def test_shapes_are_as_documented() -> None:
    step = run(wave(5, series=3))[-1]
    assert step.inputs.shape == (3, N_TARGETS, N_FEATURES)
    assert step.anchors.shape == (3, N_TARGETS, N_HEADS, N_ANCHORS)
    assert step.scale.shape == (3, N_TARGETS, N_HORIZONS)
    assert step.spread.shape == (3, N_TARGETS, N_HEADS)
    assert step.ready.shape == (3, N_TARGETS)


def test_further_channels_stand_behind_the_others_and_change_none_of_them() -> None:
    values = wave(40)[0]
    more = np.random.default_rng(0).random((40, len(EXTENDED))).astype(np.float32)
    more[:, 2] = np.nan
    usual, wide, without = Features(1), Features(1, extended=True), Features(1, extended=True)
    for now, further in zip(values, more, strict=True):
        row = np.concatenate([now, further])[None]
        a, b, c = usual.step(row).inputs, wide.step(row).inputs, without.step(now[None]).inputs
    assert b.shape == (1, N_TARGETS, N_EXTENDED_FEATURES)
    assert np.array_equal(a, b[..., :N_FEATURES])
    assert b[0, 0, -len(EXTENDED) :].tolist() == [1, 1, 0, 1, 1, 1, 1], "what is missing is masked"
    assert not c[..., N_FEATURES:].any()
    assert np.isfinite(b).all()


def test_a_later_value_never_changes_an_earlier_feature() -> None:
    values = wave(120)
    other = values.copy()
    other[:, 80:] = 0.9
    for a, b in zip(run(values)[:80], run(other)[:80], strict=True):
        assert np.array_equal(a.inputs, b.inputs)
        assert np.array_equal(a.anchors, b.anchors)


def test_series_side_by_side_are_what_each_is_alone() -> None:
    values = wave(90, series=4)
    together = run(values)[-1]
    for i in range(4):
        alone = run(values[i : i + 1])[-1]
        assert alone.inputs[0] == pytest.approx(together.inputs[i], abs=1e-4)


def test_network_features_do_not_depend_on_the_unit() -> None:
    values = wave(200)
    scaled = values.copy()
    scaled[..., 2] *= 1e-6
    a, b = run(values)[-1], run(scaled)[-1]
    assert a.inputs[0, 2] == pytest.approx(b.inputs[0, 2], abs=2e-2)
    assert a.scale[0, 2] == pytest.approx(b.scale[0, 2] * 1e6, rel=1e-2)


def test_a_running_mean_is_exact_from_the_first_sample_and_skips_what_is_missing() -> None:
    running = Running((1,), half_life=60.0)
    running.add(np.array([5.0], np.float32), np.array([True]))
    assert running.mean()[0] == pytest.approx(5.0)
    running.add(np.array([99.0], np.float32), np.array([False]))
    assert running.mean()[0] == pytest.approx(5.0)


def test_scale_is_the_mean_absolute_change_over_each_horizon() -> None:
    values = np.zeros((1, 400, len(CHANNELS)), np.float32)
    values[0, :, 0] = 0.5 + 0.001 * np.arange(400)
    values[0, :, 0] = np.minimum(values[0, :, 0], 0.9)
    step = run(values[:, :300])[-1]
    assert step.scale[0, 0] == pytest.approx([0.001 * h for h in STEPS], rel=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_missing_and_everything_stays_finite(bad: float) -> None:
    values = wave(100)
    values[0, 40:60, :3] = bad
    steps = run(values)
    assert not steps[50].ready.any()
    assert steps[70].ready.all()
    for step in steps:
        assert np.isfinite(step.inputs).all()
        assert np.isfinite(step.anchors).all()
        assert (step.scale > 0).all()


@pytest.mark.parametrize("level", [0.0, 1.0, 1e-12, 1e12])
def test_a_constant_stays_a_constant(level: float) -> None:
    values = np.full((1, 150, len(CHANNELS)), level, np.float32)
    step = run(values)[-1]
    assert np.isfinite(step.inputs).all()
    assert step.anchors[0, :, :, 0] == pytest.approx(np.full((N_TARGETS, N_HEADS), level), rel=1e-6)


def test_nothing_at_all_is_still_finite() -> None:
    values = np.full((1, 80, len(CHANNELS)), np.nan, np.float32)
    step = run(values)[-1]
    assert np.isfinite(step.inputs).all()
    assert not step.ready.any()


def test_the_nodes_own_ridge_learns_a_period_that_the_last_value_misses() -> None:
    values = np.zeros((1, 600, len(CHANNELS)), np.float32)
    values[0, :, 0] = 0.5 + 0.4 * np.sign(np.sin(2 * np.pi * np.arange(600) / 7))
    steps = run(values)
    last = ridge = 0.0
    for t in range(400, 590):
        for i, h in enumerate(STEPS):
            truth = values[0, t + h, 0]
            last += abs(truth - steps[t].anchors[0, 0, i, 0])
            ridge += abs(truth - steps[t].anchors[0, 0, i, ANCHORS.index("adaptive_ridge")])
    assert ridge < 0.3 * last


def test_a_steady_ramp_is_foreseen_by_the_drift_and_spread_knows_it() -> None:
    values = np.zeros((1, 300, len(CHANNELS)), np.float32)
    values[0, :, 1] = 0.2 + 0.001 * np.arange(300)
    step = run(values)[-1]
    drift = step.anchors[0, 1, :N_HORIZONS, ANCHORS.index("drift")]
    assert drift == pytest.approx([0.499 + 0.001 * h for h in STEPS], abs=1e-4)
    assert (step.spread[0, 1, :N_HORIZONS] < 0.1 * step.scale[0, 1]).all()
