"""What ties a router to the coordinator: reports, tables, settings, versions, and an end that takes nobody along."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import time
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors.coordinator import Coordinator as RealCoordinator
from serve_app.routing import link as module
from shadecast.errors import MessageError
from shadecast.inbox import Inbox
from shadecast.messages import SCHEMA, message
from shadecast.tables import table_message
from tests.serve_app.routing.serve import Log, Replica, Serve, VirtualTime, settle, table


class Call:
    """A method of an actor: `answer` is what its `remote` is awaited to."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def remote(self, *arguments):
        self.calls.append((time.monotonic(), *arguments))
        made = asyncio.ensure_future(self.answer(*arguments))
        self.last = weakref.ref(made)
        return made


def packed(made, base=0, rows=None):
    return json.dumps(table_message(made, made.rows if rows is None else rows, base))


class Coordinator:
    """Takes reports and gives the `tables` that are newer than the router's, each with `more`."""

    def __init__(self, *tables, wants_table_back=False, **more):
        self.tables, self.more = list(tables), more
        self.wants_table_back = wants_table_back
        self.inbox = Inbox()
        self.exchange = Call(self._exchange)
        self.told, self.given_back = asyncio.Event(), asyncio.Event()
        self.taken = []

    @property
    def received(self):
        return [received for _, received in self.exchange.calls]

    @property
    def reports(self):
        return [received["report"] for received in self.received if received["report"] is not None]

    async def _exchange(self, received):
        answer = {}
        if received["report"] is not None:
            read, answer["acknowledged"] = self.inbox.take(received["report"], time.monotonic())
            self.told.set()
            if read is not None:
                self.taken.append(read)
                if read.held_table is not None:
                    self.given_back.set()
            answer["table_wanted"] = self.wants_table_back and not self.given_back.is_set()
        if answer.get("acknowledged") == 0 or answer.get("table_wanted"):
            return message("answer", **answer)
        newer = [made for made in self.tables if (made.epoch, made.version) > held(received)]
        if newer:
            return message("answer", **answer, table=packed(newer[0]), **self.more)
        await asyncio.sleep(received["wait_s"])
        return message("answer", **answer)


class Former:
    """A coordinator of Shadecast 0.1."""

    def __init__(self):
        self.report_router = self.wait_table = Call(None)


def held(received):
    return received["epoch"], received["table_version"]


@pytest.fixture
def ray_up(monkeypatch):
    """Whether Ray is initialized, as a list with one truth value; no cluster is there."""
    up = [True]
    monkeypatch.setattr(module, "ray", SimpleNamespace(is_initialized=lambda: up[0]))
    monkeypatch.setattr(module, "shared_secret", lambda key, made, namespace: b"secret")
    return up


