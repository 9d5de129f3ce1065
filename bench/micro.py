"""`python -m bench.micro --json FILE [--quick]`: what the request path costs, in one process and one run.

Decisions of Ray's power-of-two, consistent-hash and round-robin routers and ours, side by side: the real classes over
stand-in replicas; table swap, outcome recording, score-table rebuild, forecaster step; and, on a local cluster, the
throughput of a no-op deployment through handles, default and ours in turn. Rows {name, arm, replicas, metric, value,
code}.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    ReplicaQueueLengthInfo,
    RequestMetadata,
)
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import PendingRequest, RequestRouter
from rich.console import Console
from rich.table import Table

from bench import micro_prefix
from bench.results import code_version
from bench.simulate.report import machine
from serve_app.router import PredictiveRouter
from shadecast.calls import Call, Calls, Event
from shadecast.errors import ShadecastError
from shadecast.pick import PickTable, cost_table
from shadecast.prefix import MOST_ENTRIES
from shadecast.types import RoutingTable, State, TableRow

REPLICAS = (2, 8, 64, 1000)
ROUTERS: dict[str, type[RequestRouter]] = {
    "ray_power_of_two": PowerOfTwoChoicesRequestRouter,
    "ray_consistent_hash": ConsistentHashRouter,
    "ray_round_robin": RoundRobinRouter,
    "shadecast": PredictiveRouter,
}
_DEPLOYMENT = DeploymentID(name="noop", app_name="micro")
_BATCH = 100
"""Decisions timed together: the clock costs a fifth of one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number; `replicas` is 0 where it does not matter."""

    name: str
    arm: str
    replicas: int
    metric: str
    value: float
    code: str = ""


@dataclass(frozen=True)
class _Replica:
    """As much of a running replica as routers look at when they choose."""

    replica_id: ReplicaID
    node_id: str
    max_ongoing_requests: int = _BATCH
    """A place for each of a batch: what waiting for one costs is not measured here."""
    availability_zone: str | None = None
    multiplexed_model_ids: frozenset[str] = frozenset()
    replica_metadata: dict[str, Any] = field(default_factory=dict)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> _Result:
        return _Result()


class _Result:
    """A unary result by reference, accepted, that tells its end when asked to."""

    def __init__(self) -> None:
        self.tell: Callable[[Any], None] | None = None

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=1)

    def to_object_ref(self) -> _Result:
        return self

    def _on_completed(self, callback: Callable[[Any], None]) -> None:
        self.tell = callback


def main(
    *,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    quick: Annotated[bool, typer.Option(help="fewer repetitions, one short throughput round")] = False,
    throughput: Annotated[bool, typer.Option(help="also start a local cluster and drive it")] = True,
) -> None:
    """Measure the request path."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    repeats = 30 if quick else 200
    rows = asyncio.run(_decisions(repeats, console))
    rows += _imports(3 if quick else 9)
    rows += _rebuild(quick)
    rows += _calls(repeats)
    rows += [Row(*each) for each in micro_prefix.measure(repeats, 250_000 if quick else MOST_ENTRIES)]
    try:
        rows += _forecaster(quick)
    except ShadecastError as error:
        console.print(f"the forecaster's step is left out: {error}", style="red")
    if throughput:
        from bench.micro_throughput import compare  # noqa: PLC0415 - starts a cluster: only when asked for

        rows += [Row(*each) for each in compare(pairs=2 if quick else 16, rounds=8 if quick else 12, seconds=0.5)]
    _print(console, rows)
    if json_file is not None:
        json_file.write_text(
            json.dumps([asdict(replace(row, code=code_version())) for row in rows], indent=0) + "\n", encoding="utf-8"
        )
        console.print(f"wrote {json_file}")


# ---------------------------------------------------------------- decisions


