"""`python -m bench.scale [--json FILE]`: what many routers, replicas and nodes cost the coordinator.

The coordinator is the real actor in a process of its own; messages are real ones, through Ray. Routers and nodes are
simulated in this process: each router keeps the product's own book and ledger, reports every second and polls for
tables as `serve_app.routing.link` does; each node reports every second. The coordinator's CPU is what its process used.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import typer
from rich.console import Console
from rich.table import Table

from bench.simulate.report import machine
from serve_app.launch.processes import CoordinatorProcess
from shadecast.calls import Call, Calls, Event
from shadecast.config import REPORT_S
from shadecast.inbox import node_message
from shadecast.ledger import Ledger
from shadecast.messages import check
from shadecast.tables import read_table
from shadecast.types import HORIZONS_S, Forecast, NodeReport, NodeSnapshot, RoutingTable

SIZES = ((100, 10), (1_000, 10), (1_000, 100), (3_000, 300), (10_000, 1_000))
_DEPLOYMENT = "scale/model"
_REPLICAS_PER_NODE = 8
_READ = 20
"""One router of so many reads its tables."""
_CPU_BOUND, _TICK_BOUND_S = 0.25, 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One size. `cpu` is the coordinator's share of a core, `kept_up` how many of the due reports were taken."""

    replicas: int
    routers: int
    nodes: int
    requests_per_s: float
    cpu: float
    tick_p50_s: float
    tick_p99_s: float
    report_p50_s: float
    report_p99_s: float
    report_bytes: float
    table_bytes: float
    table_rows: float
    kept_up: float
    rss_mb: float


class _Router:
    """A router's book, ledger and table; requests are made up."""

    def __init__(self, number: int, alive: list[tuple[str, str, int]], requests_per_s: float, seed: int) -> None:
        self.calls: Calls[Call] = Calls()
        self.ledger = Ledger(f"router-{number}", _DEPLOYMENT, self.calls)
        self.number, self.alive, self.requests_per_s = number, alive, requests_per_s
        self.rng = random.Random(f"{seed}/{number}")
        self.running: list[tuple[float, Call]] = []
        self.table: RoutingTable | None = None

    def live(self, now_s: float, elapsed_s: float) -> None:
        """The requests of the last moment: each on a random replica, for a log-normal time."""
        still = []
        for ends_s, call in self.running:
            if ends_s <= now_s:
                self._end(call, ends_s)
            else:
                still.append((ends_s, call))
        self.running = still
        for _ in range(round(self.requests_per_s * elapsed_s + self.rng.random() - 0.5)):
            call, at_s = Call(), now_s - elapsed_s * self.rng.random()
            replica_id = self.alive[int(self.rng.random() * len(self.alive))][0]
            self.calls.handle(call, Event.CHOOSE, at_s, replica_id=replica_id)
            self.calls.handle(call, Event.SEND, at_s)
            self.calls.handle(call, Event.ACCEPT, at_s, others=float(int(3 * self.rng.random())))
            ends_s = at_s + self.rng.lognormvariate(-2.0, 0.5)
            if ends_s <= now_s:
                self._end(call, ends_s)
            else:
                self.running.append((ends_s, call))

    def _end(self, call: Call, at_s: float) -> None:
        self.calls.handle(call, Event.END, at_s, ok=True)
        self.ledger.record(call)

    def report(self, now_s: float) -> dict[str, Any]:
        """The next report."""
        level = "table" if self.table is not None else "power_of_two"
        epoch = self.table.epoch if self.table is not None else 0
        return self.ledger.report(now_s, self.alive, level=level, table_epoch=epoch, settings={}, observes=False)


class _Load:
    """All routers and nodes of one size, against one coordinator."""

    def __init__(self, coordinator: Any, replicas: int, routers: int, rate: float, seed: int) -> None:
        rng = random.Random(seed)
        self.nodes = math.ceil(replicas / _REPLICAS_PER_NODE)
        alive = [(f"{rng.getrandbits(32):08x}", f"node-{i // _REPLICAS_PER_NODE:06d}", 16) for i in range(replicas)]
        self.coordinator = coordinator
        self.routers = [_Router(k, alive, rate * replicas / routers, seed) for k in range(routers)]
        self.seen: Counter[str] = Counter()
        self.report_s: list[float] = []
        self.bytes: dict[str, list[int]] = {"report": [], "table": [], "rows": []}
        self.counting = False
        self.rng = rng

    async def run(self, warm_s: float, seconds: float) -> None:
        """Warm up, then count."""
        tasks = [asyncio.create_task(work(each)) for each in self.routers for work in (self._reports, self._tables)]
        tasks += [asyncio.create_task(self._node(i)) for i in range(self.nodes)]
        await asyncio.sleep(warm_s)
        self.counting = True
        await asyncio.sleep(seconds)
        self.counting = False
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end

    async def _reports(self, router: _Router) -> None:
        await asyncio.sleep(REPORT_S * self.rng.random())
        last_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            router.live(now_s, now_s - last_s)
            last_s = now_s
            message = router.report(now_s)
            asked_s = time.perf_counter()
            answer = check(await self.coordinator.report.remote(message), "answer")
            router.ledger.acknowledged(answer["acknowledged"])
            if self.counting:
                self.seen["reports"] += 1
                self.report_s.append(time.perf_counter() - asked_s)
                if self.seen["reports"] % 50 == 0:
                    self.bytes["report"].append(_size(message))
            await asyncio.sleep(max(REPORT_S - (time.monotonic() - now_s), 0.0))

    async def _tables(self, router: _Router) -> None:
        while True:
            held = router.table
            version = (held.epoch, held.version) if held is not None else (0, 0)
            received = await self.coordinator.table.remote(_DEPLOYMENT, version, 5.0)
            if received is None:
                continue
            whole = router.number % _READ == 0
            router.table = read_table(received, held) if whole else _noted(received)
            if self.counting:
                self.seen["tables"] += 1
                if self.seen["tables"] % 50 == 0:
                    self.bytes["table"].append(_size(received))
                    self.bytes["rows"].append(len(received["rows"].get("replica_id", ())))

    async def _node(self, number: int) -> None:
        await asyncio.sleep(self.rng.random())
        seq = 0
        while True:
            seq += 1
            load = 0.2 * self.rng.random()
            rows = tuple((load, load + 0.05, load + 0.1) for _ in HORIZONS_S)
            forecast = Forecast({"cpu": rows, "memory": rows, "network": rows}, gate={"cpu": 1.0}, model_version="v1")
            snapshot = NodeSnapshot(load + 0.3, load, 0.4, 0.1, 0.05, 1e6, 1e6)
            report = NodeReport(f"node-{number:06d}", seq, snapshot, forecast)
            await self.coordinator.node.remote(node_message(report))
            await asyncio.sleep(1.0)


