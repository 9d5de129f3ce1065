"""Prompts behind Serve's own routing code: where they go with `balance.prefix`, or that they make no difference.

`serving` checks at the end of every scenario that no call is open and nothing is pending.
"""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from actors.coordinator import Coordinator
from serve_app.router import ObservingRouter
from shadecast.config import Config
from shadecast.errors import ConfigError
from shadecast.messages import message
from shadecast.types import RoutingTable, State, TableRow
from tests.serve_app.routing.serve import (
    Log,
    Replica,
    in_virtual_time,
    metadata,
    serving,
    settle,
    table,
)

AUTO = {"balance": {"prefix": "auto"}}


def chat(*texts, **more):
    """A conversation: each text is a turn; a letter stands for 1 k tokens of it."""
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text * 4096 if len(text) == 1 else text} for text in texts],
        **more,
    }


def replicas(letters, **more):
    return [Replica(name, **{"max_ongoing_requests": 64, **more}) for name in letters]


def even(names, version=1):
    return table(version, **dict.fromkeys(names, 1.0))


async def ask(serve, body, **labels):
    """One request from its beginning to its end: which replica has answered."""
    result = await serve.send(body, **labels)
    result.end()
    await settle()
    return result.replica.name


def prompt_of_job(args, kwargs):
    """What a user names."""
    return args[0].get("text")


def raises(args, kwargs):
    raise ValueError("no prompt")


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("labels", [{}, {"stream": True}])
@in_virtual_time
async def test_a_conversation_stays_with_the_replica_that_has_its_beginning(has_table, labels):
    async with serving(*replicas("abcdefgh"), **AUTO) as serve:
        if has_table:
            serve.take(even("abcdefgh"))
        for number in range(10):
            turns, at, busy = [f"{number:03}"], [], []
            for turn in "pqrs":
                turns.append(turn + f"{number:03}" * (100 if at else 3000))
                result = await serve.send(chat(*turns), **labels)
                at.append(result.replica.name)
                result.end()
                await _read(result, labels)
                busy = busy or [await busy_with_something_else(serve, at[0])]  # a new prompt would go elsewhere
            assert len(set(at)) == 1, f"conversation {number}"
            assert await ask(serve, chat(f"{number:04}" * 3000)) != at[0]
            busy[0].end()


async def busy_with_something_else(serve, name):
    """A request without a prompt that stays on that replica."""
    while (result := await serve.send(7)).replica.name != name:
        result.end()
        await settle()
    return result


async def _read(result, labels):
    if labels:
        with pytest.raises(StopAsyncIteration):
            await result.__anext__()
    await settle()


@in_virtual_time
async def test_reports_say_how_much_of_the_prompts_was_cached_where_they_went():
    async with serving(*replicas("abcd"), **AUTO) as serve:
        serve.take(even("abcd"))
        await ask(serve, chat("p"))
        told = serve.report()
        assert 1000 < told.prompt_tokens < 1100
        assert told.cached_tokens == 0
        await ask(serve, chat("p", "q"))
        await ask(serve, 7)  # no prompt
        told = serve.report()
        assert 2000 < told.prompt_tokens < 2200
        assert 900 < told.cached_tokens < 1100
        told = serve.report()
        assert (told.prompt_tokens, told.cached_tokens) == (0, 0)


@in_virtual_time
async def test_conversations_are_spread_over_the_replicas():
    async with serving(*replicas("abcd"), **AUTO) as serve:
        serve.take(even("abcd"))
        at = Counter()
        for number in range(80):
            at[await ask(serve, chat(f"{number:03}" * 2000))] += 1
        assert min(at.values()) >= 8


@pytest.mark.parametrize("has_table", [True, False])
@in_virtual_time
async def test_a_holder_with_too_much_to_do_is_left(has_table):
    async with serving(*replicas("abcd"), **AUTO) as serve:
        if has_table:
            serve.take(even("abcd"))
        own = await ask(serve, chat("x", "y"))
        assert {await ask(serve, chat("x", "y", "z")) for _ in range(3)} == {own}
        held = [await serve.send(chat("x", f"{n:03}" * 8000)) for n in range(12)]
        assert sum(result.replica.name == own for result in held) < 8, "a prefix does not outweigh any load"
        loads = Counter(result.replica.name for result in held)
        others = [r for r in held if r.replica.name != own]
        for result in others:
            result.end()
        await settle()
        assert loads[own] >= 2
        assert await ask(serve, chat("x", "w" * 8000)) != own
        for result in held:
            result.end()


