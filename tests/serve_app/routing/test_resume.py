"""Streams that go on from another replica: nothing lost, nothing twice, and nothing moved that need not be."""

import asyncio
import gc
import threading
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve._private.common import RequestProtocol

from serve_app.router import ObservingRouter
from tests.serve_app.routing.router_fakes import FakeReplica, FakeResult, FakeStream, make_router, request, table

RESUMES = {"balance": {"resume": "had"}}


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20.0))


async def settle():
    for _ in range(40):
        await asyncio.sleep(0)


class Stream(FakeStream):
    """A cancelled one ends, as with Ray."""

    def cancel(self):
        super().cancel()
        self.end(TaskCancelledError())


def replicas(names="abc"):
    return [FakeReplica(name, make=Stream) for name in names]


def scene(*others, kind=None, **config):
    """A router whose streams usually give an item each millisecond, over "a" and others."""
    router = make_router(FakeReplica("a", make=Stream), *others, **({"kind": kind} if kind else {}), **config)
    router._stream_patience.ended(0.001, 11, 0.011)
    for _ in range(1000):
        router._rescue_budget.earn()
    return router


async def start(router, replica="a", **labels):
    """A stream that a replica has accepted, as the handle would get it, and its reader."""
    pending = request("s", "generate", is_streaming=True, **labels)
    accepted = next(r for r in router._replicas_list if r.name == replica)
    first = Stream()
    router.on_request_routed(pending, accepted.replica_id, first)
    got = []
    reader = asyncio.create_task(read(first, got))
    await settle()
    return first, got, reader


async def read(result, got):
    try:
        while True:
            got.append(await result.__anext__())
    except StopAsyncIteration:
        return got


def stall(router, seconds=5.0):
    """The readers' clock goes on."""
    for stream in router._streams.values():
        if stream.watch._asked_s is not None:
            stream.watch._asked_s -= seconds


def collapsed(version=2, **rows):
    shares = dict.fromkeys("abc", 1.0) | {"a": (1.0, 0.02, 0.0)} | rows
    return replace(table(version=version, **shares), reference_s=0.1)


def sent_to(others):
    """The second attempts: what was asked, and the streams."""
    return [pair for replica in others for pair in zip(replica.sent, replica.results, strict=True)]


async def go_on(router, others):
    """The reader has waited too long and the table shows the collapse: the one second attempt, asked and given."""
    stall(router)
    router.take_table(collapsed())
    await settle()
    ((asked, second),) = sent_to(others)
    return asked, second


async def at_rest(router):
    await settle()
    gc.collect()
    await settle()
    assert router._ledger.all_in_flight() == {}
    assert set(router._picks.in_flight) <= {0}
    assert router._streams == {}


def test_a_stalled_stream_goes_on_elsewhere_after_what_its_reader_has_had():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, got, reader = await start(router)
        first.give(0, 1, 2)
        await settle()
        asked, second = await go_on(router, others)
        assert asked.kwargs == {"had": [0, 1, 2]}
        assert (asked.args, asked.metadata.call_method) == ([1], "generate")
        assert not first.cancelled, "until the second has given something"
        second.give(3, 4)
        await settle()
        assert first.cancelled
        assert got == [0, 1, 2, 3, 4]
        second.end()
        assert await reader == [0, 1, 2, 3, 4]
        report = router.make_report()
        assert report.rescued == 1
        assert sum(view.failed for view in report.replicas) == 0
        await at_rest(router)

    run(scenario())


def test_a_stream_that_has_not_begun_is_asked_for_anew():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        _, _, reader = await start(router)
        asked, second = await go_on(router, others)
        assert asked.kwargs == {"had": []}
        second.give("x")
        second.end()
        assert await reader == ["x"]
        await at_rest(router)

    run(scenario())


def test_a_first_attempt_that_goes_on_meanwhile_is_kept():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, _, reader = await start(router)
        first.give(0)
        await settle()
        _, second = await go_on(router, others)
        first.give("one")
        await settle()
        assert second.cancelled
        second.give("uno")
        first.end()
        assert await reader == [0, "one"]
        assert not first.cancelled
        await at_rest(router)

    run(scenario())


def test_items_of_both_in_the_same_moment_are_not_given_twice():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, _, reader = await start(router)
        _, second = await go_on(router, others)
        first.give("a0")
        second.give("b0", "b1")
        await settle()
        first.end()
        second.end()
        assert await reader in (["a0"], ["b0", "b1"])
        await at_rest(router)

    run(scenario())


