"""Streams that go on from another replica because theirs is slow, while it still gives items.

The invariants are those of `test_resume`: a reader has each item once and in order, byte for byte; it is told of an
error only if a replica has died; and at the end no call is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve_app.routing.serve import Replica, Result, Serve, VirtualTime, serving, settle, table
from tests.serve_app.routing.test_resume import (
    ANSWER,
    DIE,
    GIVE_UP,
    KINDS,
    NAMES,
    RESUMES,
    SEEDS,
    STEPS,
    Polled,
    Story,
    bc,
    frozen,  # noqa: F401 - a fixture
    read,
    router_loop,  # noqa: F401 - a fixture
    second_attempts,
    start,
)

LONG = 50
"""Items of the streams that are known."""


def run(scenario):
    return VirtualTime().run(scenario)


async def known(serve, streams=6, item_s=0.1):
    """The router has seen some streams of "a" from their start to their end."""
    shares = dict.fromkeys(serve.replicas, 0.0) | {"a": 1.0}
    serve.take(table(version=1, **shares))
    usual = [await start(serve) for _ in range(streams)]
    for _ in range(LONG):
        await asyncio.sleep(item_s)
        for stream in usual:
            stream.first.give("usual")
        await settle()
    serve.report()
    for stream in usual:
        stream.first.end()
        await stream.reader
    serve.take(table(version=2, **shares))
    serve.report()
    for replica in serve.replicas.values():
        replica.sent.clear()


@contextlib.asynccontextmanager
async def scene(*others, streams=6, **config):
    async with serving(Replica("a"), *others, **config) as serve:
        await known(serve, streams)
        yield serve


def slower(version=3, **rows):
    """The table in which "a" is slow, and far from hardly running."""
    shares = dict.fromkeys("abc", 1.0) | {"a": (1.0, 0.3, 0.0)} | rows
    return table(version=version, **shares)


async def handed_over(serve, *had):
    """A stream on "a" that has given these items, and its second attempt, which has given none."""
    stream = await start(serve)
    stream.first.give(*had)
    await settle()
    serve.take(slower())
    await settle()
    (second,) = second_attempts(serve)
    return stream, second


def test_a_stream_on_a_slow_replica_goes_on_elsewhere_though_it_still_gives_items():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve, 0, 1, 2)
            assert second.request.kwargs == {"had": [0, 1, 2]}
            stream.first.give("late")
            await settle()
            assert stream.got == [0, 1, 2], "the other's items may not suit it"
            assert not stream.first.cancelled, "until the second has given something"
            second.give(3, 4)
            await settle()
            assert stream.first.cancelled
            assert stream.got == [0, 1, 2, 3, 4]
            second.end()
            assert await stream.reader == [0, 1, 2, 3, 4]
            report = serve.report()
            assert (report.rescued, report.resumed) == (1, 1)
            assert sum(view.failed for view in report.replicas) == 0

    run(scenario())


def test_a_stream_that_has_given_nothing_is_begun_elsewhere_from_its_start():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve)
            assert second.request.kwargs == {"had": []}
            second.give(0).end()
            assert await stream.reader == [0]
            assert stream.first.cancelled

    run(scenario())


@pytest.mark.parametrize("why", ["refused", "no way", "fails", "dies", "takes too long"])
def test_where_the_other_cannot_begin_the_reader_has_what_its_own_gave_meanwhile(why):
    options = {"refused": {"says": "no"}, "no way": {"says": "error"}}.get(why, {})

    async def scenario():
        async with scene(*bc(**options), **RESUMES) as serve:
            stream = await start(serve)
            stream.first.give(0)
            await settle()
            serve.take(slower())
            stream.first.give(1, 2)
            await settle()
            if why in ("fails", "dies"):
                assert stream.got == [0]
                (second,) = second_attempts(serve)
                second.end(raised=TypeError("no")) if why == "fails" else second.die()
            if why in ("dies", "takes too long"):  # after a death it is tried elsewhere, as long as there is time
                assert stream.got == [0]
                await asyncio.sleep(3.0)
            await settle()
            assert stream.got == [0, 1, 2]
            stream.first.end()
            assert await stream.reader == [0, 1, 2]
            assert not stream.first.cancelled
            assert all(second.cancelled or second.done for second in second_attempts(serve))
            assert serve.report().rescued == 0

    run(scenario())


def test_a_reader_that_gives_up_while_an_item_is_held_has_it_when_it_asks_again():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve, 0)
            stream.first.give(1)
            await settle()
            stream.reader.cancel()
            await asyncio.gather(stream.reader, return_exceptions=True)
            await settle()
            assert second.cancelled, "nobody waits any more"
            again = asyncio.create_task(read(stream.result, stream.got))
            await settle()
            assert stream.got == [0, 1]
            stream.first.give(2).end()
            assert await again == [0, 1, 2]

    run(scenario())


def test_a_stream_that_ends_meanwhile_is_complete():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve, 0)
            stream.first.end()
            assert await stream.reader == [0]
            assert second.cancelled

    run(scenario())


@pytest.mark.parametrize("held", [True, False])
def test_a_stream_whose_replica_dies_meanwhile_goes_on(held):
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve, 0)
            if held:
                stream.first.give("late")
                await settle()
            stream.first.die()
            await settle()
            begun = second_attempts(serve)
            attempt = second if held else next(each for each in begun if each is not second)
            assert len(begun) == (1 if held else 2)
            assert attempt.request.kwargs == {"had": [0]}
            attempt.give(1).end()
            assert await stream.reader == [0, 1]

    run(scenario())


def test_a_caller_that_cancels_cancels_both():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream, second = await handed_over(serve, 0)
            stream.result.cancel()
            await asyncio.gather(stream.reader, return_exceptions=True)
            await settle()
            assert stream.first.cancelled
            assert second.cancelled

    run(scenario())


def test_one_stream_moves_with_each_table():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            streams = [await start(serve) for _ in range(4)]
            for stream in streams:
                stream.first.give(0)
            await settle()
            for version in (3, 4, 5):
                serve.take(slower(version))
                await settle()
                assert len(second_attempts(serve)) == version - 2
            for second in second_attempts(serve):
                second.give(1).end()
            await settle()
            for stream in streams:
                stream.first.give(1).end()
            assert [await stream.reader for stream in streams] == [[0, 1]] * 4

    run(scenario())


@pytest.mark.parametrize(
    ("config", "labels", "rows", "streams"),
    [
        ({}, {}, {}, 6),
        (RESUMES, {"http": True}, {}, 6),
        (RESUMES, {"multiplexed_model_id": "m"}, {}, 6),
        (RESUMES, {}, {"a": (1.0, 0.7, 0.0)}, 6),
        (RESUMES, {}, {}, 2),
        (RESUMES, {}, {"b": 0.0, "c": 0.0}, 6),
        ({"balance": {"resume": "had", "rescue_fraction": 0.0}}, {}, {}, 6),
    ],
    ids=["not declared", "through a proxy", "multiplexed", "not slow", "nothing known", "nobody", "off"],
)
def test_other_streams_stay(config, labels, rows, streams):
    async def scenario():
        async with scene(*bc(), streams=streams, **config) as serve:
            stream = await start(serve, **labels)
            stream.first.give(0)
            await settle()
            serve.take(slower(**rows))
            await settle()
            assert second_attempts(serve) == []
            stream.first.give(1).end()
            assert await stream.reader == [0, 1]

    run(scenario())


def test_a_router_that_has_come_to_observe_hands_nothing_over():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            stream = await start(serve)
            stream.first.give(0)
            await settle()
            serve.router.use_settings(True, RESUMES)
            serve.take(slower())
            await settle()
            assert second_attempts(serve) == []
            stream.first.give(1).end()
            assert await stream.reader == [0, 1]

    run(scenario())


def test_streams_stay_once_it_was_seen_how_long_they_take_to_begin_elsewhere():
    async def scenario():
        async with scene(*bc(), **RESUMES) as serve:
            moved = []
            for version in range(3, 9):
                stream = await start(serve)
                stream.first.give(0)
                await settle()
                serve.take(slower(2 * version))
                await settle()
                moved.append(len(second_attempts(serve)))
                stream.first.give(1)
                await asyncio.sleep(3.0)
                stream.first.end()
                assert await stream.reader == [0, 1]
                await settle()
                serve.take(table(version=2 * version + 1, a=1.0, b=0.0, c=0.0))
                for replica in serve.replicas.values():
                    replica.sent.clear()
            assert moved == [1, 1, 1, 1, 1, 0]

    run(scenario())


@pytest.mark.parametrize("first_gives", ["nothing", "before", "after"])
def test_a_reader_beside_the_routers_loop_gets_each_item_once(router_loop, first_gives):  # noqa: F811
    async def there(work):
        """On the router's loop."""

        async def call():
            done = await work
            await settle()
            return done

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), router_loop))

    async def begin():
        serve = Serve(Replica("a", make=Polled), *bc(make=Polled), **RESUMES)
        await settle()
        await known(serve, item_s=0.005)
        return serve, await start(serve, reads=False)

    async def take(serve):
        serve.take(slower())
        await settle()
        return second_attempts(serve)

    async def gives(attempt, name):
        attempt.give(*((name, i) for i in range(2, 20))).end()

    async def at_rest(serve):
        gc.collect()
        await settle()
        assert serve.router.calls.book.open_calls == 0
        serve.close()

    async def scenario():
        serve, stream = await there(begin())
        reader = asyncio.create_task(read(stream.result, stream.got))
        stream.first.give(0, 1)
        while len(stream.got) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        (second,) = await there(take(serve))
        assert second.request.kwargs == {"had": [0, 1]}
        if first_gives == "before":
            await there(gives(stream.first, "first"))
        await there(gives(second, "second"))
        if first_gives == "after":
            await there(gives(stream.first, "first"))
        await reader
        assert stream.got[:2] == [0, 1]
        assert [number for _, number in stream.got[2:]] == list(range(2, 20))
        assert len({origin for origin, _ in stream.got[2:]}) == 1
        for attempt in (stream.first, second):
            router_loop.call_soon_threadsafe(attempt.end)
        del stream, reader
        await there(at_rest(serve))

    asyncio.run(asyncio.wait_for(scenario(), 20.0))


