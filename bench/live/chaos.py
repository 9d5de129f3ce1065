"""Chaos: many streams while replicas are killed and hogged, so that streams go on elsewhere all the time.

The driver checks every stream, item by item: each one once, in order and right. Half of the hogs leave a replica a
third to a half of its CPU: its streams still give items and are handed over. The others leave it next to nothing.
"""

from __future__ import annotations

import random

from bench.live.scenario import Fault, Scenario

_CYCLE_S = 60.0
"""A replica that was killed is back after some 20 to 40 s."""
_FAULTS = ((0.0, "replica_kill", (0.0,)), (14.0, "hog", (1, 2)), (29.0, "hog", (1, 2, 8)), (44.0, "hog", (8,)))
"""At which second of a cycle, what, and how hard, by chance."""
_HOG_S = 11.0
_RATE_PER_S = 12.0
_QUIET_S = 15.0
"""At the end, for the streams that are left."""


def chaos_scenario(streams: int, seed: int) -> Scenario:
    """So many streams of .5 to 5 s, on four replicas, one fault after another on a node by chance."""
    rng = random.Random(f"chaos {seed}")
    length_s = streams / _RATE_PER_S
    faults = []
    for cycle in range(int(length_s / _CYCLE_S) + 1):
        for second, kind, values in _FAULTS:
            start_s = cycle * _CYCLE_S + second + 1.0
            end_s = start_s + (_HOG_S if kind == "hog" else 1.0)
            value, node = rng.choice(values), rng.randrange(4)
            if end_s < length_s - _QUIET_S:
                faults.append(Fault(kind, start_s / length_s, end_s / length_s, value, bad=False, node=node))
    return Scenario(
        f"chaos-{streams}",
        "streams checked item by item; replicas are killed and hogged",
        tuple(faults),
        kind="stream",
        rate_per_s=_RATE_PER_S,
        requests=streams,
        cpu_s=0.003,
        stream_s=(0.5, 5.0),
        slo_s=1.0,
        settings={"balance": {"resume": "had"}},
    )
