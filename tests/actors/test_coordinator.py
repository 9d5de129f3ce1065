"""The coordinator as a plain object with a clock that is a number; routers speak to it through their real messages."""

import asyncio
import json
from dataclasses import replace

import pytest

from actors.coordinator import Coordinator
from serve_app.page.watch import to_json
from shadecast.calls import Call, Calls, Event
from shadecast.errors import MessageError
from shadecast.inbox import node_message
from shadecast.ledger import Ledger
from shadecast.messages import message
from shadecast.tables import read_table, table_message
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
)

APP = "app/model"
HELD = RoutingTable(
    APP,
    3,
    99,
    1,
    (
        TableRow("a", "node-a", State.ACTIVE, 1.0, 0.9, 0.0, proven=True),
        TableRow("b", "node-b", State.INACTIVE, 0.0, 0.2, 0.0, rejections=2),
    ),
)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Router:
    """A router's side of the exchange, with the product's book and ledger."""

    def __init__(self, coordinator, clock, name="r1", replicas=("a", "b"), settings=None, started_wall_s=1.0):
        self.coordinator, self.clock = coordinator, clock
        self.calls = Calls()
        self.ledger = Ledger(name, APP, self.calls)
        self.replicas, self.settings, self.started_wall_s = replicas, settings or {}, started_wall_s
        self.observes = False
        self.table = self.given_back = None
        self.answer = {}

    def serve(self, replica_id, count=5, duration_s=0.1, ok=True):
        for _ in range(count):
            call, now_s = self.choose(replica_id), self.clock.now_s
            self.calls.handle(call, Event.END, now_s + duration_s, ok=ok)
            self.ledger.record(call)

    def choose(self, replica_id):
        call, now_s = Call(), self.clock.now_s
        self.calls.handle(call, Event.CHOOSE, now_s, replica_id=replica_id)
        self.calls.handle(call, Event.SEND, now_s)
        self.calls.handle(call, Event.ACCEPT, now_s, others=0.0)
        return call

    def report(self):
        return self.ledger.report(
            self.clock.now_s,
            [(name, f"node-{name}", 8) for name in self.replicas],
            level="table",
            table_epoch=self.table.epoch if self.table is not None else 0,
            held_table=self.given_back and table_message(self.given_back, self.given_back.rows),
            settings=self.settings,
            observes=self.observes,
            started_wall_s=self.started_wall_s,
        )

    async def exchange(self, wait_s=0.05, report=True):
        """The table that has come, None if none has."""
        epoch, version = (self.table.epoch, self.table.version) if self.table is not None else (0, 0)
        made = self.report() if report is True else report
        asked = message(
            "exchange", deployment=APP, epoch=epoch, table_version=version, wait_s=wait_s, report=made or None
        )
        self.answer = json.loads(json.dumps(await self.coordinator.exchange(asked), default=bytes.hex))
        if "acknowledged" in self.answer:
            self.ledger.acknowledged(self.answer["acknowledged"])
        if "table" not in self.answer:
            return None
        self.table = read_table(json.loads(bytes.fromhex(self.answer["table"])), self.table)
        return self.table


def node(node_id="node-a", seq=1, cpu=0.2):
    rows = tuple((0.1, 0.2, 0.3) for _ in range(6))
    forecast = Forecast({"cpu": rows, "memory": rows, "network": rows}, model_version="v1", skill={"cpu": 0.2})
    return node_message(
        NodeReport(node_id, seq, NodeSnapshot(cpu, cpu, 0.3, 0.0, 0.0, 0.0, 0.0), forecast, hostname="h")
    )


def run(scenario, **more):
    async def with_coordinator():
        clock = Clock()
        coordinator = Coordinator(now_s=clock, epoch=7, **more)
        coordinator._wake = lambda: None  # the tests tick by hand
        await scenario(coordinator, clock)
        assert len(asyncio.all_tasks()) == 1, "nothing is left pending"

    asyncio.run(with_coordinator())


