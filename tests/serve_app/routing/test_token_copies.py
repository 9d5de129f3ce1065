"""Copies of requests to language models behind Serve's routing code: short, judged by tokens, popular ones first."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from tests.serve_app.routing.serve import Replica, in_virtual_time, serving, settle, table
from tests.serve_app.routing.test_token_streams import batch, read


def body(*texts, **more):
    """A conversation; a letter stands for 1 k tokens."""
    messages = [{"role": "user", "content": text * 4096 if len(text) == 1 else text} for text in texts]
    return {"model": "m", "stream": True, "messages": messages, **more}


@contextlib.asynccontextmanager
async def on_trial(fraction=1.0, **trial):
    """A router over "a" and "new", which gets copies of so many streams."""
    config = {"trial": {"copy_methods": ["*"], **trial}, "balance": {"prefix": "auto"}}
    async with serving(Replica("a", max_ongoing_requests=64), Replica("new"), **config) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, fraction)))
        yield serve
        await settle()
        assert serve.router.calls.mirror.under_way == 0


async def start(serve, request):
    """A stream: its reader, its replica's side, and that of its copy, if it has one."""
    copies = len(serve.replicas["new"].sent)
    result = await serve.send(request, method="chat", stream=True)
    reader = asyncio.create_task(read(result, []))
    await settle()
    sent = serve.replicas["new"].sent
    return reader, result.inner, sent[-1] if len(sent) > copies else None


@in_virtual_time
async def test_a_copy_asks_for_sixteen_tokens_of_one_answer_and_is_cancelled_after_them():
    async with on_trial() as serve:
        request = body("x", n=1, max_tokens=400, seed=7)
        reader, first, copy = await start(serve, request)
        assert copy.request.args == [{**request, "max_tokens": 16}]
        assert first.request.args == [request]
        copy.give(batch(9))
        await settle()
        assert not copy.done
        copy.give(batch(5, 2))
        await settle()
        assert copy.cancelled, "though its server gives more than it was asked for"
        first.give(batch(8), batch(8)).end()
        assert len(await reader) == 2


@pytest.mark.parametrize("compare", ["", "exact"])
@in_virtual_time
async def test_texts_are_not_compared(compare):
    async with on_trial(compare=compare) as serve:
        reader, first, copy = await start(serve, body("x"))
        await asyncio.sleep(0.1)
        copy.give(batch(3, 13))
        first.give(batch(16)).end()
        await reader
        await settle()
        (pair,) = serve.report().pairs
        assert (pair.answers_equal, pair.primary_ok, pair.shadow_ok) == (None, True, True)
        assert pair.cold, "nothing was known of what tokens take"


@in_virtual_time
async def test_an_error_in_place_of_an_answer_counts_against_the_candidate():
    async with on_trial() as serve:
        reader, first, copy = await start(serve, body("x"))
        await asyncio.sleep(0.1)
        copy.give(['data: {"error": {"message": "no", "code": 500}}\n\n']).end()
        first.give(batch(16)).end()
        await reader
        await settle()
        (pair,) = serve.report().pairs
        assert (pair.primary_ok, pair.shadow_ok) == (True, False)


@pytest.mark.parametrize("slower", [1.0, 3.0])
@in_virtual_time
async def test_a_newcomers_empty_cache_does_not_count_against_it(slower):
    """A thousand tokens take .1 s, a token .01 s; "a" has the beginnings of all conversations."""

    async def give(replica, letters, times=1.0):
        await asyncio.sleep(times * 0.1 * letters)
        replica.give(batch(1))
        for _ in range(4):
            await asyncio.sleep(times * 0.04)
            replica.give(batch(4))
        await settle()
        replica.end()

    async with on_trial(fraction=0.0) as serve:
        turns = [[f"{k:02}" * 2048 * 4, f"{k:02}" * 2048 * (1 + k % 4)] for k in range(16)]
        for turn in turns:
            reader, first, _ = await start(serve, body(turn[0]))
            await give(first, 4)
            await reader
        serve.report()
        serve.take(table(2, a=1.0, new=(0.0, 1.0, 1.0)))
        for k, turn in enumerate(turns):
            reader, first, copy = await start(serve, body(*turn))
            await asyncio.gather(give(first, 1 + k % 4), give(copy, 4 + 1 + k % 4, slower))
            await reader
            await settle()
        pairs = serve.report().pairs
        assert [pair.cold for pair in pairs] == [False] * 16
        ratios = [pair.shadow_s / pair.primary_s for pair in pairs]
        assert min(ratios) > 0.8 * slower
        assert max(ratios) < 1.25 * slower


@in_virtual_time
async def test_popular_beginnings_are_copied_first():
    async with on_trial(fraction=0.1) as serve:
        rng = random.Random(4)
        serve.router.calls.routes.random = rng.random
        serve.take(table(2, a=1.0, new=0.0))
        copied = []

        async def ask(k):
            text = "p" * 8 * 4096 if k % 2 else f"{k:04}" * 4 * 2048
            reader, first, copy = await start(serve, body(text, f"{k:04}" * 100))
            first.give(batch(16)).end()
            await reader
            if copy is not None:
                copy.give(batch(16))
                copied.append(k)
            await settle()

        for k in range(40):
            await ask(k)
        serve.take(table(3, a=1.0, new=(0.0, 1.0, 0.1)))
        for k in range(40, 60):
            await ask(k)
        assert copied
        assert copied[0] % 2, "the popular one, within a few requests"
        assert copied[0] < 52


@pytest.mark.parametrize("labels", [{}, {"stream": True}])
@in_virtual_time
async def test_what_was_copied_is_known_to_be_there(labels):
    replicas = [Replica(name) for name in ("a", "b", "c", "new")]
    config = {"trial": {"copy_methods": ["*"]}, "balance": {"prefix": "auto"}}
    async with serving(*replicas, **config) as serve:
        serve.take(table(a=1.0, b=0.0, c=0.0, new=(0.0, 1.0, 1.0)))
        assert await one(serve, body("x", "y"), **labels) == "a"
        serve.take(table(2, a=0.0, b=1.0, c=1.0, new=1.0))
        assert {await one(serve, body("x", "y", str(k) * 400)) for k in range(6)} == {"new"}


async def one(serve, request, **labels):
    """A request from its beginning to its end, and its copy: which replica has answered."""
    result = await serve.send(request, method="chat", **(labels or {"stream": True}))
    await settle()
    for each in (result.inner, *serve.replicas["new"].copies):
        each.give(batch(1)).end()
    if result.inner.request.metadata.is_streaming:
        await read(result, [])
    await settle()
    return result.replica.name
