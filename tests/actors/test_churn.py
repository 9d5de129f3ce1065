"""Deployments, routers, replicas, nodes and senders come and go; what the coordinator keeps does not grow with them."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors.coordinator import Coordinator
from actors.serving_load import ServingLoad
from serve_app.page.watch import HISTORY_S, Watch
from shadecast.calls import Call, Calls, Event
from shadecast.errors import MessageError
from shadecast.inbox import node_message
from shadecast.ledger import Ledger
from shadecast.messages import message
from shadecast.types import Forecast, NodeReport, NodeSnapshot, PairedSample, ReplicaReport, RouterReport
from tests.deep_size import deep_size
from tests.serve_app.routing.serve import VirtualTime

GENERATIONS = 200


class Asked(Call):
    """A call of some sender's."""

    def __init__(self, sender):
        self.sender = sender

    @property
    def origin(self):
        return self.sender


class Router:
    def __init__(self, name, deployment):
        self.deployment, self.calls = deployment, Calls()
        self.ledger = Ledger(name, deployment, self.calls)
        self.table = (0, 0)

    def serve(self, replica_id, sender):
        now_s = time.monotonic()
        for ok in (True, False):
            call = Asked(sender)
            self.calls.handle(call, Event.CHOOSE, now_s, replica_id=replica_id)
            self.calls.handle(call, Event.SEND, now_s)
            self.calls.handle(call, Event.ACCEPT, now_s, others=0.0)
            self.calls.handle(call, Event.END, now_s + 0.1, ok=ok)
            self.ledger.record(call)
        self.ledger.pair(PairedSample(replica_id, replica_id + "'", 0.1, 0.1, 0.0, 0.0))

    async def exchange(self, coordinator, alive):
        report = self.ledger.report(time.monotonic(), alive, level="table", settings={}, started_wall_s=1.0)
        epoch, version = self.table
        answer = await coordinator.exchange(
            message(
                "exchange",
                deployment=self.deployment,
                epoch=epoch,
                table_version=version,
                wait_s=0.05,
                report=report,
            )
        )
        if "acknowledged" in answer:
            self.ledger.acknowledged(answer["acknowledged"])


def telemetry(node_id, seq):
    rows = tuple((0.1, 0.2, 0.3) for _ in range(6))
    forecast = Forecast({"cpu": rows, "memory": rows, "network": rows}, model_version="v1")
    return node_message(NodeReport(node_id, seq, NodeSnapshot(0.2, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0), forecast))


@pytest.mark.slow
def test_what_the_coordinator_and_its_page_keep_does_not_grow_with_what_has_gone():
    async def scenario():
        nodes = []
        coordinator = Coordinator(now_s=time.monotonic, epoch=1, supervise=lambda: list(nodes))
        loop = asyncio.get_running_loop()
        loop.run_in_executor = at_once
        watch = Watch(coordinator.status, time.monotonic)
        lasting, sizes = Router("lasting", "app/lasting"), []
        for generation in range(GENERATIONS):
            nodes[:] = [f"n{generation}-{i}" for i in range(3)]
            alive = [(f"r{generation}-{i}", node_id, 8) for i, node_id in enumerate(nodes)]
            routers = [lasting, Router(f"router-{generation}", "app/lasting")]
            routers.append(Router("only", f"app/deployment-{generation}"))
            for second in range(8):
                for seq, node_id in enumerate(nodes):
                    await coordinator.node(telemetry(node_id, 10 * second + seq))
                for router in routers:
                    for replica_id, _, _ in alive:
                        router.serve(replica_id, f"session-{generation}-{second}")
                    await router.exchange(coordinator, alive)
                await watch.latest()
                await asyncio.sleep(1.0)
            try:  # a router of some other version, whose every line is another one
                await coordinator.exchange({**message("exchange"), "needs": 99, "version": f"9.{generation}"})
                raise AssertionError("cannot be read")
            except MessageError:
                pass
            if generation in (GENERATIONS // 2, GENERATIONS - 1):
                nodes.clear()
                for _ in range(int(HISTORY_S) + 60):
                    await lasting.exchange(coordinator, [("last", "node", 8)])
                    await watch.latest()
                    await asyncio.sleep(1.0)
                sizes.append((deep_size(coordinator, loop), deep_size(watch, loop, coordinator)))
        await coordinator.close()
        return sizes

    early, late = VirtualTime().run(scenario(), 100_000.0)
    print(f"coordinator and page: {early} objects after {GENERATIONS // 2} generations, {late} after {GENERATIONS}")
    for before, after in zip(early, late, strict=True):
        assert after <= 1.1 * before + 100


def at_once(_executor, function, *arguments):
    done = asyncio.get_running_loop().create_future()
    done.set_result(function(*arguments))
    return done


def test_routers_that_have_gone_are_forgotten_also_where_no_node_asks_for_its_load():
    load = ServingLoad()
    for i in range(5000):
        view = ReplicaReport(f"replica-{i}", f"node-{i}", 8, 1, 1, 1, 0)
        load.take(RouterReport(f"router-{i}", "app/model", 1, 1.0, (view,)), float(i))
    assert deep_size(load) < 500
    assert load.on("node-4999", 4999.0) == (1.0, 1.0)
