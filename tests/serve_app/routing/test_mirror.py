"""Copies of unary requests: compared when asked, only of methods declared safe, never in the way of a primary."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time

import numpy as np
import pytest

from serve_app.copying import METADATA_KEY, copy_safe
from serve_app.routing.mirror import Mirror
from shadecast.config import TrialConfig
from tests.serve_app.routing.serve import Replica, Serve, VirtualTime, request, run, serving, settle, table

HERE = "tests.serve_app.routing.test_mirror"


def on_trial(new=None, **trial):
    """A router over "a" and "new", which is on trial and gets a copy of every request."""
    serve = Serve(Replica("a"), new or Replica("new"), trial={"copy_methods": ["*"], **trial})
    serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
    return serve


async def send(serve, *args):
    """A request whose primary and copy are under way: what its caller, its replica and the copy's replica have."""
    result = await serve.send(*(args or (1,)))
    await settle()
    return result, serve.replicas["a"].sent[-1], serve.replicas["new"].sent[-1]


async def pair_of(serve):
    """The one pair, once it is complete."""
    async with asyncio.timeout(5):
        while not (pairs := serve.report().pairs):  # noqa: ASYNC110 - compared in a thread
            await asyncio.sleep(0.01)
    (pair,) = pairs
    return pair


def assert_at_rest(serve):
    calls = serve.router.calls
    assert (calls.book.open_calls, calls.mirror.under_way) == (0, 0)
    assert not any(calls.routes.picks.in_flight)


def same_length(primary, copy):
    return len(primary) == len(copy)


def broken(primary, copy):
    raise RuntimeError("a user's function that fails")


@pytest.mark.parametrize("primary_first", [True, False])
@pytest.mark.parametrize(
    ("compare", "primary", "copy", "equal"),
    [
        ("", {"y": 1}, {"y": 2}, None),
        ("exact", {"y": 1}, {"y": 1}, True),
        ("exact", {"y": 1.0}, {"y": 1.0001}, False),
        ("close", {"y": 1.0}, {"y": 1.0001}, True),
        ("close", np.ones(3), np.ones(3) * 2, False),
        ("exact", np.ones(3), np.ones(3), True),
        (f"{HERE}:same_length", "ab", "cd", True),
        (f"{HERE}:same_length", "ab", "c", False),
        (f"{HERE}:broken", "ab", "c", None),
        ("no.such:function", "ab", "c", None),
    ],
)
def test_answers_are_compared_as_configured(compare, primary, copy, equal, primary_first):
    async def scenario():
        serve = on_trial(compare=compare)
        result, first, second = await send(serve)
        ends = [(first, primary), (second, copy)]
        for half, answer in ends if primary_first else reversed(ends):
            half.end(answer)
            await settle()
        assert await result.get_async() is primary
        pair = await pair_of(serve)
        assert (pair.primary_id, pair.candidate_id) == ("a", "new")
        assert (pair.primary_ok, pair.shadow_ok, pair.answers_equal) == (True, True, equal)
        assert serve.report().pairs == ()
        assert_at_rest(serve)

    run(scenario())


@pytest.mark.parametrize("which", ["copy", "primary", "both"])
def test_the_answers_of_failures_are_not_compared(which):
    async def scenario():
        serve = on_trial(compare="exact")
        _, first, second = await send(serve)
        ok = {"primary": which == "copy", "copy": which == "primary"}
        for half, name in ((first, "primary"), (second, "copy")):
            half.end(1, raised=None if ok[name] else ValueError(name))
        pair = await pair_of(serve)
        assert (pair.primary_ok, pair.shadow_ok, pair.answers_equal) == (ok["primary"], ok["copy"], None)
        assert_at_rest(serve)

    run(scenario())


