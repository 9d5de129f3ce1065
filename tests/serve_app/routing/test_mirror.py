"""Copies of unary requests: compared when asked, only of methods declared safe, never in the way of a primary."""

import asyncio
import statistics
import threading
import time

import numpy as np
import pytest

from serve_app.copying import METADATA_KEY, copy_safe
from tests.serve_app.routing.router_fakes import FakeReplica, FakeResult, make_router, request, table


class Answering(FakeResult):
    """A result whose answer the mirror can await."""

    answer = None

    async def get_async(self):
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def settle():
    for _ in range(30):
        await asyncio.sleep(0)


def on_trial(answer=None, **trial):
    def make():
        result = Answering()
        result.answer = answer
        return result

    new = FakeReplica("new", make=make)
    router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["*"], **trial})
    router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
    return router, new


async def send(router, name="r", args=None):
    pending = request(name)
    pending.args = args or [1]
    replica = (await router.choose_replicas(router._replicas_list, pending))[0][0]
    result = Answering()
    router.on_request_routed(pending, replica.replica_id, result)
    return result


async def pair_of(router, primary, answer):
    await settle()
    primary.end(answer)
    await settle()
    async with asyncio.timeout(5):
        await asyncio.gather(*router._mirror._tasks)
    (pair,) = router.make_report().pairs
    return pair


def same_length(primary, copy):
    return len(primary) == len(copy)


def broken(primary, copy):
    raise RuntimeError("a user's function that fails")


@pytest.mark.parametrize(
    ("compare", "primary", "copy", "equal"),
    [
        ("", {"y": 1}, {"y": 2}, None),
        ("exact", {"y": 1}, {"y": 1}, True),
        ("exact", {"y": 1.0}, {"y": 1.0001}, False),
        ("close", {"y": 1.0}, {"y": 1.0001}, True),
        ("close", np.ones(3), np.ones(3) * 2, False),
        ("exact", np.ones(3), np.ones(3), True),
        ("tests.serve_app.routing.test_mirror:same_length", "ab", "cd", True),
        ("tests.serve_app.routing.test_mirror:same_length", "ab", "c", False),
        ("tests.serve_app.routing.test_mirror:broken", "ab", "c", None),
        ("no.such:function", "ab", "c", None),
    ],
)
def test_answers_are_compared_as_configured(compare, primary, copy, equal):
    async def scenario():
        router, _ = on_trial(copy, compare=compare)
        result = await send(router)
        if compare in ("", "no.such:function"):
            await settle()
            router._mirror._tasks and router._by_index[1].results[0].end()
        pair = await pair_of(router, result, primary)
        assert (pair.primary_ok, pair.shadow_ok, pair.answers_equal) == (True, True, equal)
        assert router._mirror.waiting == 0

    asyncio.run(scenario())


def test_the_answers_of_failures_are_not_compared():
    async def scenario():
        router, _ = on_trial(ValueError("copy"), compare="exact")
        pair = await pair_of(router, await send(router), 1)
        assert (pair.primary_ok, pair.shadow_ok, pair.answers_equal) == (True, False, None)

    asyncio.run(scenario())


def test_large_arguments_are_serialised_away_from_the_routers_loop():
    async def scenario():
        router, new = on_trial()
        threads, sent = [], threading.Event()
        send_one = new.try_send_request

        def noted(request, with_rejection):
            threads.append(threading.current_thread())
            result = send_one(request, with_rejection)
            sent.set()
            return result

        new.try_send_request = noted
        new._get_replica_wrapper = lambda request: None
        for args in ([bytes(10)], [bytes(5_000_000)], [np.zeros(1_000_000)]):
            result = await send(router, f"r{len(threads)}", args)
            assert await asyncio.get_running_loop().run_in_executor(None, sent.wait, 5)
            sent.clear()
            await asyncio.sleep(0.02)
            new.results[-1].end()
            result.end()
            await settle()
        assert [t is threading.main_thread() for t in threads] == [True, False, False]

    asyncio.run(scenario())


def test_primaries_take_as_long_with_a_mirror_to_a_hung_replica_as_without():
    async def scenario():
        medians = {}
        for mirror in (0.0, 1.0):
            router, new = on_trial(mirror_deadline_s=60.0)
            router.take_table(table(version=2, a=1.0, new=(0.0, 1.0, mirror)))
            taken = []
            for i in range(300):
                started_s = time.perf_counter()
                result = await send(router, f"r{i}")
                result.end()
                await asyncio.sleep(0)
                taken.append(time.perf_counter() - started_s)
            await settle()
            medians[mirror] = statistics.median(taken)
            view = next(r for r in router.make_report().replicas if r.replica_id == "a")
            assert (view.finished, view.in_flight) == (300, 0)
            assert len(new.sent) == (4 if mirror else 0), "its cap of copies, all of them hung"
        assert medians[1.0] < 2.0 * medians[0.0] + 50e-6

    asyncio.run(scenario())


def test_the_cost_of_a_request_is_the_users():
    async def scenario():
        router = make_router(FakeReplica("a"), balance={"cost": "tests.serve_app.routing.test_mirror:rows"})
        router.take_table(table(a=1.0))
        for i, args in enumerate(([[1, 2, 3]], [[]], [7])):
            (await send(router, f"r{i}", args)).end()
        await settle()
        costs = [o.cost for o in router.make_report().replicas[0].outcomes]
        assert costs == [3.0, 1.0, 1.0], "no cost, or a function that fails, counts as one"

    asyncio.run(scenario())


def rows(args, kwargs):
    return len(args[0])


# ------------------------------------------------------------------ @copy_safe


class Plain:
    @copy_safe
    async def predict(self, x):
        return x

    def buy(self, x):
        return x


class WithHook(Plain):
    def record_replica_metadata(self):
        return {"zone": "b"}

    @copy_safe
    def embed(self, x):
        return x


class WithAsyncHook:
    async def record_replica_metadata(self):
        return {"zone": "c"}

    @copy_safe
    def embed(self, x):
        return x


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [
        (Plain, {METADATA_KEY: ["predict"]}),
        (WithHook, {"zone": "b", METADATA_KEY: ["predict", "embed"]}),
        (WithAsyncHook, {"zone": "c", METADATA_KEY: ["embed"]}),
    ],
)
def test_copy_safe_leaves_the_method_as_it_is_and_records_its_name(kind, recorded):
    assert asyncio.run(kind().record_replica_metadata()) == recorded
    for name in recorded[METADATA_KEY]:
        assert type(getattr(kind, name)).__name__ == "function"


def test_a_method_declared_in_code_is_copied_without_configuration():
    async def scenario():
        new = FakeReplica("new", replica_metadata={METADATA_KEY: ["infer"]})
        router = make_router(FakeReplica("a"), new)
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        result = await send(router)
        await settle()
        assert len(new.sent) == 1
        result.end()
        new.results[0].end()
        await settle()
        assert router.make_report().mirrored == 1

    asyncio.run(scenario())
