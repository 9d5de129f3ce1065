"""Judges forecasts on series: the same online code as live, over many recordings at once.

Every model is judged at the same instants: those with 60 samples of history and a known truth. Horizons count in
samples of the recording, so a 5 s source is judged at 5 and 10 s (1 and 2 samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.baselines import LAGS, NAMES, Baselines, Ridge, fit_ridge
from models.calibration import pinball
from models.features import Features
from models.forecaster import SLOW_LOAD, Model, OnlineForecaster
from models.grid import N_HORIZONS, N_TARGETS, STEPS, WINDOW_MAX, Array
from models.series import Series
from models.windows import truth_of
from shadecast.types import QUANTILES
from train.loop import units_of
from train.onsets import chance_above, cold, onset_within, recall_at_precision

MOST_RESIDUAL = 100.0


@dataclass(frozen=True, slots=True)
class Judged:
    """All judged instants of some series, flattened over series and time.

    `truth` [n, target, horizon]; `points` [n, target, baseline, horizon]; `quantiles` and `gated`
    [n, target, horizon, quantile]; `gate` [n, target, horizon]; `losses` [n, target, expert, horizon] pinball of the
    model and of the baselines with the same online correction, in multiples of the series' mean 10-sample change;
    `alarms` [n, 2] whether a node that is well was said to become slow and whether it did within the window. NaN where
    not judged.
    """

    truth: Array
    points: Array
    quantiles: Array
    gated: Array
    gate: Array
    losses: Array
    alarms: Array


def groups(series: Sequence[Series], rows: int = 60_000) -> Iterator[list[Series]]:
    """Series of like length together, so that padding stays small and memory bounded."""
    group: list[Series] = []
    for one in sorted(series, key=lambda s: len(s.values)):
        if group and (len(group) + 1) * len(one.values) > rows:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def judge(model: Model, series: Sequence[Series]) -> Judged:
    """Run the online forecaster over series, recordings side by side; no rows where all are too short to judge."""
    parts = [_judge_group(model, group) for group in groups(series) if len(group[-1].values) > LAGS]
    if not parts:
        t, h, q, b = N_TARGETS, N_HORIZONS, len(QUANTILES), len(NAMES)
        shapes = ((t, h), (t, b, h), (t, h, q), (t, h, q), (t, h), (t, 1 + b, h), (2,))
        return Judged(*(np.zeros((0, *shape), np.float32) for shape in shapes))
    names = ("truth", "points", "quantiles", "gated", "gate", "losses", "alarms")
    return Judged(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def _judge_group(model: Model, group: Sequence[Series]) -> Judged:
    values = padded(group, extended=model.net.config.extended)
    bytes_too = (1.0, 1.0, np.inf)
    forecaster = OnlineForecaster(model, series=len(group), ceiling=bytes_too)
    collected: list[tuple[Array, ...]] = []
    for t in range(values.shape[1]):
        prediction = forecaster.step(values[:, t])
        if t >= LAGS - 1:
            now = (
                forecaster.points,
                prediction.quantiles,
                prediction.gated,
                prediction.gate,
                forecaster.experts,
                prediction.alarm,
            )
            collected.append(now)
    points, quantiles, gated, gate, experts, alarm = (np.stack(c, axis=1) for c in zip(*collected, strict=True))
    truth, keep = _judged_truth(values[..., :N_TARGETS])
    unit = np.stack([units_of([s]) for s in group])[:, None, :, None, None]
    losses = (pinball(experts, truth[:, :, :, None]) / unit)[keep]
    truth = truth[keep]
    return Judged(truth, points[keep], quantiles[keep], gated[keep], gate[keep], losses, _alarms(alarm, values)[keep])


def _alarms(alarm: Array, values: Array) -> Array:
    """[series, time - 59, 2]: alarm raised, node slow at some time in the next 10 samples; NaN where unknown."""
    load = truth_of(values[..., :N_TARGETS])[:, LAGS - 1 :, 0, WINDOW_MAX]
    came = np.where(np.isfinite(load), load > SLOW_LOAD, np.nan)
    return np.stack([alarm.astype(np.float32), came], axis=-1).astype(np.float32)


def alarm_precision(judged: Judged) -> float:
    """Share of alarms that came true; 0 where none was raised."""
    known = judged.alarms[np.isfinite(judged.alarms).all(axis=1)]
    raised = known[known[:, 0] > 0]
    return float(raised[:, 1].mean()) if len(raised) else 0.0


@dataclass(frozen=True, slots=True)
class Instants:
    """What point models see at every judged instant: `truth` [n, target, horizon], `lags` [n, target, 60], oldest
    first.

    Row for row the instants of `judge` on the same series.
    """

    truth: Array
    lags: Array


def instants(series: Sequence[Series]) -> Instants:
    """Lags and truth of all judged instants."""
    parts = []
    for group in groups(series):
        if len(group[-1].values) <= LAGS:
            continue
        targets = padded(group)[..., :N_TARGETS]
        truth, keep = _judged_truth(targets)
        windows = np.lib.stride_tricks.sliding_window_view(_held(targets), LAGS, axis=1)
        parts.append(Instants(truth[keep], windows[keep]))
    if not parts:
        return Instants(np.zeros((0, N_TARGETS, N_HORIZONS), np.float32), np.zeros((0, N_TARGETS, LAGS), np.float32))
    return Instants(np.concatenate([p.truth for p in parts]), np.concatenate([p.lags for p in parts]))


def _judged_truth(targets: Array) -> tuple[Array, Array]:
    """Truth [series, time - 59, target, horizon], NaN where it must not count, and which instants count at all."""
    truth = truth_of(targets)[:, LAGS - 1 :, :, :N_HORIZONS].copy()
    truth[~np.isfinite(targets[:, LAGS - 1 :])] = np.nan
    return truth, np.asarray(np.isfinite(truth).any(axis=(2, 3)))


def _held(targets: Array) -> Array:
    """Missing samples repeat the last known one; before the first, the first."""
    out = targets.copy()
    for t in range(1, out.shape[1]):
        out[:, t] = np.where(np.isfinite(out[:, t]), out[:, t], out[:, t - 1])
    for t in range(out.shape[1] - 2, -1, -1):
        out[:, t] = np.where(np.isfinite(out[:, t]), out[:, t], out[:, t + 1])
    return np.nan_to_num(out)


def scaled_baselines(series: Sequence[Series]) -> tuple[tuple[Ridge, ...], Array]:
    """Baselines for the gate of a model that any node may run, so free of units.

    Ridge is fitted on series divided by their own deviation, without intercept. Residual quantiles
    [target, baseline, horizon, quantile] are in multiples of what the baseline is usually off by on each node.
    """
    ridge = tuple(
        fit_ridge([s.values[:, t] / max(float(np.nanstd(s.values[:, t])), 1e-9) for s in known], intercept=False)
        for t, known in enumerate([s for s in series if np.isfinite(s.values[:, t]).any()] for t in range(N_TARGETS))
    )
    collected: list[Array] = []
    for group in groups(series):
        values = padded(group)
        features, baselines = Features(len(group)), Baselines(len(group), ridge)
        rows = []
        for t in range(values.shape[1]):
            step = features.step(values[:, t])
            points = baselines.step(values[:, t, :N_TARGETS])
            rows.append(np.stack([points, baselines.usual_error(step.scale)]))
        points, usual = np.stack(rows, axis=2)[:, :, LAGS - 1 :]
        truth = truth_of(values[..., :N_TARGETS])[:, LAGS - 1 :, :, None, :N_HORIZONS]
        # what was constant so far is usually off by nothing: its first change is no multiple of that
        ratio = np.clip((truth - points) / usual, -MOST_RESIDUAL, MOST_RESIDUAL)
        collected.append(ratio.reshape(-1, *ratio.shape[2:]))
    ratios = np.concatenate(collected)
    residuals = np.zeros((N_TARGETS, len(NAMES), N_HORIZONS, len(QUANTILES)), np.float32)
    for t in range(N_TARGETS):
        known = ratios[np.isfinite(ratios[:, t]).all(axis=(1, 2)), t]
        residuals[t] = np.moveaxis(np.quantile(known, QUANTILES, axis=0), 0, -1) if len(known) else [-1.0, 0.0, 1.0]
    return ridge, residuals


def prior_skill(judged: Judged) -> Array:
    """Skill of the model over the best baseline [target, horizon], all with online correction; NaN without data."""
    known = np.where(np.isfinite(judged.losses).all(axis=2, keepdims=True), judged.losses, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.nansum(known, axis=0)
        skill = 1.0 - total[:, 0] / total[:, 1:].min(axis=1)
    return np.where(np.isfinite(skill), skill, np.nan).astype(np.float32)


def padded(group: Sequence[Series], *, extended: bool = False) -> Array:
    """Series side by side [series, time, channel], NaN after the end of the shorter ones."""
    tables = [s.all_values if extended else s.values for s in group]
    values = np.full((len(group), max(map(len, tables)), tables[0].shape[1]), np.nan, np.float32)
    for i, table in enumerate(tables):
        values[i, : len(table)] = table
    return values


def onset_truth(series: Sequence[Series]) -> tuple[Array, Array]:
    """Row for row the instants of `judge`: whether they are cold [n], and whether an onset begins by each horizon
    [n, horizon], NaN where nobody knows."""
    quiet, came = [np.zeros(0, bool)], [np.zeros((0, N_HORIZONS), np.float32)]
    for group in groups(series):
        if len(group[-1].values) <= LAGS:
            continue
        values = padded(group)
        _, keep = _judged_truth(values[..., :N_TARGETS])
        load = values[..., 0]
        periods = np.array([s.period_s for s in group])
        calm = np.empty(load.shape, bool)
        for period_s in np.unique(periods):
            calm[periods == period_s] = cold(load[periods == period_s], float(period_s))
        ahead = np.stack([onset_within(load, step) for step in STEPS], axis=-1)
        quiet.append(calm[:, LAGS - 1 :][keep])
        came.append(ahead[:, LAGS - 1 :][keep])
    return np.concatenate(quiet), np.concatenate(came)


def places(series: Sequence[Series]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row for row the instants of `judge`: which of `series` it is of [n], and which of its samples [n]."""
    number = {id(s): i for i, s in enumerate(series)}
    which, sample = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for group in groups(series):
        if len(group[-1].values) <= LAGS:
            continue
        _, keep = _judged_truth(padded(group)[..., :N_TARGETS])
        row, at = np.nonzero(keep)
        which.append(np.array([number[id(s)] for s in group])[row])
        sample.append(at + LAGS - 1)
    return np.concatenate(which), np.concatenate(sample)


