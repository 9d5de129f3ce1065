"""What stands in for Serve's own on Ray before 2.60, tried on whatever Ray is there; `make test-rays` has the rest."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve.exceptions import BackPressureError

from serve_app import ray_api
from tests.serve_app.routing.serve import Replica, in_virtual_time, serving, settle, table


@pytest.fixture(autouse=True)
def own_routing_tasks(monkeypatch):
    monkeypatch.setattr(ray_api.ServeRouter, "_fulfill_pending_requests", ray_api.ServeRouter.route_those_that_wait)


@in_virtual_time
async def test_of_many_that_wait_for_few_places_each_gets_one_in_turn():
    async with serving(Replica("a", max_ongoing_requests=2), Replica("b", max_ongoing_requests=2)) as serve:
        serve.take(table(1, a=1.0, b=1.0))
        callers = [serve.start(i) for i in range(30)]
        ended = set()
        while len(ended) < 30:
            await settle()
            sent = {caller for caller in callers if caller.done()} - ended
            assert len(sent) <= 4, "as many as there are places"
            for caller in sent:
                caller.result().end()
            ended |= sent
            await asyncio.sleep(0.05)
        order = [result.request.args[0] for replica in serve.replicas.values() for result in replica.sent]
        assert sorted(order) == list(range(30)), "each is sent once"


@in_virtual_time
async def test_one_that_is_given_up_takes_no_other_one_along():
    async with serving(Replica("a", max_ongoing_requests=1)) as serve:
        serve.take(table(1, a=1.0))
        first = await serve.send(1)
        hasty, patient = serve.start(2), serve.start(3)
        await asyncio.sleep(0.2)
        hasty.cancel()
        await asyncio.gather(hasty, return_exceptions=True)
        await asyncio.sleep(0.2)
        first.end()
        (await asyncio.wait_for(patient, 5.0)).end()


@in_virtual_time
async def test_without_replicas_requests_wait_until_there_are_some():
    async with serving() as serve:
        waiting = [serve.start(i) for i in range(3)]
        await asyncio.sleep(2.0)
        assert not any(caller.done() for caller in waiting)
        serve.scale(Replica("a"))
        for caller in waiting:
            (await asyncio.wait_for(caller, 5.0)).end()


class Stream:
    """As Ray hands out the objects of an answer: looking ahead waits for nobody, taking does."""

    def _get_next_ref_n(self, count):
        return ["the answer's object"] * count


def test_the_object_of_an_answer_is_known_before_the_answer_and_left_to_the_caller():
    def wait():
        raise AssertionError("this would wait for the answer")

    unread = SimpleNamespace(_obj_ref_gen=Stream(), _obj_ref=None, _is_streaming=False, to_object_ref=wait)
    assert ray_api.object_of(unread) == "the answer's object"
    assert unread._obj_ref is None
    read = SimpleNamespace(_obj_ref_gen=Stream(), _obj_ref="x", _is_streaming=False, to_object_ref=lambda: "x")
    assert ray_api.object_of(read) == "x"


def test_an_answer_by_value_has_no_object():
    def by_value(timeout_s):
        raise AssertionError("never called without a time limit")

    with pytest.raises(RuntimeError, match="no object"):
        ray_api.object_of(SimpleNamespace(to_object_ref=by_value))


@pytest.mark.parametrize("outcome", [None, ValueError("the replica died")])
def test_that_an_answer_is_there_is_known_by_the_end_of_its_stream(outcome):
    told = []
    result = SimpleNamespace(_obj_ref_gen=Stream(), add_done_callback=lambda callback: callback(outcome))
    ray_api.when_ready(result, object(), lambda: told.append("there"), told.append)
    assert told == ([outcome] if outcome else ["there"])


def test_a_rejection_says_when_to_come_back_where_serve_lets_it():
    class Silent(BackPressureError):
        retry_after_s = None

    assert ray_api.retry_after_s(Silent(9, 8)) is None
    assert ray_api.rejecting(1) in ({}, {"backpressure_config": {"retry_after_s": 1}})
