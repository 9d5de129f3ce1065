"""Pictures of the results (PNG, matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from bench.results import Row, by_arm, interval
from bench.simulate.arms import ARMS
from bench.simulate.scenario import Scenario

mpl.use("Agg")
from matplotlib import pyplot as plt

_OURS = ("live_capacity", "shadecast", "shadecast_perfect", "shadecast_wrong")


def _colour(arm: str) -> str:
    return "#c44e52" if arm in _OURS else "#555555" if arm == "clairvoyant" else "#4c72b0"


def plot_scenario(path: Path, scenario: Scenario, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Bars of SLO misses and of the tail, with intervals."""
    tail = "p99_slowdown" if scenario.work.batch_half else "p99_s"
    arms = list(found)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.3 * len(arms) + 1.2), sharey=True)
    for axis, metric, label in (
        (axes[0], "slo_miss_fraction", "SLO misses (fraction)"),
        (axes[1], tail, tail.replace("_", " ")),
    ):
        values = [interval(found[arm][metric]) for arm in arms]
        means, halves = [v[0] for v in values], [v[1] for v in values]
        axis.barh(arms, means, xerr=halves, color=[_colour(arm) for arm in arms], ecolor="black")
        axis.set_xlabel(label)
        if min(means) > 0 and max(means) / min(means) > 20:
            axis.set_xscale("log")
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    axes[1].invert_yaxis()
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(f"{scenario.name}: {scenario.note}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_loads(path: Path, scenarios: Sequence[Scenario], rows: Sequence[Row]) -> None:
    """SLO misses over the load."""
    ordered = sorted(scenarios, key=lambda s: s.load)
    figure, axis = plt.subplots(figsize=(7, 4))
    tables = [by_arm(rows, scenario.name, ARMS) for scenario in ordered]
    for arm in (
        "p2c_ray",
        "p2c_true",
        "prequal_tuned",
        "live_capacity",
        "shadecast",
        "shadecast_perfect",
        "clairvoyant",
    ):
        if all(arm in table for table in tables):
            means = [float(np.mean(table[arm]["slo_miss_fraction"])) for table in tables]
            axis.plot([s.load for s in ordered], means, marker="o", label=arm)
    axis.set_xlabel("load")
    axis.set_ylabel("SLO misses (fraction)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
