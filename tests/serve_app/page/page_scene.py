"""A scene for tests of the page: a real coordinator, fed with made-up reports on a clock of its own."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.coordinator import Coordinator
from shadecast.histogram import Histogram
from shadecast.types import (
    HORIZONS_S,
    Forecast,
    NodeReport,
    NodeSnapshot,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    State,
)

DIGITS, CHAT = "vision/digits", 'chat/<img src=x onerror="alert(1)">'
SETTINGS = {"config": {"trial": {"copy_methods": ["*"], "step_s": 5.0}}}
NODES = ("a1" * 28, "b2" * 28, "c3" * 28, "d4" * 28)


@dataclass
class Scene:
    """Two deployments on four nodes. A hog comes to node b at 200 s, a newcomer that is sound at 60 s, one that fails
    at 150 s, an operator drains node d at 240 s."""

    coordinator: Coordinator
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    now_s: float = 1000.0
    second: int = 0
    nodes: tuple[str, ...] = NODES
    chat: str = CHAT

    def clock_s(self) -> float:
        return self.now_s

    def load(self, node: int) -> float:
        hog = 0.55 if node == 1 and 200 <= self.second < 275 else 0.0
        wave = 0.1 * math.sin(self.second / 23.0 + node)
        return min(max(0.2 + wave + hog + self.rng.gauss(0, 0.02), 0.02), 0.98)

    def node_report(self, node: int) -> NodeReport:
        background, memory = self.load(node), 0.4 + 0.05 * (node % 8) + 0.0006 * self.second
        network = 0.15 + 0.08 * math.sin(self.second / 11.0) + self.rng.random() * 0.03

        def fan(value: float, slope: float, width: float) -> tuple[tuple[float, ...], ...]:
            rows = []
            for horizon in HORIZONS_S:
                middle, spread = value + slope * horizon, width * math.sqrt(horizon)
                rows.append(tuple(min(max(middle + k * spread, 0.0), 1.0) for k in (-1, 0, 1)))
            return tuple(rows)

        quantiles = {
            "cpu": fan(background, 0.01, 0.03),
            "memory": fan(memory, 0.0006, 0.003),
            "network": fan(network, -0.005, 0.02),
        }
        known = node != 3  # the last node has telemetry, no forecast yet
        snapshot = NodeSnapshot(
            min(background + 0.25, 1.0), background, memory, network + 0.1, network, 4e6, 2e6, 0.02 + 0.1 * (node == 1)
        )
        forecast = Forecast(
            quantiles, 0.1, {"cpu": 0.21, "memory": -0.02, "network": math.nan}, {"cpu": 1.0, "memory": 0.0}, "lstm-7"
        )
        return NodeReport(
            self.nodes[node], self.second, snapshot, forecast if known else None, 0.1, f"worker-{node}", 2 << 27
        )

    def router_report(
        self, router: int, deployment: str, per_s: float, replicas: dict[str, tuple[int, float, float]]
    ) -> RouterReport:
        """`replicas[id]` = (node, usual duration in s, failing fraction)."""
        rows = {}
        known = self.coordinator._deployments.get(deployment)
        if known is not None and known.output is not None:
            rows = {row.replica_id: row for row in known.output.table.rows}
        reports, pairs, times = [], [], Histogram()
        weights = {r: rows[r].share * rows[r].capacity if r in rows else 1.0 for r in replicas}
        for replica_id, (node, usual_s, failing) in replicas.items():
            count = round(per_s * weights[replica_id] / max(sum(weights.values()), 1e-9) + self.rng.random() - 0.5)
            slow = 1.0 / max(1.0 - self.load(node), 0.1)
            outcomes = tuple(
                Outcome(usual_s * slow * self.rng.lognormvariate(0, 0.15), 1.0, self.rng.random() >= failing)
                for _ in range(max(count, 0))
            )
            failed = sum(not o.ok for o in outcomes)
            for outcome in outcomes:
                times.add(outcome.duration_s if outcome.ok else math.nan)
            reports.append(
                ReplicaReport(
                    replica_id, self.nodes[node], 8, count // 3, len(outcomes), len(outcomes), failed, outcomes
                )
            )
            if replica_id in rows and rows[replica_id].mirror_fraction > 0.0:
                primary = next(r for r in replicas if rows.get(r) and rows[r].state is State.ACTIVE)
                for _ in range(3):
                    took_s = usual_s * self.rng.lognormvariate(0, 0.1)
                    fails = self.rng.random() < failing
                    pairs.append(PairedSample(replica_id, primary, took_s, took_s, 1.0, 1.0, True, not fails))
        return RouterReport(
            f"router{router}" + "0" * 24, deployment, self.second, 1.0, tuple(reports), tuple(pairs), len(pairs), 0,
            table_epoch=self.coordinator._epoch, level="table", waiting=router, durations=times.durations(),
            rescued=1, retried=1, refused={"cancelled": router},
            ejected=("w0d8c5ty",) if 160 <= self.second < 170 and deployment == DIGITS else (),
        )  # fmt: skip

    async def play(self) -> None:
        """One second: the nodes and two routers of each deployment report, then two ticks."""
        self.second += 1
        for node in range(4):
            await self.coordinator.report_node(self.node_report(node))
        digits = {"k3f9x2ab": (0, 0.05, 0.0), "p7qm41zz": (1, 0.05, 0.0), "w0d8c5ty": (2, 0.05, 0.0)}
        if self.second >= 60:
            digits["n5newone"] = (3, 0.05, 0.0)
        if self.second >= 150:
            digits["x9failing"] = (2, 0.05, 0.5)
        chat = {"chat-a": (0, 1.8, 0.0), "chat-b": (3, 2.2, 0.0)}
        for router in range(2):
            await self.coordinator.report_router(self.router_report(router, DIGITS, 14.0, digits), SETTINGS)
            await self.coordinator.report_router(self.router_report(router, self.chat, 0.6, chat), {})
        if self.second == 240:
            await self.coordinator.command(NODES[3], drain=True)
        for _ in range(2):
            self.now_s += 0.5
            for deployment in (DIGITS, self.chat):
                self.coordinator.tick(deployment, self.now_s)


@dataclass
class WideScene(Scene):
    """100 nodes and 150 replicas of five deployments. Two nodes at a time have a hog; of each deployment the oldest of
    30 replicas is replaced every 25 s, one after the other."""

    nodes: tuple[str, ...] = tuple(f"{node:02x}" * 28 for node in range(100))
    deployments: tuple[str, ...] = ("vision/digits", "chat/assistant", "search/embed", "search/rank", "speech/text")

    def load(self, node: int) -> float:
        hog = 0.6 if self.second // 20 % 50 == node % 50 else 0.0
        wave = 0.1 * math.sin(self.second / 23.0 + node)
        return min(max(0.2 + wave + hog + self.rng.gauss(0, 0.02), 0.02), 0.98)

    def running(self, deployment: int) -> dict[str, tuple[int, float, float]]:
        first = (self.second + 5 * deployment) // 25
        return {
            f"{deployment}r{number:06d}": ((7 * number + 31 * deployment) % 100, 0.05, 0.0)
            for number in range(first, first + 30)
        }

    async def play(self) -> None:
        """One second: nodes and two routers of each deployment report, then two ticks."""
        self.second += 1
        for node in range(len(self.nodes)):
            await self.coordinator.report_node(self.node_report(node))
        for number, deployment in enumerate(self.deployments):
            for router in range(2):
                report = self.router_report(router, deployment, 60.0, self.running(number))
                await self.coordinator.report_router(report, SETTINGS["config"])
        for _ in range(2):
            self.now_s += 0.5
            for deployment in self.deployments:
                self.coordinator.tick(deployment, self.now_s)


S = TypeVar("S", bound=Scene)


def make_scene(kind: type[S] = Scene, **more: Any) -> S:
    """A scene at its beginning."""
    box: list[S] = []
    coordinator = Coordinator(now_s=lambda: box[0].now_s if box else 1000.0, epoch=1_700_000_000_000_000_000)
    coordinator._wake = lambda: None  # type: ignore[method-assign]  # the scene ticks itself
    box.append(kind(coordinator, **more))
    return box[0]