# ---------------------------------------------------------------- reports and tables


def test_a_report_becomes_a_table_that_waiting_routers_get():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        waiting = asyncio.create_task(router.exchange(5.0))
        await asyncio.sleep(0)
        coordinator.tick(APP, clock.now_s)
        table = await waiting
        assert (table.epoch, table.version) == (7, 1)
        assert {row.replica_id: row.state for row in table.rows} == {"a": State.ACTIVE, "b": State.ACTIVE}
        assert router.answer["acknowledged"] == 1
        assert not router.answer["table_wanted"]

    run(scenario)


def test_a_router_that_has_the_newest_table_waits_and_gets_none():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        await router.exchange()
        coordinator.tick(APP, clock.now_s)
        assert await router.exchange() is not None
        assert await router.exchange(report=None) is None
        assert "acknowledged" not in router.answer
        router.table = replace(router.table, version=0)
        assert await router.exchange() is not None

    run(scenario)


def test_what_has_changed_is_sent_to_who_holds_the_last_table_and_all_of_it_to_others():
    async def scenario(coordinator, clock):
        router, late = Router(coordinator, clock), Router(coordinator, clock, "r2")
        await router.exchange()
        coordinator.tick(APP, clock.now_s)
        first = await router.exchange()
        router.choose("a")
        await router.exchange(0.0)
        clock.now_s += 0.5
        coordinator.tick(APP, clock.now_s)
        await router.exchange()
        sent = json.loads(bytes.fromhex(router.answer["table"]))
        assert sent["base"] == first.version
        assert sent["rows"]["replica_id"] == ["a"], "nothing has happened on b"
        await late.exchange()
        assert json.loads(bytes.fromhex(late.answer["table"]))["rows"]["replica_id"] == ["a", "b"]
        by_id = {row.replica_id: row for row in router.table.rows}
        assert by_id == {row.replica_id: row for row in late.table.rows}
        assert by_id["a"].queue == 1.0

    run(scenario)


def test_a_report_holds_what_has_changed_and_whoever_has_lost_count_asks_for_all_of_it():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        router.serve("a")
        await router.exchange(0.0)
        router.serve("b", 2)
        router.calls.handle(router.choose("b"), Event.DROP, clock.now_s)
        second = router.report()
        assert second["replicas"]["replica_id"] == ["b"]
        coordinator.tick(APP, clock.now_s)
        assert (await coordinator.status())["deployments"][0]["finished"] == 5
        other = Coordinator(now_s=clock, epoch=8)
        other._wake = lambda: None
        router.coordinator = other
        asked_s = asyncio.get_running_loop().time()
        await router.exchange(5.0, second)
        assert asyncio.get_running_loop().time() - asked_s < 1.0, "who has more to say is not kept waiting"
        assert router.answer["acknowledged"] == 0, "a new coordinator knows nothing to build on"
        assert router.report()["replicas"]["replica_id"] == ["a", "b"]
        await router.exchange(0.0)
        other.tick(APP, clock.now_s)
        assert (await other.status())["deployments"][0]["finished"] == 0, "what was before its time is not counted"

    run(scenario)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (7, "a int where"),
        (message("exchange", deployment=APP, epoch="x", table_version=0, wait_s=0.0), "epoch = 'x'"),
        ({**message("exchange"), "schema": 9, "needs": 9, "version": "3.0"}, r"Shadecast 3\.0 .*Shadecast 0\.2"),
    ],
)
def test_what_cannot_be_read_is_refused_with_one_line(asked, told, caplog):
    async def scenario(coordinator, clock):
        for _ in range(3):
            with pytest.raises(MessageError, match=told):
                await coordinator.exchange(asked)
        assert len(caplog.records) == 1
        assert coordinator._deployments == {}

    run(scenario)


