"""What the coordinator keeps of one deployment: its balancer, what has come for it since the last tick, its tables."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from shadecast.balancer import Balancer, TickInput, TickOutput
from shadecast.config import LOST_AFTER_S, TICK_S, Config
from shadecast.connection import Event
from shadecast.errors import ConfigError, MessageError
from shadecast.histogram import TICK_BOUNDS_S, Durations, Histogram
from shadecast.inbox import Inbox
from shadecast.ledger import REFUSALS
from shadecast.observing import Observations
from shadecast.prefix_mail import Mail
from shadecast.tables import Publisher
from shadecast.types import NodeReport, Observed, RouterReport, State

logger = logging.getLogger(__name__)

RESTORE_WAIT_S = 4.0
"""How long a new coordinator waits for a router to hand back the table of its former life."""
_TABLES_PER_S = 100.0
"""To all routers together. Tables every second serve as well as twice as many (simulated: `stale-table@1`)."""
_LONGEST_TICK_S = 2.0
"""A table must not get so old that routers stop going by it."""
FORGET_S = 60.0
"""A deployment, or a router of one, that was not heard of for so long is forgotten."""


_COUNTED = (
    "mirrored",
    "mirror_dropped",
    "uncopyable",
    "rescued",
    "retried",
    "moved",
    "resumed",
    "prompt_tokens",
    "cached_tokens",
)
"""Counts of a report that are added up."""


class Deployment:
    """One deployment. Threads: everything on the coordinator's event loop."""

    def __init__(self, name: str, epoch: int, now_s: float, *, after_restart: bool = False) -> None:
        self.name = name
        self._after_restart = after_restart
        """The coordinator has just been restarted: some router may hold a table, though the first to come has none."""
        self._epoch = epoch
        self.balancer = Balancer(name, Config(), epoch)
        self._created_s = self.heard_s = now_s
        self.settings: Any = None
        """The newest, whether they are valid or not."""
        self.observing = False
        self._settings_of = -1.0
        """When the router was started whose settings they are, by its clock; infinite if they are Serve's own word."""
        self._inbox, self._publisher = Inbox(), Publisher()
        self.mail = Mail()
        """What routers tell each other of prompts."""
        self._packed: dict[tuple[int, int], bytes] = {}
        """What was sent of the last table, by (epoch, version) held, and by (0, version on which it builds)."""
        self.nodes: list[NodeReport] = []
        self._reports: list[RouterReport] = []
        self._restored = False
        self.next_tick_s = 0.0
        self.output: TickOutput | None = None
        self._made_s = 0.0
        self._published = asyncio.Event()
        self.tick_s: deque[tuple[float, float]] = deque(maxlen=120)
        """Duration of each tick of the last minute, and the CPU time in it."""
        self._tick_s, self._late_s = Histogram(TICK_BOUNDS_S), Histogram(TICK_BOUNDS_S)
        self._routers: dict[str, _Router] = {}
        self._counts: Counter[str] = Counter()
        """Of all routers, since the coordinator started."""
        self._refused: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        """Changes of connections' states, by event."""
        self._unreadable = 0
        self._observed, self.observations = Observed(), Observations()
        self._durations, self._first_items = Durations(), Durations()

    # ------------------------------------------------------------------ reports

    def receive(self, received: Any, now_s: float) -> tuple[RouterReport | None, int]:
        """A router's report as `Inbox.take` reads it, taken in. Raises MessageError."""
        try:
            report, acknowledged = self._inbox.take(received, now_s)
        except MessageError:
            self._unreadable += 1
            raise
        self.heard_s = now_s
        started = received.get("started_wall_s", 0.0)
        if isinstance(started, (int, float)) and started > self._settings_of:
            self.settle(bool(received.get("observes")), received.get("settings"), float(started))
        if report is not None:
            self.take(report, now_s)
        return report, acknowledged

    def take(self, report: RouterReport, now_s: float) -> None:
        """A router's report, for the next tick."""
        self.heard_s = now_s
        self._routers[report.router_id] = _Router(now_s, report.level, report.waiting, report.ejected)
        for name in _COUNTED:
            self._counts[name] += getattr(report, name)
        self._counts["finished"] += sum(max(r.finished, 0) for r in report.replicas)
        self._counts["failed"] += sum(max(r.failed, 0) for r in report.replicas)
        self._refused.update(report.refused)
        self._durations = self._durations.plus(report.durations)
        self._first_items = self._first_items.plus(report.first_items)
        was, new = self._observed, report.observed
        self._observed = Observed(
            was.requests + new.requests, was.time_taken + new.time_taken, was.time_ours + new.time_ours
        )
        if new.requests or report.level == "observing":
            for view in report.replicas:
                for outcome in view.outcomes:  # a long list was cut to the newest
                    self.observations.add(now_s, outcome, max(view.finished, 0) / len(view.outcomes))
        self.balancer.outrank(report.table_epoch)
        if report.held_table is not None and not self._restored:
            self.balancer.restore(report.held_table, now_s)
            self._restored = True
            logger.info("%s: went on from table %d", self.name, report.held_table.version)
        self._reports.append(report)

    def wants_table(self) -> bool:
        """Whether this life of the coordinator has nothing to go on from yet."""
        return not self._restored and self.output is None

    def settle(self, observing: bool, settings: Any, since_s: float) -> None:
        """Go by newer settings: routers hear of them with the next table. States, evidence and holds stay."""
        self._settings_of = since_s
        if (observing, settings) == (self.observing, self.settings):
            return
        self.observing, self.settings = observing, settings
        try:
            self.balancer.reconfigure(Config.from_mapping(settings))
        except ConfigError as error:
            logger.warning("%s: %s. Balancing goes on as it was.", self.name, error)

    @property
    def has_settings(self) -> bool:
        """Whether any were heard."""
        return self._settings_of >= 0.0

    def replicas_of(self, target: str) -> int:
        """How many replicas a replica's or node's id stands for."""
        rows = self.output.table.rows if self.output is not None else ()
        return sum(1 for row in rows if target in (row.replica_id, row.node_id))

    # ------------------------------------------------------------------ ticks and tables

    def tick(self, now_s: float, holds: frozenset[str] = frozenset()) -> TickOutput | None:
        """One round of the balancer; None while the table of a former life may still come."""
        if (
            not self._restored
            and now_s - self._created_s < RESTORE_WAIT_S
            and (self._after_restart or any(report.table_epoch not in (0, self._epoch) for report in self._reports))
        ):
            return None
        taken = TickInput(now_s, tuple(self._reports), tuple(self.nodes), holds)
        self._reports, self.nodes = [], []
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        self.output = self.balancer.on_tick(taken)
        self.tick_s.append((time.perf_counter() - started_s, time.thread_time() - started_cpu_s))
        self._tick_s.add(self.tick_s[-1][0])
        self._events.update(transition.event for transition in self.output.transitions)
        self._made_s = now_s
        self._publisher.publish(self.output.table)
        self._packed = {}
        self._routers = {name: heard for name, heard in self._routers.items() if now_s - heard.at_s < FORGET_S}
        self._published.set()
        self._published = asyncio.Event()
        return self.output

    async def published(self, timeout_s: float) -> bool:
        """Whether a table is published within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._published.wait()
        except TimeoutError:
            return False
        return True

    def table(self, held: tuple[int, int], now_s: float) -> dict[str, Any]:
        """The last table for who holds (epoch, version), packed once for all who hold the same; with settings."""
        packed = self._packed.get(held)
        if packed is None:
            base = self._publisher.base(held)
            packed = self._packed.get((0, base)) or json.dumps(self._publisher.message(base)).encode()
            self._packed[held] = self._packed[0, base] = packed
        return {
            "table": packed,
            "age_s": now_s - self._made_s,
            "settings": self.settings,
            "observing": self.observing,
        }

    @property
    def between_ticks_s(self) -> float:
        """The usual time; longer where so many routers take each table that this would be most of what is done."""
        return min(max(TICK_S, len(self._routers) / _TABLES_PER_S), _LONGEST_TICK_S)

    def was_late(self, late_s: float) -> None:
        """A tick begins so long after it was due."""
        self._late_s.add(late_s)

    def view(self, now_s: float) -> dict[str, Any]:
        """What people see of it, as plain values."""
        ejected = Counter(replica_id for router in self._routers.values() for replica_id in router.ejected)
        views = self.balancer.views()
        return {
            **self.summary(now_s),
            "routers": [
                {"router_id": router_id, "level": router.level, "heard_s": now_s - router.at_s}
                for router_id, router in self._routers.items()
            ],
            "replicas": [{**asdict(view), "ejected_by": ejected[view.replica_id]} for view in views],
        }

    def routers_heard(self, now_s: float) -> set[tuple[str, str]]:
        """(deployment, id) of those that have reported lately."""
        return {(self.name, name) for name, heard in self._routers.items() if now_s - heard.at_s < LOST_AFTER_S}

    def explain(self, replica_id: str, why: str) -> dict[str, Any] | None:
        """Why a replica stands where it does; None where there is none of that id. `why`: its last change's reason."""
        ejected_by = sum(replica_id in router.ejected for router in self._routers.values())
        return self.balancer.explain(replica_id, why, ejected_by)

    def replicas_on(self, node_id: str) -> list[str]:
        """Ids of a node's replicas."""
        rows = self.output.table.rows if self.output is not None else ()
        return [row.replica_id for row in rows if row.node_id == node_id]

    def summary(self, now_s: float) -> dict[str, Any]:
        """The view without what there is one of for each router or replica: counts of them in its place."""
        output, routers = self.output, self._routers.values()
        rows = output.table.rows if output is not None else ()
        alive = {row.replica_id for row in rows}
        return {
            "deployment": self.name,
            "table_version": output.table.version if output is not None else 0,
            "table_age_s": now_s - self._made_s if output is not None else None,
            "panic": output.table.panic if output is not None else False,
            "load": output.load if output is not None else None,
            "slots": output.slots if output is not None else None,
            "batch_half": output.batch_half if output is not None else None,
            "gamma": list(output.gamma) if output is not None else None,
            "look_ahead_s": output.look_ahead_s if output is not None else None,
            "dropped_reports": output.dropped if output is not None else 0,
            "tick": _quantiles(self.tick_s),
            "tick_durations": asdict(self._tick_s.durations()),
            "tick_lateness": asdict(self._late_s.durations()),
            "observing": self.observing,
            **{name: self._counts[name] for name in ("finished", "failed", *_COUNTED)},
            "refused": {**dict.fromkeys(REFUSALS, 0), **self._refused},
            "unreadable_reports": self._unreadable,
            "events": {event.value: self._events[event.value] for event in Event},
            "observed": asdict(self._observed),
            "durations": asdict(self._durations),
            "first_items": asdict(self._first_items),
            "levels": dict(Counter(router.level for router in routers)),
            "waiting": sum(router.waiting for router in routers),
            "states": {state.value: sum(row.state is state for row in rows) for state in State},
            "ejected": len({replica_id for router in routers for replica_id in router.ejected} & alive),
            "held": self.balancer.held(),
        }


@dataclass(frozen=True, slots=True)
class _Router:
    """A router's last report, as far as people see it."""

    at_s: float
    level: str
    waiting: int
    ejected: tuple[str, ...]


def _quantiles(ticks: deque[tuple[float, float]]) -> dict[str, float]:
    """Of the last ticks' durations, and of the CPU time in them."""
    found: dict[str, float] = {"count": len(ticks)}
    for what, seconds in zip(("", "cpu_"), zip(*ticks, strict=True), strict=bool(ticks)):
        ordered = sorted(seconds)
        found[f"{what}p50_s"], found[f"{what}p99_s"] = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.99))
    return found
