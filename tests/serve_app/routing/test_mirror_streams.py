"""Streams, watched through their reader and copied: each end counted once, the first items compared."""

import asyncio
import gc
import math
import weakref

import pytest
from ray.exceptions import TaskCancelledError

from tests.serve_app.routing.router_fakes import FakeReplica, FakeStream, make_router, request, table


async def settle():
    for _ in range(30):
        await asyncio.sleep(0)


async def start(router, name="s", **more):
    """A stream that a replica has accepted; its result, as the handle would get it."""
    pending = request(name, "generate", is_streaming=True, **more)
    replica = (await router.choose_replicas(router._replicas_list, pending))[0][0]
    result = FakeStream()
    router.on_request_routed(pending, replica.replica_id, result)
    await settle()
    return result


async def read(result, count=1000):
    got = []
    try:
        for _ in range(count):
            got.append(await result.__anext__())
    except StopAsyncIteration:
        pass
    return got


async def reading(result, count=1000):
    """A reader that waits for the first item already."""
    reader = asyncio.create_task(read(result, count))
    await settle()
    await asyncio.sleep(0.01)
    return reader


def one_replica(**config):
    router = make_router(FakeReplica("a"), **config)
    router.take_table(table(a=1.0))
    return router


def view(router, name="a"):
    return next(r for r in router.make_report().replicas if r.replica_id == name)


def idle(router):
    return router._ledger.all_in_flight() == {} and not any(router._picks.in_flight) and router._mirror.waiting == 0


def test_a_stream_that_is_read_to_its_end_counts_once_with_its_items():
    async def scenario():
        router = one_replica()
        result = await start(router)
        reader = await reading(result)
        result.give(1, 2, 3)
        result.end()
        assert await reader == [1, 2, 3]
        await settle()
        del result, reader
        gc.collect()
        await settle()
        seen = view(router)
        assert (seen.started, seen.finished, seen.failed, seen.in_flight) == (1, 1, 0, 0)
        (outcome,) = seen.outcomes
        assert outcome.items == 3
        assert 0.0 <= outcome.first_item_s <= outcome.duration_s
        assert idle(router)

    asyncio.run(scenario())


def test_a_stream_read_from_a_thread_without_a_loop_counts_too():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.give("x", "y")
        result.end()
        items = []

        def blocking():
            while True:
                try:
                    items.append(result.__next__())
                except StopIteration:
                    return

        await asyncio.get_running_loop().run_in_executor(None, blocking)
        await settle()
        assert items == ["x", "y"]
        assert [(o.ok, o.items) for o in view(router).outcomes] == [(True, 2)]

    asyncio.run(scenario())


@pytest.mark.parametrize("completion_first", [True, False])
def test_an_error_that_user_code_raised_mid_stream_is_a_failure_whatever_is_told_first(completion_first):
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.give(1)
        if completion_first:
            result.end(raised=ValueError("user"))
            await settle()
        else:
            result.items.put_nowait(ValueError("user"))
        with pytest.raises(ValueError, match="user"):
            await read(result)
        await settle()
        result.end()
        await settle()
        seen = view(router)
        assert (seen.finished, seen.failed, seen.in_flight) == (1, 1, 0)
        assert idle(router)

    asyncio.run(scenario())


def test_a_replica_that_dies_mid_stream_is_a_failure_even_if_nobody_reads():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.end(RuntimeError("died"))
        await settle()
        assert (view(router).failed, idle(router)) == (1, True)

    asyncio.run(scenario())


def test_an_abandoned_stream_holds_its_place_until_the_replica_is_done_and_is_no_outcome():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.give(1)
        await read(result, 1)
        callbacks = result.callbacks
        del result
        await settle()
        assert view(router).in_flight == 1, "the replica still works on it"
        for callback in callbacks:
            callback(None)
        await settle()
        seen = view(router)
        assert (seen.finished, seen.failed, seen.in_flight) == (0, 0, 0)
        assert idle(router)

    asyncio.run(scenario())


def test_a_stream_dropped_after_it_was_complete_is_an_outcome():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.give(1)
        result.end()
        await read(result, 1)
        await settle()
        assert view(router).in_flight == 0
        del result
        await settle()
        assert view(router).finished == 1

    asyncio.run(scenario())


def test_a_cancelled_stream_is_no_outcome():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.end(TaskCancelledError())
        await settle()
        seen = view(router)
        assert (seen.finished, seen.failed, seen.in_flight) == (0, 0, 0)

    asyncio.run(scenario())


