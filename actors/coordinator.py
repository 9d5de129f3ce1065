"""The coordinator actor: a shell that carries reports to each deployment's `Balancer` and its tables to the routers.

It holds no decision. It can die at any time: routers go on with the table that they hold, and give it back to
the next life of the coordinator, which goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from actors.deployment import FORGET_S, Deployment
from actors.explanations import Explanations
from actors.orders import Forecasters, Kept, Orders
from actors.serving_load import ServingLoad
from shadecast import former
from shadecast.config import TICK_JITTER, TICK_S
from shadecast.errors import MessageError
from shadecast.inbox import read_node
from shadecast.messages import check, message, numbers
from shadecast.types import HORIZONS_S, NodeReport, RoutingTable, Transition

logger = logging.getLogger(__name__)

_SUPERVISE_S = 2.0
_LOOK_AT_SETTINGS_S = 1.0
_PUBLISH_S = 5.0
_MOST_WARNED = 100
_RESTART_S = 10.0
"""So long after a restart routers come back with the tables that they hold."""

Deployed = Callable[[str], tuple[bool, Any] | None]
"""Whether a deployment's newest router only observes, and its settings; None where that cannot be told. Blocks."""


class Coordinator:
    """Wrap with `ray.remote`; every method runs on the actor's one event loop."""

    def __init__(
        self,
        *,
        now_s: Callable[[], float] = time.monotonic,
        epoch: int | None = None,
        supervise: Callable[[], Iterable[str]] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
        deployed: Deployed | None = None,
        holds: Kept | None = None,
        draining: Callable[[], Iterable[str]] = tuple,
        restarted: bool = False,
        publish: Callable[[dict[str, Any]], None] | None = None,
        forecasters: Forecasters | None = None,
        announced: Kept | None = None,
        audit: Callable[[dict[str, Any]], None] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`supervise` starts and stops node forecasters and returns the ids of the nodes that are alive (blocking).

        `deployed` tells what a deployment was last deployed with; without it the router that started last says so.
        `holds` keeps what operators keep out for the next life of the coordinator, `draining` are the nodes that Ray is
        about to take away (both block). `restarted`: this is not the coordinator's first life. `publish` is given the
        `summary` every few seconds, in a thread. `forecasters`, `announced`, `audit` and `wall` are as in `Orders`.
        """
        self._now_s = now_s
        self._epoch = epoch if epoch is not None else time.time_ns()
        self._supervise, self._deployed, self._draining, self._publish = supervise, deployed, draining, publish
        self._store, self._restarted = holds, restarted
        self._holds = set(map(str, holds.load())) if holds is not None else set[str]()
        self._leaving = frozenset[str]()
        """Nodes that Ray is about to take away."""
        self._alive = frozenset[str]()
        """Nodes of the cluster, heard of or not."""
        self._warned: set[str] = set()
        self._uniform = uniform
        self._started_s = now_s()
        self._deployments: dict[str, Deployment] = {}
        self._nodes: dict[str, tuple[float, NodeReport]] = {}
        self._serving = ServingLoad()
        self._transitions: deque[tuple[float, Transition]] = deque(maxlen=1000)
        self._tasks: list[asyncio.Task[None]] = []
        self._retraining: tuple[float, dict[str, Any]] | None = None
        self._orders = Orders(
            self._hold,
            lambda node_id: node_id in self._nodes,
            forecasters=forecasters,
            kept=announced,
            audit=audit,
            wall=wall,
        )
        self._explanations = Explanations(
            now_s,
            self._deployments,
            self._nodes,
            self._transitions,
            kept_out=lambda: (self._holds, self._leaving),
            announced=self._orders.view,
        )

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
        deployment, report, prefixes = str(found.get("deployment", "")), found.get("report"), found.get("prefixes")
        reader = self._post(deployment, prefixes) if prefixes is not None else None
        answer = self._report(deployment, report) if report is not None else {}
        known = None
        if answer.get("acknowledged") != 0 and not answer.get("table_wanted"):  # else it has more to say first
            known = await self._newer(deployment, (int(epoch), int(version)), wait_s)
        if known is not None:
            answer |= known.table((int(epoch), int(version)), self._now_s())
        if reader is not None and deployment in self._deployments:
            answer["prefixes"] = self._deployments[deployment].mail.take(*reader, self._now_s())
        if asked := self._explanations.questions():
            answer["questions"] = asked
        return message("answer", **answer)

    def _report(self, deployment: str, received: Any) -> dict[str, Any]:
        """What a router is told of its report: the number of the last one that was taken, and what is wanted."""
        self._wake()
        now_s = self._now_s()
        known = self._known(deployment, now_s)
        try:
            report, acknowledged = known.receive(received, now_s)
        except MessageError as error:
            self._warn(str(error))
            return {"refused": str(error)}
        holds_one = report is not None and report.table_epoch not in (0, self._epoch)
        if report is not None:
            self._serving.take(report, now_s)
        self._explanations.take(deployment, received)
        return {"acknowledged": acknowledged, "table_wanted": holds_one and known.wants_table()}

    def _post(self, deployment: str, received: Any) -> tuple[str, int] | None:
        """Keep what a router tells the others of prompts; who it is, and what it has had. None if it is unreadable."""
        now_s = self._now_s()
        try:
            return self._known(deployment, now_s).mail.post(received, now_s)
        except MessageError as error:
            self._warn(str(error))
            return None

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
        _, before = self._nodes.get(report.node_id, (0.0, None))
        self._nodes[report.node_id] = (now_s, report)
        if before is None or report.seq < before.seq:
            self._orders.forecaster_began(report.node_id)
        for known in self._deployments.values():
            known.nodes.append(report)
        return self._serving.on(report.node_id, now_s)

    async def _newer(self, deployment: str, held: tuple[int, ...], timeout_s: float) -> Deployment | None:
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
            if not await known.published(remaining_s):
                return None
        return None

    # ------------------------------------------------------------------ calls from Shadecast 0.1

    async def report_router(self, received: Any, settings: Any) -> bool:
        """A report by position; True asks for the table that the router holds."""
        self._wake()
        now_s = self._now_s()
        report = former.read_report(received)
        known = self._known(report.deployment, now_s)
        if not known.has_settings:
            known.settle(report.level == "observing", settings, 0.0)
        known.take(report, now_s)
        self._serving.take(report, now_s)
        return known.wants_table()

    async def report_node(self, received: Any) -> tuple[float, float]:
        """A forecaster's report by position."""
        return self._take_node(former.read_node(received))

    async def wait_table(self, deployment: str, seen: tuple[int, int], timeout_s: float) -> RoutingTable | None:
        """The whole table, by position."""
        known = await self._newer(deployment, tuple(seen), timeout_s)
        return known.output.table if known is not None and known.output is not None else None

    def _known(self, deployment: str, now_s: float) -> Deployment:
        known = self._deployments.get(deployment)
        if known is None:
            after_restart = self._restarted and now_s - self._started_s < _RESTART_S
            known = Deployment(deployment, self._epoch, now_s, after_restart=after_restart)
            self._deployments[deployment] = known
            known.nodes += [node for _, node in self._nodes.values()]
        return known

    def _warn(self, text: str) -> None:
        """Once for each thing, and no more of them than anybody would read."""
        if text not in self._warned and len(self._warned) < _MOST_WARNED:
            self._warned.add(text)
            last = "; what else cannot be read is not told any more" if len(self._warned) == _MOST_WARNED else ""
            logger.warning("%s%s", text, last)

    # ------------------------------------------------------------------ calls from people

    async def order(self, received: Any) -> dict[str, Any]:
        """Carry out what a person orders, as `Orders.carry_out`."""
        return await self._orders.carry_out(received)

    async def write_down(self, entry: Any) -> None:
        """An order that was refused before it came here, for the audit log."""
        await self._orders.write_down(entry if isinstance(entry, Mapping) else {})

    async def retraining(self, view: Any) -> None:
        """What self-retraining says of itself every few seconds, shown in the status; None: it has ended."""
        self._retraining = (self._now_s(), dict(view)) if isinstance(view, Mapping) else None

    async def command(self, target: str, drain: bool) -> int:
        """Drain or release, as a page or command line of an older version orders it; 0: there is no such id."""
        answer = await self.order({"order": "drain" if drain else "release", "target": target})
        return int(answer.get("concerned", 0))

    async def _hold(self, target: str, drain: bool) -> int:
        """Keep a replica, or whatever runs on a node now or later, out of traffic, or let it back in.

        Returns how many replicas that concerns, 1 for a node without any; 0: nothing of that id is known.
        """
        concerned = sum(known.replicas_of(target) for known in self._deployments.values())
        concerned = concerned or int(target in self._nodes or target in self._holds or target in self._alive)
        if concerned:
            (self._holds.add if drain else self._holds.discard)(target)
            if self._store is not None:
                await asyncio.get_running_loop().run_in_executor(None, self._store.save, sorted(self._holds))
        return concerned

    async def status(self) -> dict[str, Any]:
        """Everything that `shadecast status` and the live page show, as plain values."""
        self._wake()
        now_s = self._now_s()
        return {
            **self._summary(now_s),
            "deployments": [known.view(now_s) for known in self._deployments.values()],
            "transitions": [{**asdict(t), "ago_s": now_s - at_s} for at_s, t in self._transitions],
        }

    def _retraining_view(self, now_s: float) -> dict[str, Any] | None:
        if self._retraining is None:
            return None
        heard_s, view = self._retraining
        return {**view, "age_s": now_s - heard_s}

    async def observed(self) -> list[dict[str, Any]]:
        """What `shadecast report` is made of: each deployment's half minutes, as `Observations.plain`."""
        now_s = self._now_s()
        return [
            {"deployment": name, "observing": known.observing, "blocks": known.observations.plain(now_s)}
            for name, known in self._deployments.items()
        ]

    async def explain(self, received: Any) -> dict[str, Any]:
        """Why requests, a replica or a node went, or stand, where they do, as `Explanations.explain`."""
        self._wake()
        return await self._explanations.explain(received)

    def _summary(self, now_s: float) -> dict[str, Any]:
        """The status without what there is one of for each replica or router, and without the changes of state."""
        return {
            "schema": 1,
            "epoch": self._epoch,
            "holds": sorted(self._holds),
            "leaving": sorted(self._leaving),
            "unheard": sorted(self._alive - self._nodes.keys()),
            "announced": self._orders.view(),
            "retraining": self._retraining_view(now_s),
            "uptime_s": now_s - self._started_s,
            "nodes": [_node_view(report, now_s - at_s) for at_s, report in self._nodes.values()],
            "deployments": [known.summary(now_s) for known in self._deployments.values()],
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
            if self._publish is not None:
                self._tasks.append(loop.create_task(self._publish_forever(self._publish)))

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
                    if known.next_tick_s:
                        known.was_late(self._now_s() - known.next_tick_s)
                    try:
                        self.tick(deployment, now_s)
                    except Exception:
                        logger.exception("%s: tick failed; the last table stays in force", deployment)
                    known.next_tick_s = now_s + known.between_ticks_s * self._uniform(
                        1.0 - TICK_JITTER, 1.0 + TICK_JITTER
                    )
                due_s = min(due_s, known.next_tick_s)
            await asyncio.sleep(max(due_s - self._now_s(), 0.01))

    def tick(self, deployment: str, now_s: float) -> None:
        """One round of one deployment's balancer, and what follows from it."""
        known = self._deployments[deployment]
        if now_s - known.heard_s > FORGET_S:
            del self._deployments[deployment]
            return
        output = known.tick(now_s, self._leaving.union(self._holds))
        for transition in output.transitions if output is not None else ():
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

    async def _supervise_forever(self, supervise: Callable[[], Iterable[str]]) -> None:
        while True:
            try:
                loop = asyncio.get_running_loop()
                self._alive = frozenset(await loop.run_in_executor(None, supervise))
                self._leaving = frozenset(await loop.run_in_executor(None, self._draining))
                for node_id in [n for n in self._nodes if n not in self._alive]:
                    del self._nodes[node_id]
            except Exception:
                logger.exception("starting node forecasters failed; nodes are scored on live capacity meanwhile")
            await asyncio.sleep(_SUPERVISE_S)

    async def _publish_forever(self, publish: Callable[[dict[str, Any]], None]) -> None:
        while True:
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, publish, self._summary(self._now_s()))
            except Exception as error:
                self._warn(f"publishing metrics failed: {error!r}")
            await asyncio.sleep(_PUBLISH_S)

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
                    known.settle(*newest, math.inf)
            await asyncio.sleep(_LOOK_AT_SETTINGS_S)


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
