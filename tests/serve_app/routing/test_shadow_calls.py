"""Calls that the code which handles a copy makes: routed as any other, and nothing is learned from them."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.router import ObservingRouter
from shadecast.config import SessionConfig
from shadecast.sessions import SessionMap
from tests.serve_app.routing.serve import Replica, in_virtual_time, serving, settle, table

OF_COPY = "r1/0-shadow"
SESSION = SessionConfig()
EVERYTHING = {"trial": {"copy_methods": ["*"]}, "balance": {"resume": "had", "rescue_fraction": 0.2}}


def views(serve):
    return {view.replica_id: view for view in serve.report().replicas}


@in_virtual_time
async def test_it_takes_a_place_and_is_no_outcome_no_error_and_no_finished_request():
    async with serving(Replica("a"), **EVERYTHING) as serve:
        serve.take(table(a=1.0))
        views(serve)
        for ends_with in ("an answer", "an error"):
            await serve.send(1, request_id=OF_COPY)
            sent = serve.replicas["a"].sent[-1]
            assert views(serve)["a"].in_flight == 1, "the work is real"
            assert serve.router.calls.routes.picks.in_flight == [1]
            sent.end(**({"outcome": 1} if ends_with == "an answer" else {"raised": ValueError("user code")}))
            await settle()
        await asyncio.sleep(60.0)
        await serve.send(1)
        serve.replicas["a"].sent[-1].end()
        await settle()
        view = views(serve)["a"]
        assert (view.in_flight, view.started, view.finished, view.failed) == (0, 1, 1, 0)
        assert len(view.outcomes) == 1


@in_virtual_time
async def test_one_that_takes_for_ever_is_no_evidence_and_hurries_no_report():
    async with serving(Replica("a"), **EVERYTHING) as serve:
        serve.take(table(a=1.0, reference_s=0.01))
        result = await serve.send(1, request_id=OF_COPY)
        await asyncio.sleep(30.0)
        assert not serve.router.is_overdue()
        assert views(serve)["a"].unfinished == ()
        await serve.send(1)
        await asyncio.sleep(1.0)
        assert serve.router.is_overdue(), "somebody's own is"
        assert len(views(serve)["a"].unfinished) == 1
        for sent in (result, serve.replicas["a"].sent[-1]):
            sent.end()


@in_virtual_time
async def test_it_is_copied_to_nobody():
    async with serving(Replica("a"), Replica("new"), **EVERYTHING) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        for name, copies in ((OF_COPY, 0), ("r2", 1)):
            await serve.send(1, request_id=name)
            await settle()
            assert len(serve.replicas["new"].sent) == copies
            for replica in serve.replicas.values():
                for sent in replica.sent:
                    sent.end()
            await settle()
        assert serve.report().mirrored == 1


@in_virtual_time
async def test_it_is_not_sent_again_where_its_replica_says_nothing():
    async with serving(Replica("a", says="nothing"), Replica("b"), **EVERYTHING) as serve:
        serve.take(table(a=1.0, b=0.0))
        waiting = serve.start(1, request_id=OF_COPY)
        await asyncio.sleep(20.0)
        assert (len(serve.replicas["a"].sent), len(serve.replicas["b"].sent)) == (1, 0)
        assert not serve.router.calls.routes.ejections
        serve.replicas["a"].sent[0].accept()
        await waiting
        serve.replicas["a"].sent[0].end()


@in_virtual_time
async def test_a_stream_of_it_does_not_go_on_elsewhere_and_tells_no_pace():
    async with serving(Replica("a"), Replica("b"), **EVERYTHING) as serve:
        serve.take(table(a=1.0, b=0.0))
        result = await serve.send(1, request_id=OF_COPY, stream=True)
        serve.replicas["a"].sent[0].give(1, 2, 3)
        for expected in (1, 2, 3):
            assert await result.__anext__() == expected
        serve.replicas["a"].sent[0].die()
        with pytest.raises(Exception, match="died"):
            await result.__anext__()
        assert not serve.replicas["b"].sent
        view = views(serve)["a"]
        assert (view.items, view.stream_s, view.outcomes) == (0, 0.0, ())
        assert serve.report().rescued == 0
        serve.scale(Replica("b"))
        del result


@in_virtual_time
async def test_it_goes_where_its_session_lives_and_leaves_no_trace_there():
    async with serving(*(Replica(name) for name in "abcdefgh"), **EVERYTHING) as serve:
        serve.take(table(**dict.fromkeys("abcdefgh", 1.0)))
        serve.router.use_secret(b"secret")
        homes = {}
        for i in range(50):
            for name in (OF_COPY, f"r{i}", OF_COPY):
                await serve.send(1, request_id=name, session_id=f"s{i}")
                (home,) = (r for r in serve.replicas.values() if r.running)
                homes.setdefault(i, set()).add(home.name)
                home.sent[-1].end()
                await settle()
            sessions = serve.router.calls.routes.sessions._map
            assert len(sessions) == i + 1, "only the session's own request is remembered"
        assert all(len(names) == 1 for names in homes.values())


@in_virtual_time
async def test_while_it_waits_nobody_is_told_to_make_room():
    async with serving(Replica("a", max_ongoing_requests=1), **EVERYTHING) as serve:
        serve.take(table(a=1.0))
        await serve.send(1)
        waiting = [serve.start(1, request_id=OF_COPY) for _ in range(3)]
        own = serve.start(1)
        await asyncio.sleep(0.1)
        assert serve.report().waiting == 1
        for _ in range(5):
            serve.replicas["a"].sent[-1].end()
            await asyncio.sleep(1.5)
            for sent in serve.replicas["a"].sent:
                sent.end()
        await asyncio.gather(*waiting, own)
        for _ in range(5):
            for sent in serve.replicas["a"].sent:
                sent.end()
            await settle()


@in_virtual_time
async def test_an_observing_router_compares_nothing_by_it():
    async with serving(Replica("a"), Replica("b"), kind=ObservingRouter) as serve:
        serve.take(table(a=1.0, b=1.0))
        for name, observed in ((OF_COPY, 0), ("r2", 1)):
            await serve.send(1, request_id=name)
            assert serve.report().observed.requests == observed
        for replica in serve.replicas.values():
            for sent in replica.sent:
                sent.end()


def test_to_look_where_a_session_lives_changes_nothing():
    sessions = SessionMap(SESSION, b"secret")
    sessions.update({"a": 1.0, "b": 1.0, "c": 1.0}, {}, 0.0)
    for i in range(100):
        looked = sessions.peek(f"s{i}", 0.0)
        assert len(sessions) == i
        assert sessions.lookup(f"s{i}", 0.0) == looked
    before = {name: sessions.peek(name, 1.0) for name in (f"s{i}" for i in range(100))}
    sessions.update({"a": 1.0, "b": 1.0, "d": 1.0}, {}, 2.0)
    kept = [name for name, home in before.items() if home != "c"]
    assert [sessions.peek(name, 2.0) for name in kept] == [before[name] for name in kept]
    assert all(sessions.peek(name, 2.0) in ("a", "b", "d") for name in before)
    away = {name: sessions.peek(name, 2.0, ("a",)) for name in before}
    assert "a" not in away.values()
    assert SessionMap(SESSION, b"secret").peek("s1", 0.0) is None
