"""Pictures of forecasts: what was said five seconds before beside what came."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.baselines import LAGS
from models.forecaster import Model, OnlineForecaster
from models.grid import N_TARGETS, STEPS, TARGETS
from models.series import Series

LENGTH = 240
AHEAD = 3
"""Index of the horizon that is drawn (5 samples)."""


def bands_png(model: Model, held: Sequence[Series]) -> bytes | None:
    """One panel per target: truth, and the .1-.9 band forecast 5 samples before. None without matplotlib or data."""
    try:
        import matplotlib  # noqa: PLC0415 - optional extra

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415
    except ImportError:
        return None
    long_enough = [s for s in held if len(s.values) > LAGS + LENGTH // 2]
    if not long_enough:
        return None
    figure, axes = plt.subplots(N_TARGETS, 1, figsize=(9, 6.5), sharex=False)
    for t, axis in enumerate(axes):
        best = max(
            long_enough, key=lambda s: float(np.nanstd(s.values[:, t])) / (1e-9 + float(np.nanmax(s.values[:, t])))
        )
        _panel(axis, model, best, t)
    axes[0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    with Image.open(drawn) as picture:  # 32 colours are enough for lines and bands: a third of the size
        picture.convert("RGB").quantize(32).save(out, "PNG", optimize=True)
    return out.getvalue()


def _panel(axis: Any, model: Model, series: Series, target: int) -> None:
    forecaster = OnlineForecaster(model, ceiling=(1.0, 1.0, np.inf))
    rows = [forecaster.step(v[None]).quantiles[0, target, AHEAD] for v in series.values]
    low = max(LAGS, len(rows) - LENGTH - STEPS[AHEAD])
    issued = np.arange(low, len(rows) - STEPS[AHEAD])
    band = np.asarray(rows)[issued]
    at_s = (issued + STEPS[AHEAD]) * series.period_s
    axis.fill_between(at_s, band[:, 0], band[:, 2], alpha=0.3, label=f"forecast .1-.9, {STEPS[AHEAD]} samples before")
    axis.plot(at_s, band[:, 1], lw=1, ls="--", label="median")
    axis.plot(at_s, series.values[issued + STEPS[AHEAD], target], lw=1, color="black", label="what came")
    axis.set_title(f"{TARGETS[target]}: {series.source}, machine {series.machine}, not trained on", fontsize=9)
    axis.set_xlabel("s", fontsize=8)
