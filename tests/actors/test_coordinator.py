"""The coordinator as a plain object with a clock that is a number."""

import asyncio
import json

import pytest

from actors.coordinator import Coordinator
from serve_app.launch.commands import _finite
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    Outcome,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
)

APP = "app/model"


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def report(seq=1, replicas=("a", "b"), router="r1", **more):
    views = tuple(ReplicaReport(n, f"node-{n}", 8, 0, 5, 5, 0, (Outcome(0.1, 0),) * 5) for n in replicas)
    return RouterReport(router, APP, seq, 1.0, views, **more)


def node(node_id="node-a", seq=1, cpu=0.2):
    rows = tuple((0.1, 0.2, 0.3) for _ in range(6))
    forecast = Forecast({"cpu": rows, "memory": rows, "network": rows}, model_version="v1", skill={"cpu": 0.2})
    return NodeReport(node_id, seq, NodeSnapshot(cpu, cpu, 0.3, 0.0, 0.0, 0.0, 0.0), forecast, hostname="h")


def run(scenario):
    async def with_coordinator():
        clock = Clock()
        coordinator = Coordinator(now_s=clock, epoch=7)
        coordinator._wake = lambda: None  # the tests tick by hand
        await scenario(coordinator, clock)
        assert len(asyncio.all_tasks()) == 1, "nothing is left pending"

    asyncio.run(with_coordinator())


def test_a_report_becomes_a_table_that_waiting_routers_get():
    async def scenario(coordinator, clock):
        assert await coordinator.report_router(report(), {}) is True
        waiting = asyncio.create_task(coordinator.wait_table(APP, (0, 0), 5.0))
        await asyncio.sleep(0)
        coordinator.tick(APP, clock.now_s)
        table = await waiting
        assert (table.epoch, table.version) == (7, 1)
        assert {row.replica_id: row.state for row in table.rows} == {"a": State.ACTIVE, "b": State.ACTIVE}
        assert await coordinator.report_router(report(2), {}) is False

    run(scenario)


def test_a_router_that_has_the_newest_table_waits_and_gets_none():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(), {})
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.wait_table(APP, (0, 0), 1.0) is not None
        assert await coordinator.wait_table(APP, (7, 1), 0.05) is None
        assert await coordinator.wait_table(APP, (7, 0), 0.05) is not None

    run(scenario)


def test_a_new_life_goes_on_from_the_table_that_a_router_still_holds():
    async def scenario(coordinator, clock):
        rows = (
            TableRow("a", "node-a", State.ACTIVE, 1.0, 0.9, 0.0, proven=True),
            TableRow("b", "node-b", State.INACTIVE, 0.0, 0.2, 0.0, rejections=2),
        )
        assert await coordinator.report_router(report(1, table_epoch=3), {}) is True
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.wait_table(APP, (0, 0), 0.02) is None, "no table before the routers were heard"
        held = RoutingTable(APP, 3, 99, 1, rows)
        await coordinator.report_router(report(2, table_epoch=3, held_table=held), {})
        coordinator.tick(APP, clock.now_s)
        table = await coordinator.wait_table(APP, (3, 99), 1.0)
        assert {row.replica_id: row.share > 0 for row in table.rows} == {"a": True, "b": False}

    run(scenario)


def test_a_router_that_never_answers_holds_nothing_up():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(1, table_epoch=3), {})
        clock.now_s += 3.0
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.wait_table(APP, (3, 99), 1.0) is not None

    run(scenario)


def test_status_is_plain_and_becomes_json():
    async def scenario(coordinator, clock):
        await coordinator.report_node(node())
        await coordinator.report_router(report(), {"trial": {"mirror_fraction": 0.05}})
        coordinator.tick(APP, clock.now_s)
        clock.now_s += 2.0
        status = json.loads(json.dumps(_finite(await coordinator.status())))
        (seen,) = status["nodes"]
        assert seen["age_s"] == 2.0
        assert seen["predicted"]["cpu"]["5.0"] == [0.1, 0.2, 0.3]
        (deployment,) = status["deployments"]
        assert deployment["table_age_s"] == 2.0
        assert {r["replica_id"] for r in deployment["replicas"]} == {"a", "b"}
        assert deployment["finished"] == 10
        assert [t["event"] for t in status["transitions"]] == ["admit_untried"] * 2

    run(scenario)


def test_wrong_settings_from_a_router_mean_the_defaults():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(), {"trial": {"mirror_fraction": 7}})
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.wait_table(APP, (0, 0), 1.0) is not None

    run(scenario)


def test_changed_settings_keep_states_and_versions_rising():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(), {})
        for _ in range(5):
            coordinator.tick(APP, clock.now_s)
        await coordinator.report_router(report(2), {"trial": {"margin": 1.2}})
        coordinator.tick(APP, clock.now_s)
        table = await coordinator.wait_table(APP, (7, 5), 1.0)
        assert table.version > 5
        assert all(row.state is State.ACTIVE for row in table.rows)

    run(scenario)


def test_an_operators_command_reaches_the_next_tick():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(), {})
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.command("node-a", True) == 1
        assert await coordinator.command("nowhere", True) == 0
        coordinator.tick(APP, clock.now_s + 0.5)
        table = await coordinator.wait_table(APP, (7, 1), 1.0)
        assert {row.replica_id for row in table.rows if row.share > 0} == {"b"}

    run(scenario)


def test_a_deployment_that_nobody_reports_is_forgotten():
    async def scenario(coordinator, clock):
        await coordinator.report_router(report(), {})
        coordinator.tick(APP, clock.now_s)
        clock.now_s += 61.0
        coordinator.tick(APP, clock.now_s)
        assert (await coordinator.status())["deployments"] == []

    run(scenario)


def test_the_loop_ticks_by_itself_and_ends_when_closed():
    async def scenario():
        coordinator = Coordinator(epoch=1, supervise=lambda: ["node-a"])
        await coordinator.report_router(report(), {"balance": {"tick_s": 0.1}})
        first = await coordinator.wait_table(APP, (0, 0), 5.0)
        second = await coordinator.wait_table(APP, (first.epoch, first.version), 5.0)
        assert second.version > first.version
        await coordinator.report_node(node("node-gone"))
        async with asyncio.timeout(10):
            while (await coordinator.status())["nodes"]:  # the supervisor says that it is not alive
                await coordinator.wait_table(APP, (1, 10**9), 0.2)
        await coordinator.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", [RuntimeError("x"), OSError("y")])
def test_a_supervisor_that_fails_stops_nothing(fault):
    calls = []

    def supervise():
        calls.append(1)
        raise fault

    async def scenario():
        coordinator = Coordinator(epoch=1, supervise=supervise)
        await coordinator.report_router(report(), {"balance": {"tick_s": 0.1}})
        assert await coordinator.wait_table(APP, (0, 0), 5.0) is not None
        assert calls
        await coordinator.close()

    asyncio.run(scenario())


def test_a_node_is_told_what_serve_has_on_it_over_all_routers():
    async def scenario(coordinator, clock):
        view = ReplicaReport("a", "node-a", 8, in_flight=3, started=6)
        for router in ("r1", "r2"):
            await coordinator.report_router(RouterReport(router, APP, 1, 2.0, (view,)), {})
        assert await coordinator.report_node(node("node-a")) == (6.0, 6.0)
        assert await coordinator.report_node(node("node-b")) == (0.0, 0.0)
        clock.now_s += 4.0
        assert await coordinator.report_node(node("node-a")) == (0.0, 0.0), "a silent router carries nothing"

    run(scenario)