# ------------------------------------------------------------------ any story


class SlowStory(Story):
    """Any stream, on replicas of which some are slow now and then and still give items."""

    async def step(self, kind, *what):
        if kind == "slower":
            self.version += 1
            rows = {name: (1.0, 0.3 if name in what[0] else 1.0, 0.0) for name in NAMES}
            self.serve.take(table(version=self.version, **rows))
        else:
            await super().step(kind, *what)
        assert self.got == ANSWER[: len(self.got)]


def tell(steps, make, seed=0):
    async def scenario():
        async with scene(*(Replica(name, make=make) for name in NAMES[1:]), **RESUMES) as serve:
            serve.router.calls.routes.random = random.Random(seed).random
            serve.replicas["a"].make = make
            story = SlowStory(serve, await serve.send(1, method="generate", stream=True))
            for step in steps:
                await story.step(*step)
            begun = len(story.attempts)
            await story.to_its_end()
            del story
            return begun

    return run(scenario())


SLOWER = st.tuples(st.just("slower"), st.sets(st.sampled_from(NAMES), min_size=1, max_size=2))
GIVE = st.tuples(st.just("give"), st.integers(0, 5), st.integers(1, 3))
SETTLE = st.tuples(st.just("settle"))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(GIVE, SETTLE, SLOWER, *STEPS, DIE, GIVE_UP), max_size=30), KINDS, SEEDS)
def test_whatever_happens_a_reader_has_each_item_once_and_in_order(steps, make, seed):
    tell(steps, make, seed)


def test_such_stories_do_hand_streams_over():
    give, rest = ("give", 0, 1), ("settle",)
    move = [rest, ("slower", {"a"}), rest, ("give", 0, 2), rest, ("give", 1, 1), rest]
    assert tell([give, *move, ("slower", {"b", "c"}), rest, ("slower", {"b", "d"}), rest], Result) >= 2