def onset_metrics(quantiles: Array, cold_now: Array, came: Array) -> list[float]:
    """Onset recall at a precision of .7 by each horizon [horizon]; `quantiles` [n, horizon, quantile] of CPU.

    An onset by a horizon is as likely as the likeliest of the horizons up to it says.
    """
    chances = np.maximum.accumulate(chance_above(quantiles), axis=1)
    known = cold_now[:, None] & np.isfinite(came) & np.isfinite(chances)
    return [recall_at_precision(chances[k, i], came[k, i]) for i, k in enumerate(known.T)]


def with_residuals(points: Array, residuals: Array) -> Array:
    """Point forecasts [n, horizon] and residual quantiles [horizon, quantile] -> quantile forecasts."""
    return (points[..., None] + residuals).astype(np.float32)


def metrics(quantiles: Array, truth: Array, threshold: float) -> dict[str, float]:
    """Metrics of quantile forecasts [n, quantile] against truth [n]; overload means beyond `threshold`."""
    known = np.isfinite(truth)
    q, y = quantiles[known].astype(np.float64), truth[known].astype(np.float64)
    if not len(y):
        return {}
    middle = q[:, 1]
    warned, came = middle > threshold, y > threshold
    hits = float((warned & came).sum())
    return {
        "mae": float(np.abs(y - middle).mean()),
        "rmse": float(np.sqrt(((y - middle) ** 2).mean())),
        "pinball": float(pinball(q, y).mean()),
        "coverage_80": float(((y >= q[:, 0]) & (y <= q[:, 2])).mean()),
        "overload_precision": hits / float(warned.sum()) if warned.any() else float("nan"),
        "overload_recall": hits / float(came.sum()) if came.any() else float("nan"),
    }


def horizon_indices(period_s: float) -> list[tuple[int, float]]:
    """(index of the head, horizon in seconds) that a recording of this period can be judged at."""
    wanted = {h * period_s: i for i, h in enumerate(STEPS)}
    return [(i, s) for s, i in sorted(wanted.items()) if s in STEPS]