def test_a_router_whose_report_cannot_be_read_is_told_so_and_still_gets_tables(caplog):
    async def scenario(coordinator, clock):
        other, router = Router(coordinator, clock), Router(coordinator, clock, "r2")
        await other.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        for _ in range(2):
            assert await router.exchange(report={**router.report(), "replicas": {"replica_id": 7}}) is not None
            assert "acknowledged" not in router.answer
            assert "cannot be read" in router.answer["refused"] or "expected" in router.answer["refused"]
            router.table = None
        assert sum("columns" in record.message for record in caplog.records) == 1
        assert [r["router_id"] for r in (await coordinator.status())["deployments"][0]["routers"]] == ["r1"]

    run(scenario)


@pytest.mark.parametrize(("routers", "between_s"), [(50, 0.5), (100, 1.0), (1000, 2.0)])
def test_with_many_routers_tables_are_made_less_often(routers, between_s):
    async def scenario(coordinator, clock):
        for k in range(routers):
            await Router(coordinator, clock, f"r{k}").exchange(0.0)
        assert coordinator._deployments[APP].between_ticks_s == between_s

    run(scenario)


# ---------------------------------------------------------------- a coordinator's death


def test_a_new_life_goes_on_from_the_table_that_a_router_still_holds():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        router.table = HELD
        assert await router.exchange(5.0) is None
        assert router.answer["table_wanted"], "at once"
        coordinator.tick(APP, clock.now_s)
        assert await router.exchange() is None, "no table before the routers were heard"
        router.given_back = HELD
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        table = await router.exchange()
        assert table.epoch == 7
        assert {row.replica_id: row.share > 0 for row in table.rows} == {"a": True, "b": False}
        assert not router.answer["table_wanted"]

    run(scenario)


def test_a_router_that_never_answers_holds_nothing_up():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        router.table = replace(HELD, epoch=3)
        await router.exchange(0.0)
        clock.now_s += 4.5
        coordinator.tick(APP, clock.now_s)
        assert await router.exchange(report=None) is not None

    run(scenario)


def test_a_coordinator_outranks_tables_of_a_later_epoch():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        router.table = router.given_back = replace(HELD, epoch=10**9)  # its machine's clock was ahead
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        table = await router.exchange()
        assert table.epoch > 10**9, "else its router would never take a table of ours"

    run(scenario)


# ---------------------------------------------------------------- settings


def test_settings_of_the_router_that_was_started_last_go_to_all_with_the_table():
    async def scenario(coordinator, clock):
        old = Router(coordinator, clock, "old", settings={"trial": {"margin": 1.3}}, started_wall_s=10.0)
        new = Router(coordinator, clock, "new", settings={"trial": {"margin": 1.2}}, started_wall_s=20.0)
        for _ in range(3):  # both report all the time
            for router in (old, new):
                await router.exchange(0.0)
            clock.now_s += 0.5
            coordinator.tick(APP, clock.now_s)
        for router in (old, new):
            await router.exchange()
            assert router.answer["settings"] == {"trial": {"margin": 1.2}}
            assert router.answer["observing"] is False

    run(scenario)


def test_two_settings_at_once_lose_neither_states_nor_evidence_nor_an_operators_hold():
    async def scenario(coordinator, clock):
        old = Router(coordinator, clock, "old", settings={"trial": {"margin": 1.3}}, started_wall_s=10.0)
        new = Router(coordinator, clock, "new", settings={"trial": {"margin": 1.2}}, started_wall_s=20.0)
        for second in range(8):
            for router in (old, new):
                router.serve("a"), router.serve("b", duration_s=0.2)
                await router.exchange(0.0)
            if second == 3:
                await coordinator.command("node-b", True)
            coordinator.tick(APP, clock.now_s)
            clock.now_s += 1.0
            if second >= 5:
                (deployment,) = (await coordinator.status())["deployments"]
                views = {view["replica_id"]: view for view in deployment["replicas"]}
                assert views["b"]["held"]
                assert views["b"]["share"] == 0.0
                assert views["a"]["state"] == "active"
                assert deployment["finished"] == 20 * (second + 1)
                assert views["a"]["live_capacity"] > 1.2 * views["b"]["live_capacity"], "as it has shown"
                assert deployment["table_version"] == second + 1

    run(scenario)