@in_virtual_time
async def test_what_was_computed_weighs_no_more():
    """A stream's first item says that its prompt is computed; a decoding stream weighs as a request only."""
    async with serving(*replicas("ab"), **AUTO) as serve:
        serve.take(even("ab"))
        long = await serve.send(chat("a" * 400_000), stream=True)
        other = "b" if long.replica.name == "a" else "a"
        assert {await ask(serve, chat(f"{n:03}" * 300)) for n in range(8)} == {other}
        long.inner.give("token")
        assert await long.__anext__() == "token"
        await settle()
        own = long.replica.name
        short = [await serve.send(chat(f"{n:03}" * 300)) for n in range(100, 106)]
        assert own in {result.replica.name for result in short}
        for result in (*short, long):
            result.end()
        await _read(long, {"stream": True})


@in_virtual_time
async def test_a_slow_replica_gets_fewer_prompts():
    async with serving(*replicas("ab"), **AUTO) as serve:
        serve.take(table(a=(1.0, 1.0, 0.0), b=(1.0, 0.2, 0.0)))
        held = [await serve.send(chat(f"{n:03}" * 2000)) for n in range(12)]
        at = Counter(result.replica.name for result in held)
        assert at["a"] > at["b"] >= 1
        for result in held:
            result.end()


@in_virtual_time
async def test_a_replica_without_a_share_is_never_chosen_though_it_has_the_prompt():
    async with serving(*replicas("abc"), **AUTO) as serve:
        serve.take(even("abc"))
        own = await ask(serve, chat("x", "y"))
        rest = [name for name in "abc" if name != own]
        serve.take(table(2, **{own: 0.0}, **dict.fromkeys(rest, 1.0)))
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pqrstu"} <= set(rest)


@in_virtual_time
async def test_a_replica_on_its_first_steps_gets_its_part_of_the_draws_only():
    async with serving(*replicas("ab"), **AUTO) as serve:
        rows = tuple(
            TableRow(name, "node", State.SHIFTING if name == "b" else State.ACTIVE, share, 1.0, 0.0)
            for name, share in (("a", 1.0), ("b", 0.1))
        )
        serve.take(RoutingTable("app/model", 1, 1, 1, rows))
        at = Counter([await ask(serve, chat(f"{n:04}" * 1000)) for n in range(200)])
        assert 3 <= at["b"] <= 45


@in_virtual_time
async def test_a_full_replica_is_left_and_where_all_are_full_the_next_request_waits():
    async with serving(*replicas("ab", max_ongoing_requests=2), **AUTO) as serve:
        serve.take(even("ab"))
        own = await ask(serve, chat("x", "y"))
        held = [await serve.send(chat("x", "y")) for _ in range(4)]
        assert Counter(result.replica.name for result in held) == {"a": 2, "b": 2}
        waiting = serve.start(chat("x", "y", "z"))
        await settle()
        assert not waiting.done()
        freed = next(result for result in held if result.replica.name == own)
        freed.end()
        async with asyncio.timeout(0.5):
            result = await waiting
        assert result.replica.name == own
        for each in (*held, result):
            each.end()


@in_virtual_time
async def test_a_prompt_that_finds_its_replica_full_goes_elsewhere_and_is_known_there():
    names = "abcdefgh"
    async with serving(*replicas(names), **AUTO) as serve:
        serve.take(even(names))
        own = serve.replicas[await ask(serve, chat("x", "y"))]
        own.says = "no"
        other = await ask(serve, chat("x", "y", "z"))
        assert other != own.name
        serve.take(table(2, **{name: float(name != own.name) for name in names}))
        assert {await ask(serve, chat("x", "y", "z", turn)) for turn in "pq"} == {other}


@in_virtual_time
async def test_replicas_that_have_ended_are_forgotten_and_one_that_returns_has_nothing():
    a, b = replicas("ab")
    async with serving(a, b, **AUTO) as serve:
        serve.take(even("ab"))
        own = serve.replicas[await ask(serve, chat("x", "y"))]
        rest = [r for r in (a, b) if r is not own]
        serve.scale(*rest)
        assert await ask(serve, chat("x", "y")) == rest[0].name
        serve.scale(*rest, own)
        serve.take(even("ab", 2))
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pqrs"} == {rest[0].name}


