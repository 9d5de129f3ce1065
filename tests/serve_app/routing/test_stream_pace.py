"""The pace of streams: what their reader's waiting says of the replica, and what its slowness does not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.serve_app.routing.serve import Replica, VirtualTime, serving, settle, table


async def start(serve):
    """A stream: what its reader and what its replica has."""
    result = await serve.send(1, method="generate", stream=True)
    return result, serve.replicas["a"].sent[-1]


async def take(result, first, after_s):
    """The reader asks now; the item is there `after_s` later."""
    reader = asyncio.create_task(result.__anext__())
    await asyncio.sleep(after_s)
    first.give(1)
    await reader


def pace(serve):
    """Items and seconds since the last report."""
    views = [view for view in serve.report().replicas if view.replica_id == "a"]
    return sum(view.items for view in views), pytest.approx(sum(view.stream_s for view in views))


def in_virtual_time(scenario):
    async def whole():
        async with serving(Replica("a")) as serve:
            serve.take(table(a=1.0))
            await scenario(serve)

    VirtualTime().run(whole())


def test_items_after_the_first_are_counted_with_the_time_that_they_were_waited_for():
    async def scenario(serve):
        result, first = await start(serve)
        await take(result, first, 3.0)
        assert pace(serve) == (0, 0.0), "the first item says how long the request queued"
        for _ in range(5):
            await take(result, first, 0.02)
        assert pace(serve) == (5, 0.1)
        first.end()

    in_virtual_time(scenario)


def test_a_stream_that_stalls_counts_while_it_stalls_and_its_time_only_once():
    async def scenario(serve):
        result, first = await start(serve)
        await take(result, first, 0.1)
        await take(result, first, 0.02)
        reader = asyncio.create_task(result.__anext__())
        await asyncio.sleep(2.0)
        assert pace(serve) == (1, 2.02)
        await asyncio.sleep(1.0)
        first.give(1)
        await reader
        assert pace(serve) == (1, 1.0)
        first.end()

    in_virtual_time(scenario)


def test_a_slow_reader_does_not_make_the_replica_look_slow():
    async def scenario(serve):
        result, first = await start(serve)
        await take(result, first, 0.1)
        for _ in range(5):
            first.give(1)  # the reader is busy; the item lies there
            await asyncio.sleep(1.0)
            await result.__anext__()
        assert pace(serve) == (0, 0.0)
        first.end()

    in_virtual_time(scenario)


def test_a_router_reports_each_item_of_its_streams_once():
    async def scenario(serve):
        result, first = await start(serve)

        async def read():
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    await result.__anext__()

        reader = asyncio.create_task(read())
        counts = []
        for give in (4, 0, 3):
            for _ in range(give):
                await asyncio.sleep(0.003)
                first.give(1)
            await asyncio.sleep(0.003)
            (seen,) = serve.report().replicas
            counts.append(seen.items)
            assert seen.stream_s == pytest.approx(0.003 * max(give - (len(counts) == 1) + 1, 1)), "also while it stalls"
        assert counts == [3, 0, 3]
        await asyncio.sleep(0.003)
        first.give(1).end()
        await reader
        await settle()
        (seen,) = serve.report().replicas
        assert (seen.items, seen.finished, seen.in_flight) == (1, 1, 0)
        assert serve.router.calls.book.open_calls == 0
        assert pace(serve) == (0, 0.0)

    in_virtual_time(scenario)


def test_the_pace_of_two_streams_is_summed():
    async def scenario(serve):
        streams = [await start(serve) for _ in range(2)]
        for result, first in streams:
            await take(result, first, 0.1)
        pace(serve)
        await asyncio.gather(*(take(*stream, 0.5) for stream in streams))
        assert pace(serve) == (2, 0.5 + 0.6), "the first one's reader had not asked for 0.1 s, which is little of it"
        for _, first in streams:
            first.end()

    in_virtual_time(scenario)


@pytest.mark.parametrize("labels", [{"_by_reference": False}, {}])
def test_an_answer_in_one_piece_has_no_pace(labels):
    async def scenario(serve):
        result = await serve.send(1, **labels)
        reader = asyncio.create_task(result.get_async())
        await asyncio.sleep(1.0)
        assert pace(serve) == (0, 0.0)
        serve.replicas["a"].sent[-1].end("answer")
        assert await reader == "answer"
        await settle()
        (view,) = serve.report().replicas
        assert (view.items, view.stream_s, view.finished) == (0, 0.0, 1)
        (outcome,) = view.outcomes
        assert outcome.duration_s == pytest.approx(1.0)

    in_virtual_time(scenario)