def test_a_deployment_turns_from_observing_to_predictive_and_back():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        router.observes = True
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        await router.exchange()
        assert router.answer["observing"] is True
        newer = Router(coordinator, clock, "r2", started_wall_s=2.0)
        await newer.exchange(0.0)
        clock.now_s += 0.5
        coordinator.tick(APP, clock.now_s)
        await router.exchange()
        assert router.answer["observing"] is False

    run(scenario)


def test_what_serve_was_told_last_wins_over_every_router():
    deployed = {APP: (False, {"trial": {"margin": 1.2}})}

    async def scenario():
        coordinator = Coordinator(epoch=1, deployed=deployed.get)
        router = Router(coordinator, asyncio.get_running_loop().time, settings={"trial": {"margin": 1.5}})
        router.clock = Clock()
        async with asyncio.timeout(10):
            while router.answer.get("settings") != {"trial": {"margin": 1.2}}:
                await router.exchange(0.6)
            deployed[APP] = (True, {})
            while router.answer.get("observing") is not True:
                await router.exchange(0.6)
            newer = Router(coordinator, router.clock, "r2", settings={"trial": {"margin": 1.4}}, started_wall_s=9e9)
            await newer.exchange(0.6)
            await newer.exchange(0.6)
            assert newer.answer["settings"] == {}
        await coordinator.close()

    asyncio.run(scenario())


def test_wrong_settings_leave_those_before_in_force(caplog):
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock, settings={"trial": {"mirror_fraction": 0.07}})
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        newer = Router(coordinator, clock, "r2", settings={"trial": {"mirror_fraction": 7}}, started_wall_s=2.0)
        await newer.exchange(0.0)
        assert coordinator._deployments[APP].balancer.config.trial.mirror_fraction == 0.07
        assert "mirror_fraction = 7" in caplog.text
        clock.now_s += 0.5
        coordinator.tick(APP, clock.now_s)
        assert await router.exchange() is not None

    run(scenario)


# ---------------------------------------------------------------- people, nodes, the loop


def test_status_is_plain_and_becomes_json():
    async def scenario(coordinator, clock):
        await coordinator.node(node())
        router = Router(coordinator, clock, settings={"trial": {"mirror_fraction": 0.05}})
        router.serve("a")
        router.serve("b")
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        clock.now_s += 2.0
        status = json.loads(json.dumps(to_json(await coordinator.status())))
        (seen,) = status["nodes"]
        assert seen["age_s"] == 2.0
        assert seen["predicted"]["cpu"]["5.0"] == [0.1, 0.2, 0.3]
        (deployment,) = status["deployments"]
        assert deployment["table_age_s"] == 2.0
        assert {r["replica_id"] for r in deployment["replicas"]} == {"a", "b"}
        assert deployment["finished"] == 10
        assert [t["event"] for t in status["transitions"]] == ["admit_untried"] * 2
        assert 0.0 < deployment["tick"]["cpu_p50_s"] <= deployment["tick"]["cpu_p99_s"]

    run(scenario)


def test_an_operators_command_reaches_the_next_tick():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.command("node-a", True) == 1
        assert await coordinator.command("nowhere", True) == 0
        assert (await coordinator.status())["holds"] == ["node-a"]
        coordinator.tick(APP, clock.now_s + 0.5)
        table = await router.exchange()
        assert {row.replica_id for row in table.rows if row.share > 0} == {"b"}

    run(scenario)


def test_a_deployment_that_nobody_reports_is_forgotten():
    async def scenario(coordinator, clock):
        await Router(coordinator, clock).exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        clock.now_s += 61.0
        coordinator.tick(APP, clock.now_s)
        assert (await coordinator.status())["deployments"] == []

    run(scenario)