def test_large_arguments_are_serialised_away_from_the_routers_loop():
    threads, sent = [], threading.Event()

    class Noting(Replica):
        def try_send_request(self, pr, with_rejection):
            threads.append(threading.current_thread())
            try:
                if threads[-1] is threading.main_thread():
                    return super().try_send_request(pr, with_rejection)
                send = asyncio.run_coroutine_threadsafe(self.later(pr), self.loop)
                return send.result(5)
            finally:
                sent.set()

        async def later(self, pr):
            return super().try_send_request(pr, True)

        def _get_replica_wrapper(self, pr):
            """Made at the first request, on the router's loop."""
            assert threading.current_thread() is threading.main_thread()

    async def scenario():
        new = Noting("new")
        new.loop = asyncio.get_running_loop()
        serve = on_trial(new)
        for args in ([bytes(10)], [bytes(5_000_000)], [np.zeros(1_000_000)]):
            await serve.send(*args)
            assert await asyncio.get_running_loop().run_in_executor(None, sent.wait, 5)
            sent.clear()
            while serve.router.calls.mirror.under_way:
                for replica in serve.replicas.values():
                    replica.sent[-1].end()
                await asyncio.sleep(0.01)
        assert [t is threading.main_thread() for t in threads] == [True, False, False]
        assert len(serve.report().pairs) == 3
        assert_at_rest(serve)

    run(scenario())


def test_primaries_take_as_long_with_a_mirror_to_a_hung_replica_as_without():
    async def scenario():
        medians = {}
        for mirror in (0.0, 1.0):
            serve = on_trial(mirror_deadline_s=60.0)
            serve.take(table(version=2, a=1.0, new=(0.0, 1.0, mirror)))
            taken = []
            for _ in range(300):
                started_s = time.perf_counter()
                result = await serve.send(1)
                serve.replicas["a"].sent[-1].end()
                await result.get_async()
                taken.append(time.perf_counter() - started_s)
            await settle()
            medians[mirror] = statistics.median(taken)
            report = serve.report()
            view = next(r for r in report.replicas if r.replica_id == "a")
            assert (view.started, view.finished, view.failed, view.in_flight) == (300, 300, 0, 0)
            copies = serve.replicas["new"].sent
            assert len(copies) == (4 if mirror else 0), "its cap of copies, all of them hung"
            assert (report.mirrored, report.mirror_dropped) == ((4, 296) if mirror else (0, 0))
            for copy in copies:
                copy.end()
            await settle()
            assert_at_rest(serve)
        assert medians[1.0] < 2.0 * medians[0.0] + 50e-6

    run(scenario())


@pytest.mark.parametrize("fate", ["hangs", "dies", "fails", "is full", "cannot be reached"])
def test_nothing_that_happens_to_a_copy_reaches_its_primary(fate):
    says = {"hangs": "nothing", "dies": "dead", "is full": "no", "cannot be reached": "error"}.get(fate, "yes")

    async def scenario():
        async with serving(
            Replica("a"), Replica("new", says=says), trial={"copy_methods": ["*"], "mirror_deadline_s": 1.0}
        ) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            result = await serve.send(1)
            await settle()
            if fate == "fails":
                serve.replicas["new"].sent[-1].end(raised=ValueError("copy"))
            await asyncio.sleep(2.0)
            serve.replicas["a"].sent[-1].end("answer")
            assert await result.get_async() == "answer"
            await settle()
            report = serve.report()
            view = next(r for r in report.replicas if r.replica_id == "a")
            assert (view.finished, view.failed) == (1, 0)
            views = {r.replica_id: (r.started, r.finished, r.failed) for r in report.replicas}
            assert views.get("new", (0, 0, 0)) == (0, 0, 0), "a copy is no request"
            assert serve.router.calls.mirror.under_way == 0
            assert report.mirror_dropped == (1 if fate == "is full" else 0)
            judged = [(pair.primary_ok, pair.shadow_ok) for pair in report.pairs]
            assert judged == ([] if fate == "is full" else [(True, False)]), "full: says nothing of its speed"
            if fate == "hangs":
                assert serve.replicas["new"].sent[-1].cancelled, "after its deadline"

    VirtualTime().run(scenario())


