"""Streams, watched through their reader and copied: each end counted once, the first items compared."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import weakref

import pytest
from ray.exceptions import TaskCancelledError

from tests.serve_app.routing.serve import Replica, Result, Serve, VirtualTime, run, serving, settle, table


def in_virtual_time(scenario):
    return VirtualTime().run(scenario)


async def start(serve, **labels):
    """A stream that a replica has accepted: what its reader and what its replica has."""
    result = await serve.send(1, **{"method": "generate", "stream": True, **labels})
    await settle()
    return result, serve.replicas["a"].sent[-1]


async def read(result, count=1000):
    got = []
    with contextlib.suppress(StopAsyncIteration):
        for _ in range(count):
            got.append(await result.__anext__())
    return got


async def reading(result, count=1000):
    """A reader that has been waiting for the first item for 10 ms."""
    reader = asyncio.create_task(read(result, count))
    await asyncio.sleep(0.01)
    return reader


@contextlib.asynccontextmanager
async def one_replica(**config):
    async with serving(Replica("a"), **config) as serve:
        serve.take(table(a=1.0))
        yield serve


def view(serve, name="a"):
    """What has happened on a replica since the last report."""
    (found,) = (r for r in serve.report().replicas if r.replica_id == name)
    return found


def counts(serve):
    seen = view(serve)
    return seen.started, seen.finished, seen.failed, seen.in_flight


def test_a_stream_that_is_read_to_its_end_counts_once_with_its_items():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            reader = await reading(result)
            first.give(1, 2)
            await asyncio.sleep(0.5)
            first.give(3).end()
            assert await reader == [1, 2, 3]
            await settle()
            del result, reader
            gc.collect()
            await settle()
            seen = view(serve)
            assert (seen.started, seen.finished, seen.failed, seen.in_flight) == (1, 1, 0, 0)
            (outcome,) = seen.outcomes
            assert outcome.items == 3
            assert (outcome.first_item_s, outcome.duration_s) == (pytest.approx(0.01), pytest.approx(0.51))
            assert outcome.ok

    in_virtual_time(scenario())


def test_a_stream_read_from_a_thread_without_a_loop_counts_too():
    async def scenario():
        serve = Serve(Replica("a"))
        result, first = await start(serve)
        first.give("x", "y").end()
        items = []

        def blocking():
            with contextlib.suppress(StopIteration):
                while True:
                    items.append(result.__next__())

        await asyncio.get_running_loop().run_in_executor(None, blocking)
        await settle()
        assert items == ["x", "y"]
        assert [(o.ok, o.items) for o in view(serve).outcomes] == [(True, 2)]
        assert serve.router.calls.book.open_calls == 0

    run(scenario())


@pytest.mark.parametrize("completion_first", [True, False])
def test_an_error_that_user_code_raised_mid_stream_is_a_failure_whatever_is_told_first(completion_first):
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            first.give(1)
            if completion_first:
                first.end(raised=ValueError("user"))
                await settle()
            else:
                first.give(ValueError("user"))
            with pytest.raises(ValueError, match="user"):
                await read(result)
            await settle()
            first.end()
            await settle()
            assert counts(serve) == (1, 1, 1, 0)

    in_virtual_time(scenario())


def test_a_replica_that_dies_mid_stream_is_a_failure_even_if_nobody_reads():
    async def scenario():
        async with one_replica() as serve:
            _result, first = await start(serve)
            first.end(RuntimeError("died"))
            await settle()
            assert counts(serve) == (1, 1, 1, 0)
            assert serve.router.calls.book.open_calls == 0

    in_virtual_time(scenario())


def test_an_abandoned_stream_holds_its_place_until_the_replica_is_done_and_is_no_outcome():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            first.give(1)
            await read(result, 1)
            del result
            await settle()
            assert view(serve).in_flight == 1, "the replica still works on it"
            first.end()
            await settle()
            seen = view(serve)
            assert (seen.finished, seen.failed, seen.in_flight, seen.outcomes) == (0, 0, 0, ())

    in_virtual_time(scenario())


def test_a_stream_dropped_after_it_was_complete_is_an_outcome():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            first.give(1).end()
            await read(result, 1)
            await settle()
            assert view(serve).in_flight == 0
            del result
            await settle()
            assert serve.report().replicas[0].finished == 1

    in_virtual_time(scenario())


def test_a_cancelled_stream_is_no_outcome():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            result.cancel()
            await settle()
            assert first.done
            seen = view(serve)
            assert (seen.finished, seen.failed, seen.in_flight, seen.outcomes) == (0, 0, 0, ())

    in_virtual_time(scenario())


def test_a_reader_that_stops_waiting_for_an_item_may_ask_again():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(result.__anext__(), 0.01)
            await settle()
            assert view(serve).in_flight == 1
            first.give(1).end()
            assert await read(result) == [1]
            await settle()
            assert view(serve).finished == 1

    in_virtual_time(scenario())


def test_a_slow_reader_does_not_make_the_replica_look_slow():
    async def scenario():
        async with one_replica() as serve:
            result, first = await start(serve)
            first.give(1, 2).end()
            await settle()
            await asyncio.sleep(0.2)
            assert await read(result) == [1, 2]
            await settle()
            (outcome,) = view(serve).outcomes
            assert outcome.duration_s < 0.1
            assert math.isnan(outcome.first_item_s), "asked for late: its time says nothing"

    in_virtual_time(scenario())


@pytest.mark.parametrize("resume", ["", "had"])
def test_nobody_but_the_reader_holds_a_stream(resume):
    async def scenario():
        async with one_replica(balance={"resume": resume}) as serve:
            gc.disable()
            try:
                result, first = await start(serve)
                first.end()
                await settle()
                held = weakref.ref(result)
                del result
                assert held() is None
            finally:
                gc.enable()
            await settle()
            assert serve.router.calls.book.open_calls == 0

    in_virtual_time(scenario())


# ------------------------------------------------------------------ copies


@contextlib.asynccontextmanager
async def on_trial(**trial):
    """A router over "a" and "new", which gets a copy of every stream."""
    async with serving(Replica("a"), Replica("new"), trial={"copy_methods": ["*"], **trial}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        yield serve
        await settle()
        assert serve.router.calls.mirror.under_way == 0


async def start_copied(serve):
    result, first = await start(serve)
    (copy,) = serve.replicas["new"].sent
    return result, first, copy


def test_a_copied_stream_is_read_for_32_items_then_cancelled_and_compared_over_the_same_items():
    async def scenario():
        async with on_trial() as serve:
            result, first, copy = await start_copied(serve)
            copy.give(*range(100))
            await settle()
            assert copy.cancelled
            assert serve.router.calls.mirror.under_way == 0
            left = [item for item in copy.items if isinstance(item, int)]
            assert left == list(range(32, 100))
            reader = await reading(result, 40)
            for i in range(40):
                first.give(i)
                await asyncio.sleep(0.001)
            await reader
            await settle()
            (pair,) = serve.report().pairs
            assert pair.primary_ok
            assert pair.shadow_ok
            assert pair.primary_s == pytest.approx(0.01 + 31 * 0.001), "at item 32 of the 40"
            assert pair.shadow_s == pytest.approx(0.0)
            first.end()
            await read(result)
            await settle()
            assert serve.report().pairs == (), "one pair, although the stream went on"

    in_virtual_time(scenario())


def test_streams_of_different_length_are_compared_over_the_shorter():
    async def scenario():
        async with on_trial() as serve:
            result, first, copy = await start_copied(serve)
            copy.give(1, 2).end()
            await settle()
            reader = await reading(result)
            first.give(1, 2)
            await asyncio.sleep(0.3)
            first.give(3).end()
            await reader
            await settle()
            (pair,) = serve.report().pairs
            assert pair.primary_s == pytest.approx(0.01), "the time of two items"

    in_virtual_time(scenario())


class Noted(Result):
    """Notes that it was cancelled, even if it had ended."""

    told = False

    def cancel(self):
        self.told = True
        super().cancel()


@pytest.mark.parametrize("how", ["empty", "raises", "hangs"])
def test_a_copied_stream_that_is_empty_fails_or_hangs_counts_against_the_candidate(how):
    async def scenario():
        async with on_trial(mirror_deadline_s=0.1) as serve:
            serve.replicas["new"].make = Noted
            result, first, copy = await start_copied(serve)
            if how == "empty":
                copy.end()
            elif how == "raises":
                copy.end(raised=ValueError("no"))
            reader = await reading(result)
            first.give(1).end()
            assert await reader == [1]
            await asyncio.sleep(0.2)
            (pair,) = serve.report().pairs
            assert (pair.primary_ok, pair.shadow_ok) == (True, False)
            assert copy.told
            assert copy.done

    in_virtual_time(scenario())


@pytest.mark.parametrize("copy_ends", ["before", "after"])
def test_a_primary_stream_that_its_client_abandons_voids_the_pair(copy_ends):
    async def scenario():
        async with on_trial() as serve:
            result, first, copy = await start_copied(serve)
            if copy_ends == "before":
                copy.give(*range(32))
                await settle()
            result.cancel()
            await settle()
            copy.give(*range(32))
            await settle()
            assert first.done
            assert serve.report().pairs == ()

    in_virtual_time(scenario())


def test_a_copied_stream_that_its_reader_drops_without_a_word_voids_the_pair():
    async def scenario():
        async with on_trial() as serve:
            result, first, copy = await start_copied(serve)
            copy.give(*range(32))
            del result
            await settle()
            first.give(1).end(TaskCancelledError())
            await settle()
            assert serve.report().pairs == ()

    in_virtual_time(scenario())


def test_a_copied_stream_that_goes_on_elsewhere_voids_the_pair():
    async def scenario():
        replicas = [Replica(name) for name in ("a", "b", "new")]
        async with serving(*replicas, trial={"copy_methods": ["*"]}, balance={"resume": "had"}) as serve:
            serve.take(table(a=1.0, b=0.0, new=(0.0, 1.0, 1.0)))
            usual, first = await start(serve)
            serve.replicas["new"].sent[-1].end()
            first.give(1).end()
            await read(usual)
            await settle()
            serve.report()
            result, _first = await start(serve)
            copy = serve.replicas["new"].sent[-1]
            reader = await reading(result)
            await asyncio.sleep(5.0)
            serve.take(table(version=2, reference_s=0.1, a=(1.0, 0.02, 0.0), b=1.0, new=(0.0, 1.0, 1.0)))
            await settle()
            (second,) = serve.replicas["b"].sent
            second.give("x").end()
            copy.give("x").end()
            assert await reader == ["x"]
            await settle()
            report = serve.report()
            assert report.rescued == 1
            assert report.pairs == (), "the second attempt's time is not the first one's"
            assert len(serve.replicas["new"].sent) == 2, "a second attempt is not copied again"

    in_virtual_time(scenario())


@pytest.mark.parametrize(("copied", "equal"), [([1, 2], True), ([1, 3], False), ([1], False), ([1, 2, 3], False)])
def test_the_items_of_streams_are_compared_when_asked(copied, equal):
    async def scenario():
        serve = Serve(Replica("a"), Replica("new"), trial={"copy_methods": ["*"], "compare": "exact"})
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        result, first, copy = await start_copied(serve)
        copy.give(*copied).end()
        reader = await reading(result)
        first.give(1, 2).end()
        await reader
        async with asyncio.timeout(5):
            while not (pairs := serve.report().pairs):  # noqa: ASYNC110 - compared in a thread
                await asyncio.sleep(0.01)
        (pair,) = pairs
        assert pair.answers_equal is equal
        assert (serve.router.calls.book.open_calls, serve.router.calls.mirror.under_way) == (0, 0)

    run(scenario())