def at_once(_executor, function, *arguments):
    """In place of another thread, for which virtual time would not wait."""
    done = asyncio.get_running_loop().create_future()
    try:
        done.set_result(function(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


async def on_its_loop(scenario):
    asyncio.get_running_loop().run_in_executor = at_once
    await scenario()


def run(scenario):
    VirtualTime().run(on_its_loop(scenario))


def linked(monkeypatch, found, **config):
    """A router that is in touch with the last coordinator of `found`, and the task that keeps it so."""
    monkeypatch.setattr(module, "find_coordinator", lambda: found[-1])
    serve = Serve(Replica("a"), **config)
    (link,) = (task for task in asyncio.all_tasks() if task.get_coro().__name__ == "keep_in_touch")
    return serve, link


def ours(log):
    return [line for line in log.lines(logging.INFO) if line.startswith("shadecast")]


async def call_of(serve):
    result = await serve.send(1)
    for replica in serve.replicas.values():
        for sent in replica.sent:
            sent.end()
    await result.get_async()
    await settle()


# ------------------------------------------------------------------ reports and tables


def test_a_router_reports_takes_tables_and_gives_its_own_back_if_it_is_asked_to(monkeypatch, ray_up):
    async def scenario():
        first, second = Coordinator(table(a=1.0)), Coordinator(wants_table_back=True)
        found = [first]
        serve, link = linked(monkeypatch, found)
        await asyncio.sleep(2.0)
        assert serve.router.level == "table"
        assert serve.router.calls.routes.sessions.settled
        assert held(first.received[-1]) == (1, 1)
        assert held(first.received[0]) == (0, 0)
        first.exchange.answer = second.exchange.remote  # it has restarted, under the same name
        await second.given_back.wait()
        assert second.taken[-1].held_table.rows == serve.router.table.rows
        assert [report["held_table"] is not None for report in second.reports].count(True) == 1
        assert serve.router.level == "table"
        await asyncio.sleep(3.0)
        assert [report["held_table"] is not None for report in second.reports].count(True) == 1, "once"
        link.cancel()

    run(scenario)


def test_a_report_is_made_each_second_however_often_tables_come(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator(*(table(version=version, a=1.0) for version in range(1, 1000)))
        serve, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(10.0)
        assert 9 <= len(coordinator.reports) <= 14, "as soon as the last one is nearly a second old"
        assert 150 <= len(coordinator.received) <= 210, "without a rush"
        times = [at_s for at_s, _ in coordinator.exchange.calls]
        assert min(b - a for a, b in pairwise(times)) >= 0.045
        assert serve.router.table.version > 150
        assert sum(read.interval_s for read in coordinator.taken) == pytest.approx(10.0, abs=1.2)
        link.cancel()

    run(scenario)


def test_one_call_is_under_way_at_a_time(monkeypatch, ray_up):
    async def scenario():
        coordinator, under_way = Coordinator(), []
        inner = coordinator.exchange.answer

        async def counted(received):
            under_way.append(1)
            assert len(under_way) == 1
            try:
                return await inner(received)
            finally:
                under_way.pop()

        coordinator.exchange.answer = counted
        _, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(10.0)
        assert len(coordinator.received) >= 9
        link.cancel()

    run(scenario)


def test_what_a_router_counts_reaches_the_coordinator_once(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator(table(a=1.0))
        serve, link = linked(monkeypatch, [coordinator])
        for _ in range(7):
            await call_of(serve)
            await asyncio.sleep(0.5)
        await asyncio.sleep(2.5)
        views = [view for read in coordinator.taken for view in read.replicas if view.replica_id == "a"]
        assert (sum(view.started for view in views), sum(view.finished for view in views)) == (7, 7)
        assert sum(len(view.outcomes) for view in views) == 7
        link.cancel()

    run(scenario)


def test_a_coordinator_that_has_restarted_is_told_everything_at_once(monkeypatch, ray_up):
    async def scenario():
        first, second = Coordinator(), Coordinator()
        serve, link = linked(monkeypatch, [first])
        await call_of(serve)
        await asyncio.sleep(3.0)
        assert first.reports[-1]["base"] > 0
        assert not first.reports[-1]["replicas"], "nothing has changed"
        first.exchange.answer = second.exchange.remote
        await second.told.wait()
        while not second.taken:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        times = [at_s for at_s, received in second.exchange.calls if received["report"] is not None]
        assert times[1] - times[0] < 0.2, "it need not wait for the next second"
        assert [view.replica_id for view in second.taken[0].replicas] == ["a"]
        assert not second.taken[0].partial
        link.cancel()

    run(scenario)


def test_a_request_that_is_overdue_is_reported_with_every_table_until_it_ends(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator(*(table(version=version, reference_s=0.05, a=1.0) for version in range(1, 1000)))
        serve, link = linked(monkeypatch, [coordinator])
        await coordinator.told.wait()
        result = await serve.send(1)
        await asyncio.sleep(1.0)
        told = len(coordinator.reports)
        await asyncio.sleep(1.0)
        assert len(coordinator.reports) - told > 4
        result.end()
        await settle()
        told = len(coordinator.reports)
        await asyncio.sleep(3.0)
        assert len(coordinator.reports) - told <= 4
        link.cancel()

    run(scenario)


def test_a_router_without_replicas_says_so_once_and_is_quiet_until_there_are_some(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator()
        serve, link = linked(monkeypatch, [coordinator])
        await coordinator.told.wait()
        serve.scale()
        await asyncio.sleep(3.0)
        assert coordinator.taken[-1].gone == ("a",)
        told = len(coordinator.received)
        await asyncio.sleep(60.0)
        assert len(coordinator.received) == told
        serve.scale(Replica("b"))
        coordinator.told.clear()
        await coordinator.told.wait()
        await asyncio.sleep(0.2)  # the coordinator had forgotten it, and wants to have everything
        assert [view.replica_id for view in coordinator.taken[-1].replicas] == ["b"]
        told = len(coordinator.received)
        await asyncio.sleep(3.0)
        assert len(coordinator.received) > told
        link.cancel()

    run(scenario)


def test_a_table_that_builds_on_another_one_than_the_routers_makes_it_ask_for_the_whole_one(monkeypatch, ray_up):
    async def scenario():
        coordinator, whole = Coordinator(table(a=1.0)), table(version=7, a=1.0, b=0.0)
        serve, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(1.5)
        assert serve.router.table.version == 1
        asked = len(coordinator.received)

        async def builds_on_another(received):
            base = 0 if held(received) == (0, 0) else 6
            if held(received) >= (1, 7):
                await asyncio.sleep(received["wait_s"])
                return message("answer")
            return message("answer", table=packed(whole, base, rows=whole.rows[1:] if base else None))

        coordinator.exchange.answer = builds_on_another
        await asyncio.sleep(3.0)
        assert serve.router.table.version == 7
        assert [row.replica_id for row in serve.router.table.rows] == ["a", "b"]
        after = [held(received) for received in coordinator.received[asked:]]
        assert after[:3] == [(1, 1), (0, 0), (1, 7)]
        link.cancel()

    run(scenario)


def test_a_table_that_builds_on_the_routers_own_is_merged_with_it(monkeypatch, ray_up):
    async def scenario():
        coordinator, newer = Coordinator(table(a=1.0, b=0.5)), table(version=2, a=1.0, b=0.25)
        serve, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(1.5)

        async def builds(received):
            if held(received) == (1, 1):
                return message("answer", table=packed(newer, 1, rows=newer.rows[1:]))
            await asyncio.sleep(received["wait_s"])
            return message("answer")

        coordinator.exchange.answer = builds
        await asyncio.sleep(1.5)
        assert serve.router.table.version == 2
        assert [row.share for row in serve.router.table.rows] == [1.0, 0.25]
        link.cancel()

    run(scenario)


def test_settings_that_come_with_a_table_are_used_from_then_on(monkeypatch, ray_up):
    async def scenario():
        settings = {"config": {"trial": {"copy_methods": ["infer"]}}}
        coordinator = Coordinator(table(a=1.0), settings=settings["config"], observing=True)
        serve, link = linked(monkeypatch, [coordinator])
        used = []
        monkeypatch.setattr(serve.router, "use_settings", lambda *settings: used.append(settings))
        await asyncio.sleep(1.0)
        assert used == [(True, settings["config"])]
        link.cancel()

    run(scenario)


def test_a_router_observes_and_no_longer_copies_as_soon_as_the_coordinator_knows_that_it_should(monkeypatch, ray_up):
    async def scenario():
        on_trial = {"a": 1.0, "new": (0.0, 1.0, 1.0)}
        coordinator = Coordinator(table(**on_trial), settings={"trial": {"copy_methods": ["*"]}}, observing=False)
        serve, link = linked(monkeypatch, [coordinator])
        serve.scale(Replica("a"), Replica("new", queue=7))
        await asyncio.sleep(1.0)
        await call_of(serve)
        assert serve.router.level == "table"
        assert len(serve.replicas["new"].copies) == 1, "by a setting that has only come with the table"
        coordinator.tables.append(table(version=2, **on_trial))
        coordinator.more["observing"] = True
        await asyncio.sleep(2.0)
        assert serve.router.level == "observing"
        await call_of(serve)
        assert len(serve.replicas["new"].copies) == 1
        link.cancel()

    run(scenario)


def test_a_router_and_the_coordinator_itself_understand_each_other(monkeypatch, ray_up):
    async def scenario():
        coordinator = RealCoordinator(now_s=time.monotonic)
        serve, link = linked(monkeypatch, [SimpleNamespace(exchange=Call(coordinator.exchange))])
        serve.scale(Replica("a"), Replica("b"))
        for _ in range(8):
            await call_of(serve)
            await asyncio.sleep(0.5)
        assert serve.router.level == "table"
        assert {row.replica_id for row in serve.router.table.rows} == {"a", "b"}
        (deployment,) = (await coordinator.status())["deployments"]
        assert deployment["deployment"] == "app/model"
        link.cancel()
        await coordinator.close()

    run(scenario)


def test_routers_in_touch_with_one_coordinator_know_each_others_prompts_within_a_second(monkeypatch, ray_up):
    async def scenario():
        coordinator = RealCoordinator(now_s=time.monotonic)
        exchange = Call(coordinator.exchange)
        monkeypatch.setattr(module, "find_coordinator", lambda: SimpleNamespace(exchange=exchange))
        names = "abcdefgh"
        ours, theirs = (
            Serve(*(Replica(name) for name in names), balance={"prefix": "auto", "bootstrap_s": 100.0}) for _ in "ab"
        )
        links = [task for task in asyncio.all_tasks() if task.get_coro().__name__ == "keep_in_touch"]
        await asyncio.sleep(4.0)
        assert {serve.router.level for serve in (ours, theirs)} == {"table"}
        for number in range(12):
            body = {"messages": [{"role": "user", "content": f"{number:03}" * 4000}]}
            result = await ours.send(body)
            own = result.replica.name
            result.end()
            await settle()
            while (busy := await theirs.send(7)).replica.name != own:  # so that a new prompt would go elsewhere
                busy.end()
                await settle()
            await asyncio.sleep(0.7)
            body["messages"].append({"role": "user", "content": "and then?"})
            result = await theirs.send(body)
            assert result.replica.name == own
            for each in (result, busy):
                each.end()
            await settle()
        often = sum(1 for at_s, _ in exchange.calls if at_s > time.monotonic() - 2.0)
        assert 8 <= often <= 24, "four times a second each"
        for link in links:
            link.cancel()
        await coordinator.close()

    run(scenario)


# ------------------------------------------------------------------ other versions, and nonsense


def test_a_coordinator_of_version_0_1_gives_one_warning_and_is_left_alone(monkeypatch, ray_up):
    async def scenario():
        found = [former := Former()]
        serve, link = linked(monkeypatch, found)
        await asyncio.sleep(30.0)
        assert former.report_router.calls == []
        assert serve.router.level == "power_of_two"
        await call_of(serve)
        found.append(newer := Coordinator(table(a=1.0)))
        await newer.told.wait()
        await asyncio.sleep(0.1)
        assert serve.router.level == "table"
        link.cancel()

    with Log() as log:
        run(scenario)
    (line,) = log.lines()
    assert "Shadecast 0.1 (schema 1)" in line
    assert f"schema {SCHEMA}" in line
    assert "power of two choices until you run" in line


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"kind": "answer", "schema": 9, "needs": 9, "version": "3.1"}, ["Shadecast 3.1 (schema 9)", "upgrade"]),
        (True, ["a bool where", "another version"]),
        (None, ["a NoneType where"]),
        (message("table"), ["a 'table' of Shadecast", "expects"]),
        (message("answer", table=b"no json"), ["unpacked"]),
        (message("answer", table="[1]"), ["a list where"]),
        (message("answer", table='{"kind": "table", "schema": 2, "needs": 7, "version": "2.5"}'), ["Shadecast 2.5"]),
        (message("answer", refused="a report of Shadecast 1.0 cannot be read"), ["Shadecast 1.0 cannot be read"]),
    ],
)
def test_an_answer_that_cannot_be_read_warns_once_and_routing_goes_on(monkeypatch, ray_up, answer, words):
    async def scenario():
        coordinator = Coordinator(table(a=1.0))
        well = coordinator.exchange.answer

        async def odd(received):
            await asyncio.sleep(0.1)
            return answer

        coordinator.exchange.answer = odd
        serve, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(20.0)
        assert 10 <= len(coordinator.received) <= 210, "asked again, and not in a rush"
        await call_of(serve)
        coordinator.exchange.answer = well
        await asyncio.sleep(2.0)
        assert serve.router.level == "table"
        link.cancel()

    with Log() as log:
        run(scenario)
    (line,) = log.lines()
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "answer",
    [
        message("answer", acknowledged="many"),
        message("answer", table=5),
        message("answer", acknowledged=None),
    ],
)
def test_an_answer_with_impossible_values_ends_nothing(monkeypatch, ray_up, answer):
    async def scenario():
        coordinator = Coordinator(table(a=1.0))
        well = coordinator.exchange.answer

        async def odd(received):
            return answer

        coordinator.exchange.answer = odd
        serve, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(5.0)
        assert not link.done()
        coordinator.exchange.answer = well
        await asyncio.sleep(3.0)
        assert serve.router.level == "table"
        link.cancel()

    run(scenario)


def test_a_coordinator_that_raises_a_message_error_of_its_own_is_told_of_once(monkeypatch, ray_up):
    async def scenario():
        async def refuses(received):
            raise MessageError("an exchange of Shadecast 9.9 cannot be read by Shadecast 1.0")

        coordinator = Coordinator()
        coordinator.exchange.answer = refuses
        _, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(10.0)
        assert len(coordinator.received) >= 9
        link.cancel()

    with Log() as log:
        run(scenario)
    (line,) = log.lines()
    assert "9.9" in line


# ------------------------------------------------------------------ an end that takes nobody along


def test_a_coordinator_that_is_gone_is_looked_for_again(monkeypatch, ray_up):
    async def scenario():
        broken, well, asked = Coordinator(), Coordinator(), asyncio.Event()

        async def gone(*_):
            asked.set()
            raise RayActorError

        broken.exchange.answer = gone
        found = [broken]
        serve, link = linked(monkeypatch, found)
        await asked.wait()
        found.append(well)
        await well.told.wait()
        assert not link.done()
        assert serve.router.level in ("power_of_two", "table")
        link.cancel()

    with Log() as log:
        run(scenario)
    assert log.lines() == [], "that happens"


def test_a_coordinator_that_does_not_answer_is_looked_for_again(monkeypatch, ray_up):
    async def scenario():
        hangs, well = Coordinator(), Coordinator()

        async def forever(*_):
            await asyncio.Event().wait()

        hangs.exchange.answer = forever
        found = [hangs]
        _, link = linked(monkeypatch, found)
        await asyncio.sleep(1.0)
        found.append(well)
        await asyncio.wait_for(well.told.wait(), 5.0)
        link.cancel()

    run(scenario)


def test_while_there_is_no_coordinator_it_is_looked_for_each_second(monkeypatch, ray_up):
    async def scenario():
        looked = []
        serve, link = linked(monkeypatch, [None])
        monkeypatch.setattr(module, "find_coordinator", lambda: looked.append(1))
        await asyncio.sleep(10.0)
        assert 9 <= len(looked) <= 11
        assert serve.router.level == "power_of_two"
        await call_of(serve)
        link.cancel()

    run(scenario)


@pytest.mark.parametrize("comes_after_s", [0.5, 15.0, 60.0, 600.0, 7200.0])
def test_a_control_plane_that_comes_late_is_found_within_a_twentieth_of_the_time_it_was_missed(
    monkeypatch, ray_up, comes_after_s
):
    """The usual order is `serve run`, then `shadecast up`."""

    async def scenario():
        found, coordinator = [None], Coordinator(table(a=1.0))
        serve, link = linked(monkeypatch, found)
        await asyncio.sleep(comes_after_s)
        assert serve.router.level == "power_of_two"
        found.append(coordinator)
        await asyncio.wait_for(coordinator.told.wait(), min(max(1.1, 0.051 * comes_after_s), 31.0))
        await asyncio.sleep(0.1)
        assert serve.router.level == "table"
        link.cancel()

    with Log() as log:
        VirtualTime().run(on_its_loop(scenario), 10_000.0)
    said = ours(log)
    assert len(said) == (2 if comes_after_s > 5.0 else 0), "that it is away, once that counts, and that it is there"
    assert all("app/model" in line for line in said)
    assert not said or "`shadecast up`" in said[0]


def test_an_application_without_a_control_plane_is_quiet(monkeypatch, ray_up):
    async def scenario():
        looked = []
        serve, link = linked(monkeypatch, [None])
        monkeypatch.setattr(module, "find_coordinator", lambda: looked.append(time.monotonic()))
        await asyncio.sleep(60.0)
        assert len(looked) <= 50
        await asyncio.sleep(3540.0)
        assert len(looked) <= 250, "a twentieth of what it was"
        assert max(b - a for a, b in pairwise(looked)) <= 31.0
        await call_of(serve)
        link.cancel()

    with Log() as log:
        VirtualTime().run(on_its_loop(scenario), 10_000.0)
    (line,) = ours(log)
    assert "no control plane" in line


def test_routers_that_have_lost_the_control_plane_together_do_not_look_for_it_together(monkeypatch, ray_up):
    async def scenario():
        looked = []
        monkeypatch.setattr(module, "find_coordinator", lambda: looked.append(time.monotonic()))
        routers = [Serve(Replica("a")) for _ in range(100)]
        await asyncio.sleep(1200.0)
        late = [at_s for at_s in looked if at_s > looked[0] + 1100.0]
        per_s = [sum(1 for at_s in late if int(at_s) == second) for second in {int(at_s) for at_s in late}]
        assert max(per_s) <= 20, "of a hundred, in one second of thirty"
        for serve in routers:
            serve.close()

    VirtualTime().run(on_its_loop(scenario), 10_000.0)


async def _raises(_received):
    raise RuntimeError("its disk is full\nand more lines")


async def _hangs(_received):
    await asyncio.Event().wait()


async def _is_dead(_received):
    raise RayActorError


async def _answers_oddly(_received):
    return {"kind": "answer", "schema": 9, "needs": 9, "version": "3.1"}


async def _answers_nonsense(_received):
    return message("answer", acknowledged="many")


async def _fails_remotely(_received):
    raise RayTaskError("exchange", "Traceback\n" * 30, ValueError("no such thing")).as_instanceof_cause()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (_raises, "RuntimeError: its disk is full)"),
        (_hangs, "does not answer"),
        (_is_dead, "does not answer"),
        (_answers_oddly, "Shadecast 3.1 (schema 9)"),
        (_answers_nonsense, "broken (ValueError"),
        (_fails_remotely, "broken (ValueError: no such thing)"),
    ],
)
def test_a_broken_coordinator_is_told_of_in_one_line_asked_less_and_less_and_used_once_it_is_well(
    monkeypatch, ray_up, broken, words
):
    async def scenario():
        coordinator, well = Coordinator(), Coordinator(table(a=1.0))
        coordinator.exchange.answer = broken
        found = [coordinator]
        serve, link = linked(monkeypatch, found)
        await asyncio.sleep(3600.0)
        assert len(coordinator.received) <= 250
        await call_of(serve)
        found.append(well)
        await asyncio.wait_for(well.told.wait(), 35.0)
        await asyncio.sleep(0.1)
        assert serve.router.level == "table"
        link.cancel()

    with Log() as log:
        VirtualTime().run(on_its_loop(scenario), 10_000.0)
    wrong, well = [record for record in log.records if record.getMessage().startswith("shadecast")]
    assert words in wrong.getMessage()
    assert "\n" not in wrong.getMessage()
    assert wrong.exc_info is None
    assert "answers" in well.getMessage()


