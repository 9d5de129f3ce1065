"""Streams of language models behind Serve's own routing code: their tokens count, and the memory that they take."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.serve_app.routing.serve import Replica, in_virtual_time, serving, settle, table

AUTO = {"prefix": "auto", "kv_tokens": 1000}


def body(tokens=100):
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": "word" * tokens}]}


def batch(*tokens):
    """All that an engine has made in 50 ms, as `ray.serve.llm` sends it: a chunk of so many tokens each."""
    return ["data: " + json.dumps({"choices": [{"delta": {"content": "word" * n}}]}) + "\n\n" for n in tokens]


async def read(result, got):
    try:
        while True:
            got.append(await result.__anext__())
    except StopAsyncIteration:
        return got


async def start(serve, request=None):
    """A stream, what its replica has of it, and its reader, who is waiting."""
    result = await serve.send(body() if request is None else request, method="chat", stream=True)
    reader = asyncio.create_task(read(result, []))
    await settle()
    return reader, result.inner


def view(serve, name="a"):
    (found,) = (view for view in serve.report().replicas if view.replica_id == name)
    return found


@pytest.mark.parametrize(("prefix", "items"), [("auto", 12), ("off", 2)])
@in_virtual_time
async def test_tokens_count_where_prompts_are_looked_at_however_many_come_at_once(prefix, items):
    async with serving(Replica("a"), balance={"prefix": prefix}) as serve:
        reader, first = await start(serve)
        for tokens in ((1,), (2, 3), (7,)):
            await asyncio.sleep(0.05)
            first.give(batch(*tokens))
            await settle()
        seen = view(serve)
        assert (seen.items, seen.stream_s) == (items, pytest.approx(0.1))
        first.end()
        assert await reader == [batch(1), batch(2, 3), batch(7)]


@pytest.mark.parametrize("request_", [7, body()])
@in_virtual_time
async def test_items_count_where_there_is_no_prompt_or_no_chunk(request_):
    async with serving(Replica("a"), balance=AUTO) as serve:
        reader, first = await start(serve, request_)
        for item in ("one", "two", batch(9) if request_ == 7 else "three"):
            await asyncio.sleep(0.05)
            first.give(item)
            await settle()
        assert view(serve).items == 2
        first.end()
        await reader


@in_virtual_time
async def test_prompts_and_answers_under_way_take_memory_until_they_have_left():
    async with serving(Replica("a"), balance=AUTO) as serve:
        reader, first = await start(serve)
        prompt = view(serve).kv_own
        assert prompt == pytest.approx(0.1, abs=0.02)
        await asyncio.sleep(0.1)
        first.give(batch(100), batch(100))
        await settle()
        seen = view(serve)
        assert (seen.kv_own, seen.kv_told) == (pytest.approx(prompt + 0.2), -1.0)
        other, second = await start(serve, body(200))
        assert view(serve).kv_own == pytest.approx(prompt + 0.4, abs=0.02)
        second.end()
        first.end()
        await asyncio.gather(reader, other)
        await settle()
        assert view(serve).kv_own == 0.0


@pytest.mark.parametrize(("stats", "told"), [({"kv_cache_usage_perc": 0.25}, 0.25), ({}, -1.0), ("none", -1.0)])
@in_virtual_time
async def test_what_an_engine_says_of_its_memory_is_passed_on(stats, told):
    replica = Replica("a")
    replica.routing_stats = stats
    async with serving(replica, balance=AUTO) as serve:
        assert view(serve).kv_told == told


@pytest.mark.parametrize("value", [float("nan"), "much", True, None, -0.5])
@in_virtual_time
async def test_what_cannot_be_true_of_a_memory_is_not_passed_on(value):
    replica = Replica("a")
    replica.routing_stats = {"kv_cache_usage_perc": value, "kv_tokens": value}
    async with serving(replica, balance={"prefix": "auto"}) as serve:
        assert view(serve).kv_told == -1.0


@in_virtual_time
async def test_no_memory_is_told_where_prompts_are_not_looked_at():
    async with serving(Replica("a"), balance=AUTO) as serve:
        assert view(serve).kv_own == 0.0
        serve.router.use_settings(False, {})
        assert view(serve).kv_own == -1.0


async def known(serve, streams=8):
    """Streams of 200 tokens, 10 ms each, five at a time, have been seen on "a" from start to end."""
    serve.take(table(version=1, a=1.0, b=0.0))
    usual = [await start(serve) for _ in range(streams)]
    for _ in range(40):
        await asyncio.sleep(0.05)
        for _, first in usual:
            first.give(batch(5))
        await settle()
    serve.report()
    for reader, first in usual:
        first.end()
        await reader
    serve.report()


@pytest.mark.parametrize(("tokens", "moves"), [(5, True), (190, False)])
@in_virtual_time
async def test_a_stream_is_handed_over_by_the_tokens_that_it_has_left(tokens, moves):
    """Both have given one item: by items they would be alike."""
    async with serving(Replica("a"), Replica("b"), balance={**AUTO, "kv_tokens": 0, "resume": "had"}) as serve:
        await known(serve)
        reader, first = await start(serve)
        await asyncio.sleep(0.05)
        first.give(batch(tokens))
        await settle()
        serve.take(table(version=2, a=(1.0, 0.3, 0.0), b=1.0))
        await settle()
        seconds = serve.replicas["b"].sent
        assert bool(seconds) is moves
        for each in (*seconds, first):
            each.give(batch(1)).end()
        await reader


@pytest.mark.parametrize(("tokens", "moves"), [(100, True), (30_000, False)])
@in_virtual_time
async def test_a_stream_is_not_handed_over_where_its_prompt_takes_longer_to_compute_than_that_saves(tokens, moves):
    """A thousand tokens take .1 s; "b" has none of the prompts."""
    async with serving(Replica("a"), Replica("b"), balance={"prefix": "auto", "resume": "had"}) as serve:
        serve.take(table(version=1, a=1.0, b=0.0))
        for k in range(12):
            prompt = 500 * (1 + k % 4)
            reader, first = await start(serve, {"stream": True, "prompt": f"{k:04}" * prompt})
            await asyncio.sleep(1e-4 * prompt)
            for _ in range(40):
                first.give(batch(5))
                await asyncio.sleep(0.05)
            serve.report()
            first.end()
            await reader
        reader, first = await start(serve, {"stream": True, "prompt": "word" * tokens})
        await asyncio.sleep(0.05)
        first.give(batch(5))
        await settle()
        serve.take(table(version=2, a=(1.0, 0.3, 0.0), b=1.0))
        await settle()
        seconds = serve.replicas["b"].sent
        assert bool(seconds) is moves
        for each in (*seconds, first):
            each.give(batch(1)).end()
        await reader


def said(text, **more):
    """One chunk of an answer."""
    return {"id": "first", "choices": [{"index": 0, "delta": {"content": text}}], **more}


async def usual(serve):
    """A stream on "a", so that it is known how long streams take from word to word."""
    serve.take(table(version=1, **(dict.fromkeys(serve.replicas, 0.0) | {"a": 1.0})))
    reader, first = await start(serve)
    for _ in range(4):
        await asyncio.sleep(0.1)
        first.give(said(" so"))
        await settle()
    first.end()
    await reader
    serve.report()


async def slow(serve, version, name):
    """Its streams stall, and the table shows it."""
    await asyncio.sleep(5.0)
    rows = dict.fromkeys(serve.replicas, 1.0) | {name: (1.0, 0.02, 0.0)}
    serve.take(table(version=version, reference_s=0.1, **rows))
    await settle()


async def stalled(serve, request):
    """A stream on "a" that has said a few words and stalls: its reader, its replica, and what was sent to "b"."""
    await usual(serve)
    reader, first = await start(serve, request)
    first.give({"id": "first", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    first.give(said("one"), said(" two", usage={"prompt_tokens": 9, "completion_tokens": 2}))
    await settle()
    await slow(serve, 2, "a")
    return reader, first, serve.replicas["b"].sent


@pytest.mark.parametrize("prefix", ["auto", "off"])
@in_virtual_time
async def test_the_rest_of_an_answer_is_asked_for_with_what_was_said_and_its_reader_sees_one_answer(prefix):
    balance = {"prefix": prefix, "resume": "openai"}
    async with serving(Replica("a"), Replica("b"), balance=balance) as serve:
        request = body() | {"max_tokens": 50}
        reader, first, (second,) = await stalled(serve, request)
        assert second.request.args == [
            request
            | {"messages": [*request["messages"], {"role": "assistant", "content": "one two"}], "max_tokens": 48}
            | {"continue_final_message": True, "add_generation_prompt": False}
        ]
        usage = {"prompt_tokens": 11, "completion_tokens": 1}
        second.give({"id": "second", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        second.give(said(" three", usage=usage) | {"id": "second"})
        second.end()
        got = await reader
        assert first.cancelled
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in got) == "one two three"
        assert {chunk["id"] for chunk in got} == {"first"}
        assert [chunk["choices"][0]["delta"].get("role") for chunk in got] == ["assistant", None, None, None, None]
        assert got[-1]["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


@in_virtual_time
async def test_an_answer_that_moves_twice_is_asked_for_each_time_by_all_that_was_said():
    replicas = [Replica(name) for name in "abc"]
    async with serving(*replicas, balance={"resume": "openai"}) as serve:
        await usual(serve)
        serve.take(table(version=2, a=1.0, b=0.0, c=0.0))
        reader, first = await start(serve)
        first.give(said("one"))
        await settle()
        first.die()
        await settle()
        second = last_sent(serve, but="a")
        assert second.request.args[0]["messages"][-1]["content"] == "one"
        second.give(said(" two"))
        await settle()
        await slow(serve, 3, second.replica.name)
        third = last_sent(serve, but=second.replica.name)
        assert third.request.args[0]["messages"][-1]["content"] == "one two"
        third.give(said(" three")).end()
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in await reader) == "one two three"


def last_sent(serve, but):
    """The stream that is under way on another replica."""
    (found,) = [sent for name, replica in serve.replicas.items() if name != but for sent in replica.running]
    return found


@pytest.mark.parametrize("more", [{"tools": [{"type": "function"}]}, {"n": 2}, {"logprobs": True}, {"stop": ["."]}])
@in_virtual_time
async def test_an_answer_whose_rest_cannot_be_asked_for_stays(more):
    async with serving(Replica("a"), Replica("b"), balance={"resume": "openai"}) as serve:
        reader, first, sent = await stalled(serve, body() | more)
        assert sent == []
        first.give(said(" three")).end()
        assert len(await reader) == 4


def says(*texts):
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": "".join(texts)}]}


@pytest.mark.parametrize(("streams", "expected"), [(0, {"a", "b"}), (12, {"a"})])
@in_virtual_time
async def test_once_streams_have_told_what_tokens_cost_a_cached_prompt_stays_behind_a_short_queue(streams, expected):
    """By the product, what waits on a replica counts once for each request there; in seconds it waits only once."""
    async with serving(*(Replica(name, max_ongoing_requests=64) for name in "ab"), balance={"prefix": "auto"}) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        for number in range(streams):
            tokens = 500 * (number + 1)
            reader, inner = await start(serve, says(f"{number:04}" * tokens))
            await asyncio.sleep(1e-4 * tokens)
            inner.give(batch(1))
            await asyncio.sleep(0.2)
            inner.give(batch(20))
            await settle()
            inner.end()
            await reader
        serve.take(table(2, a=1.0, b=1e-3))  # the beginning is to be on a
        common, readers, at = "long" * 4000, [], []
        for text in (common, common + "more" * 1500):
            reader, inner = await start(serve, says(text))
            readers.append((reader, inner))
            if text is common:
                inner.give(batch(1))
                await settle()
        serve.take(table(3, a=1.0, b=1.0))
        for number in range(8):
            result = await serve.send(says(common, f"{number:04}" * 40), method="chat", stream=True)
            at.append(result.replica.name)
            readers.append((asyncio.create_task(read(result, [])), result.inner))
            result.inner.give(batch(1))
            await settle()
        assert set(at) == expected
        for reader, inner in readers:
            inner.end()
            await reader
