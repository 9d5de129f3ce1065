"""Requests that a replica does not accept, and those that a slow one holds: what is retried or moved, and what is not.

A request that no replica has accepted counts as on its way; Serve may choose again for it. One that a slow replica has
accepted gets a second attempt. `serving` checks at the end of every scenario that no call is open.
"""

import asyncio
import itertools
import time
from dataclasses import replace

import pytest
from ray.exceptions import TaskCancelledError

from serve_app.copying import METADATA_KEY
from shadecast.rescue import Patience
from tests.serve_app.routing.serve import Replica, VirtualTime, in_virtual_time, serving, settle, table

COPYABLE = {"trial": {"copy_methods": ["*"]}}


def slow(version=2, capacity=0.02, **rows):
    """A table that shows replica "a" as slow, and "b" as well."""
    return table(version, reference_s=0.1, **{"a": (1.0, capacity, 0.0), "b": 1.0} | rows)


def in_flight(serve):
    picks = serve.router.calls.routes.picks
    return dict(zip(picks.ids, picks.in_flight, strict=True))


def views(serve):
    return {view.replica_id: view for view in serve.report().replicas}


def takes(serve, name):
    """Whether the replica seems to have a place."""
    picks = serve.router.calls.routes.picks
    return picks.has_room(picks.index[name])


async def stuck(serve, age_s=5.0, **labels):
    """A request that "a", the only one that takes any, has not accepted for so long."""
    serve.take(table(1, a=1.0, b=0.0))
    caller = serve.start(1, **labels)
    await asyncio.sleep(age_s)
    assert not caller.done()
    assert len(serve.replicas["a"].sent) == 1
    return caller


async def over(*callers):
    """Nobody waits any more."""
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


# ------------------------------------------------------------------ not accepted: what is told of it


@in_virtual_time
async def test_a_request_that_its_replica_has_not_accepted_is_reported_as_in_flight_and_unfinished():
    async with serving(Replica("a", says="nothing"), Replica("b")) as serve:
        caller = await stuck(serve)
        seen = views(serve)
        assert (seen["a"].in_flight, seen["b"].in_flight) == (1, 0)
        (entry,) = seen["a"].unfinished
        assert entry.age_s == pytest.approx(5.0)
        assert seen["a"].started == 0, "arrivals are counted when a replica accepts them"
        await over(caller)


@in_virtual_time
async def test_what_a_router_reports_is_what_it_later_subtracts_from_the_tables_queue():
    """Otherwise each new table would hide the requests that wait for acceptance."""
    async with serving(Replica("a", says="nothing"), Replica("b")) as serve:
        caller = await stuck(serve)
        told = {name: view.in_flight for name, view in views(serve).items()}
        assert told == {"a": 1, "b": 0}
        known = table(2, a=1.0, b=1.0)
        rows = tuple(replace(row, queue=float(told[row.replica_id])) for row in known.rows)
        serve.take(replace(known, rows=rows))
        picks = serve.router.calls.routes.picks
        busy, idle = (picks.score(picks.index[name]) for name in "ab")
        assert busy > 1.5 * idle
        await over(caller)
        assert picks.score(picks.index["a"]) == idle, "once it is gone, nothing is left of it"


# ------------------------------------------------------------------ not accepted: cancelled and retried


@in_virtual_time
async def test_a_request_that_a_slow_replica_has_not_accepted_goes_elsewhere():
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), **COPYABLE) as serve:
        caller = await stuck(serve)
        serve.take(slow())
        result = await caller
        assert result.replica.name == "b"
        assert a.sent[0].cancelled, "the first attempt is cancelled"
        assert not result.inner.cancelled
        result.end()
        await settle()
        report = serve.report()
        assert report.rescued == 1
        assert (report.retried, report.moved, report.resumed) == (1, 0, 0)
        assert {view.replica_id: (view.started, view.finished, view.in_flight) for view in report.replicas} == {
            "a": (0, 0, 0),
            "b": (1, 1, 0),
        }
        assert in_flight(serve) == {"a": 0, "b": 0}
        assert serve.router.calls.book.open_calls == 0


@in_virtual_time
async def test_the_code_of_a_replica_may_declare_its_methods_safe_to_send_again():
    declared = {METADATA_KEY: ["infer"]}
    a, b = Replica("a", says="nothing", replica_metadata=declared), Replica("b", replica_metadata=declared)
    async with serving(a, b) as serve:
        caller = await stuck(serve)
        serve.take(slow())
        result = await caller
        assert result.replica is b
        result.end()


