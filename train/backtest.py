"""Every forecast side by side on machines that it has not seen: rows of one number each.

All models predict at the same instants (60 samples of history, truth known). Point models carry the quantiles of their
residuals on training machines. Rows: `{source, target, horizon_s, model, metric, value}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.baselines import Ridge, fit_dlinear, fit_ridge, residual_quantiles
from models.forecaster import Model
from models.grid import N_HORIZONS, N_TARGETS, TARGETS, Array
from models.series import Series
from train.evaluate import (
    Instants,
    Judged,
    horizon_indices,
    instants,
    judge,
    metrics,
    onset_metrics,
    onset_truth,
    with_residuals,
)
from train.onsets import headroom_error

OVERLOAD_FRACTION = 0.9
VIEWS: Mapping[str, str] = {"": "quantiles", "_gated": "gated"}
"""What of `Judged` appears as a forecast of its own: suffix of the model's name -> field of quantiles."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PointModel:
    """A linear forecast fitted on training machines, with its residual quantiles there [horizon, quantile]."""

    ridge: Ridge
    residuals: Array


def flat_model(weights: Array) -> Ridge:
    """A fixed weighting of the 60 lags, equal at all horizons."""
    return Ridge(np.repeat(weights[None], N_HORIZONS, axis=0).astype(np.float32), np.zeros(N_HORIZONS, np.float32))


def point_fits() -> dict[str, Callable[[list[Array]], Ridge]]:
    """Name -> fit on one target's training series."""
    age = np.arange(59, -1, -1)
    ewma = 0.5 ** (age / 5.0)
    return {
        "last_value": lambda _: flat_model(np.where(age == 0, 1.0, 0.0)),
        "ewma": lambda _: flat_model(ewma / ewma.sum()),
        "mean10": lambda _: flat_model(np.where(age < 10, 0.1, 0.0)),
        "ridge60": fit_ridge,
        "nlinear": lambda values: fit_ridge(values, penalty=0.0, intercept=False),
        "dlinear": fit_dlinear,
    }


def fit_points(train: Sequence[Series]) -> dict[str, list[PointModel]]:
    """All point models on the training machines of one source: name -> one per target."""
    seen = instants(train)
    fitted: dict[str, list[PointModel]] = {}
    for name, fit in point_fits().items():
        fitted[name] = []
        for t in range(N_TARGETS):
            ridge = fit([s.values[:, t] for s in train])
            residuals = residual_quantiles(seen.truth[:, t], ridge.predict(seen.lags[:, t]))
            fitted[name].append(PointModel(ridge, residuals))
    return fitted


def quantiles_of(points: Mapping[str, Sequence[PointModel]], seen: Instants) -> dict[str, Array]:
    """Quantile forecasts [n, target, horizon, quantile] of every point model at the instants given."""
    out: dict[str, Array] = {}
    for name, per_target in points.items():
        columns = [with_residuals(p.ridge.predict(seen.lags[:, t]), p.residuals) for t, p in enumerate(per_target)]
        out[name] = np.stack(columns, axis=1)
    return out


def backtest_source(
    source: str,
    train: Sequence[Series],
    held: Sequence[Series],
    models: Mapping[str, Model],
    extra: Callable[[Instants, int, int], Array] | None = None,
) -> list[Row]:
    """Rows of one source: baselines fitted on `train`, everything judged on `held`.

    Each of `models` appears by its name and, blended by its gate, as `<name>_gated`. `extra` may predict
    quantiles [n, quantile] for (instants, target, horizon) at 5 and 10 s, as `gradient_boosting`.
    """
    seen = instants(held)
    judged: dict[str, Judged] = {name: judge(model, held) for name, model in models.items()}
    quantiles = quantiles_of(fit_points(train), seen)
    for name, one in judged.items():
        quantiles |= {f"{name}{suffix}": getattr(one, view) for suffix, view in VIEWS.items()}
    usual = instants(train).truth
    rows = onset_rows(source, held, quantiles)
    for t, target in enumerate(TARGETS):
        limit = OVERLOAD_FRACTION
        if target == "network":
            known = usual[np.isfinite(usual[:, t, 0]), t, 0]
            limit = float(np.quantile(known, OVERLOAD_FRACTION)) if len(known) else math.inf
        for index, horizon_s in horizon_indices(held[0].period_s):
            truth = seen.truth[:, t, index]
            results = {name: metrics(q[:, t, index], truth, limit) for name, q in quantiles.items()}
            if target != "network":  # of which the public sources tell no fraction
                for name in [n for n, found in results.items() if found]:
                    results[name]["headroom_error"] = headroom_error(quantiles[name][:, t, index], truth)
            if extra is not None and horizon_s in (5.0, 10.0) and np.isfinite(truth).any():
                results["gradient_boosting"] = metrics(extra(seen, t, index), truth, limit)
            rows += _rows(source, target, horizon_s, results)
            for name, one in judged.items():
                gate = one.gate[np.isfinite(truth), t, index]
                if len(gate):
                    key = {"source": source, "target": target, "horizon_s": horizon_s, "model": f"{name}_gated"}
                    rows.append({**key, "metric": "gate_mean", "value": float(gate.mean())})
                    rows.append({**key, "metric": "gate_open", "value": float((gate > 0).mean())})
    return rows


def onset_rows(source: str, held: Sequence[Series], quantiles: Mapping[str, Array]) -> list[Row]:
    """How many onsets of CPU load after 5 s of quiet each model warns of, at a precision of .7, by each horizon."""
    calm, came = onset_truth(held)
    rows: list[Row] = []
    for name, each in quantiles.items():
        recalls = onset_metrics(each[:, 0], calm, came)
        for index, horizon_s in horizon_indices(held[0].period_s):
            if not math.isnan(recalls[index]):
                row = {"source": source, "target": TARGETS[0], "horizon_s": horizon_s, "model": name}
                rows.append({**row, "metric": "onset_recall_p70", "value": recalls[index]})
    return rows


def backtest(
    train: Sequence[Series], held: Sequence[Series], models: Mapping[str, Model], extra: Any = None
) -> list[Row]:
    """Rows of all sources; one that was not trained on gets baselines of all training machines.

    `extra(train series)` makes the `extra` of `backtest_source`.
    """
    rows: list[Row] = []
    for source in sorted({s.source for s in held}):
        mine = [s for s in held if s.source == source]
        known = [s for s in train if s.source == source] or list(train)
        rows += backtest_source(source, known, mine, models, extra(known) if extra else None)
    return rows


def mean_of(rows: Sequence[Row], model: str, metric: str, horizons_s: Sequence[float] = (5.0, 10.0)) -> float:
    """Mean of a metric over sources, targets and the horizons given; NaN without any."""
    values = [
        r["value"]
        for r in rows
        if (r["model"], r["metric"]) == (model, metric) and r["horizon_s"] in horizons_s and r["value"] is not None
    ]
    return float(np.mean(values)) if values else math.nan


def _rows(source: str, target: str, horizon_s: float, results: dict[str, dict[str, float]]) -> list[Row]:
    rows = []
    for name, values in results.items():
        if not values:
            continue
        full = dict(values)
        for other, metric in (("last_value", "last_value"), ("ridge60", "ridge")):
            base = results[other]["pinball"]
            full[f"pinball_skill_{metric}"] = 1.0 - values["pinball"] / base if base > 0 else math.nan
        for metric, value in full.items():
            plain = None if math.isnan(value) else value
            row = {"source": source, "target": target, "horizon_s": horizon_s, "model": name}
            rows.append({**row, "metric": metric, "value": plain})
    return rows