def test_a_coordinator_that_fails_every_other_call_floods_no_log(monkeypatch, ray_up):
    async def scenario():
        coordinator, calls = Coordinator(*(table(version=version, a=1.0) for version in range(1, 2000))), []
        inner = coordinator.exchange.answer

        async def every_other(received):
            calls.append(1)
            if len(calls) % 2:
                raise RuntimeError("sometimes")
            return await inner(received)

        coordinator.exchange.answer = every_other
        _, link = linked(monkeypatch, [coordinator])
        await asyncio.sleep(600.0)
        link.cancel()

    with Log() as log:
        VirtualTime().run(on_its_loop(scenario), 10_000.0)
    assert len(ours(log)) <= 2


@pytest.mark.parametrize("how", ["no secret", "no handle"])
def test_what_cannot_be_had_now_is_asked_for_again(monkeypatch, ray_up, how):
    async def scenario():
        coordinator, tries = Coordinator(table(a=1.0)), []

        def fails_first(*_):
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("the cluster does not answer")
            return b"secret" if how == "no secret" else coordinator

        serve, link = linked(monkeypatch, [coordinator])
        monkeypatch.setattr(module, "shared_secret" if how == "no secret" else "find_coordinator", fails_first)
        await asyncio.sleep(5.0)
        assert len(tries) >= 3
        assert serve.router.table.version == 1
        assert serve.router.calls.routes.sessions.settled
        link.cancel()

    run(scenario)