@pytest.mark.parametrize(
    ("methods", "age_s", "capacity"),
    [([], 5.0, 0.02), (["*"], 0.0, 0.02), (["*"], 5.0, 0.8)],
    ids=["not idempotent", "young", "not slow"],
)
@in_virtual_time
async def test_no_other_request_is_cancelled_and_retried_by_a_table(methods, age_s, capacity):
    a, b = Replica("a", says="nothing"), Replica("b")
    async with serving(a, b, trial={"copy_methods": methods}) as serve:
        caller = await stuck(serve, age_s)
        serve.take(slow(capacity=capacity))
        await settle()
        assert not caller.done()
        assert not a.sent[0].cancelled
        assert b.sent == []
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller


@in_virtual_time
async def test_a_caller_that_gives_up_while_waiting_is_cancelled_and_leaves_no_count():
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), **COPYABLE) as serve:
        caller = await stuck(serve)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert a.sent[0].cancelled
        await settle()
        serve.router.on_request_completed(a.replica_id, a.sent[0].request.metadata.internal_request_id)
        assert serve.router.calls.book.open_calls == 0
        assert in_flight(serve) == {"a": 0, "b": 0}


async def unresponsive_for(serve, seconds, **labels):
    """A request that "a" has not accepted for so long, when "b" is there for it, too: nobody has looked yet."""
    caller = await stuck(serve, seconds, **labels)
    serve.take(table(2, a=1.0, b=1.0))
    return caller


LOOKED_S = 0.15
"""By then somebody has looked."""


@in_virtual_time
async def test_a_request_that_an_unresponsive_replica_does_not_accept_goes_elsewhere_without_a_new_table():
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), **COPYABLE) as serve:
        caller = await unresponsive_for(serve, 1.0)
        async with asyncio.timeout(LOOKED_S):
            result = await caller
        assert result.replica.name == "b"
        assert a.sent[0].cancelled
        picks = serve.router.calls.routes.picks
        assert picks.score(picks.index["a"]) > 1e8, "it seems full to the next requests"
        assert not takes(serve, "a")
        seen = views(serve)
        assert [1.0 <= outcome.duration_s < 1.0 + LOOKED_S for outcome in seen["a"].outcomes] == [True], "it is told"
        assert (seen["a"].started, seen["a"].finished) == (0, 0)
        result.end()


@in_virtual_time
async def test_it_goes_elsewhere_after_a_quarter_of_a_second_if_acceptance_is_usually_quick():
    a = Replica("a", says="nothing")
    async with serving(a, *(Replica(n) for n in "bcd"), **COPYABLE) as serve:
        serve.take(table(1, a=(1.0, 9.0, 0.0), b=1.0, c=1.0, d=1.0))
        started_s = time.monotonic()
        result = await serve.send(1)
        assert a.sent
        assert 0.25 <= time.monotonic() - started_s <= 0.36
        result.end()


@in_virtual_time
async def test_a_replica_that_stays_unresponsive_is_left_out_for_longer_each_time_until_it_answers():
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), **COPYABLE) as serve:
        versions = itertools.count(1)

        def new_table():
            serve.take(table(next(versions), a=(1.0, 1.0, 0.0), b=(1.0, 0.3, 0.0)))

        async def ejected_for(requests=1):
            """Send some to "a", which is the better one, and see how long it is left out then."""
            await asyncio.sleep(0.01)
            new_table()
            calls = [serve.start(1) for _ in range(requests)]
            await settle()
            assert len([sent for sent in a.sent if not sent.done]) == requests
            while takes(serve, "a"):  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.01)
            started_s = time.monotonic()
            assert serve.report().ejected == ("a",)
            for call in calls:
                (await call).end()
            while not takes(serve, "a"):
                new_table()  # which does not forget it
                await asyncio.sleep(0.01)
            return time.monotonic() - started_s

        lengths_s = [await ejected_for(2)]  # another request of the same spell adds nothing
        lengths_s += [await ejected_for() for _ in range(5)]
        assert lengths_s == pytest.approx([1.5, 3.0, 6.0, 12.0, 12.0, 12.0], abs=0.05)
        await asyncio.sleep(0.01)
        a.says = "yes"
        new_table()
        result = await serve.send(1)
        assert result.replica is a
        assert serve.report().ejected == ()
        result.end()
        a.says = "nothing"
        assert await ejected_for() == pytest.approx(1.5, abs=0.05)


