"""What Ray's versions do differently, on one real node: how ends are learned, and that nobody waits for another one."""

import asyncio
import gc
import os
import signal
import time

import pytest
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig

from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import wait_for
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]


@serve.deployment(
    num_replicas=2,
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=8,
    request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter"),
)
class Model:
    async def answer(self, size=1, sleep_s=0.0):
        await asyncio.sleep(sleep_s)
        return b"x" * size

    async def until(self, path):
        while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240 - told from another process
            await asyncio.sleep(0.05)
        return "then"

    async def fail(self):
        raise ValueError("user code")

    async def items(self, count):
        for i in range(count):
            yield i

    async def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def model():
    with started(LocalCluster(workers=0)) as local:
        local.connect()
        try:
            yield serve.run(Model.bind(), name="versions", route_prefix=None)
        finally:
            serve.shutdown()


def router_of(handle):
    handle.answer.remote().result(timeout_s=60)
    return handle._router._asyncio_router.request_router


def outcomes(router, seconds=20.0):
    """Whether each of the calls that have ended went well, once all have."""
    wait_for(lambda: router.calls.book.open_calls == 0, seconds, "all calls have ended in the book")
    message = asyncio.run_coroutine_threadsafe(report(router), router.loop).result(10)
    return [outcome.ok for view in message.replicas for outcome in view.outcomes]


async def report(router):
    from shadecast.inbox import Inbox  # noqa: PLC0415

    read, _ = Inbox().take(router.make_report(), 0.0)
    return read


def test_calls_that_take_long_keep_no_other_one_waiting(model, tmp_path):
    """A router that waits for an answer routes nothing else meanwhile."""
    router_of(model)
    slow = [model.until.remote(str(tmp_path / "now")) for _ in range(8)]
    quick = [model.answer.remote() for _ in range(8)]
    assert [r.result(timeout_s=30) for r in quick] == [b"x"] * 8
    (tmp_path / "now").touch()
    assert [r.result(timeout_s=60) for r in slow] == ["then"] * 8


def test_more_calls_than_places_wait_and_all_are_answered(model):
    router = router_of(model)
    waiting = [model.answer.remote(1, 0.05) for _ in range(60)]
    assert [r.result(timeout_s=60) for r in waiting] == [b"x"] * 60
    outcomes(router)


def test_one_that_is_cancelled_while_it_waits_takes_no_other_one_along(model):
    router = router_of(model)
    full = [model.answer.remote(1, 2.0) for _ in range(16)]
    given_up, patient = model.answer.remote(1, 0.0), [model.answer.remote() for _ in range(4)]
    time.sleep(0.5)
    given_up.cancel()
    assert [r.result(timeout_s=60) for r in [*full, *patient]] == [b"x"] * 20
    outcomes(router)


def test_errors_of_user_code_are_known_large_answers_are_none_and_what_nobody_reads_ends_too(model):
    router = router_of(model)
    outcomes(router)
    failed = [model.fail.remote() for _ in range(5)]
    for response in failed:
        with pytest.raises(ValueError, match="user code"):
            response.result(timeout_s=60)
    large = [model.answer.remote(2_000_000) for _ in range(5)]
    assert all(len(r.result(timeout_s=60)) == 2_000_000 for r in large)
    unread = [model.answer.remote() for _ in range(5)]
    found = outcomes(router)
    assert found.count(False) == 5
    assert found.count(True) >= 10
    assert len(unread) == 5


def test_cancelled_calls_and_streams_end_in_the_book(model):
    router = router_of(model)
    calls = [model.answer.remote(1, 30.0) for _ in range(5)]
    stream = model.options(stream=True).items.remote(1000)
    assert next(iter(stream)) == 0
    time.sleep(0.5)
    for response in (*calls, stream):
        response.cancel()
    del stream, response, calls  # whoever holds a stream may read on
    gc.collect()
    outcomes(router)
    assert list(model.options(stream=True).items.remote(5)) == list(range(5))
    outcomes(router)


def test_calls_of_a_replica_that_dies_end_in_the_book(model):
    router = router_of(model)
    pid = model.pid.remote().result(timeout_s=60)
    calls = []
    while len(router.calls.book.all_in_flight()) < 2:  # a replica whose queue is not known may get several in a row
        calls.append(model.answer.remote(1, 3.0))
        time.sleep(0.05)
        assert len(calls) < 40
    os.kill(pid, signal.SIGKILL)
    ended = []
    for response in calls:
        try:
            ended.append(response.result(timeout_s=60))
        except (RayActorError, ray.exceptions.RayTaskError):
            ended.append(None)
    assert b"x" in ended
    outcomes(router, 30.0)
