"""The demo's model: the digits network, read at five one-pixel shifts and averaged; newcomers with real faults.

A replica asks the demo, when it starts, what it shall be: "healthy", "well" (a healthy one that comes later), "slow"
(does all its work five times) or "failing" (raises for a fifth of its requests).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from serve_app.gateway.digits import Digits
from serve_app.gateway.tensors import TensorSpec

NAMESPACE = "shadecast-demo"
ROLES = "roles"
SLOWER = 5
FAILING_FRACTION = 0.2
_SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


class Roles:
    """What the next replicas to start shall be; healthy once the list is empty. Wrap with `ray.remote`."""

    def __init__(self) -> None:
        self._next: list[str] = []

    def plan(self, *roles: str) -> None:
        """Roles of the next replicas, in the order of their start."""
        self._next = list(roles)

    def take(self) -> str:
        """The role of a replica that starts now."""
        return self._next.pop(0) if self._next else "healthy"


class FaultyDigits:
    """Digits with test-time augmentation; says in its answer which node and which kind of replica gave it."""

    name = "digits"
    inputs = Digits.inputs
    outputs = (*Digits.outputs, TensorSpec("answered_by", "BYTES", (-1,)))

    def __init__(self) -> None:
        self._model = Digits()
        self._role: str = ray.get(ray.get_actor(ROLES, namespace=NAMESPACE).take.remote())
        self._label = f"{ray.get_runtime_context().get_node_id()[:6]} {self._role}"
        self._rng = random.Random()

    async def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
        """Mean probabilities over the shifted images."""
        pixels = inputs["pixels"]
        images = pixels.reshape(-1, 8, 8)
        shifted = np.concatenate([np.roll(images, shift, axis=(1, 2)) for shift in _SHIFTS]).reshape(-1, 64)
        for _ in range(SLOWER if self._role == "slow" else 1):
            read = await self._model.infer({"pixels": shifted})
        if self._role == "failing" and self._rng.random() < FAILING_FRACTION:
            raise RuntimeError("this replica is broken, as the demo wants it")
        probabilities = read["probabilities"].reshape(len(_SHIFTS), len(pixels), 10).mean(axis=0)
        return {
            "digit": probabilities.argmax(axis=1),
            "probabilities": probabilities,
            "answered_by": np.array([self._label.encode()] * len(pixels), dtype=object),
        }