def _noted(message: Any) -> RoutingTable:
    """A table whose rows are not read: each router has a core of its own for that, here they share one."""
    return RoutingTable(_DEPLOYMENT, message["epoch"], message["table_version"], 1, ())


def _size(message: Any) -> int:
    from ray import cloudpickle  # noqa: PLC0415

    return len(cloudpickle.dumps(message))


def measure(replicas: int, routers: int, rate: float, seconds: float, seed: int) -> Row:
    """One size."""
    coordinator = ray.remote(CoordinatorProcess).options(num_cpus=0).remote({})
    try:
        pid = ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid()))
        process = psutil.Process(pid)
        load = _Load(coordinator, replicas, routers, rate, seed)
        warm_s = 6.0 + replicas / 1_000.0
        used: list[float] = []

        async def run() -> None:
            running = asyncio.create_task(load.run(warm_s, seconds))
            await asyncio.sleep(warm_s)
            started = sum(process.cpu_times()[:2])
            started_s = time.monotonic()
            await running
            used.append((sum(process.cpu_times()[:2]) - started) / (time.monotonic() - started_s))

        asyncio.run(run())
        ticks = ray.get(coordinator.status.remote(), timeout=60)["ticks"]
        quantiles = sorted(load.report_s) or [math.nan]
        return Row(
            replicas,
            routers,
            load.nodes,
            rate * replicas,
            used[0],
            ticks["p50_s"],
            ticks["p99_s"],
            quantiles[len(quantiles) // 2],
            quantiles[int(0.99 * (len(quantiles) - 1))],
            _mean(load.bytes["report"]),
            _mean(load.bytes["table"]),
            _mean(load.bytes["rows"]),
            load.seen["reports"] / (routers * seconds / REPORT_S),
            process.memory_info().rss / 2**20,
        )
    finally:
        ray.kill(coordinator)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(
    *,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    rate: Annotated[float, typer.Option(help="requests a second and replica")] = 5.0,
    seconds: Annotated[float, typer.Option(help="that are counted, per size")] = 30.0,
    sizes: Annotated[str, typer.Option(help="replicas x routers, e.g. 1000x100,3000x300; default: all")] = "",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Measure the coordinator."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    wanted = [tuple(map(int, size.split("x"))) for size in sizes.split(",") if size] or SIZES
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    rows = []
    try:
        for replicas, routers in wanted:
            console.print(f"{replicas:,} replicas, {routers:,} routers", style="dim")
            rows.append(measure(replicas, routers, rate, seconds, seed))
            _print(console, rows[-1:])
    finally:
        ray.shutdown()
    console.print("  ".join(f"{key}: {value}" for key, value in machine().items()), style="dim")
    _print(console, rows)
    for row in rows:
        if (row.replicas, row.routers) == (1_000, 100):
            for what, value, bound in (
                ("share of a core", row.cpu, _CPU_BOUND),
                ("tick p99, s", row.tick_p99_s, _TICK_BOUND_S),
            ):
                console.print(f"{'held  ' if value <= bound else 'MISSED'} {what}: {value:.3g} (bound {bound:g})")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=0) + "\n", encoding="utf-8")
        console.print(f"wrote {json_file}")


def _print(console: Console, rows: list[Row]) -> None:
    table = Table(
        *("replicas", "routers", "nodes", "requests/s", "CPU, cores", "tick p50 / p99, ms", "report p50 / p99, ms"),
        *("report, kB", "table, kB (rows)", "reports in time", "RSS, MB"),
    )
    for row in rows:
        table.add_row(
            f"{row.replicas:,}",
            f"{row.routers:,}",
            f"{row.nodes:,}",
            f"{row.requests_per_s:,.0f}",
            f"{row.cpu:.3f}",
            f"{1e3 * row.tick_p50_s:.0f} / {1e3 * row.tick_p99_s:.0f}",
            f"{1e3 * row.report_p50_s:.0f} / {1e3 * row.report_p99_s:.0f}",
            f"{row.report_bytes / 1e3:.1f}",
            f"{row.table_bytes / 1e3:.1f} ({row.table_rows:.0f})",
            f"{row.kept_up:.0%}",
            f"{row.rss_mb:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
