"""Pictures of one seed: latency over time per arm, faults shaded; share per node over time with states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

_BIN_S = 2.0
_STATES = {
    "inactive": "#222222",
    "shadowing": "#c49c94",
    "shifting": "#ffbb78",
    "active": "#98df8a",
    "draining": "#ff9896",
}


def plot_scenario(folder: Path, name: str, arms: Sequence[str], series: Path) -> list[Path]:
    """Both pictures of the first seed that all arms have; where it was run elsewhere, those that are there already."""
    pictures = [folder / f"{name}-{what}.png" for what in ("latency", "shares")]
    for seed in range(100):
        paths = {arm: series / f"{name}-{arm}-{seed}.json" for arm in arms}
        if all(path.exists() for path in paths.values()):
            found = {arm: json.loads(path.read_text()) for arm, path in paths.items()}
            return [_latency(pictures[0], found), _shares(pictures[1], found)]
    return [picture for picture in pictures if picture.exists()]


def _shade(axis: Any, data: dict[str, Any]) -> None:
    for span in data["spans"]:
        axis.axvspan(span["start_s"], min(span["end_s"], data["length_s"]), color="#d62728", alpha=0.12, lw=0)


def _latency(path: Path, found: dict[str, Any]) -> Path:
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 1.3 * len(found) + 0.8), sharex=True, sharey=True, squeeze=False
    )
    for axis, (arm, data) in zip(axes[:, 0], found.items(), strict=True):
        good = np.array([[r[0], r[1]] for r in data["records"] if not r[3]])
        bad = [r[0] for r in data["records"] if r[3]]
        _shade(axis, data)
        axis.plot(good[:, 0], 1000 * good[:, 1], ".", ms=2, color="#4c72b0", alpha=0.5)
        axis.plot(bad, [1000 * good[:, 1].max()] * len(bad), "x", ms=4, color="#c44e52")
        bins = np.arange(0.0, data["length_s"], _BIN_S)
        worst = [good[(good[:, 0] >= b) & (good[:, 0] < b + _BIN_S), 1] for b in bins]
        axis.plot(bins + _BIN_S / 2, [1000 * w.max() if len(w) else np.nan for w in worst], color="#333333", lw=0.8)
        axis.set_yscale("log")
        axis.set_ylabel(arm, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, data["length_s"])
    axes[0, 0].set_title("latency in ms by the time a request was due (line: worst of 2 s; x: failed)", fontsize=8)
    axes[-1, 0].set_xlabel("s", fontsize=8)
    return _save(figure, path)


def _shares(path: Path, found: dict[str, Any]) -> Path:
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 1.3 * len(found) + 0.8), sharex=True, sharey=True, squeeze=False
    )
    for axis, (arm, data) in zip(axes[:, 0], found.items(), strict=True):
        _shade(axis, data)
        bins = np.arange(0.0, data["length_s"] + _BIN_S, _BIN_S)
        at_s = np.array([r[0] for r in data["records"]])
        total = np.maximum(np.histogram(at_s, bins)[0], 1)
        for i, (node_id, name) in enumerate(sorted(data["names"].items(), key=lambda item: item[1])):
            there = np.histogram([r[0] for r in data["records"] if r[2] == node_id], bins)[0]
            axis.plot(bins[:-1] + _BIN_S / 2, there / total, lw=1, color=f"C{i}", label=name)
            _states(axis, data["states"], node_id, -0.07 - 0.07 * i)
        axis.set_ylim(-0.38, 1.0)
        axis.set_yticks([0.0, 0.5, 1.0])
        axis.set_ylabel(arm, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, data["length_s"])
    axes[0, 0].legend(fontsize=6, ncol=5, loc="upper right")
    axes[0, 0].set_title(
        "share of requests per node; bars: state (green active, orange shifting, brown shadowing, black inactive)",
        fontsize=8,
    )
    axes[-1, 0].set_xlabel("s", fontsize=8)
    return _save(figure, path)


def _states(axis: Any, states: Sequence[dict[str, Any]], node_id: str, y: float) -> None:
    for now, later in pairwise(states):
        for row in now["replicas"]:
            if row["node_id"] == node_id:
                axis.plot(
                    [now["at_s"], later["at_s"]], [y, y], lw=3, color=_STATES[row["state"]], solid_capstyle="butt"
                )


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
