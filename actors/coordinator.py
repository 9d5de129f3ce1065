"""The coordinator actor: a shell that carries reports to each deployment's `Balancer` and its tables to the routers.

It holds no decision. It can die at any time: routers go on with the table that they hold, and give it back to
the next life of the coordinator, which goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

from actors.serving_load import ServingLoad
from shadecast import former
from shadecast.balancer import Balancer, Command, TickInput, TickOutput
from shadecast.config import TICK_JITTER, TICK_S, Config
from shadecast.errors import ConfigError, MessageError
from shadecast.inbox import Inbox, read_node
from shadecast.messages import check, message, numbers
from shadecast.tables import Publisher
from shadecast.types import HORIZONS_S, NodeReport, Observed, RouterReport, RoutingTable, Transition

logger = logging.getLogger(__name__)

_RESTORE_WAIT_S = 2.5
"""How long a new coordinator waits for a router to hand back the table of its former life."""
_FORGET_S = 60.0
"""A deployment that no router has reported for so long is forgotten."""
_SUPERVISE_S = 2.0
_LOOK_AT_SETTINGS_S = 1.0
_EXCHANGES_PER_S = 200.0
"""With more routers than take a table per tick at this rate, each one pauses between two tables."""
_LONGEST_PAUSE_S = 1.5
"""A table must not get so old that routers stop going by it."""

Deployed = Callable[[str], tuple[bool, Any] | None]
"""Whether a deployment's newest router only observes, and its settings; None where that cannot be told. Blocks."""


@dataclass(slots=True)
class _Deployment:
    """One deployment's balancer and what arrived for it since its last tick."""

    balancer: Balancer
    created_s: float
    heard_s: float
    settings: Any = None
    """The newest, whether they are valid or not."""
    observing: bool = False
    settings_of: float = -1.0
    """When the router was started whose settings they are, by its clock; infinite if they are Serve's own word."""
    inbox: Inbox = field(default_factory=Inbox)
    publisher: Publisher = field(default_factory=Publisher)
    routers: list[RouterReport] = field(default_factory=list)
    nodes: list[NodeReport] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    restored: bool = False
    next_tick_s: float = 0.0
    output: TickOutput | None = None
    made_s: float = 0.0
    published: asyncio.Event = field(default_factory=asyncio.Event)
    seen: dict[str, tuple[float, str]] = field(default_factory=dict)
    """When each router was heard, and its level."""
    mirrored: int = 0
    mirror_dropped: int = 0
    rescued: int = 0
    observed: Observed = field(default_factory=Observed)
    finished: int = 0
    failed: int = 0
    sent: dict[int, bytes] = field(default_factory=dict)
    """Of the last table, by the version on which it builds."""

    def packed(self, held: tuple[int, int]) -> bytes:
        """The last table for who holds (epoch, version), packed once for all who hold the same."""
        base = self.publisher.base(held)
        packed = self.sent.get(base)
        if packed is None:
            packed = self.sent[base] = msgpack.packb(self.publisher.message(base))
        return packed


