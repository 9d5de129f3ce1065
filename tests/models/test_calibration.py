"""What the forecaster learns live: bands that cover, a gate that closes on bad models, alarms that must come true."""

from __future__ import annotations

import numpy as np
import pytest

from models.baselines import NAMES
from models.calibration import AlarmRecord, QuantileCorrection, Ring, SkillGate, pinball
from models.grid import N_HORIZONS, N_TARGETS, STEPS

SHAPE = (1, N_TARGETS, 1 + len(NAMES), N_HORIZONS)


def losses(model: float, others: float = 1.0) -> np.ndarray:
    out = np.full(SHAPE, others, np.float32)
    out[:, :, 0] = model
    return out


def test_a_ring_gives_back_each_horizon_when_it_is_due() -> None:
    ring = Ring((N_HORIZONS, 1))
    for t in range(30):
        due = ring.due()
        for i, h in enumerate(STEPS):
            expected = t - h if t >= h else np.nan
            assert due[i, 0] == pytest.approx(expected, nan_ok=True)
        ring.push(np.full((N_HORIZONS, 1), float(t), np.float32))


@pytest.mark.parametrize("width", [0.1, 5.0])
def test_bands_that_are_too_narrow_or_too_wide_come_to_cover_80_percent(width: float) -> None:
    rng = np.random.default_rng(1)
    correction = QuantileCorrection((1,))
    scale = np.ones(1, np.float32)
    inside = []
    for t in range(6000):
        q = correction.apply(np.array([[-width, 0.0, width]], np.float32), scale)
        y = rng.standard_normal(1).astype(np.float32)
        if t > 2000:
            inside.append(bool(q[0, 0] <= y[0] <= q[0, 2]))
        correction.learn(q, y)
    assert 0.78 < np.mean(inside) < 0.82


def test_missing_truth_teaches_nothing() -> None:
    correction = QuantileCorrection((2,))
    correction.learn(np.zeros((2, 3), np.float32), np.full(2, np.nan, np.float32))
    assert (correction.offset == 0).all()


def test_without_a_backtest_the_gate_is_closed_until_60_good_samples_in_a_row() -> None:
    gate = SkillGate(SHAPE)
    for _ in range(59):
        gate.learn(losses(0.5))
        assert (gate.gate() == 0).all()
    for _ in range(60):
        gate.learn(losses(0.5))
    assert gate.gate() == pytest.approx(1.0)
    assert gate.skill() == pytest.approx(0.5, abs=0.02)


def test_a_model_that_turns_bad_is_off_within_ten_samples_of_negative_skill() -> None:
    prior = np.full((1, N_TARGETS, N_HORIZONS), 0.3, np.float32)
    gate = SkillGate(SHAPE, prior)
    assert (gate.gate() == 1.0).all()
    for _ in range(100):
        gate.learn(losses(0.7))
    negative = 0
    for _ in range(1000):
        gate.learn(losses(20.0))
        negative += bool((gate.skill() < 0).all())
        if (gate.gate() == 0).all() and not gate.is_open.any():
            break
    assert negative <= 10


def test_skill_is_against_the_best_baseline_not_against_the_worst() -> None:
    gate = SkillGate(SHAPE)
    loss = losses(0.8)
    loss[:, :, 2] = 0.5
    for _ in range(300):
        gate.learn(loss)
    assert (gate.skill() < 0).all()
    assert (gate.best_baseline() == 2).all()


def test_each_target_and_horizon_is_gated_on_its_own() -> None:
    gate = SkillGate(SHAPE)
    loss = losses(0.5)
    loss[:, 1, 0] = 2.0
    loss[:, 2, 0, 3] = 2.0
    for _ in range(200):
        gate.learn(loss)
    value = gate.gate()[0]
    assert (value[0] == 1.0).all()
    assert (value[1] == 0.0).all()
    assert value[2, 3] == 0.0
    assert value[2, 2] == 1.0


def test_a_node_where_nothing_moves_has_no_skill_to_claim() -> None:
    gate = SkillGate(SHAPE)
    for _ in range(300):
        gate.learn(losses(0.0, 0.0))
    assert (gate.gate() == 0).all()


def test_alarms_that_do_not_come_true_switch_the_veto_off_and_true_ones_on() -> None:
    record = AlarmRecord(2)
    for t in range(400):
        alarm = np.array([t % 20 == 5, t % 20 == 5])
        slow = np.array([t % 20 == 9, False])
        record.step(alarm, slow)
    assert record.precision()[0] > 0.6
    assert record.precision()[1] < 0.05


def test_an_alarm_counts_once_however_long_the_node_is_slow() -> None:
    record = AlarmRecord(1, prior=0.0)
    record.step(np.array([True]), np.array([False]))
    for _ in range(20):
        record.step(np.array([False]), np.array([True]))
    assert record.hits[0] == pytest.approx(1.0, abs=0.05)


def test_pinball_weighs_misses_by_the_quantile() -> None:
    q = np.zeros((1, 3), np.float32)
    assert pinball(q, np.array([1.0], np.float32))[0] == pytest.approx((0.1 + 0.5 + 0.9) / 3)
    assert pinball(q, np.array([-1.0], np.float32))[0] == pytest.approx((0.9 + 0.5 + 0.1) / 3)