@pytest.mark.parametrize("why", ["refused", "broken", "fails"])
def test_where_no_other_replica_takes_it_the_first_attempt_goes_on(why):
    make = {
        "refused": lambda: Stream(accepted=False),
        "broken": lambda: Stream(broken=RuntimeError("no way there")),
        "fails": Stream,
    }[why]

    async def scenario():
        others = [FakeReplica(name, make=make) for name in "bc"]
        router = scene(*others, **RESUMES)
        first, _, reader = await start(router)
        stall(router)
        router.take_table(collapsed())
        await settle()
        if why == "fails":
            ((_, second),) = sent_to(others)
            second.end(raised=TypeError("an unexpected keyword argument 'had'"))
            await settle()
        first.give(0)
        first.end()
        assert await reader == [0]
        assert not first.cancelled
        assert sum(view.failed for view in router.make_report().replicas) == 0, "the method's fault, not a replica's"
        await at_rest(router)

    run(scenario())


def test_a_second_attempt_that_has_nothing_left_to_give_ends_the_stream():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, _, reader = await start(router)
        first.give(0)
        await settle()
        _, second = await go_on(router, others)
        second.end()
        assert await reader == [0]
        assert first.cancelled
        await at_rest(router)

    run(scenario())


@pytest.mark.parametrize(
    ("config", "labels", "seconds", "rows"),
    [
        ({}, {}, 5.0, {}),
        (RESUMES, {"_request_protocol": RequestProtocol.HTTP}, 5.0, {}),
        (RESUMES, {"_by_reference": False}, 5.0, {}),
        (RESUMES, {}, 0.1, {}),
        (RESUMES, {}, 5.0, {"a": (1.0, 0.5, 0.0)}),
        ({"balance": {"resume": "had", "rescue_fraction": 0.0}}, {}, 5.0, {}),
    ],
    ids=["not declared", "a body through a proxy", "by value", "patience", "not collapsed", "switched off"],
)
def test_other_streams_stay_where_they_are(config, labels, seconds, rows):
    async def scenario():
        router = scene(*(others := replicas("bc")), **config)
        first, _, reader = await start(router, **labels)
        stall(router, seconds)
        router.take_table(collapsed(**rows))
        await settle()
        assert sent_to(others) == []
        first.give(0)
        first.end()
        assert await reader == [0]

    run(scenario())


def test_an_observing_router_moves_nothing():
    async def scenario():
        router = scene(*(others := replicas("bc")), kind=ObservingRouter, **RESUMES)
        first, _, reader = await start(router)
        stall(router)
        router.take_table(collapsed())
        first.end(ActorDiedError())
        with pytest.raises(ActorDiedError):
            await reader
        assert sent_to(others) == []

    run(scenario())


def test_a_stream_whose_replica_dies_goes_on_elsewhere_once():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        router.take_table(table(a=1.0, b=1.0, c=1.0))
        first, got, reader = await start(router)
        first.give(0, 1)
        await settle()
        first.end(ActorDiedError())
        await settle()
        ((asked, second),) = sent_to(others)
        assert asked.kwargs == {"had": [0, 1]}
        second.give(2)
        await settle()
        assert got == [0, 1, 2]
        second.end(ActorDiedError())
        with pytest.raises(ActorDiedError):
            await reader
        assert len(sent_to(others)) == 1, "a request that kills replicas must not kill them all"
        await at_rest(router)

    run(scenario())


def test_after_a_death_the_next_replica_is_tried_if_the_first_choice_is_dead_too():
    async def scenario():
        dead, well = FakeReplica("b", make=lambda: Stream(broken=ActorDiedError())), FakeReplica("c", make=Stream)
        router = scene(dead, well, **RESUMES)
        router.take_table(table(a=1.0, b=(1.0, 50.0, 0.0), c=1.0))
        first, _, reader = await start(router)
        first.end(ActorDiedError())
        await settle()
        assert len(dead.sent) == 1
        ((_, second),) = sent_to([well])
        second.give("x")
        second.end()
        assert await reader == ["x"]
        assert [r.name for r in router._by_index] == ["a", "c"]
        await at_rest(router)

    run(scenario())


def test_the_error_of_the_death_is_raised_if_there_is_nobody_else():
    async def scenario():
        router = scene(**RESUMES)
        router.take_table(table(a=1.0))
        first, got, reader = await start(router)
        first.give(0)
        await settle()
        first.end(ActorDiedError())
        with pytest.raises(ActorDiedError):
            await reader
        assert got == [0]
        await at_rest(router)

    run(scenario())


def test_an_error_of_user_code_is_not_a_death():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        router.take_table(table(a=1.0, b=1.0, c=1.0))
        first, _, reader = await start(router)
        first.end(raised=ValueError("user"))
        with pytest.raises(ValueError, match="user"):
            await reader
        assert sent_to(others) == []

    run(scenario())


