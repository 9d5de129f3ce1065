"""Throughput of a no-op deployment through a handle on a local cluster: Serve's default router and ours in turn.

Both routers drive the same replicas, from a process each: where replicas land makes differences of several percent
between two deployments of the same, which no number of rounds averages out. So do two processes of the same router:
each pair of processes is one sample of the ratio, and the interval is over pairs. The deployment asks for our router;
the driver process of the other arm takes Serve's default instead.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig

from bench.results import interval
from serve_app.launch.control_plane import start_control_plane
from serve_app.launch.local import LocalCluster

_REPLICAS = 4
_CONCURRENCY = 16
_APP = "throughput"
_ARMS = ("ray_default", "shadecast")


class _Noop:
    """Answers at once, with the id of its process."""

    async def __call__(self, x: int) -> int:
        return os.getpid()


class _Driver:
    """A process with a handle of its own, and so with a router of its own."""

    def __init__(self, arm: str, address: str) -> None:
        command = [sys.executable, "-m", __name__, address, arm]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def drive(self, seconds: float) -> tuple[float, set[str]]:
        """Requests per second of a closed loop, and the replicas that answered."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(seconds, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("rate "):
                _, rate, *replicas = line.split()
                return float(rate), set(replicas)
        raise RuntimeError(f"the driver process ended with exit code {self._process.wait()}")

    def end(self) -> None:
        """Let it go; it ends with its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30.0)


def compare(pairs: int, rounds: int, seconds: float) -> Iterator[tuple[str, str, int, str, float]]:
    """Rows (name, arm, replicas, metric, value). A pair drives both arms for `seconds` a round, the first by turns."""
    rates: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    logs: list[float] = []
    with LocalCluster(workers=1) as cluster:
        cluster.connect()
        start_control_plane(page_port=0)
        serve.start(proxy_location="Disabled")
        router = RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")
        options = {"num_replicas": _REPLICAS, "max_ongoing_requests": 16, "ray_actor_options": {"num_cpus": 0.1}}
        deployment = serve.deployment(_Noop, request_router_config=router, **options)
        serve.run(deployment.bind(), name=_APP, route_prefix=None)
        for _ in range(pairs):
            found = _pair(ray.get_runtime_context().gcs_address, rounds, seconds)
            for arm, values in found.items():
                rates[arm] += values
            both = zip(found["shadecast"], found["ray_default"], strict=True)
            logs.append(statistics.median(math.log(ours / default) for ours, default in both))
        serve.shutdown()
    for arm, values in rates.items():
        yield "throughput", arm, _REPLICAS, "median_per_s", statistics.median(values)
    mean, half = interval(logs)
    yield "throughput", "shadecast", _REPLICAS, "ratio_to_default", math.exp(mean)
    yield "throughput", "shadecast", _REPLICAS, "ratio_low", math.exp(mean - half)
    yield "throughput", "shadecast", _REPLICAS, "ratio_high", math.exp(mean + half)


def _pair(address: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Rates of one process of each router, in turn."""
    drivers = {arm: _Driver(arm, address) for arm in _ARMS}
    try:
        seen = {arm: driver.drive(1.0)[1] for arm, driver in drivers.items()}
        if seen["ray_default"] != seen["shadecast"]:
            raise RuntimeError(f"the routers drove different replicas: {seen}; the ratio would say nothing")
        rates: dict[str, list[float]] = {arm: [] for arm in _ARMS}
        for i in range(rounds):
            for arm in sorted(drivers, reverse=bool(i % 2)):
                rates[arm].append(drivers[arm].drive(seconds)[0])
        return rates
    finally:
        for driver in drivers.values():
            driver.end()


async def _drive(handle: Any, seconds: float) -> tuple[float, set[int]]:
    until_s = time.monotonic() + seconds
    done, replicas = 0, set()

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < until_s:
            replicas.add(await handle.remote(1))
            done += 1

    started_s = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(_CONCURRENCY)))
    return done / (time.monotonic() - started_s), replicas


def _drive_on_demand(address: str, arm: str) -> None:
    """The driver process: one line of seconds in, one line of result out."""
    if arm == "ray_default":
        RequestRouterConfig.get_request_router_class = lambda _: PowerOfTwoChoicesRequestRouter
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    handle = serve.get_app_handle(_APP)
    asyncio.run(_drive(handle, 0.5))
    router = type(handle._router._asyncio_router.request_router).__name__
    if (router == "PredictiveRouter") != (arm == "shadecast"):
        sys.exit(f"the handle routes by {router}, not as arm {arm} should")
    for line in sys.stdin:
        rate, replicas = asyncio.run(_drive(handle, float(line)))
        print("rate", rate, *sorted(replicas), flush=True)


if __name__ == "__main__":
    _drive_on_demand(*sys.argv[1:])