class Coordinator:
    """Wrap with `ray.remote`; every method runs on the actor's one event loop."""

    def __init__(
        self,
        now_s: Callable[[], float] = time.monotonic,
        epoch: int | None = None,
        supervise: Callable[[], Iterable[str]] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
        deployed: Deployed | None = None,
    ) -> None:
        """`supervise` starts and stops node forecasters and returns the ids of the nodes that are alive (blocking).

        `deployed` tells what a deployment was last deployed with; without it the router that started last says so.
        """
        self._now_s = now_s
        self._epoch = epoch if epoch is not None else time.time_ns()
        self._supervise, self._deployed = supervise, deployed
        self._warned: set[str] = set()
        self._uniform = uniform
        self._started_s = now_s()
        self._deployments: dict[str, _Deployment] = {}
        self._nodes: dict[str, tuple[float, NodeReport]] = {}
        self._serving = ServingLoad()
        self._transitions: deque[tuple[float, Transition]] = deque(maxlen=1000)
        self._tick_s: deque[tuple[float, float]] = deque(maxlen=1000)
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------ calls from routers and forecasters

    async def exchange(self, received: Any) -> dict[str, Any]:
        """Take a router's report, where it brings one, and answer with the first table that is newer than its own.

        After its `wait_s` the answer comes without one. Raises MessageError.
        """
        try:
            found = check(received, "exchange")
            epoch, version, wait_s = numbers(found, ("epoch", "table_version", "wait_s"))
        except MessageError as error:
            self._warn(str(error))
            raise
        deployment, report = str(found.get("deployment", "")), found.get("report")
        answer = self._report(deployment, report) if report is not None else {}
        known = None
        if answer.get("acknowledged") != 0 and not answer.get("table_wanted"):  # else it has more to say first
            known = await self._newer(deployment, (int(epoch), int(version)), wait_s)
        if known is not None:
            answer["table"] = known.packed((int(epoch), int(version)))
            answer["age_s"] = self._now_s() - known.made_s
            answer["settings"], answer["observing"] = known.settings, known.observing
            answer["pause_s"] = min(max(len(known.seen) / _EXCHANGES_PER_S - TICK_S, 0.0), _LONGEST_PAUSE_S)
        return message("answer", **answer)

    def _report(self, deployment: str, received: Any) -> dict[str, Any]:
        """What a router is told of its report: the number of the last one that was taken, and what is wanted."""
        self._wake()
        now_s = self._now_s()
        known = self._known(deployment, now_s)
        try:
            report, acknowledged = known.inbox.take(received, now_s)
        except MessageError as error:
            self._warn(str(error))
            return {"refused": str(error)}
        known.heard_s = now_s
        started = received.get("started_wall_s", 0.0)
        if isinstance(started, (int, float)) and started > known.settings_of:
            known.settings_of = float(started)
            self._settle(known, bool(received.get("observes")), received.get("settings"))
        if report is not None:
            self._take(known, report, now_s)
        holds_one = report is not None and report.table_epoch not in (0, self._epoch)
        table_wanted = holds_one and not known.restored and known.output is None
        return {"acknowledged": acknowledged, "table_wanted": table_wanted}

    async def node(self, received: Any) -> tuple[float, float]:
        """Take a node's telemetry and forecast; what Serve has there: (requests in flight, arrivals per second)."""
        try:
            return self._take_node(read_node(received))
        except MessageError as error:
            self._warn(str(error))
            raise

    def _take_node(self, report: NodeReport) -> tuple[float, float]:
        self._wake()
        now_s = self._now_s()
        self._nodes[report.node_id] = (now_s, report)
        for known in self._deployments.values():
            known.nodes.append(report)
        return self._serving.on(report.node_id, now_s)

    async def _newer(self, deployment: str, held: tuple[int, ...], timeout_s: float) -> _Deployment | None:
        """A deployment once its table is newer than the one held; None after `timeout_s`."""
        self._wake()
        deadline_s = self._now_s() + timeout_s
        while (remaining_s := deadline_s - self._now_s()) > 0.0:
            known = self._deployments.get(deployment)
            if known is None:
                await asyncio.sleep(min(0.2, remaining_s))
                continue
            if known.output is not None and (known.output.table.epoch, known.output.table.version) > held:
                return known
            try:
                await asyncio.wait_for(known.published.wait(), remaining_s)
            except TimeoutError:
                return None
        return None

    # ------------------------------------------------------------------ calls from Shadecast 0.1

    async def report_router(self, received: Any, settings: Any) -> bool:
        """A report by position; True asks for the table that the router holds."""
        self._wake()
        now_s = self._now_s()
        report = former.read_report(received)
        known = self._known(report.deployment, now_s)
        known.heard_s = now_s
        if known.settings_of < 0.0:
            known.settings_of = 0.0
            self._settle(known, report.level == "observing", settings)
        self._take(known, report, now_s)
        return not known.restored and known.output is None

    async def report_node(self, received: Any) -> tuple[float, float]:
        """A forecaster's report by position."""
        return self._take_node(former.read_node(received))

    async def wait_table(self, deployment: str, seen: tuple[int, int], timeout_s: float) -> RoutingTable | None:
        """The whole table, by position."""
        known = await self._newer(deployment, tuple(seen), timeout_s)
        return known.output.table if known is not None and known.output is not None else None

    # ------------------------------------------------------------------ reports and settings

    def _known(self, deployment: str, now_s: float) -> _Deployment:
        known = self._deployments.get(deployment)
        if known is None:
            known = self._deployments[deployment] = _Deployment(
                Balancer(deployment, Config(), self._epoch), now_s, now_s
            )
            known.nodes.extend(node for _, node in self._nodes.values())
        return known

    def _take(self, known: _Deployment, report: RouterReport, now_s: float) -> None:
        self._serving.take(report, now_s)
        known.seen[report.router_id] = (now_s, report.level)
        known.mirrored += report.mirrored
        known.mirror_dropped += report.mirror_dropped
        known.rescued += report.rescued
        was, new = known.observed, report.observed
        known.observed = Observed(
            was.requests + new.requests, was.time_taken + new.time_taken, was.time_ours + new.time_ours
        )
        known.finished += sum(max(r.finished, 0) for r in report.replicas)
        known.failed += sum(max(r.failed, 0) for r in report.replicas)
        known.balancer.outrank(report.table_epoch)
        if report.held_table is not None and not known.restored:
            known.balancer.restore(report.held_table, now_s)
            known.restored = True
            logger.info("%s: went on from table %d", report.deployment, report.held_table.version)
        known.routers.append(report)

    def _settle(self, known: _Deployment, observing: bool, settings: Any) -> None:
        """Go by newer settings: routers hear of them with the next table. States, evidence and holds stay."""
        if (observing, settings) == (known.observing, known.settings):
            return
        known.observing, known.settings = observing, settings
        try:
            known.balancer.reconfigure(Config.from_mapping(settings))
        except ConfigError as error:
            self._warn(f"{known.balancer.deployment}: {error}. Balancing goes on as it was.")

    def _warn(self, text: str) -> None:
        """Once for each thing."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    # ------------------------------------------------------------------ calls from people

    async def command(self, target: str, drain: bool) -> int:
        """Drain (or let back in) a replica, or all replicas of a node; the number of connections concerned."""
        concerned = 0
        for known in self._deployments.values():
            known.commands.append(Command(target, drain))
            views = known.output.replicas if known.output is not None else ()
            concerned += sum(1 for v in views if target in (v.replica_id, v.node_id))
        return concerned

    async def status(self) -> dict[str, Any]:
        """Everything that `shadecast status` and the live page show, as plain values."""
        self._wake()
        now_s = self._now_s()
        return {
            "schema": 1,
            "epoch": self._epoch,
            "uptime_s": now_s - self._started_s,
            "nodes": [_node_view(report, now_s - at_s) for at_s, report in self._nodes.values()],
            "deployments": [self._deployment_view(known, now_s) for known in self._deployments.values()],
            "ticks": _quantiles(self._tick_s),
            "transitions": [{**asdict(t), "ago_s": now_s - at_s} for at_s, t in self._transitions],
        }

    # ------------------------------------------------------------------ the loop

    def _wake(self) -> None:
        """Start the loops with the first call: an actor's constructor runs before its event loop does."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._tick_forever())]
            if self._supervise is not None:
                self._tasks.append(loop.create_task(self._supervise_forever(self._supervise)))
            if self._deployed is not None:
                self._tasks.append(loop.create_task(self._look_at_settings(self._deployed)))

    async def close(self) -> None:
        """Stop the loops."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _tick_forever(self) -> None:
        while True:
            now_s = self._now_s()
            due_s = now_s + TICK_S
            for deployment, known in list(self._deployments.items()):
                if now_s >= known.next_tick_s:
                    try:
                        self.tick(deployment, now_s)
                    except Exception:
                        logger.exception("%s: tick failed; the last table stays in force", deployment)
                    known.next_tick_s = now_s + TICK_S * self._uniform(1.0 - TICK_JITTER, 1.0 + TICK_JITTER)
                due_s = min(due_s, known.next_tick_s)
            await asyncio.sleep(max(due_s - self._now_s(), 0.01))

    def tick(self, deployment: str, now_s: float) -> None:
        """One round of one deployment's balancer, and what follows from it."""
        known = self._deployments[deployment]
        if now_s - known.heard_s > _FORGET_S:
            del self._deployments[deployment]
            return
        if (
            not known.restored
            and now_s - known.created_s < _RESTORE_WAIT_S
            and any(report.table_epoch not in (0, self._epoch) for report in known.routers)
        ):
            return  # a router goes by a table that this life of the coordinator did not make
        routers, nodes, commands = tuple(known.routers), tuple(known.nodes), tuple(known.commands)
        known.routers.clear()
        known.nodes.clear()
        known.commands.clear()
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        output = known.balancer.on_tick(TickInput(now_s, routers, nodes, commands))
        known.output = output
        known.made_s = now_s
        known.publisher.publish(output.table)
        known.sent.clear()
        self._tick_s.append((time.perf_counter() - started_s, time.thread_time() - started_cpu_s))
        known.seen = {router: seen for router, seen in known.seen.items() if now_s - seen[0] < _FORGET_S}
        for transition in output.transitions:
            self._transitions.append((now_s, transition))
            logger.info(
                "%s: replica %s on node %s: %s -> %s: %s",
                transition.deployment,
                transition.replica_id,
                transition.node_id[:8],
                transition.before,
                transition.after,
                transition.reason,
            )
        known.published.set()
        known.published = asyncio.Event()

    async def _supervise_forever(self, supervise: Callable[[], Iterable[str]]) -> None:
        while True:
            try:
                alive = set(await asyncio.get_running_loop().run_in_executor(None, supervise))
                for node_id in [n for n in self._nodes if n not in alive]:
                    del self._nodes[node_id]
            except Exception:
                logger.exception("starting node forecasters failed; nodes are scored on live capacity meanwhile")
            await asyncio.sleep(_SUPERVISE_S)

    async def _look_at_settings(self, deployed: Deployed) -> None:
        """Serve keeps its router objects when a deployment's settings change: only it knows the newest."""
        loop = asyncio.get_running_loop()
        while True:
            for deployment, known in list(self._deployments.items()):
                try:
                    newest = await loop.run_in_executor(None, deployed, deployment)
                except Exception as error:  # Serve's controller restarts, say
                    logger.debug("settings of %s: %r", deployment, error)
                    continue
                if newest is not None:
                    known.settings_of = float("inf")
                    self._settle(known, *newest)
            await asyncio.sleep(_LOOK_AT_SETTINGS_S)

    # ------------------------------------------------------------------ views

    def _deployment_view(self, known: _Deployment, now_s: float) -> dict[str, Any]:
        output = known.output
        return {
            "deployment": known.balancer.deployment,
            "table_version": output.table.version if output is not None else 0,
            "table_age_s": now_s - known.made_s if output is not None else None,
            "panic": output.table.panic if output is not None else False,
            "load": output.load if output is not None else None,
            "slots": output.slots if output is not None else None,
            "batch_half": output.batch_half if output is not None else None,
            "gamma": list(output.gamma) if output is not None else None,
            "look_ahead_s": output.look_ahead_s if output is not None else None,
            "dropped_reports": output.dropped if output is not None else 0,
            "finished": known.finished,
            "failed": known.failed,
            "mirrored": known.mirrored,
            "mirror_dropped": known.mirror_dropped,
            "rescued": known.rescued,
            "observed": asdict(known.observed),
            "routers": [
                {"router_id": router_id, "level": level, "heard_s": now_s - at_s}
                for router_id, (at_s, level) in known.seen.items()
            ],
            "replicas": [asdict(view) for view in output.replicas] if output is not None else [],
        }


def _quantiles(ticks: Collection[tuple[float, float]]) -> dict[str, float]:
    """Of the last ticks' durations, and of the CPU time in them."""
    found: dict[str, float] = {"count": len(ticks)}
    for what, seconds in zip(("", "cpu_"), zip(*ticks, strict=True), strict=bool(ticks)):
        ordered = sorted(seconds)
        found[f"{what}p50_s"], found[f"{what}p99_s"] = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.99))
    return found


def _node_view(report: NodeReport, age_s: float) -> dict[str, Any]:
    forecast = report.forecast
    return {
        "node_id": report.node_id,
        "hostname": report.hostname,
        "age_s": age_s,
        "current": asdict(report.snapshot),
        "predicted": (
            {r: dict(zip(map(str, HORIZONS_S), map(list, rows), strict=True)) for r, rows in forecast.quantiles.items()}
            if forecast is not None
            else None
        ),
        "skill": dict(forecast.skill) if forecast is not None else {},
        "gate": dict(forecast.gate) if forecast is not None else {},
        "model_version": forecast.model_version if forecast is not None else "",
        "forecaster_rss_bytes": report.rss_bytes,
    }