def test_a_stream_may_move_again():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, _, reader = await start(router)
        first.give(0)
        await settle()
        asked, second = await go_on(router, others)
        second.give(1)
        await settle()
        stall(router)
        to = next(r.name for r in others if r.sent)
        router.take_table(collapsed(3, **{"a": 1.0, to: (1.0, 0.02, 0.0)}))
        await settle()
        third_asked, third = next(pair for pair in sent_to(router._replicas_list) if pair[0] is not asked)
        assert third_asked.kwargs == {"had": [0, 1]}
        third.give(2)
        await settle()
        assert second.cancelled
        third.end()
        assert await reader == [0, 1, 2]
        await at_rest(router)

    run(scenario())


def test_a_reader_that_cancels_cancels_every_attempt():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, _, reader = await start(router)
        _, second = await go_on(router, others)
        first.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await settle()
        assert second.cancelled
        await at_rest(router)

    run(scenario())


def test_a_reader_that_gives_up_waiting_may_ask_again():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        first, got, reader = await start(router)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        stall(router)
        router.take_table(collapsed())
        await settle()
        assert sent_to(others) == [], "nobody waits"
        again = asyncio.create_task(read(first, got))
        await settle()
        first.give(7)
        first.end()
        assert await again == [7]
        await at_rest(router)

    run(scenario())


def test_moves_take_a_tenth_of_a_rescue_each_and_the_longest_waits_come_first():
    async def scenario():
        router = scene(*(others := replicas("bc")), **RESUMES)
        for replica in others:
            replica.max_ongoing_requests = 100
        streams = [await start(router) for _ in range(12)]
        for i, stream in enumerate(router._streams.values()):
            stream.watch._asked_s -= 5.0 + i
        router._rescue_budget.tokens = 0.85
        for version in range(2, 6):
            router.take_table(collapsed(version))
            await settle()
        second = sent_to(others)
        assert len(second) == 8
        for i, (_, stream) in enumerate(second):
            stream.give(i)
        await settle()
        moved = [bool(got) for _, got, _ in streams]
        assert moved == [False] * 4 + [True] * 8
        for _, _, reader in streams:
            reader.cancel()
        await asyncio.gather(*(reader for *_, reader in streams), return_exceptions=True)

    run(scenario())


def test_a_stream_that_its_reader_has_dropped_is_not_held():
    async def scenario():
        router = scene(*replicas("bc"), **RESUMES)
        first, _, reader = await start(router)
        first.give(0)
        await settle()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        callbacks = first.callbacks
        del first, reader, _
        gc.collect()
        await settle()
        (stream,) = router._streams.values()
        assert stream.watch._dropped
        for callback in callbacks:
            callback(TaskCancelledError())
        await at_rest(router)

    run(scenario())


class PolledStream(Stream):
    """May be read from any loop."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.listed = []

    def give(self, *items):
        self.listed.extend(items)

    def end(self, outcome=None, *, raised=None):
        self.listed.append(raised or outcome or StopAsyncIteration())
        FakeResult.end(self, outcome)

    async def __anext__(self):
        while not self.listed:  # noqa: ASYNC110 - given on another loop
            await asyncio.sleep(0.001)
        item = self.listed.pop(0)
        if isinstance(item, Exception):
            raise item
        return item


@pytest.fixture
def router_loop():
    """A loop in a thread of its own, as Serve runs a router."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10.0)
    loop.close()


@pytest.mark.parametrize("goes_on_after_s", [None, 0.0, 0.001, 0.002, 0.005])
def test_a_reader_beside_the_routers_loop_gets_each_item_once(router_loop, goes_on_after_s):
    async def there(work):
        """On the router's loop."""

        async def call():
            done = work()
            await settle()
            return done

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), router_loop))

    def begin():
        others = [FakeReplica(name, make=PolledStream) for name in "bc"]
        router = scene(*others, **RESUMES)
        first = PolledStream()
        router.on_request_routed(request("s", "generate", is_streaming=True), FakeReplica("a").replica_id, first)
        return router, others, first

    def collapse(router):
        stall(router)
        router.take_table(collapsed())

    async def scenario():
        router, others, first = await there(begin)
        reader = asyncio.create_task(read(first, got := []))
        first.give(0, 1)
        while len(got) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        await there(lambda: collapse(router))
        ((asked, second),) = sent_to(others)
        assert asked.kwargs == {"had": [0, 1]}
        second.give(*(("second", i) for i in range(2, 20)))
        second.end()
        if goes_on_after_s is not None:
            await asyncio.sleep(goes_on_after_s)
            first.give(*(("first", i) for i in range(2, 20)))
            first.end()
        await reader
        assert got[:2] == [0, 1]
        assert [number for _, number in got[2:]] == list(range(2, 20))
        origins = {origin for origin, _ in got[2:]}
        assert len(origins) == 1
        assert origins == {"second"} or goes_on_after_s is not None
        await there(lambda: None)

    run(scenario())
