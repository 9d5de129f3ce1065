"""What a node's forecaster costs: `python -m bench.forecast --cost`.

Two measurements. The sampling loop alone, in this process: CPU of sampler, model and loop, and the jitter of its
ticks. The whole actor on a local Ray node, as in production: its process's CPU and memory, with
Ray's own threads, and beside it an actor that does nothing, for what Ray takes by itself.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WARM_UP_S = 15.0


def measure_cost(seconds: float, registry: str) -> dict[str, Any]:
    """Both measurements, one after the other."""
    load = os.getloadavg()[0]
    return {
        "schema": 1,
        "seconds": seconds,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load1": round(load, 2)},
        "loop": loop_cost(seconds, registry),
        "actor": actor_cost(seconds, registry),
        "targets": {"core_percent": 0.5, "rss_mb": 350, "jitter_s": 0.05},
    }


def jitter(ticks_s: list[float], period_s: float = 1.0) -> dict[str, float]:
    """How far tick intervals are from the period: share within 5 %, median and greatest deviation."""
    off = [abs(b - a - period_s) for a, b in itertools.pairwise(ticks_s)]
    return {
        "samples": len(ticks_s),
        "rate_hz": round((len(ticks_s) - 1) / (ticks_s[-1] - ticks_s[0]), 4),
        "within_5_percent": round(sum(o <= 0.05 * period_s for o in off) / len(off), 4),
        "median_s": round(statistics.median(off), 4),
        "max_s": round(max(off), 4),
    }


def loop_cost(seconds: float, registry: str) -> dict[str, Any]:
    """Sampler, model and loop in a thread of this process, with the shipped model."""
    import torch  # noqa: PLC0415

    from actors.node_forecaster import NodeForecaster  # noqa: PLC0415
    from actors.telemetry import Sampler  # noqa: PLC0415
    from models.registry import Registry  # noqa: PLC0415

    torch.set_num_threads(1)
    ticks_s: list[float] = []
    sampler = Sampler(time.monotonic)
    forecaster = NodeForecaster("cost", sampler, lambda _: ticks_s.append(time.monotonic()), time.monotonic, time.time)
    versions = Registry(registry)
    forecaster.use(versions.load(versions.champion()))
    for _ in range(70):
        forecaster.tick()  # every branch of the model has run
    start_s = time.thread_time()
    for _ in range(50):
        sampler.read()
    read_ms = (time.thread_time() - start_s) / 50 * 1e3
    ticks_s.clear()
    spent: list[float] = []
    stop = threading.Event()

    def loop() -> None:
        before_s = time.thread_time()
        forecaster.run(stop)
        spent.append(time.thread_time() - before_s)

    thread = threading.Thread(target=loop)
    thread.start()
    stop.wait(seconds)
    stop.set()
    thread.join()
    return {
        "core_percent": round(100 * spent[0] / seconds, 3),
        "sampler_core_percent": round(read_ms / 10, 3),
        "jitter": jitter(ticks_s),
    }


class Idle:
    """An actor that does nothing: what Ray itself takes for each."""

    def pid(self) -> int:
        """Its process."""
        return os.getpid()


def actor_cost(seconds: float, registry: str) -> dict[str, Any]:
    """The actor on a Ray node of its own, with a telemetry log."""
    import pandas as pd  # noqa: PLC0415
    import ray  # noqa: PLC0415

    from serve_app.launch.processes import start_forecaster  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="shadecast-cost-") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            node_id = ray.get_runtime_context().get_node_id()
            settings = {"telemetry_log": folder, "registry": registry}
            actor = start_forecaster(settings, node_id, detached=False)
            idle = ray.remote(Idle).options(num_cpus=0).remote()
            pid, idle_pid = ray.get(actor.status.remote(), timeout=90)["pid"], ray.get(idle.pid.remote(), timeout=90)
            time.sleep(WARM_UP_S)
            before_s, idle_before_s = cpu_s(pid), cpu_s(idle_pid)
            time.sleep(seconds)
            spent_s, idle_s = cpu_s(pid) - before_s, cpu_s(idle_pid) - idle_before_s
            rss_mb, idle_mb = rss_bytes(pid) / 2**20, rss_bytes(idle_pid) / 2**20
            ray.get(actor.stop.remote(), timeout=30)
        finally:
            ray.shutdown()
        rows = pd.concat([pd.read_parquet(p, partitioning=None) for p in Path(folder).rglob("*.parquet")])
    return {
        "core_percent": round(100 * spent_s / seconds, 3),
        "rss_mb": round(rss_mb, 1),
        "an_empty_actor": {"core_percent": round(100 * idle_s / seconds, 3), "rss_mb": round(idle_mb, 1)},
        "jitter": jitter(sorted(rows["t_s"])),
    }


def cpu_s(pid: int) -> float:
    """User and system seconds that a process has used."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
