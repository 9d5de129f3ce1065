"""Pictures of the page (SVG, matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bench.summary.entries import DEFAULT, LIVE, ORACLE, OURS, Summary
from bench.summary.questions import ARMS, QUESTIONS, Line, full_label

mpl.use("Agg")
from matplotlib import pyplot as plt

_STYLE = {
    DEFAULT: ("s", "#4c72b0"),
    "round_robin": ("v", "#937860"),
    "capacity_queue": ("^", "#8172b3"),
    "consistent_hash": ("<", "#da8bc3"),
    "prequal": (">", "#55a868"),
    LIVE: ("D", "#dd8452"),
    OURS: ("o", "#c44e52"),
    ORACLE: ("x", "#555555"),
}


def draw(folder: Path, summary: Summary) -> None:
    """Both pictures."""
    latencies: list[tuple[str, Line]] = []
    misses: list[tuple[str, Line]] = []
    for question in QUESTIONS:
        for line in question.lines if question.columns is None else ():
            found = [summary.get(line.scenario, line.metric, arm) for arm in (OURS, DEFAULT)]
            if line.metric in ("p99_s", "p999_s") and all(found):
                latencies.append((full_label(question, line), line))
            elif line.metric.endswith(("error_fraction", "miss_fraction")) and all(found):
                misses.append((full_label(question, line), line))
    _dots(folder / "summary-latency.svg", latencies, summary, relative=True)
    _dots(folder / "summary-misses.svg", misses, summary, relative=False)


def _dots(path: Path, lines: Sequence[tuple[str, Line]], summary: Summary, *, relative: bool) -> None:
    """A row for each line, a dot for each arm; where nothing was measured, none."""
    mpl.rcParams.update({"svg.hashsalt": path.name, "svg.fonttype": "none"})
    figure, axis = plt.subplots(figsize=(10.5, 0.34 * len(lines) + 1.5))
    low = 0.002 if relative else 0.02
    for arm, (marker, colour) in _STYLE.items():
        points = []
        for i, (_, line) in enumerate(lines):
            entry = summary.get(line.scenario, line.metric, arm)
            value = None if entry is None else summary.ratio(entry) if relative else 100.0 * entry.value
            if value is not None:
                points.append((max(value, low), i))
        if points:
            size = 60 if arm == OURS else 28
            axis.scatter(*zip(*points, strict=True), marker=marker, color=colour, s=size, label=ARMS[arm].strip("*"),
                         zorder=4 if arm == OURS else 3)  # fmt: skip
    axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xscale("log")
    if relative:
        axis.axvline(1.0, color=_STYLE[DEFAULT][1], lw=0.8)
    axis.set_xlabel("times Serve's default, less is better" if relative else f"%, less is better; {low} is none")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, ncol=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