@in_virtual_time
async def test_a_replica_that_answers_late_is_used_again_at_once():
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), trial={"copy_methods": ["infer"]}) as serve:
        serve.take(table(1, a=1.0, b=0.0))
        kept = serve.start(1, method="buy")  # cannot be retried
        retried = serve.start(1)
        await settle()
        serve.take(table(2, a=1.0, b=1.0))
        await asyncio.sleep(0.5)
        assert not takes(serve, "a")
        a.sent[0].accept()
        await settle()
        assert takes(serve, "a")
        (await kept).end()
        (await retried).end()


@in_virtual_time
async def test_an_ejection_ends_although_timers_come_a_moment_early():
    """Those of uvloop, which Ray uses where it is installed, count in whole milliseconds."""
    loop = asyncio.get_running_loop()
    call_later = loop.call_later
    loop.call_later = lambda delay_s, *rest, **more: call_later(max(delay_s - 0.0005, 0.0), *rest, **more)
    a = Replica("a", says="nothing")
    async with serving(a, Replica("b"), **COPYABLE) as serve:
        caller = await unresponsive_for(serve, 1.0)
        (await caller).end()
        assert not takes(serve, "a")
        await asyncio.sleep(1.6)
        assert takes(serve, "a")


@pytest.mark.parametrize("why", ["not idempotent", "young", "no budget"])
@in_virtual_time
async def test_an_unresponsive_replica_keeps_other_requests(why):
    a, b = Replica("a", says="nothing"), Replica("b")
    settings = {"trial": {"copy_methods": [] if why == "not idempotent" else ["*"]}}
    if why == "no budget":
        settings["balance"] = {"rescue_fraction": 0.0}
    async with serving(a, b, **settings) as serve:
        caller = await unresponsive_for(serve, 0.05 if why == "young" else 1.0)
        await asyncio.sleep(LOOKED_S)
        assert not caller.done()
        assert not a.sent[0].cancelled
        assert b.sent == []
        assert takes(serve, "a")
        await over(caller)


def test_an_unresponsive_replica_keeps_its_requests_if_this_process_was_stuck_itself():
    """Answers may lie unread."""
    clock = VirtualTime()

    async def scenario():
        a, b = Replica("a", says="nothing"), Replica("b")
        async with serving(a, b, **COPYABLE) as serve:
            caller = await unresponsive_for(serve, 0.1)
            a.sent[0].word.get_loop().call_at(clock.now_s + 0.16, a.sent[0].accept)  # after the look that is due
            clock.now_s += 1.0  # nothing runs meanwhile
            await asyncio.sleep(0.05)
            assert not a.sent[0].cancelled
            assert b.sent == []
            assert takes(serve, "a")
            assert caller.done()
            (await caller).end()

    clock.run(scenario())


@pytest.mark.parametrize("why", ["the other is unresponsive too", "the other is slow"])
@in_virtual_time
async def test_an_unresponsive_replica_keeps_its_requests_where_nobody_else_is_better(why):
    """At a peak, what all that are well hold would go to the one that is not."""
    a, b = Replica("a", says="nothing"), Replica("b", says="nothing")
    async with serving(a, b, **COPYABLE) as serve:
        if why == "the other is slow":
            caller = await stuck(serve, 0.1)
            serve.take(slow(2, capacity=1.0, b=(1.0, 0.02, 0.0)))
        else:
            serve.take(table(1, a=0.0, b=1.0))
            other = serve.start("other")
            await settle()
            serve.take(table(2, a=1.0, b=0.0))
            await asyncio.sleep(0.2)
            caller = serve.start(1)
            await asyncio.sleep(0.17)
            assert not takes(serve, "b")
            assert [sent.request.args for sent in a.sent if not sent.cancelled] == [[1], ["other"]]
            serve.take(table(3, a=1.0, b=1.0))
        kept = [sent for sent in a.sent if not sent.cancelled]
        sent_to_b = len(b.sent)
        await asyncio.sleep(1.0)
        assert not caller.done()
        assert not any(sent.cancelled for sent in kept)
        assert len(b.sent) == sent_to_b
        await over(caller, *([other] if why != "the other is slow" else []))


async def read(stream):
    try:
        while True:
            await anext(stream)
    except StopAsyncIteration:
        return


