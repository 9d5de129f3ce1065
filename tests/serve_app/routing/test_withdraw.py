"""Requests that a starved replica has not even accepted: they count as on their way, and Serve may choose again."""

import asyncio
import time
from dataclasses import replace

import pytest

from shadecast.rescue import Patience
from tests.serve_app.routing.router_fakes import FakeReplica, FakeResult, FakeStream, make_router, request, table


class SilentResult(FakeResult):
    """Never says whether the replica takes the request; a cancelled wait cancels the call, as with Serve's own."""

    async def get_rejection_response(self):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancel()
            raise


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20.0))


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def route(router, pending):
    """What Serve does with a request, in its order (`Router._route_and_send_request_once` of Ray 2.60)."""
    retry = False
    while True:
        replica = await router._choose_replica_for_request(pending, is_retry=retry)
        result = replica.try_send_request(pending, with_rejection=True)
        router.on_send_request(replica.replica_id)
        info = await result.get_rejection_response()
        router.on_new_queue_len_info(replica.replica_id, info.num_ongoing_requests)
        if info.accepted:
            router.on_request_routed(pending, replica.replica_id, result)
            return replica, result
        result.cancel()
        router.on_request_completed(replica.replica_id, pending.metadata.internal_request_id)
        retry = True


def scene(**trial):
    """A router whose replica "a" says nothing, and one request on its way there."""
    a, b = FakeReplica("a", make=SilentResult), FakeReplica("b")
    router = make_router(a, b, trial=trial)
    router.take_table(table(a=1.0, b=0.0))
    return router, a, b


async def waiting(router, age_s=5.0):
    caller = asyncio.create_task(route(router, request("stuck")))
    await settle()
    assert router._sending
    for choice in router._sending.values():
        choice.since_s -= age_s
    return caller


def collapse():
    return replace(table(version=2, a=(1.0, 0.02, 0.0), b=1.0), reference_s=0.1)


def test_a_request_that_its_replica_has_not_accepted_is_reported_as_in_flight_and_unfinished():
    async def scenario():
        router, _, _ = scene()
        caller = await waiting(router)
        views = {view.replica_id: view for view in router.make_report().replicas}
        assert (views["a"].in_flight, views["b"].in_flight) == (1, 0)
        (entry,) = views["a"].unfinished
        assert entry.age_s >= 5.0
        assert views["a"].started == 0, "arrivals are counted when a replica accepts them"
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    run(scenario())


def test_what_a_router_reports_is_what_it_later_subtracts_from_the_tables_queue():
    """Otherwise each new table would hide the requests that wait for acceptance."""

    async def scenario():
        router, _, _ = scene()
        caller = await waiting(router)
        views = {view.replica_id: view.in_flight for view in router.make_report().replicas}
        assert views == router._counted == {"a": 1, "b": 0}
        known = table(version=2, a=(1.0, 1.0, 0.0), b=1.0)
        rows = tuple(replace(row, queue=float(views[row.replica_id])) for row in known.rows)
        router.take_table(replace(known, rows=rows))
        busy, idle = (router._picks.score(router._picks.index[name]) for name in "ab")
        assert busy > 1.5 * idle
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    run(scenario())


def test_a_request_that_a_collapsed_replica_has_not_accepted_goes_elsewhere():
    async def scenario():
        router, a, b = scene(copy_methods=["*"])
        caller = await waiting(router)
        router.take_table(collapse())
        chosen, result = await caller
        assert chosen.replica_id == b.replica_id
        assert a.results[0].cancelled, "the first attempt is cancelled"
        assert not result.cancelled
        result.end()
        await settle()
        report = router.make_report()
        assert report.rescued == 1
        assert [view.in_flight for view in report.replicas] == [0, 0]
        assert router._picks.in_flight == [0, 0]
        assert router._sending == {}

    run(scenario())


def test_the_code_of_a_replica_may_declare_its_methods_safe_to_send_again():
    async def scenario():
        router, a, b = scene()
        for each in (a, b):
            each.replica_metadata = {"shadecast_copy_safe": ["infer"]}
        caller = await waiting(router)
        router.take_table(collapse())
        chosen, _ = await caller
        assert chosen.replica_id == b.replica_id

    run(scenario())


@pytest.mark.parametrize(
    ("trial", "age_s", "after"),
    [
        ({"copy_methods": []}, 5.0, collapse()),
        ({"copy_methods": ["*"]}, 0.0, collapse()),
        ({"copy_methods": ["*"]}, 5.0, replace(table(version=2, a=(1.0, 0.8, 0.0), b=1.0), reference_s=0.1)),
    ],
    ids=["not idempotent", "young", "not collapsed"],
)
def test_no_other_request_is_withdrawn(trial, age_s, after):
    async def scenario():
        router, a, b = scene(**trial)
        caller = await waiting(router, age_s)
        router.take_table(after)
        await settle()
        assert not caller.done()
        assert not a.results[0].cancelled
        assert b.sent == []
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    run(scenario())


def test_a_caller_that_gives_up_while_waiting_is_cancelled_and_leaves_no_count():
    async def scenario():
        router, a, _ = scene(copy_methods=["*"])
        caller = await waiting(router)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert a.results[0].cancelled
        router.on_request_completed(a.replica_id, "stuck")
        assert router._sending == {}
        assert router._picks.in_flight == [0, 0]

    run(scenario())


