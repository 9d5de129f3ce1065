"""`python -m bench.scale [--json FILE]`: what many routers, replicas and nodes cost the coordinator.

The coordinator is the real actor in a process of its own; messages are real ones, through Ray. Routers and nodes are
simulated in this process: each router keeps the product's own book and ledger, and is in touch with the coordinator
through the product's own link; each node reports every second. The coordinator's CPU is what its process used.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import psutil
import ray
import typer
from rich.console import Console
from rich.table import Table

from bench.results import code_version
from bench.simulate.report import machine
from serve_app.coordinator import COORDINATOR, NAMESPACE
from serve_app.launch.processes import CoordinatorProcess
from serve_app.routing.link import Link
from shadecast.calls import Call, Calls, Event
from shadecast.config import REPORT_S
from shadecast.inbox import node_message
from shadecast.ledger import Ledger
from shadecast.tables import unpack_table
from shadecast.types import HORIZONS_S, Forecast, NodeReport, NodeSnapshot, RoutingTable

SIZES = ((100, 10), (1_000, 10), (1_000, 100), (3_000, 300), (10_000, 1_000))
_DEPLOYMENT = "scale/model"
_REPLICAS_PER_NODE = 8
_REQUESTS_PER_S = 5_000.0
"""This process cannot make up more."""
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
    tick_cpu_p99_s: float
    report_bytes: float
    table_bytes: float
    table_rows: float
    kept_up: float
    tables_per_s: float
    """Of one router."""
    rss_mb: float
    code: str = ""


class _Router:
    """A router's book, ledger and table; requests are made up."""

    def __init__(self, number: int, alive: list[tuple[str, str, int]], requests_per_s: float, seed: int) -> None:
        self.calls: Calls[Call] = Calls()
        self.ledger = Ledger(f"router-{number}", _DEPLOYMENT, self.calls)
        self.number, self.alive, self.requests_per_s = number, alive, requests_per_s
        self.rng = random.Random(f"{seed}/{number}")
        self.running: list[tuple[float, Call]] = []
        self.deployment = _DEPLOYMENT
        self.table: RoutingTable | None = None
        self.lived_s: float | None = None
        self.reports: list[dict[str, Any]] = []

    def _live(self, now_s: float) -> None:
        """The requests since the last call: each on a random replica, for a log-normal time."""
        elapsed_s, self.lived_s = now_s - (self.lived_s or now_s), now_s
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

    # what the product's link asks a router for

    def has_replicas(self) -> bool:
        """Always."""
        return True

    def is_overdue(self) -> bool:
        """Never."""
        return False

    def make_report(self) -> dict[str, Any]:
        """The next report, with what has happened meanwhile."""
        now_s = time.monotonic()
        self._live(now_s)
        level = "table" if self.table is not None else "power_of_two"
        epoch = self.table.epoch if self.table is not None else 0
        made = self.ledger.report(now_s, self.alive, level=level, table_epoch=epoch, settings={}, observes=False)
        self.reports.append(made)
        return made

    def reported(self, acknowledged: int, *, table_wanted: bool) -> None:
        """The coordinator's answer."""
        assert not table_wanted
        self.ledger.acknowledged(acknowledged)

    between_s = math.inf

    def post(self) -> None:
        """Nothing for the other routers."""

    def hear(self, answer: Mapping[str, Any]) -> None:
        """Nothing from them."""

    def use_settings(self, observing: bool, settings: Any) -> None:
        """The same ones always."""

    def take_table(self, table: RoutingTable) -> None:
        """A newer table."""
        self.table = table


class _Link(Link):
    """A link that reads few of its tables: each router has a core of its own for that, here they share one."""

    def __init__(self, router: _Router, seen: Callable[[bytes], None]) -> None:
        super().__init__(cast("Any", weakref.ref(router)))
        self.reads, self.seen = router.number % _READ == 0, seen
        self.read_table = self._read_table

    def _read_table(self, packed: bytes, held: RoutingTable | None) -> RoutingTable | None:
        """The table, without its rows in most routers."""
        self.seen(packed)
        if self.reads:
            return unpack_table(packed, held)
        message = json.loads(packed)
        return RoutingTable(_DEPLOYMENT, message["epoch"], message["table_version"], 1, ())


