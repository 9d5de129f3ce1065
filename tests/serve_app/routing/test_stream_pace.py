"""The pace of streams: what their reader's waiting says of the replica, and what its slowness does not."""

import asyncio

import pytest

from serve_app.routing.watch import StreamWatch
from tests.serve_app.routing.router_fakes import FakeReplica, FakeStream, make_router, request, table


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def watched(clock: Clock) -> tuple[FakeStream, StreamWatch]:
    stream = FakeStream()
    watch = StreamWatch(
        stream, asyncio.get_running_loop(), clock, freed=lambda: None, ended=lambda error, duration_s: None
    )
    return stream, watch


async def take(stream: FakeStream, clock: Clock, after_s: float) -> None:
    """The reader asks now; the item is there `after_s` later."""
    reader = asyncio.ensure_future(stream.__anext__())
    await asyncio.sleep(0)
    clock.now_s += after_s
    stream.give(1)
    await reader


def test_items_after_the_first_are_counted_with_the_time_that_they_were_waited_for():
    async def scenario():
        clock = Clock()
        stream, watch = watched(clock)
        await take(stream, clock, 3.0)
        assert watch.pace() == (0, 0.0), "the first item says how long the request queued"
        for _ in range(5):
            await take(stream, clock, 0.02)
        items, waited_s = watch.pace()
        assert items == 5
        assert waited_s == pytest.approx(0.1)

    asyncio.run(scenario())


def test_a_stream_that_stalls_counts_while_it_stalls_and_its_time_only_once():
    async def scenario():
        clock = Clock()
        stream, watch = watched(clock)
        await take(stream, clock, 0.1)
        await take(stream, clock, 0.02)
        reader = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        clock.now_s += 2.0
        assert watch.pace() == (1, pytest.approx(2.02))
        clock.now_s += 1.0
        stream.give(1)
        await reader
        assert watch.pace() == (2, pytest.approx(3.02))

    asyncio.run(scenario())


def test_a_slow_reader_does_not_make_the_replica_look_slow():
    async def scenario():
        clock = Clock()
        stream, watch = watched(clock)
        await take(stream, clock, 0.1)
        for _ in range(5):
            clock.now_s += 1.0  # the reader is busy; the item lies there
            await take(stream, clock, 0.0)
        assert watch.pace() == (0, 0.0)

    asyncio.run(scenario())


def test_a_router_reports_each_item_of_its_streams_once():
    async def scenario():
        router = make_router(FakeReplica("a"))
        router.take_table(table(a=1.0))
        pending = request("s", "generate", is_streaming=True)
        replica = (await router.choose_replicas(router._replicas_list, pending))[0][0]
        result = FakeStream()
        router.on_request_routed(pending, replica.replica_id, result)

        async def read() -> None:
            try:
                while True:
                    await result.__anext__()
            except StopAsyncIteration:
                pass

        reader = asyncio.ensure_future(read())
        counts = []
        for give in (4, 0, 3):
            for _ in range(give):
                await asyncio.sleep(0.003)
                result.give(1)
            await asyncio.sleep(0.003)
            seen = router.make_report().replicas[0]
            counts.append(seen.items)
            assert seen.stream_s > 0.0, "also while it stalls"
        assert counts == [3, 0, 3]
        await asyncio.sleep(0.003)
        result.give(1)
        result.end()
        await reader
        await asyncio.sleep(0.01)
        assert router.make_report().replicas[0].items == 1
        assert router._streams == {}
        assert router.make_report().replicas[0].stream_s == 0.0

    asyncio.run(scenario())