async def give(stream, seconds):
    for _ in range(int(50 * seconds)):
        stream.give("item")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("waited_s", "item_ago_s", "left"), [(0.5, 0.0, False), (0.5, 1.0, True), (0.5, None, True), (1.0, 0.0, True)]
)
@in_virtual_time
async def test_a_replica_whose_streams_go_on_is_busy_and_is_left_later(waited_s, item_ago_s, left):
    a, b = Replica("a"), Replica("b")
    async with serving(a, b, **COPYABLE) as serve:
        serve.take(table(1, a=1.0, b=0.0))
        stream = await serve.send(1, method="generate", stream=True)
        a.says = "nothing"
        reader = asyncio.create_task(read(stream))
        giver = asyncio.create_task(give(stream, 100.0 if item_ago_s == 0.0 else 0.0))
        if item_ago_s:
            stream.give("item")
            await asyncio.sleep(item_ago_s - waited_s)
        caller = serve.start("late")
        await settle()
        serve.take(table(2, a=1.0, b=1.0))
        await asyncio.sleep(waited_s)
        assert caller.done() is left
        assert len(b.sent) == left
        if left:
            (await caller).end()
        await over(caller, giver)
        stream.end()
        await reader
        del stream


def test_where_acceptance_takes_long_everywhere_patience_grows():
    patience = Patience()
    short_s = patience.limit_s
    for _ in range(300):
        patience.accepted(0.1)
    assert patience.limit_s > 3.0 * short_s
    for _ in range(300):
        patience.accepted(0.002)
    assert patience.limit_s == short_s


@in_virtual_time
async def test_where_acceptance_takes_long_everywhere_nothing_is_retried_early():
    a, b = Replica("a", says="nothing"), Replica("b", says="nothing")
    async with serving(a, b, **COPYABLE) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        for _ in range(100):
            call = serve.start(1)
            await asyncio.sleep(0.1)
            for replica in (a, b):
                for sent in replica.sent:
                    sent.accept()
            (await call).end()
        call = serve.start(1)
        await asyncio.sleep(0.6)
        assert not any(sent.cancelled for replica in (a, b) for sent in replica.sent)
        await over(call)


def test_nothing_looks_at_an_idle_router():
    clock = VirtualTime()

    async def scenario():
        a = Replica("a", says="nothing")
        async with serving(a, Replica("b"), **COPYABLE) as serve:
            (await (await unresponsive_for(serve, 1.0))).end()
            await asyncio.sleep(5.0)  # the ejection is over, too
            before = clock.waits
            await asyncio.sleep(60.0)
            assert clock.waits == before + 1

    clock.run(scenario())


# ------------------------------------------------------------------ the attempt after the first


@pytest.mark.parametrize("why", ["it is full", "it says nothing"])
@in_virtual_time
async def test_the_attempt_after_the_first_is_counted_although_the_first_one_completes_late(why):
    """Serve tells of the first attempt's completion after the second choice, by an id that both have."""
    a = Replica("a", says="nothing")
    b, c, d = (Replica(name, says="nothing") for name in "bcd")
    async with serving(a, b, c, d, **COPYABLE) as serve:
        serve.take(table(1, a=1.0, b=0.0, c=0.0, d=0.0))
        caller = serve.start(1)
        await settle()
        serve.take(table(2, a=1.0, b=(1.0, 3.0, 0.0), c=(1.0, 2.0, 0.0), d=1.0))
        if why == "it is full":
            serve.router.on_new_queue_len_info(a.replica_id, 8)
            a.says, a.queue = "no", 8
            a.sent[0].reject()
            await settle(100)
        else:
            await asyncio.sleep(0.36)
        assert a.sent[0].done, "its completion was told"
        assert len(b.sent) == 1
        assert serve.router.calls.book.all_in_flight() == {"b": 1}
        assert in_flight(serve) == {"a": 0, "b": 1, "c": 0, "d": 0}
        seen = views(serve)
        assert (seen["a"].in_flight, seen["b"].in_flight) == (0, 1)
        assert len(seen["b"].unfinished) == 1
        c.says = "yes"
        await asyncio.sleep(0.4)
        assert b.sent[0].cancelled, "the second attempt is cancelled and retried, too"
        result = await caller
        assert result.replica is c
        assert serve.router.calls.book.all_in_flight() == {"c": 1}
        result.end("answer")
        assert await result.get_async() == "answer"
        await settle()
        report = serve.report()
        assert sum(view.finished for view in report.replicas) == 1
        assert report.rescued == 1, "since the report before"