def test_a_primary_that_its_caller_cancels_voids_the_pair():
    async def scenario():
        async with serving(Replica("a"), Replica("new"), trial={"copy_methods": ["*"]}) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            result, _, copy = await send(serve)
            result.cancel()
            copy.end()
            await settle()
            assert serve.report().pairs == ()

    VirtualTime().run(scenario())


def test_a_pair_tells_both_times_and_both_loads():
    async def scenario():
        async with serving(Replica("a"), Replica("new"), trial={"copy_methods": ["infer"]}) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            for _ in range(2):
                await serve.send(method="buy")
            serve.replicas["new"].running.add(object())
            _, first, copy = await send(serve)
            await asyncio.sleep(0.5)
            copy.end()
            await asyncio.sleep(1.5)
            first.end()
            await settle()
            report = serve.report()
            (pair,) = report.pairs
            assert (pair.primary_s, pair.shadow_s) == (pytest.approx(2.0), pytest.approx(0.5))
            assert (pair.primary_in_flight, pair.shadow_in_flight) == (2.0, 1.0)
            assert (report.mirrored, report.uncopyable) == (1, 2), "only methods declared safe"
            for other in serve.replicas["a"].sent:
                other.end()

    VirtualTime().run(scenario())


def test_copies_of_calls_that_share_an_id_have_ids_of_their_own():
    """A replica knows its requests by them: one copy must not end another one."""

    async def scenario():
        async with serving(Replica("a"), Replica("new"), trial={"copy_methods": ["*"]}) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            for _ in range(3):
                await serve.send(1, request_id="one")
            await settle()
            ids = [copy.request.metadata.internal_request_id for copy in serve.replicas["new"].sent]
            assert len(set(ids)) == 3
            assert all(name.startswith("one") and name.endswith("-shadow") for name in ids)
            assert len(serve.replicas["new"].copies) == 3
            for replica in serve.replicas.values():
                for result in replica.sent:
                    result.end()

    VirtualTime().run(scenario())


@pytest.mark.parametrize(
    ("methods", "labels", "recorded", "copied"),
    [
        (["*"], {}, {}, True),
        (["*"], {"http": True}, {}, False),
        (["infer"], {}, {}, True),
        (["other"], {}, {}, False),
        ([], {}, {METADATA_KEY: ["infer"]}, True),
        ([], {"method": "buy"}, {METADATA_KEY: ["infer"]}, False),
        ([], {"http": True}, {METADATA_KEY: ["infer"]}, False),
    ],
)
def test_only_what_is_declared_safe_and_is_no_streamed_body_may_be_copied(methods, labels, recorded, copied):
    async def scenario():
        mirror = Mirror(TrialConfig(copy_methods=tuple(methods)), on_pair=print, on_drop=print)
        assert mirror.copyable(request(**labels), Replica("new", replica_metadata=recorded)) is copied
        assert mirror.copyable(request(**labels)) is (copied and not recorded)

    run(scenario())


def test_the_cost_of_a_request_is_the_users():
    async def scenario():
        async with serving(Replica("a"), balance={"cost": f"{HERE}:rows"}) as serve:
            serve.take(table(a=1.0))
            for argument in ([1, 2, 3], [], 7):
                await serve.send(argument)
                serve.replicas["a"].sent[-1].end()
            await settle()
            (view,) = serve.report().replicas
            costs = [o.cost for o in view.outcomes]
            assert costs == [3.0, 1.0, 1.0], "no cost, or a function that fails, counts as one"

    VirtualTime().run(scenario())


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
        new = Replica("new", replica_metadata={METADATA_KEY: ["infer"]})
        async with serving(Replica("a"), new) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            _, first, copy = await send(serve)
            assert len(new.copies) == 1
            first.end()
            copy.end()
            await settle()
            assert serve.report().mirrored == 1

    VirtualTime().run(scenario())
