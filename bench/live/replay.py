"""What each node plays in the replay scenarios: recorded jobs after one another, as in the simulator."""

from __future__ import annotations

import random

from bench.recordings import IDLE, LINK_BYTES_PER_S
from bench.simulate.nodes import NodeTrace, replays
from models.grid import CHANNELS

PAUSE_S = 150.0
"""Mean, between two recordings of a node."""
_CPU, _MEMORY, _NETWORK = (CHANNELS.index(name) for name in ("cpu", "memory", "network"))
_NETWORK_PART = 0.01
"""Of the recorded bytes: what a quarter of a core can send beside its other work. The model's view has no units."""

PlayedRow = tuple[int, float, int, int]
"""(second, CPU seconds a second, bytes of memory, bytes sent a second)."""


def schedule(seed: int, node: int, length_s: float, cpus: float, memory_bytes: int) -> list[PlayedRow]:
    """What a node plays over a run, a row where something changes.

    `cpus` is the node's quota, and `memory_bytes` what the job may use at most.
    """
    trace = NodeTrace()
    replays(PAUSE_S)(trace, random.Random(f"{seed}/replay/{node}"), length_s, node)
    rows: list[PlayedRow] = []
    for second in range(int(length_s)):
        shown = trace.shown(float(second)) or IDLE
        grown = max(shown[_MEMORY] - IDLE[_MEMORY], 0.0) / (1.0 - IDLE[_MEMORY])
        row = (
            second,
            round(cpus * shown[_CPU], 4),
            int(grown * memory_bytes),
            int(shown[_NETWORK] * LINK_BYTES_PER_S * _NETWORK_PART),
        )
        if not rows or row[1:] != rows[-1][1:]:
            rows.append(row)
    return rows
