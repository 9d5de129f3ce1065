"""Exponential averages with bias correction: weights are renormalised by the mass seen so far (Kingma and Ba, 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.grid import Array

HALF_LIFE = 60.0
"""Samples after which half of what a node did is forgotten."""


@dataclass(slots=True)
class Running:
    """Exponential means, exact from the first sample; missing values leave them as they are.

    `half_life` is one number, or one per entry of the first axis.
    """

    shape: tuple[int, ...]
    half_life: float | Sequence[float]
    total: Array = field(init=False)
    mass: Array = field(init=False)
    _keep: Array = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.mass = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.float32)
        keep = np.asarray(0.5 ** (1.0 / np.asarray(self.half_life)), np.float32)
        self._keep = keep.reshape(-1, *[1] * (len(self.shape) - 1)) if keep.ndim else keep

    def add(self, value: Array, present: NDArray[np.bool_]) -> None:
        """Take one step of values; where `present` is False nothing changes."""
        gain = np.where(present, 1 - self._keep, np.float32(0))
        self.total += gain * (np.where(present, value, np.float32(0)) - self.total)
        self.mass += gain * (1 - self.mass)

    def mean(self) -> Array:
        """Current mean, 0 where nothing has been seen."""
        return self.total / np.maximum(self.mass, np.float32(1e-12))