@in_virtual_time
async def test_a_call_whose_second_attempt_is_given_up_leaves_nothing():
    a, b = Replica("a", says="no", queue=8), Replica("b", says="nothing")
    async with serving(a, b) as serve:
        serve.take(table(1, a=(1.0, 9.0, 0.0), b=1.0))
        serve.router.on_new_queue_len_info(a.replica_id, 0)
        caller = serve.start(1)
        await settle()
        assert len(a.sent) == len(b.sent) == 1
        assert in_flight(serve) == {"a": 0, "b": 1}
        await over(caller)
        await settle()
        assert b.sent[0].cancelled
        assert serve.router.calls.book.open_calls == 0


# ------------------------------------------------------------------ accepted by a slow replica: moved


async def held_by_a(serve, age_s=5.0):
    """A request that "a" has accepted, whose caller waits for so long already; its result and the caller."""
    serve.take(table(1, a=1.0, b=0.0, c=0.0))
    result = await serve.send(1)
    caller = asyncio.create_task(result.get_async())
    await asyncio.sleep(age_s)
    return result, caller


def others(serve):
    """What the other replicas got."""
    return [sent for name, replica in serve.replicas.items() if name != "a" for sent in replica.sent]


def three(says="yes"):
    return Replica("a"), Replica("b", says=says), Replica("c", says=says)