def test_no_handle_is_dropped_while_ray_shuts_down(monkeypatch, ray_up):
    """Ray 2.60 ends the process in which an actor's handle is freed between the two halves of `ray.shutdown()`."""

    async def scenario():
        coordinator = Coordinator()
        handle = weakref.ref(coordinator)
        found = [coordinator]
        serve, link = linked(monkeypatch, found)
        await coordinator.told.wait()
        found.clear()
        del coordinator
        ray_up[0] = False
        await asyncio.sleep(4.5)
        gc.collect()
        assert handle() is not None, "the link has noticed, and keeps what it has"
        await link
        assert serve.router.calls.routes.sessions.settled
        link = None
        await settle()
        gc.collect()
        assert handle() is None

    run(scenario)


@pytest.mark.parametrize("version", ["ours", "0.1"])
def test_a_handle_that_was_found_just_when_ray_shut_down_is_kept_too(monkeypatch, ray_up, version):
    """No call was made with it; to drop it is as fatal."""

    async def scenario():
        made = []

        def find():
            ray_up[0] = False
            coordinator = Coordinator() if version == "ours" else Former()
            made.append(weakref.ref(coordinator))
            return coordinator

        _, link = linked(monkeypatch, [None])
        monkeypatch.setattr(module, "find_coordinator", find)
        await asyncio.sleep(4.5)
        gc.collect()
        (handle,) = made
        assert handle() is not None
        assert version == "0.1" or not handle().exchange.calls, "a call would start a new cluster"
        await link
        link = None
        await settle()
        gc.collect()
        assert handle() is None

    run(scenario)


