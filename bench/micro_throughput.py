"""Throughput of a no-op deployment through a handle on a local cluster: Serve's default router and ours in turn."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from scipy.stats import t as student_t

from serve_app.control_plane import start_control_plane
from serve_app.local import LocalCluster

_REPLICAS = 4
_CONCURRENCY = 16


class _Noop:
    """Answers at once."""

    async def __call__(self, x: int) -> int:
        return x


def _application(**router: Any) -> Any:
    options = {"num_replicas": _REPLICAS, "max_ongoing_requests": 16, "ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(**options, **router)(_Noop).bind()


def compare(rounds: int, seconds: float) -> Iterator[tuple[str, str, int, str, float]]:
    """Rows (name, arm, replicas, metric, value). Each round drives both arms for `seconds`, the first one by turns."""
    ours = RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter")
    with LocalCluster(workers=1) as cluster:
        cluster.connect()
        start_control_plane(page_port=0)
        serve.start(proxy_location="Disabled")
        handles = {
            "ray_default": serve.run(_application(), name="default", route_prefix=None),
            "shadecast": serve.run(_application(request_router_config=ours), name="shadecast", route_prefix=None),
        }
        rates: dict[str, list[float]] = {arm: [] for arm in handles}
        for handle in handles.values():
            asyncio.run(_drive(handle, 2.0))
        for i in range(rounds):
            for arm in sorted(handles, reverse=bool(i % 2)):
                rates[arm].append(asyncio.run(_drive(handles[arm], seconds)))
        serve.shutdown()
    for arm, values in rates.items():
        yield "throughput", arm, _REPLICAS, "median_per_s", statistics.median(values)
    logs = [math.log(a / b) for a, b in zip(rates["shadecast"], rates["ray_default"], strict=True)]
    mean, half = statistics.mean(logs), math.inf
    if rounds > 1:
        half = float(student_t.ppf(0.975, rounds - 1)) * statistics.stdev(logs) / math.sqrt(rounds)
    yield "throughput", "shadecast", _REPLICAS, "ratio_to_default", math.exp(mean)
    yield "throughput", "shadecast", _REPLICAS, "ratio_low", math.exp(mean - half)
    yield "throughput", "shadecast", _REPLICAS, "ratio_high", math.exp(mean + half)


async def _drive(handle: Any, seconds: float) -> float:
    """Requests per second of a closed loop."""
    until_s = time.monotonic() + seconds
    done = 0

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < until_s:
            await handle.remote(1)
            done += 1

    started_s = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(_CONCURRENCY)))
    return done / (time.monotonic() - started_s)
