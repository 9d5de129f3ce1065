"""What other threads tell a router of the ends of its calls: soon, all of it, and mostly without waking it."""

from __future__ import annotations

import asyncio
import functools
import threading
import time

from serve_app.routing.ends import Soon


def on_a_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


def soon(urgent: bool = False) -> Soon:
    made = Soon(lambda: urgent)
    made.loop = asyncio.get_running_loop()
    return made


@on_a_loop
async def test_the_first_is_done_at_once_and_what_follows_within_a_moment():
    ends, done = soon(), []
    ends.call(lambda: done.append(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == [1]
    ends.call(lambda: done.append(2))
    await asyncio.sleep(0)
    assert done == [1], "the loop was woken for it"
    await asyncio.sleep(0.1)
    assert done == [1, 2]


@on_a_loop
async def test_it_is_done_at_once_where_somebody_waits_for_it():
    ends, done = soon(urgent=True), []
    for i in range(3):
        ends.call(lambda i=i: done.append(i))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert done == list(range(i + 1))


@on_a_loop
async def test_a_choice_catches_up_first():
    ends, done = soon(), []
    ends.call(lambda: None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ends.call(lambda: done.append(1))
    ends.catch_up()
    assert done == [1]


@on_a_loop
async def test_one_that_raises_keeps_nobody_else_from_being_done(caplog):
    ends, done = soon(), []
    ends.call(lambda: 1 / 0)
    ends.call(lambda: done.append(1))
    ends.catch_up()
    assert done == [1]
    assert "was not taken in" in caplog.text


@on_a_loop
async def test_nothing_is_forgotten_whatever_threads_do():
    ends, done = soon(), []

    def work(k: int) -> None:
        for i in range(300):
            ends.call(functools.partial(done.append, (k, i)))
            time.sleep(0.0001 * (i % 7) * k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    await asyncio.sleep(0.1)
    assert len(done) == 1200
    ends.call(lambda: done.append("last"))
    await asyncio.sleep(0.1)
    assert done[-1] == "last"
    assert not ends.left