@pytest.mark.parametrize("first", ["the coordinator", "Ray"])
def test_the_last_call_to_a_coordinator_that_has_died_is_kept_while_ray_shuts_down(monkeypatch, ray_up, first):
    """As with a handle, and no handle is left to keep: seen where a test killed the coordinator and then shut down."""

    async def scenario():
        coordinator, asked, dies = Coordinator(), asyncio.Event(), asyncio.Event()

        async def die(*_):
            asked.set()
            await dies.wait()
            raise RayActorError

        call = Call(die)
        coordinator.exchange = call
        found = [coordinator]
        _serve, link = linked(monkeypatch, found)
        await asked.wait()
        found.append(None)
        if first == "the coordinator":
            dies.set()
            await asyncio.sleep(0.5)
            ray_up[0] = False
        else:
            ray_up[0] = False
            dies.set()
        await asyncio.sleep(4.5)
        gc.collect()
        assert call.last() is not None
        await link
        link = None
        await settle()
        gc.collect()
        assert call.last() is None
        assert len(call.calls) == 1, "a call after that would start a new cluster"

    run(scenario)


def test_a_router_that_nobody_holds_is_freed_and_its_link_ends(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator()
        serve, link = linked(monkeypatch, [coordinator])
        await coordinator.told.wait()
        router = weakref.ref(serve.router)
        del serve
        await settle()
        gc.collect()
        assert router() is None, "although a call is under way"
        await asyncio.wait_for(link, 5.0)

    run(scenario)
