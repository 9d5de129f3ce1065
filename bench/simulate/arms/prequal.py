"""Prequal: asynchronous, reusable probes of requests in flight and latency, and the hot-cold rule.

Source: Wydrowski, Kleinberg, Rumble, Archer, Load is not what you should balance: introducing Prequal (NSDI 2024),
sections 4 and 5. Per query r_probe = 3 probes to replicas drawn without replacement, r_remove = 1 removal from the pool
(alternately the oldest and the worst), a pool of at most 16 probes not older than 1 s, each reused up to
b_reuse = max(1, (1 + delta) / ((1 - m/n) r_probe - r_remove)) times with delta = 1, where m is the pool's and n the
replicas' number; a probe's requests in flight (RIF) grow by one when it is used. A probe is hot if its RIF exceeds the
Q_RIF = 2^-0.25 quantile of recent probes; the choice is the cold one with least latency, or, if all are hot, the one
with least RIF; with fewer than two probes in the pool it is random. A replica answers with its RIF and the median of
recent latencies of requests that arrived at about the present RIF.
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World

_RECENT_RIFS = 128
_SAMPLES_PER_RIF = 16
_SAMPLE_LIFE_S = 60.0


class _Probe:
    __slots__ = ("at_s", "latency_s", "replica", "rif", "uses_left")

    def __init__(self, replica: int, rif: int, latency_s: float, at_s: float, uses_left: int) -> None:
        self.replica = replica
        self.rif = rif
        self.latency_s = latency_s
        self.at_s = at_s
        self.uses_left = uses_left


class _LatencyByRif:
    """A replica's own record: recent latencies by the RIF at arrival."""

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[float, float]]] = {}

    def record(self, rif: int, latency_s: float, now_s: float) -> None:
        samples = self._samples.get(rif)
        if samples is None:
            samples = self._samples[rif] = deque(maxlen=_SAMPLES_PER_RIF)
        samples.append((now_s, latency_s))

    def estimate(self, rif: int, now_s: float) -> float:
        """Median at the nearest RIF that has samples not too old; 0 without any."""
        oldest_s = now_s - _SAMPLE_LIFE_S
        known = self._samples
        for distance in range(64):
            for near in (rif - distance, rif + distance) if distance else (rif,):
                samples = known.get(near)
                if samples and samples[-1][0] >= oldest_s:
                    ordered = sorted([latency for at_s, latency in samples if at_s >= oldest_s])
                    return ordered[len(ordered) // 2]
        return 0.0


class Prequal(Arm):
    """Prequal with the published constants."""

    probes_per_query = 3
    removals_per_query = 1
    pool_size = 16
    max_age_s = 1.0
    reuse_delta = 1.0
    hot_quantile = 2.0**-0.25
    idle_probe_s = 0.0
    """Probe a replica when the router has not probed for so long; 0 never (the paper leaves the interval open)."""

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Empty pools."""
        super().start(sim, world, rng)
        self._pools: list[list[_Probe]] = [[] for _ in range(sim.routers)]
        self._rifs: list[deque[int]] = [deque(maxlen=_RECENT_RIFS) for _ in range(sim.routers)]
        self._latency: list[_LatencyByRif] = []
        self._remove_worst = [False] * sim.routers
        self._hot: list[tuple[int, int]] = [(-1, 0)] * sim.routers
        self._seen = [0] * sim.routers
        self._probed_s = [0.0] * sim.routers
        if self.idle_probe_s:
            for router in range(sim.routers):
                sim.at(rng.random() * self.idle_probe_s, self._idle, router)

    def on_members(self) -> None:
        """Drop probes of replicas that are gone."""
        while len(self._latency) < len(self.sim.replicas):
            self._latency.append(_LatencyByRif())
        replicas = self.sim.replicas
        for router, pool in enumerate(self._pools):
            self._pools[router] = [probe for probe in pool if replicas[probe.replica].alive]

    def pick(self, request: Request) -> int:
        """The hot-cold lexicographic rule; then probe and remove."""
        members = self.sim.members
        if not members:
            return -1
        router = request.router
        pool = self._fresh(router)
        if len(pool) < 2:
            chosen = members[int(self.rng.random() * len(members))]
        else:
            probe = self._choose(pool, self._threshold(router))
            chosen = probe.replica
            probe.rif += 1
            probe.uses_left -= 1
            if probe.uses_left <= 0:
                pool.remove(probe)
        for _ in range(self.removals_per_query):
            self._remove(router)
        self._probe(router, self.probes_per_query)
        return chosen

    def score(self, request: Request, replica: int) -> float:
        """Requests in flight by a fresh probe (sessions only)."""
        return 1.0 + self.sim.replicas[replica].load()

    def on_done(self, request: Request, ok: bool) -> None:
        """The replica records the latency under the RIF at arrival."""
        if ok:
            now_s = self.sim.now_s
            self._latency[request.replica].record(request.others + 1, now_s - request.sent_s, now_s)

    def _fresh(self, router: int) -> list[_Probe]:
        oldest_s = self.sim.now_s - self.max_age_s
        pool = self._pools[router]
        if pool and pool[0].at_s < oldest_s:
            pool = self._pools[router] = [probe for probe in pool if probe.at_s >= oldest_s]
        return pool

    def _choose(self, pool: list[_Probe], threshold: int) -> _Probe:
        best_cold: _Probe | None = None
        best_hot = pool[0]
        for probe in pool:
            if probe.rif <= threshold:
                if best_cold is None or probe.latency_s < best_cold.latency_s:
                    best_cold = probe
            elif best_hot.rif <= threshold or probe.rif < best_hot.rif:
                best_hot = probe
        return best_cold if best_cold is not None else best_hot

    def _threshold(self, router: int) -> int:
        """The Q_RIF quantile of recent probes: a RIF above it is hot."""
        at, value = self._hot[router]
        if self._seen[router] - at < 4 and at >= 0:  # a few probes hardly move it
            return value
        rifs = sorted(self._rifs[router])
        value = rifs[min(int(self.hot_quantile * len(rifs)), len(rifs) - 1)] if rifs else 0
        self._hot[router] = (self._seen[router], value)
        return value

    def _remove(self, router: int) -> None:
        pool = self._pools[router]
        if not pool:
            return
        if self._remove_worst[router]:
            threshold = self._threshold(router)
            hot = [probe for probe in pool if probe.rif > threshold]
            worst = max(hot, key=lambda p: p.rif) if hot else max(pool, key=lambda p: p.latency_s)
            pool.remove(worst)
        else:
            del pool[0]  # the oldest: probes are kept in order of arrival
        self._remove_worst[router] = not self._remove_worst[router]

    def _probe(self, router: int, count: int) -> None:
        """Probes are answered at once, but only later queries see the answers."""
        members, replicas, now_s = self.sim.members, self.sim.replicas, self.sim.now_s
        pool, rifs = self._pools[router], self._rifs[router]
        n = len(members)
        self._probed_s[router] = now_s
        spare = (1.0 - min(self.pool_size / n, 1.0)) * self.probes_per_query - self.removals_per_query
        uses = max(1, round((1.0 + self.reuse_delta) / spare)) if spare > 0.0 else self.pool_size
        for replica in self.rng.sample(members, min(count, n)):
            rif = replicas[replica].load()
            pool.append(_Probe(replica, rif, self._latency[replica].estimate(rif + 1, now_s), now_s, uses))
            rifs.append(rif)
            self._seen[router] += 1
            if len(pool) > self.pool_size:
                del pool[0]

    def _idle(self, router: int) -> None:
        if self.sim.now_s - self._probed_s[router] >= self.idle_probe_s and self.sim.members:
            self._probe(router, 1)
        self.sim.at(self.sim.now_s + self.idle_probe_s, self._idle, router)


class TunedPrequal(Prequal):
    """Prequal tuned for 16 replicas: see docs/benchmarks/simulation.md for the grid that chose these values."""

    probes_per_query = 5
    pool_size = 8
    hot_quantile = 0.6
    idle_probe_s = 0.1