def test_a_reader_that_stops_waiting_for_an_item_may_ask_again():
    async def scenario():
        router = one_replica()
        result = await start(router)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(result.__anext__(), 0.01)
        await settle()
        assert view(router).in_flight == 1
        result.give(1)
        result.end()
        assert await read(result) == [1]
        await settle()
        assert view(router).finished == 1

    asyncio.run(scenario())


def test_a_slow_reader_does_not_make_the_replica_look_slow():
    async def scenario():
        router = one_replica()
        result = await start(router)
        result.give(1, 2)
        result.end()
        await settle()
        await asyncio.sleep(0.2)
        assert await read(result) == [1, 2]
        await settle()
        (outcome,) = view(router).outcomes
        assert outcome.duration_s < 0.1
        assert math.isnan(outcome.first_item_s), "asked for late: its time says nothing"

    asyncio.run(scenario())


def test_nobody_but_the_reader_holds_a_stream():
    async def scenario():
        router = one_replica()
        gc.disable()
        try:
            result = await start(router)
            result.end()
            await settle()
            alive = [True]
            weakref.finalize(result, alive.clear)
            del result
            assert not alive
        finally:
            gc.enable()
        await settle()
        assert idle(router)

    asyncio.run(scenario())


# ------------------------------------------------------------------ copies


def on_trial(**trial):
    new = FakeReplica("new", make=FakeStream)
    router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["*"], **trial})
    router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
    return router, new


def test_a_copied_stream_is_read_for_32_items_then_cancelled_and_compared_over_the_same_items():
    async def scenario():
        router, new = on_trial()
        result = await start(router)
        (copy,) = new.results
        copy.give(*range(100))
        await settle()
        assert copy.cancelled
        assert copy.items.qsize() == 100 - 32
        assert router._mirror.under_way == 0
        reader = await reading(result, 40)
        for i in range(40):
            result.give(i)
            await asyncio.sleep(0.001)
        await reader
        await settle()
        (pair,) = router.make_report().pairs
        assert pair.primary_ok
        assert pair.shadow_ok
        assert 0.02 < pair.primary_s < 1.0
        assert pair.shadow_s < pair.primary_s
        result.end()
        await read(result)
        await settle()
        assert router.make_report().pairs == (), "one pair, although the stream went on"
        assert idle(router)

    asyncio.run(scenario())


def test_streams_of_different_length_are_compared_over_the_shorter():
    async def scenario():
        router, new = on_trial()
        result = await start(router)
        new.results[0].give(1, 2)
        new.results[0].end()
        await settle()
        reader = await reading(result)
        result.give(1, 2)
        await settle()
        await asyncio.sleep(0.3)
        result.give(3)
        result.end()
        await reader
        await settle()
        (pair,) = router.make_report().pairs
        assert pair.primary_s < 0.2, "the time of two items"

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["empty", "raises", "hangs"])
def test_a_copied_stream_that_is_empty_fails_or_hangs_counts_against_the_candidate(how):
    async def scenario():
        router, new = on_trial(mirror_deadline_s=0.1)
        result = await start(router)
        copy = new.results[0]
        if how == "empty":
            copy.end()
        elif how == "raises":
            copy.end(raised=ValueError("no"))
        reader = await reading(result)
        result.give(1)
        result.end()
        await reader
        async with asyncio.timeout(5):
            await asyncio.gather(*router._mirror._tasks)
        await settle()
        (pair,) = router.make_report().pairs
        assert (pair.primary_ok, pair.shadow_ok) == (True, False)
        assert copy.cancelled
        assert idle(router)

    asyncio.run(scenario())


def test_a_primary_stream_that_its_client_abandons_voids_the_pair():
    async def scenario():
        router, new = on_trial()
        result = await start(router)
        new.results[0].give(*range(32))
        result.end(TaskCancelledError())
        await settle()
        assert router.make_report().pairs == ()
        assert idle(router)

    asyncio.run(scenario())


@pytest.mark.parametrize(("copied", "equal"), [([1, 2], True), ([1, 3], False), ([1], False), ([1, 2, 3], False)])
def test_the_items_of_streams_are_compared_when_asked(copied, equal):
    async def scenario():
        router, new = on_trial(compare="exact")
        result = await start(router)
        new.results[0].give(*copied)
        new.results[0].end()
        reader = await reading(result)
        result.give(1, 2)
        result.end()
        await reader
        await settle()
        async with asyncio.timeout(5):
            await asyncio.gather(*router._mirror._tasks)
        (pair,) = router.make_report().pairs
        assert pair.answers_equal is equal

    asyncio.run(scenario())
