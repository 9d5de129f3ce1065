"""Names and sizes of every array's axes: targets, channels, horizons in samples."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from shadecast.types import HORIZONS_S, RESOURCES

Array = NDArray[Any]
"""Numeric array; float32 wherever nothing else is said."""

TARGETS = RESOURCES
COVARIATES: tuple[str, ...] = ("context_switches", "load", "disk_busy")
CHANNELS: tuple[str, ...] = TARGETS + COVARIATES
EXTENDED: tuple[str, ...] = ("process_starts", "runnable", "blocked", "system", "io_wait", "page_faults", "io_bytes")
"""Further channels, which a net of extended inputs sees behind `CHANNELS`. Meters that lack them are masked."""
N_TARGETS = len(TARGETS)
STEPS = tuple(int(h) for h in HORIZONS_S)
"""Horizons in samples; the models count in samples, at 1 Hz these are seconds."""
LONGEST = STEPS[-1]
N_HORIZONS = len(STEPS)
WINDOW_MEAN, WINDOW_MAX = N_HORIZONS, N_HORIZONS + 1
"""Heads after the horizons: mean and greatest value (least headroom) over the next `LONGEST` samples."""
N_HEADS = N_HORIZONS + 2