def test_the_loop_ticks_by_itself_and_ends_when_closed():
    async def scenario():
        coordinator = Coordinator(epoch=1, supervise=lambda: ["node-a"])
        router = Router(coordinator, Clock())
        first = await router.exchange(5.0)
        second = await router.exchange(5.0)
        assert second.version > first.version
        await coordinator.node(node("node-gone"))
        async with asyncio.timeout(10):
            while (await coordinator.status())["nodes"]:  # the supervisor says that it is not alive
                await router.exchange(0.2)
        assert (await coordinator.status())["unheard"] == ["node-a"], "alive, but its forecaster has not reported"
        drained = await coordinator.order({"order": "drain", "target": "node-a"})
        assert drained["concerned"] == 1
        await coordinator.node(node("node-a"))
        assert (await coordinator.status())["unheard"] == []
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
        assert await Router(coordinator, Clock()).exchange(5.0) is not None
        assert calls
        await coordinator.close()

    asyncio.run(scenario())


def test_a_coordinator_that_restarts_waits_for_a_router_that_holds_a_table_though_one_without_comes_first():
    """A gateway that has just started knows nothing: by its report alone everybody would enter without a trial."""

    async def scenario(coordinator, clock):
        fresh, old = Router(coordinator, clock, "fresh"), Router(coordinator, clock, "old")
        await fresh.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        assert (await coordinator.status())["deployments"][0]["table_version"] == 0
        clock.now_s += 3.0
        old.table = HELD
        await old.exchange(0.0)
        assert old.answer["table_wanted"]
        old.given_back = HELD
        await old.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        await fresh.exchange()
        assert serving(fresh.table) == {"a"}, "b was turned away"

    run(scenario, restarted=True)


def test_a_coordinator_that_restarts_begins_anew_where_nobody_holds_a_table():
    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        await router.exchange(0.0)
        clock.now_s += 4.5
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        assert serving(await router.exchange()) == {"a", "b"}

    run(scenario, restarted=True)


class Kept:
    """Holds that outlive the coordinator."""

    def __init__(self):
        self.holds = []

    def load(self):
        return self.holds

    def save(self, holds):
        self.holds = list(holds)


def serving(table):
    return {row.replica_id for row in table.rows if row.share > 0.0}


def test_holds_outlive_the_coordinator_and_keep_out_whatever_comes_to_a_node_later():
    kept = Kept()

    async def before(coordinator, clock):
        router = Router(coordinator, clock)
        router.replicas = ("a", "c")
        await coordinator.node(node("node-b"))
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        assert await coordinator.command("node-b", True) == 1, "nothing runs there yet"
        assert await coordinator.command("c", True) == 1
        assert await coordinator.command("nowhere", True) == 0

    async def after(coordinator, clock):
        router = Router(coordinator, clock)
        await router.exchange(0.0)
        coordinator.tick(APP, clock.now_s)
        assert serving(await router.exchange()) == {"a"}, "b has started on the node that is held"
        assert await coordinator.command("node-b", False) == 1
        assert kept.holds == ["c"]
        clock.now_s += 1.0
        coordinator.tick(APP, clock.now_s)
        assert serving(await router.exchange()) == {"a", "b"}

    run(before, holds=kept)
    assert kept.holds == ["c", "node-b"]
    run(after, holds=kept)


def test_announcements_are_in_the_status_and_a_forecaster_that_starts_again_hears_them():
    told = []

    class Forecasters:
        def announce(self, node_id, *values):
            told.append((node_id, *values))

    async def scenario(coordinator, clock):
        async def report(seq):
            await coordinator.node(node(seq=seq))
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

        await report(50)
        order = {"order": "announce", "target": "node-a", "starts_in_s": 9.0, "lasts_s": 60.0}
        assert (await coordinator.order(order))["told"]
        (shown,) = (await coordinator.status())["announced"]
        assert (shown["node_id"], shown["starts_in_s"], shown["ends_in_s"]) == ("node-a", 9.0, 69.0)
        await report(51)
        assert len(told) == 1, "it knows"
        await report(1)
        assert told == [("node-a", 9.0, 60.0, 1.0)] * 2

    run(scenario, forecasters=Forecasters(), wall=lambda: 1000.0)


