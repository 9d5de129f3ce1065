"""The soak: mixed load for a long time with a random fault every 30 s, and what must not grow or be left."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil

from bench.live.scenario import Fault, Scenario

_EVERY_S = 30.0
_LASTS_S = 12.0
_SAMPLE_S = 10.0
_FAULTS = (
    ("hog", 8.0),
    ("quota", 0.1),
    ("slow_link", 1e6),
    ("link_down", 0.0),
    ("replica_kill", 0.0),
    ("coordinator_kill", 0.0),
    ("forecaster_kill", 0.0),
)


def soak_scenario(minutes: float, seed: int) -> Scenario:
    """Requests and streams, one fault every 30 s on a node by chance; the last minute is quiet."""
    rng = random.Random(f"soak {seed}")
    length_s = 60.0 * minutes
    faults = []
    at_s = 20.0
    while at_s + _LASTS_S < length_s - 60.0:
        kind, value = rng.choice(_FAULTS)
        start, end = at_s / length_s, (at_s + _LASTS_S) / length_s
        faults.append(Fault(kind, start, end, value, bad=False, node=rng.randrange(4)))
        at_s += _EVERY_S
    rate_per_s = 14.0
    return Scenario(
        f"soak-{minutes:g}",
        "requests and streams, a random fault every 30 s",
        tuple(faults),
        rate_per_s=rate_per_s,
        requests=round(length_s * rate_per_s),
        stream_s=(2.0, 6.0),
        stream_fraction=0.03,
        slo_s=1.0,
        soak=True,
    )


class Watch:
    """Resident memory of every process over time."""

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self._seen: dict[tuple[int, float], list[tuple[float, float]]] = {}
        self._names: dict[tuple[int, float], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            now_s = time.monotonic()
            for process in self._processes():
                with contextlib.suppress(psutil.Error, IndexError):
                    key = (process.pid, process.create_time())
                    self._seen.setdefault(key, []).append((now_s, float(process.memory_info().rss)))
                    self._names.setdefault(key, process.cmdline()[0])
            self._ended.wait(_SAMPLE_S)

    def finish(self) -> dict[str, float]:
        """The steepest growth, and the five steepest by process; see `growth_per_s`."""
        self._ended.set()
        self._thread.join(timeout=30.0)
        slopes = growth_per_s([(self._names[key], samples) for key, samples in self._seen.items()])
        if not slopes:
            return {}
        return {"rss_slope_bytes_per_h": 3600.0 * max(slopes.values())} | {
            f"rss_slope_{name.removeprefix('ray::')}": 3600.0 * slope
            for name, slope in sorted(slopes.items(), key=lambda item: -item[1])[:5]
        }


def growth_per_s(seen: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> dict[str, float]:
    """Growth over the second half of all that was watched; name -> that of the process of this name that grew most.

    `seen`: name and (second, value) of each process. Only processes that were there throughout that half count: those
    that were started meanwhile still fill up.
    """
    times_s = [at_s for _, samples in seen for at_s, _ in samples]
    if not times_s:
        return {}
    last_s = max(times_s)
    half_s = (min(times_s) + last_s) / 2.0
    slopes: dict[str, float] = {}
    for name, samples in seen:
        half = [sample for sample in samples if sample[0] >= half_s]
        if len(half) >= 6 and samples[0][0] <= half_s and half[-1][0] >= last_s - 2.0 * _SAMPLE_S:
            at_s, value = np.array(half).T
            slope = float(np.polyfit(at_s - at_s[0], value, 1)[0])
            slopes[name] = max(slope, slopes.get(name, slope))
    return slopes