@in_virtual_time
async def test_a_replica_that_dies_with_the_prompt_is_left_at_once():
    async with serving(*replicas("abc"), **AUTO) as serve:
        serve.take(even("abc"))
        own = await ask(serve, chat("x", "y"))
        serve.replicas[own].says = "dead"
        after = await ask(serve, chat("x", "y"))
        assert after != own
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pqr"} == {after}


@in_virtual_time
async def test_a_session_is_a_hint_where_the_prompt_can_be_read_and_rules_where_it_cannot():
    async with serving(*replicas("abcd"), **AUTO) as serve:
        serve.take(even("abcd"))
        own = await ask(serve, chat("x", "y"), session_id="one")
        assert {await ask(serve, chat("x", "y", str(n) * 900), session_id=f"s{n}") for n in range(9)} == {own}
        cold = {await ask(serve, chat(f"{n:03}" * 900), session_id="two") for n in range(9)}
        assert len(cold) == 1, "a session's prompts that nobody has go to one replica while loads are equal"
        unread = {name: await ask(serve, 1, session_id=name) for name in "uvwxyz"}
        for name, at in unread.items():
            assert {await ask(serve, n, session_id=name) for n in range(3)} == {at}


@pytest.mark.parametrize(
    "body",
    [
        None,
        7,
        {},
        {"messages": 5},
        {"messages": []},
        {"messages": [object()]},
        {"messages": [None, {"role": object(), "content": object()}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": object()}]}]},
        {"prompt": [1, "x", None]},
        {"prompt": [-5, 1 << 70]},
        {"prompt": ""},
        {"messages": "\udcff" * 2000, "model": object(), "tools": [object()]},
    ],
)
@in_virtual_time
async def test_a_body_that_cannot_be_read_is_the_usual_choice(body):
    async with serving(*replicas("abcd"), **AUTO) as serve:
        serve.take(even("abcd"))
        with Log() as log:
            at = Counter([await ask(serve, body) for _ in range(40)])
        assert sum(at.values()) == 40
        assert len(log.lines()) <= 1
        assert serve.report().replicas


@in_virtual_time
async def test_whatever_breaks_is_told_once_and_requests_go_on():
    class Evil(dict):
        def get(self, name, default=None):
            raise RuntimeError("evil")

    async with serving(*replicas("ab"), **AUTO) as serve:
        serve.take(even("ab"))
        with Log() as log:
            for _ in range(10):
                await ask(serve, Evil(messages=[1]))
        (line,) = log.lines()
        assert "app/model" in line
        assert "balance.prefix" in line
        assert "evil" in line


@in_virtual_time
async def test_a_users_function_says_what_the_prompt_is():
    name = f"{__name__}:prompt_of_job"
    async with serving(*replicas("abcdefgh"), balance={"prefix": name}) as serve:
        serve.take(even("abcdefgh"))
        own = await ask(serve, {"text": "x" * 20_000})
        assert {await ask(serve, {"text": "x" * 20_000 + str(n) * 800}) for n in range(8)} == {own}
        assert len({await ask(serve, {"messages": "x" * 20_000}) for n in range(60)}) > 1, "nothing else is read"


@in_virtual_time
async def test_a_users_function_that_fails_leaves_the_usual_choice():
    async with serving(*replicas("ab"), balance={"prefix": f"{__name__}:raises"}) as serve:
        serve.take(even("ab"))
        with Log() as log:
            for _ in range(5):
                await ask(serve, chat("x"))
        (line,) = log.lines()
        assert "balance.prefix" in line


@in_virtual_time
async def test_off_is_the_default_and_prompts_are_not_looked_at():
    class Untouched(dict):
        def get(self, name, default=None):
            raise AssertionError("read")

    async with serving(*replicas("abcd")) as serve:
        serve.take(even("abcd"))
        with Log() as log:
            at = {await ask(serve, Untouched(messages="x" * 9000)) for _ in range(40)}
        assert at == set("abcd")
        assert log.lines() == []


@in_virtual_time
async def test_who_observes_reads_no_prompt():
    async with serving(*replicas("abcd"), kind=ObservingRouter, options={}, **AUTO) as serve:
        serve.take(even("abcd"))
        assert {await ask(serve, chat("x", "y")) for _ in range(60)} == set("abcd")
        assert serve.router.calls.prefixes.post("r") is None


@in_virtual_time
async def test_it_can_be_switched_on_and_off_while_calls_are_under_way():
    async with serving(*replicas("abcd")) as serve:
        serve.take(even("abcd"))
        held = [await serve.send(chat("x", "y"))]
        serve.router.use_settings(False, AUTO)
        held.append(await serve.send(chat("x", "y")))
        held[1].end()
        await settle()
        assert {await ask(serve, chat("x", "y")) for _ in range(4)} == {held[1].replica.name}
        serve.router.use_settings(False, {})
        for result in held:
            result.end()
        await settle()
        serve.router.use_settings(False, AUTO)
        assert len({await ask(serve, chat("x", "y")) for _ in range(4)}) == 1


@in_virtual_time
async def test_another_secret_is_another_index_and_the_same_secret_forgets_nothing():
    async with serving(*replicas("abcdefgh"), **AUTO) as serve:
        serve.take(even("abcdefgh"))
        serve.router.use_secret(b"s" * 16)
        own = await ask(serve, chat("x", "y"))
        serve.router.use_secret(b"s" * 16)
        serve.router.use_secret(None)
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pqrs"} == {own}


@pytest.mark.parametrize(("told", "setting", "kept"), [(400_000, 0, True), (9, 0, False), (9, 400_000, True)])
@in_virtual_time
async def test_a_replica_has_no_more_than_its_memory_by_its_own_word_or_the_setting(told, setting, kept):
    fleet = replicas("ab")
    for replica in fleet:
        replica.routing_stats = {"kv_tokens": told}
    async with serving(*fleet, balance={"prefix": "auto", "kv_tokens": setting}) as serve:
        serve.take(even("ab"))
        own = await ask(serve, chat("x", "y"))
        busy = await busy_with_something_else(serve, own)
        assert (await ask(serve, chat("x", "y", "z")) == own) is kept
        busy.end()


@in_virtual_time
async def test_a_pick_that_nobody_sends_goes_by_its_prompt_too():
    async with serving(*replicas("abcdefgh"), **AUTO) as serve:
        serve.take(even("abcdefgh"))
        at = set()
        for turn in "pqrs":
            async with serve.choose_replica(metadata(), chat("x", "y", turn), _reserve=False) as selection:
                at.add(selection.replica_id)
            await asyncio.sleep(1.01)
        assert len(at) == 1


@in_virtual_time
async def test_of_a_thousand_replicas_the_one_that_has_the_prompt_is_found():
    names = [f"r{i}" for i in range(1000)]
    async with serving(*replicas(names), **AUTO) as serve:
        serve.take(even(names))
        own = await ask(serve, chat("x", "y"))
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pqrstuvw"} == {own}


@in_virtual_time
async def test_a_model_that_is_loaded_on_demand_is_asked_for_where_it_is_loaded():
    fleet = replicas("abcd")
    for replica in fleet[:2]:
        replica.multiplexed_model_ids = {"lora"}
    async with serving(*fleet, **AUTO) as serve:
        serve.take(even("abcd"))
        base = await ask(serve, chat("x", "y"))
        at = {await ask(serve, chat("x", "y", turn), multiplexed_model_id="lora") for turn in "pqrs"}
        assert len(at) == 1
        assert at <= {"a", "b"}
        assert await ask(serve, chat("x", "y")) == base


# ------------------------------------------------------------------ several routers


class Cluster:
    """Routers of one deployment, which speak to the product's own coordinator."""

    def __init__(self, *routers):
        self.routers = routers
        self.coordinator = Coordinator(epoch=1)
        for serve in routers:
            serve.router.use_secret(b"s" * 16)

    async def exchange(self):
        """Once for each router, in turn."""
        for number, serve in enumerate(self.routers):
            prefixes = serve.router.calls.prefixes
            asked = message(
                "exchange",
                deployment="app/model",
                epoch=1,
                table_version=1 << 40,
                wait_s=0.0,
                report=None,
                prefixes=prefixes.post(f"router-{number}"),
            )
            answer = await self.coordinator.exchange(json.loads(json.dumps(asked)))
            prefixes.hear(json.loads(json.dumps(answer["prefixes"])))

    async def close(self):
        await self.coordinator.close()


@asynccontextmanager
async def two_routers(names):
    async with serving(*replicas(names), **AUTO) as one, serving(*replicas(names), **AUTO) as two:
        for serve in (one, two):
            serve.take(even(names))
        cluster = Cluster(one, two)
        try:
            yield one, two, cluster
        finally:
            await cluster.close()


@in_virtual_time
async def test_routers_learn_of_each_other_where_a_conversation_is():
    async with two_routers("abcdefgh") as (one, two, cluster):
        for number in range(10):
            body = chat(f"{number:03}" * 3000)
            own = await ask(one, body)
            busy = await busy_with_something_else(one, own), await busy_with_something_else(two, own)
            await cluster.exchange()
            await cluster.exchange()
            assert await ask(two, chat(f"{number:03}" * 3000, "more" * 100)) == own
            for result in busy:
                result.end()
            await settle()


@in_virtual_time
async def test_a_router_leaves_a_replica_that_another_one_has_filled():
    async with two_routers("ab") as (one, two, cluster):
        long = await one.send(chat("a" * 800_000), stream=True)
        await cluster.exchange()
        await cluster.exchange()
        at = {await ask(two, chat(f"{n:03}" * 300)) for n in range(8)}
        assert at == set("ab") - {long.replica.name}
        long.inner.give("token")
        await long.__anext__()
        await settle()
        await cluster.exchange()
        await cluster.exchange()
        held = [await two.send(chat(f"{n:03}" * 300)) for n in range(100, 106)]
        assert long.replica.name in {result.replica.name for result in held}
        for result in (*held, long):
            result.end()
        await _read(long, {"stream": True})


@in_virtual_time
async def test_routers_exchange_more_often_while_there_is_something_to_tell():
    async with two_routers("ab") as (one, _, cluster):
        one.take(replace(even("ab", 2), routers=2))
        quiet_s = one.router.between_s
        result = await one.send(chat("a" * 8000), stream=True)
        busy_s = one.router.between_s
        await cluster.exchange()
        assert one.router.between_s == busy_s < quiet_s, "its prompt is still to be computed"
        result.inner.give("token")
        await result.__anext__()
        await settle()
        assert one.router.between_s == quiet_s
        result.end()
        await _read(result, {"stream": True})


@in_virtual_time
async def test_routers_tell_each_other_nothing_by_hashes_that_others_do_not_have():
    async with serving(Replica("a"), **AUTO) as serve:
        serve.take(even("a"))
        await ask(serve, chat("x"))
        assert serve.router.calls.prefixes.post("r") is None, "the cluster's secret is not known yet"
        serve.router.use_secret(b"s" * 16)
        assert serve.router.calls.prefixes.post("r") is not None
        serve.router.use_settings(False, {})
        assert serve.router.calls.prefixes.post("r") is None


@pytest.mark.parametrize("news", [7, {}, {"number": 1, "age_s": 0.0, "decisions": [{"replicas": 3}]}, {"number": "x"}])
@in_virtual_time
async def test_news_that_cannot_be_read_are_told_once_and_change_nothing(news):
    async with serving(*replicas("ab"), **AUTO) as serve:
        serve.take(even("ab"))
        own = await ask(serve, chat("x", "y"))
        with Log() as log:
            for _ in range(3):
                serve.router.calls.prefixes.hear(news)
        assert len(log.lines()) <= 1
        assert {await ask(serve, chat("x", "y", turn)) for turn in "pq"} == {own}


@in_virtual_time
async def test_news_of_replicas_that_this_router_does_not_have_are_left_out():
    async with two_routers("ab") as (one, two, cluster):
        one.scale(*replicas("xy"))
        await ask(one, chat("x", "y"))
        await cluster.exchange()
        await cluster.exchange()
        assert {await ask(two, chat("x", "y", turn)) for turn in "pqr"} <= set("ab")


@pytest.mark.parametrize("value", [True, "on", "module", 3, None])
def test_a_wrong_setting_is_refused_with_what_to_write(value):
    with pytest.raises(ConfigError, match=r'balance\.prefix = .*"off", "auto" or "module:function"'):
        Config.from_mapping({"balance": {"prefix": value}})
