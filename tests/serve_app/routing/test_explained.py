"""What a router says of its decisions: true, bounded, only when it is asked, and without any effect on them.

Behind Serve's own routing code. `serving` checks at the end of every scenario that no call is open.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray.serve._private import tracing_utils

from serve_app import explained as module
from serve_app.router import ObservingRouter
from shadecast.decisions import check
from shadecast.explain import explain_decision
from shadecast.pick import load_cost
from tests.serve_app.routing.serve import Replica, in_virtual_time, metadata, serving, settle, table

COPYABLE = {"trial": {"copy_methods": ["*"]}}


def ask(serve, request_id="", most=50):
    """Somebody asks, as the coordinator passes it on; what the next report says."""
    serve.router.explained.asked([{"number": 1, "request_id": request_id, "most": most}])
    (told,) = serve.router.make_report()["explained"]
    assert told["number"] == 1
    json.dumps(told, allow_nan=False)
    return check(told)


async def finish(serve, *results):
    for replica in serve.replicas.values():
        for sent in replica.sent:
            sent.end()
    for result in results:
        await result.get_async()
    await settle()


async def send(serve, count=1, **labels):
    for _ in range(count):
        await finish(serve, await serve.send(1, **labels))


# ---------------------------------------------------------------- what it says


@in_virtual_time
async def test_the_last_decision_says_which_replicas_were_looked_at_and_what_their_scores_are_made_of():
    async with serving(Replica("a"), Replica("b"), Replica("c")) as serve:
        serve.take(table(1, a=1.0, b=(1.0, 0.5, 0.0), c=(1.0, 0.25, 0.0)))
        scores = dict(zip(serve.router.calls.routes.picks.ids, serve.router.calls.routes.picks.scores, strict=True))
        await send(serve, request_id="mine")
        (told,) = ask(serve)
        assert (told["request_id"], told["chosen"], told["level"], told["special"]) == ("mine", "a", "table", "")
        assert (told["eligible"], told["alive"]) == (3, 3)
        assert {c["replica_id"]: c["score"] for c in told["candidates"]} == pytest.approx(scores)
        assert all(c["looked_at"] and c["out"] == "" for c in told["candidates"])
        assert [c["capacity"] for c in sorted(told["candidates"], key=lambda c: c["replica_id"])] == [1.0, 0.5, 0.25]


@in_virtual_time
async def test_of_a_prompt_it_says_what_each_replica_has_of_it_and_what_waits_there():
    prompt = {"messages": [{"role": "user", "content": "x" * 8000}]}
    async with serving(Replica("a"), Replica("b"), balance={"prefix": "auto"}) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        first = await serve.send(prompt)
        first.end()
        await settle()
        own, other = first.replica.name, {"a": "b", "b": "a"}[first.replica.name]
        waiting = await serve.send({"messages": [{"role": "user", "content": "y" * 4000}]})
        serve.report()
        await finish(serve, await serve.send(prompt, request_id="mine"), waiting)
        (told,) = ask(serve, "mine")
        seen = {c["replica_id"]: c for c in told["candidates"]}
        assert (told["chosen"], told["prompt_tokens"]) == (own, pytest.approx(2000, rel=0.1))
        assert seen[own]["cached_tokens"] > 1800
        assert seen[other]["cached_tokens"] == 0
        assert seen[waiting.replica.name]["waiting_tokens"] == pytest.approx(1000, rel=0.1)
        assert seen[own]["prefix_score"] < seen[other]["prefix_score"]
        assert all(c["looked_at"] for c in seen.values())
        said = " ".join(explain_decision(told))
        assert f"{own} has {seen[own]['cached_tokens']:.0f} of them in its cache" in said
        await finish(serve, await serve.send(1))
        assert ask(serve)[0]["prompt_tokens"] in (0, told["prompt_tokens"])


@in_virtual_time
async def test_of_many_replicas_only_those_that_were_drawn_are_looked_at():
    async with serving(*(Replica(f"r{i}") for i in range(40))) as serve:
        serve.take(table(1, **{f"r{i}": 1.0 for i in range(40)}))
        await send(serve)
        (told,) = ask(serve)
        looked = [c["replica_id"] for c in told["candidates"] if c["looked_at"]]
        assert 1 <= len(looked) <= 4
        assert told["chosen"] in looked


@in_virtual_time
async def test_a_request_that_comes_at_one_second_s_beginning_is_kept_and_the_next_ones_are_not():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        for second in range(3):
            serve.report()
            await send(serve, request_id=f"first-{second}")
            await send(serve, count=20)
            await asyncio.sleep(1.0)
            serve.take(table(2 + second, a=1.0, b=1.0))
        assert [d["request_id"] for d in ask(serve)] == ["first-2", "first-1", "first-0"]


@in_virtual_time
async def test_a_request_that_is_asked_for_in_advance_is_kept_whatever_its_turn_is():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        await send(serve, count=5)
        assert ask(serve, "wanted") == []
        await send(serve, count=5)
        await send(serve, request_id="wanted")
        (told,) = ask(serve, "wanted")
        assert told["request_id"] == "wanted"
        assert told["candidates"]


@in_virtual_time
async def test_once_nobody_asks_any_more_requests_are_not_watched_for():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        await send(serve)
        assert ask(serve, "wanted") == []
        serve.router.explained.asked(None)
        serve.report()
        await send(serve)
        await send(serve, request_id="wanted")
        assert ask(serve, "wanted") == []
        await asyncio.sleep(31.0)  # the coordinator is away: it cannot say that nobody asks
        assert "explained" not in serve.router.make_report()


# ---------------------------------------------------------------- special ones


@in_virtual_time
async def test_a_request_that_waited_says_how_long():
    async with serving(Replica("a", max_ongoing_requests=1)) as serve:
        serve.take(table(1, a=1.0))
        first = await serve.send(1)
        waiting = serve.start(2, request_id="patient")
        await asyncio.sleep(0.5)
        serve.replicas["a"].sent[0].end()
        second = await waiting
        await finish(serve, first, second)
        (told,) = ask(serve, "patient")
        assert (told["special"], told["chosen"]) == ("waited", "a")
        assert told["waited_s"] >= 0.5


@in_virtual_time
async def test_a_request_that_is_given_up_says_why():
    async with serving(Replica("a", max_ongoing_requests=1)) as serve:
        serve.take(table(1, a=1.0))
        first = await serve.send(1)
        waiting = serve.start(2, request_id="hasty")
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await finish(serve, first)
        (told,) = ask(serve, "hasty")
        assert (told["special"], told["chosen"]) == ("refused", "")
        assert "gave up" in told["detail"]


@in_virtual_time
async def test_a_request_that_is_retried_says_from_where_and_after_how_long_and_then_where_it_went():
    async with serving(Replica("a", says="nothing"), Replica("b"), **COPYABLE) as serve:
        serve.take(table(1, a=1.0, b=0.0))
        caller = serve.start(1, request_id="stuck")
        await settle()
        serve.take(table(2, a=1.0, b=1.0))
        await finish(serve, await caller)
        newest, retried = (d for d in ask(serve, "stuck") if d["special"])
        assert retried["special"] == "retried"
        assert "a had not accepted it after 0." in retried["detail"]
        assert (newest["special"], newest["chosen"]) == ("came back", "b")
        out = {c["replica_id"]: c["out"] for c in newest["candidates"]}
        assert out["a"] == "ejected"


@in_virtual_time
async def test_a_session_that_moves_says_from_where():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.router.use_secret(b"secret")
        serve.take(table(1, a=1.0, b=1.0))
        await send(serve, session_id="s")
        (told,) = ask(serve)
        assert told["session"]
        home, other = (told["chosen"], "b" if told["chosen"] == "a" else "a")
        serve.take(table(2, **{other: 1.0}))
        serve.scale(serve.replicas[other])
        await send(serve, session_id="s", request_id="moved")
        moved = [d for d in ask(serve, "moved") if d["special"]]
        assert [(d["special"], d["chosen"]) for d in moved] == [("session moved", other)]
        assert f"left {home}" in moved[0]["detail"]
        assert "s" not in {d["detail"] for d in moved}, "a session's own id is nobody's business"


@in_virtual_time
async def test_a_request_that_is_copied_says_whereto():
    async with serving(Replica("a"), Replica("b"), **COPYABLE) as serve:
        serve.take(table(1, a=1.0, b=(0.0, 1.0, 1.0)))
        await send(serve, request_id="twice")
        await finish(serve)  # the copy, which was sent after the request was accepted
        (told,) = ask(serve, "twice")
        assert (told["chosen"], told["copied_to"]) == ("a", "b")


@in_virtual_time
async def test_without_a_table_it_says_by_what_it_went():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.router.explained.asked([{"number": 1, "request_id": "early"}])
        await send(serve, request_id="early")
        (told,) = ask(serve, "early")
        assert told["level"] == "power_of_two"
        assert {c["node_id"] for c in told["candidates"]} == {"node"}


@in_virtual_time
async def test_a_router_that_only_observes_says_so():
    async with serving(Replica("a"), Replica("b"), kind=ObservingRouter) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        serve.router.explained.asked([{"number": 1, "request_id": "seen"}])
        await send(serve, request_id="seen")
        assert [d["level"] for d in ask(serve, "seen")] == ["observing"]


# ---------------------------------------------------------------- no effect, no cost


@in_virtual_time
async def test_a_report_has_nothing_of_it_while_nobody_asks():
    async with serving(Replica("a"), Replica("b")) as serve:
        await send(serve, count=3)
        assert "explained" not in serve.router.make_report()
        assert ask(serve)
        serve.router.explained.asked(None)
        assert "explained" not in serve.router.make_report()


@pytest.mark.parametrize("count", [3, 30])
def test_what_is_looked_at_goes_where_it_would_have_gone_anyway(count):
    @in_virtual_time
    async def chosen(watched, into):
        async with serving(*(Replica(f"r{i}") for i in range(count))) as serve:
            routes = serve.router.calls.routes
            routes.random = random.Random(5).random
            serve.take(table(1, **{f"r{i}": (0.3 if i % 5 else 1.0, 0.5 + i % 3 / 4, 0.0) for i in range(count)}))
            if watched:
                serve.router.explained.asked([{"number": 1, "request_id": f"q{i}"} for i in range(8)])
            for i in range(40):
                await send(serve, request_id=f"q{i % 8}")
            into += [(r.name, len(r.sent)) for r in serve.replicas.values()]
            assert type(routes.picks).__name__ == "PickTable", "nothing stands in for it any more"

    plain, watched = [], []
    chosen(False, plain)
    chosen(True, watched)
    assert plain == watched


@in_virtual_time
async def test_what_breaks_while_a_decision_is_explained_hurts_no_request(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    async with serving(Replica("a"), Replica("b")) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        for name in ("candidates", "looked_at"):
            monkeypatch.setattr(module, name, broken)
        for i in range(5):
            serve.report()
            await send(serve, session_id=f"s{i % 2}" if i % 2 else "")
        assert ask(serve) == []


@in_virtual_time
async def test_tables_and_membership_that_change_while_one_is_looked_at_are_kept():
    async with serving(Replica("a"), Replica("b")) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        await asyncio.sleep(3.5)  # older than forecasts are good for: the picks are laid out anew by the next choice
        serve.report()
        await send(serve, request_id="late")
        (told,) = ask(serve, "late")
        assert told["level"] == "stale_table"
        assert type(serve.router.calls.routes.picks).__name__ == "PickTable"


@in_virtual_time
async def test_under_a_flood_few_decisions_are_kept_and_the_ring_is_bounded():
    async with serving(Replica("a", max_ongoing_requests=4), Replica("b", max_ongoing_requests=4)) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        began_s = time.monotonic()
        for _ in range(50):
            callers = [serve.start(1) for _ in range(20)]
            while not all(caller.done() for caller in callers):
                await finish(serve)
            await finish(serve, *(caller.result() for caller in callers))
        assert time.monotonic() - began_s < 10.0
        assert len(serve.router.explained.ring) <= 128 + 7 * 32
        assert len(ask(serve)) >= 1


def test_a_handful_of_requests_keeps_nothing_of_the_requests_themselves():
    @in_virtual_time
    async def scenario():
        async with serving(Replica("a"), Replica("b")) as serve:
            serve.take(table(1, a=1.0, b=1.0))
            await finish(serve, await serve.send("argument-of-a-user"))
            assert "argument-of-a-user" not in json.dumps(ask(serve))

    scenario()


# ---------------------------------------------------------------- spans


@pytest.fixture
def spans(monkeypatch):
    """Serve's own tracing, switched on; what it exports."""
    if not hasattr(tracing_utils, "_tracing_enabled"):
        pytest.skip("before Ray 2.59, Serve looks only once whether it shall trace: as it is imported")
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing_utils, "_tracing_enabled", True)
    monkeypatch.setattr(tracing_utils, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def traced(serve, **labels):
    """A request as a handle sends it: Serve makes a span of its routing."""
    made = metadata(**labels)
    return await serve.assign_request(made, 1)


def of(spans, name):
    return [dict(span.attributes) for span in spans.get_finished_spans() if span.name.startswith(name)]


def test_where_serve_traces_each_request_s_span_has_its_replica_score_and_level(spans):
    @in_virtual_time
    async def scenario():
        async with serving(Replica("a"), Replica("b")) as serve:
            serve.take(table(1, a=1.0, b=(1.0, 0.5, 0.0)))
            serve.report()
            for i in range(5):
                await finish(serve, await traced(serve, request_id=f"q{i}", session_id="s" if i else ""))
            found = of(spans, "route_to_replica")
            assert [each["request_id"] for each in found] == ["q0", "q1", "q2", "q3", "q4"]
            assert (found[0]["shadecast.replica"], found[0]["shadecast.level"]) == ("a", "table")
            assert found[0]["shadecast.score"] == pytest.approx(load_cost(1.0, 1.0, 0.0))
            assert [each["shadecast.session"] for each in found] == [False, True, True, True, True]
            assert all("shadecast.special" not in each for each in found)
            assert len(ask(serve)) <= 2, "that each is on its span does not make each be kept"

    scenario()


def test_a_hop_that_is_repeated_or_copied_is_marked_in_the_request_s_trace(spans):
    @in_virtual_time
    async def scenario():
        async with serving(Replica("a", says="nothing"), Replica("b"), Replica("c"), **COPYABLE) as serve:
            serve.report()
            serve.take(table(1, a=1.0, b=0.0, c=(0.0, 1.0, 1.0)))
            caller = asyncio.create_task(traced(serve, request_id="stuck"))
            await settle()
            serve.take(table(2, a=1.0, b=1.0, c=(0.0, 1.0, 1.0)))
            await finish(serve, await caller)
            await finish(serve)
            (route,) = of(spans, "route_to_replica")
            assert (route["shadecast.replica"], route["shadecast.special"]) == ("b", "came back")
            assert of(spans, "shadecast.retried") == [{"shadecast.from": "a"}]
            assert of(spans, "shadecast.copied") == [{"shadecast.replica": "c"}]
            traces = {span.context.trace_id for span in spans.get_finished_spans()}
            assert len(traces) == 1

    scenario()


def test_where_serve_does_not_trace_there_is_no_span(spans, monkeypatch):
    monkeypatch.setattr(tracing_utils, "_tracing_enabled", False)

    @in_virtual_time
    async def scenario():
        async with serving(Replica("a"), Replica("b")) as serve:
            serve.take(table(1, a=1.0, b=1.0))
            serve.report()
            await finish(serve, await traced(serve))
            assert spans.get_finished_spans() == ()

    scenario()