def test_a_node_that_ray_is_about_to_take_away_is_drained_before_it_goes():
    leaving = []

    async def scenario():
        coordinator = Coordinator(epoch=1, supervise=lambda: [], draining=lambda: list(leaving))
        router = Router(coordinator, Clock())
        assert serving(await router.exchange(5.0)) == {"a", "b"}
        leaving.append("node-b")
        async with asyncio.timeout(10.0):
            while serving(await router.exchange(5.0)) != {"a"}:
                pass
        assert (await coordinator.status())["leaving"] == ["node-b"]
        leaving.clear()  # it stays after all
        async with asyncio.timeout(10.0):
            while serving(await router.exchange(5.0)) != {"a", "b"}:
                pass
        await coordinator.close()

    asyncio.run(scenario())


def test_a_node_is_told_what_serve_has_on_it_over_all_routers():
    async def scenario(coordinator, clock):
        routers = [Router(coordinator, clock, name) for name in ("r1", "r2")]
        for router in routers:
            await router.exchange(0.0)
            for _ in range(3):
                router.choose("a")
        clock.now_s += 2.0
        for router in routers:
            await router.exchange(0.0)
        assert await coordinator.node(node("node-a")) == (6.0, 3.0)
        assert await coordinator.node(node("node-b")) == (0.0, 0.0)
        routers[0].replicas = ("b",)
        clock.now_s += 1.0
        await routers[0].exchange(0.0)
        assert await coordinator.node(node("node-a")) == (3.0, 1.5), "one router does not list it any more"
        clock.now_s += 4.0
        assert await coordinator.node(node("node-a")) == (0.0, 0.0), "a silent router carries nothing"

    run(scenario)


# ---------------------------------------------------------------- Shadecast 0.1


def test_routers_and_forecasters_of_the_former_version_are_served_beside_ours():
    async def scenario(coordinator, clock):
        view = ReplicaReport("a", "node-a", 8, in_flight=3, started=6, finished=2)
        former = RouterReport("former", APP, 1, 1.0, (view, ReplicaReport("b", "node-b", 8, 0)))
        assert await coordinator.report_router(former, {"trial": {"margin": 1.2}}) is True
        ours = Router(coordinator, clock, "ours")
        ours.choose("a")
        await ours.exchange(0.0)
        told = NodeReport("node-a", 1, NodeSnapshot(0.2, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0), None)
        assert await coordinator.report_node(told) == (4.0, 6.0)
        coordinator.tick(APP, clock.now_s)
        whole = await coordinator.wait_table(APP, (0, 0), 1.0)
        table = await ours.exchange()
        assert whole.rows == table.rows
        assert {row.replica_id: row.queue for row in whole.rows} == {"a": 4.0, "b": 0.0}
        assert await coordinator.wait_table(APP, (7, 1), 0.05) is None
        clock.now_s += 0.5
        held = replace(former, seq=2, table_epoch=7, level="table")
        assert await coordinator.report_router(held, {"trial": {"margin": 1.2}}) is False
        coordinator.tick(APP, clock.now_s)
        assert (await coordinator.wait_table(APP, (7, 1), 1.0)).version == 2

    run(scenario)


def test_a_new_life_goes_on_from_the_table_of_a_router_of_the_former_version():
    async def scenario(coordinator, clock):
        views = tuple(ReplicaReport(name, f"node-{name}", 8, 0) for name in ("a", "b"))
        report = RouterReport("former", APP, 1, 1.0, views, table_epoch=3)
        assert await coordinator.report_router(report, {}) is True
        assert await coordinator.report_router(replace(report, seq=2, held_table=HELD), {}) is False
        coordinator.tick(APP, clock.now_s)
        table = await coordinator.wait_table(APP, (3, 99), 1.0)
        assert {row.replica_id: row.share > 0 for row in table.rows} == {"a": True, "b": False}

    run(scenario)