async def silent_for(router, a, seconds):
    """A request that waits for "a" while both replicas are open; the router's clock goes on by so much."""
    router.take_table(table(version=2, a=1.0, b=0.0))
    caller = await waiting(router, age_s=0.0)
    router.take_table(table(version=3, a=1.0, b=1.0))
    for choice in router._sending.values():
        choice.since_s -= seconds
    return caller


def test_a_request_that_a_silent_replica_does_not_accept_goes_elsewhere_without_a_new_table():
    async def scenario():
        router, a, b = scene(copy_methods=["*"])
        caller = await silent_for(router, a, 1.0)
        chosen, _ = await asyncio.wait_for(caller, 5.0)
        assert chosen.replica_id == b.replica_id
        assert a.results[0].cancelled
        assert router._picks.score(router._picks.index["a"]) > 1e8, "it seems full to the next requests"
        views = {view.replica_id: view for view in router.make_report().replicas}
        assert [o.duration_s >= 1.0 for o in views["a"].outcomes] == [True], "and the coordinator is told"

    run(scenario())


def test_a_replica_that_stays_silent_is_left_out_for_longer_each_time_until_it_answers():
    async def scenario():
        router, a, _ = scene(copy_methods=["*"])
        router.take_table(table(version=2, a=1.0, b=1.0))
        i = router._picks.index["a"]
        start_s = now_s = time.monotonic()
        lengths_s = []
        for _ in range(6):
            router._shun(i, now_s)
            router._shun(i, now_s + 0.1)  # another request of the same silence
            until_s = router._shunned["a"][1]
            lengths_s.append(until_s - now_s)
            now_s = until_s
        assert lengths_s == pytest.approx([1.5, 3.0, 6.0, 12.0, 12.0, 12.0])
        assert router._told["a"][2] > start_s + 12.0, "new tables do not forget it"
        pending = request("answered")
        router.on_request_routed(pending, a.replica_id, FakeResult())
        assert router._shunned == {}

    run(scenario())


@pytest.mark.parametrize("why", ["not idempotent", "young", "no budget", "this process was stuck itself"])
def test_a_silent_replica_keeps_other_requests(why):
    async def scenario():
        methods = [] if why == "not idempotent" else ["*"]
        router, a, b = scene(copy_methods=methods)
        caller = await silent_for(router, a, 0.0 if why == "young" else 1.0)
        if why == "no budget":
            router._rescue_budget.tokens = 0.0
        if why == "this process was stuck itself":
            for choice in router._sending.values():
                choice.since_s += 1.0 - router._patience.limit_s  # late, but only just
            late = router._event_loop.time() - 1.0
            router._leave_silent(late)
        else:
            router._leave_silent(router._event_loop.time())
        await settle()
        assert not caller.done()
        assert not a.results[0].cancelled
        assert b.sent == []
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize("why", ["the other is silent too", "the other has collapsed"])
def test_a_silent_replica_keeps_its_requests_where_nobody_else_is_better(why):
    """At a peak, what all that are well hold would go to the one that is not."""

    async def scenario():
        router, a, b = scene(copy_methods=["*"])
        caller = await silent_for(router, a, 0.0)
        if why == "the other has collapsed":
            router.take_table(replace(table(version=4, a=1.0, b=(1.0, 0.02, 0.0)), reference_s=0.1))
        else:
            router._shun(router._picks.index["b"], time.monotonic())
        for choice in router._sending.values():
            choice.since_s -= 1.0
        router._leave_silent(router._event_loop.time())
        await settle()
        assert not caller.done()
        assert b.sent == []
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize(
    ("waited_s", "item_ago_s", "left"), [(0.5, 0.0, False), (0.5, 1.0, True), (0.5, None, True), (1.0, 0.0, True)]
)
def test_a_replica_whose_streams_go_on_is_busy_and_is_left_later(waited_s, item_ago_s, left):
    async def scenario():
        router, a, b = scene(copy_methods=["*"])
        stream = FakeStream()
        router.on_request_routed(request("s", "generate", is_streaming=True), a.replica_id, stream)
        if item_ago_s is not None:
            stream.give("item")
            assert await stream.__anext__() == "item"
            (watched,) = router._streams.values()
            watched.watch._last_s -= item_ago_s
        caller = await silent_for(router, a, waited_s)
        router._leave_silent(router._event_loop.time())
        await settle()
        assert caller.done() is left
        assert len(b.sent) == left
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    run(scenario())


def test_where_acceptance_takes_long_everywhere_patience_grows():
    patience = Patience()
    short_s = patience.limit_s
    for _ in range(300):
        patience.accepted(0.1)
    assert patience.limit_s > 3.0 * short_s
    for _ in range(300):
        patience.accepted(0.002)
    assert patience.limit_s == short_s


def test_nothing_looks_at_an_idle_router():
    async def scenario():
        router, a, _ = scene(copy_methods=["*"])
        caller = await silent_for(router, a, 1.0)
        await asyncio.wait_for(caller, 5.0)
        await asyncio.sleep(0.3)
        assert not router._looking

    run(scenario())
