"""What ties a router to the coordinator: reports, tables, and an end that takes nobody along."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from serve_app.routing import link as module
from tests.serve_app.routing.router_fakes import FakeReplica, make_router, table


class Call:
    """A method of an actor: `answer` is what its `remote` is awaited to."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def remote(self, *arguments):
        self.calls.append(arguments)
        made = asyncio.ensure_future(self.answer(*arguments))
        self.last = weakref.ref(made)
        return made


class Coordinator:
    """Takes reports, and gives one table."""

    def __init__(self, wants_table_back=False):
        self.wants_table_back = wants_table_back
        self.report_router = Call(self._report)
        self.wait_table = Call(self._table)
        self.told, self.given_back = asyncio.Event(), asyncio.Event()

    async def _report(self, report, settings):
        self.told.set()
        if report.held_table is not None:
            self.given_back.set()
        return self.wants_table_back

    async def _table(self, deployment, seen, timeout_s):
        if seen == (0, 0):
            return table(a=1.0)
        await asyncio.Event().wait()


@pytest.fixture
def ray_up(monkeypatch):
    """Whether Ray is initialized, as a list with one truth value; no cluster is there."""
    up = [True]
    monkeypatch.setattr(module.ray, "is_initialized", lambda: up[0])
    monkeypatch.setattr(module, "_cluster_secret", lambda: b"secret")
    return up


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 20.0))


async def linked(monkeypatch, found):
    """A router that is in touch with the last coordinator of `found`, and the task that keeps it so."""
    monkeypatch.setattr(module, "find_coordinator", lambda: found[-1])
    router = make_router(FakeReplica("a"))
    if router._control is not None:
        router._control.cancel()
    router.report_s = 0.02
    router._control = asyncio.ensure_future(module.keep_in_touch(weakref.ref(router)))
    return router, router._control


def test_a_router_reports_takes_tables_and_gives_its_own_back_if_it_is_asked_to(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator(wants_table_back=True)
        router, link = await linked(monkeypatch, [coordinator])
        await coordinator.given_back.wait()
        assert router.level == "table"
        assert router._homes.settled
        assert coordinator.wait_table.calls[-1][1] == router.held_version()
        link.cancel()

    run(scenario())


def test_a_router_without_replicas_says_so_once_and_is_silent_until_there_are_some(monkeypatch, ray_up):
    async def scenario():
        coordinator = Coordinator()
        router, link = await linked(monkeypatch, [coordinator])
        await coordinator.told.wait()
        router.update_replicas([])
        for _ in range(1000):
            if any(not report.replicas for report, _ in coordinator.report_router.calls):
                break
            await asyncio.sleep(0.01)
        told, polled = len(coordinator.report_router.calls), len(coordinator.wait_table.calls)
        await asyncio.sleep(0.2)
        assert (len(coordinator.report_router.calls), len(coordinator.wait_table.calls)) == (told, polled)
        router.update_replicas([FakeReplica("b")])
        coordinator.told.clear()
        await coordinator.told.wait()
        assert coordinator.report_router.calls[-1][0].replicas
        await asyncio.sleep(0.05)
        assert len(coordinator.wait_table.calls) > polled
        link.cancel()

    run(scenario())


def test_a_coordinator_that_is_gone_is_looked_for_again(monkeypatch, ray_up):
    async def scenario():
        broken, well, asked = Coordinator(), Coordinator(), asyncio.Event()

        async def gone(*_):
            asked.set()
            raise module.RayActorError

        broken.report_router = Call(gone)
        found = [broken]
        router, link = await linked(monkeypatch, found)
        await asked.wait()
        found.append(well)
        await well.told.wait()
        assert not link.done()
        assert router.level in ("power_of_two", "table")
        link.cancel()

    run(scenario())


def test_no_handle_is_dropped_while_ray_shuts_down(monkeypatch, ray_up):
    """Ray 2.60 ends the process in which an actor's handle is freed between the two halves of `ray.shutdown()`."""

    async def scenario():
        monkeypatch.setattr(module, "_SHUTDOWN_S", 0.3)
        coordinator = Coordinator()
        handle = weakref.ref(coordinator)
        found = [coordinator]
        router, link = await linked(monkeypatch, found)
        await coordinator.told.wait()
        found.clear()
        del coordinator
        ray_up[0] = False
        await asyncio.sleep(0.15)
        gc.collect()
        assert handle() is not None, "the link has noticed, and keeps what it has"
        await link
        assert router._homes.settled
        link = None
        await asyncio.sleep(0)
        gc.collect()
        assert handle() is None

    run(scenario())


@pytest.mark.parametrize("method", ["report_router", "wait_table"])
def test_the_last_call_to_a_coordinator_that_has_died_is_kept_while_ray_shuts_down(monkeypatch, ray_up, method):
    """As with a handle, and no handle is left to keep: seen where a test killed the coordinator and then shut down."""

    async def scenario():
        monkeypatch.setattr(module, "_SHUTDOWN_S", 0.3)
        coordinator, asked, dies = Coordinator(), asyncio.Event(), asyncio.Event()

        async def die(*_):
            asked.set()
            await dies.wait()
            raise module.RayActorError

        call = Call(die)
        setattr(coordinator, method, call)
        found = [coordinator]
        _router, link = await linked(monkeypatch, found)
        await asked.wait()
        found.append(None)
        if method == "report_router":
            dies.set()
            await asyncio.sleep(0.1)
            ray_up[0] = False
        else:
            ray_up[0] = False
            dies.set()
        await asyncio.sleep(0.15)
        gc.collect()
        assert call.last() is not None
        await link
        link = None
        await asyncio.sleep(0.05)
        gc.collect()
        assert call.last() is None

    run(scenario())