class _Load:
    """All routers and nodes of one size, against one coordinator."""

    def __init__(self, coordinator: Any, replicas: int, routers: int, rate: float, seed: int) -> None:
        rng = random.Random(seed)
        self.nodes = math.ceil(replicas / _REPLICAS_PER_NODE)
        alive = [(f"{rng.getrandbits(32):08x}", f"node-{i // _REPLICAS_PER_NODE:06d}", 16) for i in range(replicas)]
        self.coordinator = coordinator
        self.routers = [_Router(k, alive, rate * replicas / routers, seed) for k in range(routers)]
        self.seen: Counter[str] = Counter()
        self.bytes: dict[str, list[int]] = {"report": [], "table": [], "rows": []}
        self.counting = False
        self.rng = rng

    async def run(self, warm_s: float, seconds: float) -> None:
        """Warm up, then count."""
        tasks = [asyncio.create_task(self._router(each)) for each in self.routers]
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

    async def _router(self, router: _Router) -> None:
        link = _Link(router, self._table_seen)
        await asyncio.sleep(REPORT_S * self.rng.random())
        while True:
            pause_s = await link.exchange()
            if self.counting and router.reports:
                self.seen["reports"] += len(router.reports)
                if self.seen["reports"] % 50 in (0, 1):
                    self.bytes["report"].append(_size(router.reports[-1]))
            router.reports.clear()
            await asyncio.sleep(pause_s)

    def _table_seen(self, packed: bytes) -> None:
        if self.counting:
            self.seen["tables"] += 1
            if self.seen["tables"] % 50 == 1:
                self.bytes["table"].append(len(packed))
                self.bytes["rows"].append(len(json.loads(packed)["rows"].get("replica_id", ())))

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


def _size(message: Any) -> int:
    from ray import cloudpickle  # noqa: PLC0415

    return len(cloudpickle.dumps(message))


def measure(replicas: int, routers: int, rate: float, seconds: float, seed: int) -> Row:
    """One size."""
    coordinator = ray.remote(CoordinatorProcess).options(name=COORDINATOR, namespace=NAMESPACE, num_cpus=0).remote({})
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
        (deployment,) = ray.get(coordinator.status.remote(), timeout=60)["deployments"]
        ticks = deployment["tick"]
        return Row(
            replicas,
            routers,
            load.nodes,
            rate * replicas,
            used[0],
            ticks["p50_s"],
            ticks["p99_s"],
            ticks["cpu_p99_s"],
            _mean(load.bytes["report"]),
            _mean(load.bytes["table"]),
            _mean(load.bytes["rows"]),
            load.seen["reports"] / (routers * seconds / REPORT_S),
            load.seen["tables"] / (routers * seconds),
            process.memory_info().rss / 2**20,
        )
    finally:
        ray.kill(coordinator)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(
    *,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    rate: Annotated[float, typer.Option(help="requests a second and replica, 5,000 a second at most in all")] = 5.0,
    seconds: Annotated[float, typer.Option(help="that are counted, per size")] = 60.0,
    sizes: Annotated[str, typer.Option(help="replicas x routers, e.g. 1000x100,3000x300; default: all")] = "",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Measure the coordinator."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    wanted = [_size_of(size) for size in sizes.split(",") if size] or SIZES
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    rows = []
    try:
        for replicas, routers in wanted:
            console.print(f"{replicas:,} replicas, {routers:,} routers", style="dim")
            rows.append(measure(replicas, routers, min(rate, _REQUESTS_PER_S / replicas), seconds, seed))
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
        json_file.write_text(
            json.dumps([asdict(replace(row, code=code_version())) for row in rows], indent=0) + "\n", encoding="utf-8"
        )
        console.print(f"wrote {json_file}")


def _size_of(text: str) -> tuple[int, int]:
    replicas, _, routers = text.partition("x")
    if not (replicas.isdigit() and routers.isdigit() and int(replicas) and int(routers)):
        raise SystemExit(f"{text}: a size is replicas x routers, 1000x100 say")
    return int(replicas), int(routers)


def _print(console: Console, rows: list[Row]) -> None:
    table = Table(
        *("replicas", "routers", "nodes", "requests/s", "CPU, cores", "tick p50 / p99 (CPU), ms"),
        *("report, kB", "table, kB (rows)", "reports in time", "tables/s", "RSS, MB"),
    )
    for row in rows:
        table.add_row(
            f"{row.replicas:,}",
            f"{row.routers:,}",
            f"{row.nodes:,}",
            f"{row.requests_per_s:,.0f}",
            f"{row.cpu:.3f}",
            f"{1e3 * row.tick_p50_s:.0f} / {1e3 * row.tick_p99_s:.0f} ({1e3 * row.tick_cpu_p99_s:.0f})",
            f"{row.report_bytes / 1e3:.1f}",
            f"{row.table_bytes / 1e3:.1f} ({row.table_rows:.0f})",
            f"{row.kept_up:.0%}",
            f"{row.tables_per_s:.2f}",
            f"{row.rss_mb:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
