"""Runs features over many series at once and lays truth beside them: the arrays that training and judging share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.features import Features
from models.grid import LONGEST, N_HEADS, N_TARGETS, STEPS, WINDOW_MAX, WINDOW_MEAN, Array
from models.series import Series


@dataclass(frozen=True, slots=True)
class Batch:
    """Series of equal (padded) length.

    `inputs` [series, time, target, feature]; `anchors` [series, time, target, head, anchor];
    `spread` [series, time, target, head]; `truth` [series, time, target, head], NaN where unknown;
    `values` [series, time, target].
    """

    inputs: Array
    anchors: Array
    spread: Array
    truth: Array
    values: Array


def truth_of(values: Array) -> Array:
    """What the heads should have said: `values` [series, time, target] -> [series, time, target, head]."""
    s, time, targets = values.shape
    truth = np.full((s, time, targets, N_HEADS), np.nan, np.float32)
    for i, h in enumerate(STEPS):
        truth[:, : time - h, :, i] = values[:, h:]
    if time > LONGEST:
        ahead = np.stack([values[:, k : time - LONGEST + k] for k in range(1, LONGEST + 1)])
        truth[:, : time - LONGEST, :, WINDOW_MEAN] = ahead.mean(axis=0)
        truth[:, : time - LONGEST, :, WINDOW_MAX] = ahead.max(axis=0)
    return truth


def batch_of(values: Sequence[Array], announced: Sequence[Array] | None = None, extended: bool = False) -> Batch:
    """Featurise arrays [time, channel] side by side; shorter ones are padded with missing rows.

    `extended` makes inputs of the further channels, too.
    """
    longest = max(len(v) for v in values)
    table = np.full((len(values), longest, values[0].shape[1]), np.nan, np.float32)
    events = np.zeros((len(values), longest, len(STEPS)), np.float32)
    for i, v in enumerate(values):
        table[i, : len(v)] = v
        if announced is not None:
            events[i, : len(v)] = announced[i]
    features = Features(len(values), extended)
    steps = [features.step(table[:, t], events[:, t]) for t in range(longest)]
    targets = table[..., :N_TARGETS]
    return Batch(
        inputs=np.stack([s.inputs for s in steps], axis=1),
        anchors=np.stack([s.anchors for s in steps], axis=1),
        spread=np.stack([s.spread for s in steps], axis=1),
        truth=truth_of(targets),
        values=targets,
    )


def cut(series: Series, length: int) -> list[Array]:
    """Non-overlapping pieces of at most `length` samples; a last piece too short to judge joins the one before."""
    pieces = max(1, len(series.values) // length)
    return np.array_split(series.values, pieces)