@in_virtual_time
async def test_a_request_stuck_on_a_slow_replica_is_answered_by_another_one():
    async with serving(*three(), **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        serve.take(slow(c=1.0))
        await settle()
        assert result.inner.cancelled, "the first attempt is cancelled"
        (second,) = others(serve)
        assert second.request.args == [1]
        second.end("second")
        assert await caller == "second"
        await settle()
        report = serve.report()
        assert report.rescued == 1
        assert (report.retried, report.moved, report.resumed) == (0, 1, 0)
        assert sum(view.finished for view in report.replicas) == 1
        (evidence,) = next(view.outcomes for view in report.replicas if view.replica_id == "a")
        assert evidence.duration_s == pytest.approx(5.0), "what it has taken there at least"
        assert in_flight(serve) == {"a": 0, "b": 0, "c": 0}
        assert serve.router.calls.book.open_calls == 0


@pytest.mark.parametrize(
    ("settings", "capacity", "age_s"),
    [
        ({"trial": {"copy_methods": []}}, 0.02, 5.0),
        (COPYABLE, 0.5, 5.0),
        (COPYABLE, 0.02, 0.0),
        (COPYABLE | {"balance": {"rescue_fraction": 0.0}}, 0.02, 5.0),
    ],
    ids=["not idempotent", "not slow", "young", "switched off"],
)
@in_virtual_time
async def test_nothing_else_is_moved(settings, capacity, age_s):
    async with serving(*three(), **settings) as serve:
        result, caller = await held_by_a(serve, age_s)
        serve.take(slow(capacity=capacity, c=1.0))
        await settle()
        assert others(serve) == []
        assert not result.inner.cancelled
        result.end("first")
        assert await caller == "first"
        assert serve.report().rescued == 0


@pytest.mark.parametrize("says", ["no", "dead", "error"])
@in_virtual_time
async def test_a_second_attempt_that_finds_no_place_leaves_the_first_one_alone(says):
    async with serving(*three(says), **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        serve.take(slow(c=1.0))
        await settle()
        assert not result.inner.cancelled
        assert serve.router.calls.book.all_in_flight() == {"a": 1}
        result.end("first")
        assert await caller == "first"
        await settle()
        seen = views(serve)
        assert (seen["a"].finished, serve.report().rescued) == (1, 0)


@in_virtual_time
async def test_an_attempt_that_ends_before_the_second_one_is_accepted_is_the_answer():
    async with serving(*three("nothing"), **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        serve.take(slow(c=1.0))
        await settle()
        (second,) = others(serve)
        result.end("first")
        assert await caller == "first"
        second.accept(1)
        await settle()
        assert second.cancelled
        report = serve.report()
        assert (report.rescued, sum(view.finished for view in report.replicas)) == (0, 1)


@in_virtual_time
async def test_a_caller_that_gives_up_after_a_move_is_cancelled_and_so_are_both_attempts():
    async with serving(*three(), **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        serve.take(slow(c=1.0))
        await settle()
        (second,) = others(serve)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        result.cancel()
        assert result.inner.cancelled
        assert second.cancelled
        await settle()
        assert sum(view.finished for view in serve.report().replicas) == 0


async def many_held_by_a(serve, count):
    """Requests that "a" has accepted five seconds ago; nobody waits for their answers."""
    serve.take(table(1, a=1.0, b=0.0, c=0.0))
    results = [await serve.send(i) for i in range(count)]
    await asyncio.sleep(5.0)
    return results


def crowd():
    return [Replica(name, max_ongoing_requests=300) for name in "abc"]


@in_virtual_time
async def test_moves_stay_within_their_budget():
    async with serving(*crowd(), **COPYABLE, balance={"rescue_fraction": 0.01}) as serve:
        results = await many_held_by_a(serve, 200)
        callers = [asyncio.create_task(result.get_async()) for result in results]
        await settle()
        for version in range(2, 12):
            serve.take(slow(version, c=1.0))
            await settle()
        assert serve.report().rescued == 8, "what may be saved up, with 200 requests stuck"
        assert len(others(serve)) == 8
        await over(*callers)
        for result in results:
            result.cancel()


@in_virtual_time
async def test_what_nobody_waits_for_costs_nothing_of_the_budget_and_is_moved_once_somebody_does():
    async with serving(*crowd(), **COPYABLE) as serve:
        results = await many_held_by_a(serve, 20)
        for version in range(2, 12):
            serve.take(slow(version, c=1.0))
            await settle()
        assert others(serve) == []
        report = serve.report()
        assert report.rescued == 0
        assert [outcome for view in report.replicas for outcome in view.outcomes] == []
        callers = [asyncio.create_task(result.get_async()) for result in results]
        await settle()
        serve.take(slow(12, c=1.0))
        await settle()
        assert serve.report().rescued == 8, "all that may be saved up is still there"
        for second in others(serve):
            second.end("second")
        await settle()
        assert sum(caller.done() for caller in callers) == 8
        for result in results:
            result.end("first")
        answers = await asyncio.gather(*callers)
        assert sorted(answers) == ["first"] * 12 + ["second"] * 8
        await settle()
        assert sum(view.finished for view in serve.report().replicas) == 20


@pytest.mark.parametrize("says", ["no", "error", "dead"])
@in_virtual_time
async def test_attempts_that_find_no_place_cost_nothing_of_the_budget(says):
    a, b, c = crowd()
    b.says = c.says = says
    async with serving(a, b, c, **COPYABLE) as serve:
        results = await many_held_by_a(serve, 20)
        callers = [asyncio.create_task(result.get_async()) for result in results]
        await settle()
        for version in range(2, 12):
            serve.take(slow(version, c=1.0))
            await settle(100)
        assert serve.report().rescued == 0
        b.says = c.says = "yes"
        serve.scale(a, b, c)  # also those that were found dead
        serve.take(slow(12, c=1.0))
        await settle(100)
        assert serve.report().rescued == 8
        await over(*callers)
        for result in results:
            result.cancel()


@in_virtual_time
async def test_an_observing_router_neither_moves_nor_retries_anything():
    a, b = Replica("a"), Replica("b")
    async with serving(a, b, **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        a.says = "nothing"
        late = serve.start(1)
        await settle()
        serve.router.use_settings(True, COPYABLE)
        serve.take(slow())
        await asyncio.sleep(1.0)
        assert b.sent == []
        assert not any(sent.cancelled for sent in a.sent)
        result.end("first")
        assert await caller == "first"
        await over(late)


@pytest.mark.parametrize("outcome", [TaskCancelledError(), "first"], ids=["cancelled", "answered"])
@in_virtual_time
async def test_a_first_attempt_keeps_its_place_until_its_replica_has_noticed_that_it_is_cancelled(outcome):
    async with serving(*three(), **COPYABLE) as serve:
        result, caller = await held_by_a(serve)
        first = result.inner
        first.cancel = lambda: None  # it goes on
        serve.take(slow(c=1.0))
        await settle()
        (second,) = others(serve)
        assert serve.router.calls.book.in_flight("a") == 1
        assert in_flight(serve)["a"] == 1
        second.end("second")
        assert await caller == "second"
        assert serve.router.calls.book.in_flight("a") == 1
        first.end(outcome)
        await asyncio.sleep(0.05)
        assert serve.router.calls.book.in_flight("a") == 0
        seen = views(serve)
        assert (seen["a"].finished, sum(view.finished for view in seen.values())) == (0, 1), "one call, one outcome"