async def _decisions(repeats: int, console: Console) -> list[Row]:
    rows = []
    for count in REPLICAS:
        console.print(f"decisions over {count} replicas", style="dim")
        arms: dict[str, tuple[RequestRouter, dict[str, Any]]] = {
            name: (_router(kind, count), {"session_id": "s"} if kind is ConsistentHashRouter else {})
            for name, kind in ROUTERS.items()
        }
        arms["shadecast_session"] = (_router(PredictiveRouter, count), {"session_id": "s"})
        arms["shadecast_trials"] = (_router(PredictiveRouter, count, shifting=True), {})
        await asyncio.sleep(0)
        taken: dict[tuple[str, str], list[float]] = {}
        with _without_gc():
            for version in range(2, repeats + 2):  # in turn, so that all see the same machine
                for name, (router, labels) in arms.items():
                    if isinstance(router, PredictiveRouter):  # it must not grow stale while others are measured
                        router.take_table(_table(count, version, shifting=name == "shadecast_trials"))
                    taken.setdefault(("decision", name), []).append(_choose_batch(router, labels))
                    taken.setdefault(("way_to_a_replica", name), []).append(await _way_batch(router, labels))
        for (what, name), times in taken.items():
            rows.append(Row(what, name, count, "median_us", statistics.median(times) * 1e6))
            rows.append(Row(what, name, count, "p90_us", statistics.quantiles(times, n=10)[-1] * 1e6))
        rows += _swap(arms["shadecast"][0], count, repeats + 2, max(repeats // 4, 10))
        rows += await _outcomes(arms["shadecast"][0], count, repeats)
        for router, _ in arms.values():
            _stop(router)
        await asyncio.sleep(0)
    return rows


def _router(kind: type[RequestRouter], count: int, *, shifting: bool = False) -> Any:
    router: Any = kind(
        deployment_id=_DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="n0",
        use_replica_queue_len_cache=True,
    )
    router.initialize_state()
    router.update_replicas([_Replica(ReplicaID(f"r{i:04d}", _DEPLOYMENT), f"n{i % 100}") for i in range(count)])
    if isinstance(router, PredictiveRouter):
        router.take_table(_table(count, 1, shifting=shifting))
    return router


def _table(count: int, version: int, *, shifting: bool = False) -> RoutingTable:
    rows = tuple(
        TableRow(
            f"r{i:04d}",
            f"n{i % 100}",
            State.SHIFTING if shifting and i % 4 == 0 else State.ACTIVE,
            0.2 if shifting and i % 4 == 0 else 1.0,
            0.5 + (i % 10) / 10.0,
            float(i % 3),
            session_weight=1.0,
        )
        for i in range(count)
    )
    return RoutingTable("micro/noop", 1, version, 4, rows, 2.0)


def _requests(labels: dict[str, Any], serial: Iterator[int]) -> list[PendingRequest]:
    made = []
    for _, i in zip(range(_BATCH), serial, strict=False):
        metadata = RequestMetadata(request_id=f"q{i}", internal_request_id=f"q{i}", **labels)
        made.append(PendingRequest(args=[], kwargs={}, metadata=metadata))
    return made


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


_SERIAL = _numbers()


def _choose_batch(router: Any, labels: dict[str, Any]) -> float:
    """Seconds a decision: `choose_replicas` to its end and the first rank looked at, as Serve does."""
    requests, replicas, chosen = _requests(labels, _SERIAL), router._replicas_list, []
    ours = isinstance(router, PredictiveRouter)
    for request in requests if ours else ():
        router.asked(request)
    choose = router.choose_replicas
    started_s = time.perf_counter()
    for request in requests:
        try:
            choose(candidate_replicas=replicas, pending_request=request).send(None)
        except StopIteration as done:
            chosen.append(next(iter(done.value))[0])
    taken_s = time.perf_counter() - started_s
    assert len(chosen) == len(requests)
    for request in requests if ours else ():
        router.given_up(request)
    return taken_s / len(requests)


async def _way_batch(router: Any, labels: dict[str, Any]) -> float:
    """Seconds from a request's arrival in the router to its replica, Serve's own part included."""
    requests, chosen = _requests(labels, _SERIAL), []
    for replica in router._replicas_list:  # known queues, as under steady traffic
        router.on_new_queue_len_info(replica.replica_id, 0)
    started_s = time.perf_counter()
    for request in requests:
        chosen.append(await router._choose_replica_for_request(request))
    taken_s = time.perf_counter() - started_s
    assert len(chosen) == len(requests)
    for request in requests if isinstance(router, PredictiveRouter) else ():
        router.given_up(request)
    return taken_s / len(requests)


def _swap(router: Any, count: int, first: int, repeats: int) -> list[Row]:
    times = []
    for version in range(first, first + repeats):
        table = _table(count, version)
        started_s = time.perf_counter()
        router.take_table(table)
        times.append(time.perf_counter() - started_s)
    return [Row("table_swap", "shadecast", count, "median_ms", statistics.median(times) * 1e3)]


async def _outcomes(router: Any, count: int, repeats: int) -> list[Row]:
    """The router's own work for a chosen request: send it, hear that it was accepted, watch it, record its end."""
    times = []
    for _ in range(max(repeats // 4, 10)):
        requests = _requests({}, _SERIAL)
        replicas = [await router._choose_replica_for_request(request) for request in requests]
        started_s = time.perf_counter()
        for request, replica in zip(requests, replicas, strict=True):
            result = replica.try_send_request(request, with_rejection=True)
            await result.get_rejection_response()
            assert result.inner.tell is not None
            result.inner.tell(None)
        await asyncio.sleep(0)
        router.calls.soon.catch_up()
        times.append((time.perf_counter() - started_s) / len(requests))
    assert not router.calls.book.open_calls
    return [Row("outcome", "shadecast_router", count, "median_us", statistics.median(times) * 1e6)]


def _stop(router: Any) -> None:
    if isinstance(router, PredictiveRouter) and router._control is not None:
        router._control.cancel()


# ---------------------------------------------------------------- parts


def _imports(times: int) -> list[Row]:
    """CPU time of what a process imports over ray.serve's own: the class that it is sent, then what a router does."""
    code = (
        "import time, ray.serve, ray.serve.config; began = time.process_time(); import serve_app.router; "
        "taken = time.process_time(); import serve_app.routing.request_router; "
        "print(taken - began, time.process_time() - began)"
    )
    command = [sys.executable, "-c", code]
    told = [subprocess.check_output(command, text=True).split() for _ in range(times)]  # noqa: S603 - see above
    taken, made = ([float(each[i]) for each in told] for i in (0, 1))
    return [
        Row("import", "serve_app.router", 0, "median_ms", statistics.median(taken) * 1e3),
        Row("import", "serve_app.routing", 0, "median_ms", statistics.median(made) * 1e3),
    ]


def _rebuild(quick: bool) -> list[Row]:
    rows = []
    costs = cost_table(2.0, 0.0)
    for count, repeats in ((128, 50 if quick else 500), (10_000, 5 if quick else 40)):
        table = _table(count, 1)
        ids = [row.replica_id for row in table.rows]
        mine = dict.fromkeys(ids[::3], 1)
        limits = [16.0] * count

        def once(ids: list[str] = ids, table: RoutingTable = table, mine: Any = mine, limits: Any = limits) -> None:
            PickTable(ids, table, mine, mine, costs, limits=limits)

        rows.append(Row("rebuild", "shadecast", count, "median_ms", _median_s(once, repeats) * 1e3))
    return rows


def _calls(repeats: int) -> list[Row]:
    """The book of calls alone: a call from its choice to its end."""
    book: Calls[Call] = Calls()

    def once() -> None:
        for _ in range(_BATCH):
            call = Call()
            book.open(call, 1.0)
            book.handle(call, Event.CHOOSE, 1.0, replica_id="r")
            book.handle(call, Event.SEND, 1.0)
            book.handle(call, Event.ACCEPT, 1.0, others=2.0)
            book.handle(call, Event.END, 1.1, ok=True)

    return [Row("calls", "shadecast", 1, "median_us", _median_s(once, repeats) / _BATCH * 1e6)]


def _forecaster(quick: bool) -> list[Row]:
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415 - after the decisions: its threads are not theirs

    from models.forecaster import OnlineForecaster  # noqa: PLC0415
    from models.grid import CHANNELS  # noqa: PLC0415
    from models.registry import SHIPPED, Registry  # noqa: PLC0415

    torch.set_num_threads(1)  # as in the actor
    registry = Registry(str(SHIPPED))
    forecaster = OnlineForecaster(registry.load(registry.champion()))
    samples = np.random.default_rng(1).random((1, len(CHANNELS))).astype(np.float32)
    for _ in range(70):
        forecaster.step(samples)
    median_s = _median_s(lambda: forecaster.step(samples), 100 if quick else 400)
    return [Row("forecaster_step", "shadecast", 0, "median_ms", median_s * 1e3)]


def _median_s(call: Callable[[], Any], repeats: int) -> float:
    times = []
    with _without_gc():
        for _ in range(repeats):
            started_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


@contextmanager
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---------------------------------------------------------------- output


def checks(rows: Iterable[Row]) -> list[tuple[str, float, float, bool]]:
    """(what, value, bound, held) of the targets that these rows can tell."""
    found = {(row.name, row.arm, row.replicas, row.metric): row.value for row in rows}
    eight = found["decision", "shadecast", 8, "median_us"]
    thousand = found["decision", "shadecast", 1000, "median_us"] / eight
    small = found["rebuild", "shadecast", 128, "median_ms"]
    large = found["rebuild", "shadecast", 10_000, "median_ms"]
    made = [
        ("decision over 8 replicas, us", eight, 5.0, eight <= 5.0),
        ("decision over 1,000 replicas, times that over 8", thousand, 2.0, thousand <= 2.0),
        ("rebuild for 128 replicas, ms", small, 0.5, small <= 0.5),
        ("rebuild for 10,000 replicas, ms", large, 50.0, large <= 50.0),
    ]
    calls = found["calls", "shadecast", 1, "median_us"]
    made.append(("a call in the book, us", calls, 3.0, calls <= 3.0))
    for tokens, bound in ((1_000, 20.0), (12_000, 260.0)):
        took = found["prefix_all", f"prompt_{tokens}_tokens", micro_prefix.REPLICAS, "median_us"]
        made.append((f"a prompt of {tokens:,} tokens in the prefix index, us", took, bound, took <= bound))
    imported = found["import", "serve_app.router", 0, "median_ms"]
    made.append(("import of serve_app.router over ray.serve's own, ms", imported, 30.0, imported <= 30.0))
    ratio = found.get(("throughput", "shadecast", 4, "ratio_to_default"))
    if ratio is not None:
        made.append(("throughput, times the default's", ratio, 0.98, ratio >= 0.98))
    return made


def _print(console: Console, rows: list[Row]) -> None:
    console.print("  ".join(f"{key}: {value}" for key, value in machine().items()), style="dim")
    table = Table("what", "arm", "replicas", "metric", "value")
    for row in rows:
        table.add_row(row.name, row.arm, str(row.replicas or ""), row.metric, f"{row.value:.3g}")
    console.print(table)
    for what, value, bound, held in checks(rows):
        console.print(f"{'held  ' if held else 'MISSED'} {what}: {value:.3g} (bound {bound:g})")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
