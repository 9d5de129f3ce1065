"""How calls to the model end: answers, retries, refusals, deadlines. No Ray cluster: handles are plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.gateway.model_call import CallOptions, ModelCaller
from serve_app.gateway.model_server import Refusal
from serve_app.protocol_error import ProtocolError
from shadecast.budget import Budget
from tests.serve_app.gateway.gateway_fakes import Clock, FakeHandle, FakeResponse, FullResponse, make_caller

OPTIONS = CallOptions(timeout_s=30.0)
DIED = ActorDiedError()
UNREACHABLE = ActorUnavailableError("gone", b"\0" * 16)
ANSWER = {"digit": 3}


def infer(caller: ModelCaller, options: CallOptions = OPTIONS) -> Any:
    return asyncio.run(caller.infer({"pixels": 1}, {}, options))


def refusal(caller: ModelCaller, options: CallOptions = OPTIONS) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        infer(caller, options)
    return caught.value


def from_model(cause: Exception) -> Exception:
    """As Serve hands on what a replica raised."""
    return RayTaskError("infer", "Traceback (most recent call last): secret path", cause).as_instanceof_cause()


def test_an_answer_comes_back_as_it_is() -> None:
    assert infer(make_caller(FakeHandle(ANSWER))) == ANSWER


def test_the_call_carries_method_session_model_and_the_time_left() -> None:
    handle = FakeHandle(ANSWER)
    infer(make_caller(handle), CallOptions(timeout_s=7.0, session_id="s", multiplexed_model_id="m"))
    options, args = handle.calls[0]
    assert options == {"method_name": "infer", "session_id": "s", "multiplexed_model_id": "m"}
    assert args == ({"pixels": 1}, {}, 7.0)


@pytest.mark.parametrize("lost", [DIED, UNREACHABLE])
def test_a_request_whose_replica_is_lost_is_answered_by_another(lost: Exception) -> None:
    handle = FakeHandle(lost, ANSWER)
    caller = make_caller(handle)
    assert infer(caller) == ANSWER
    assert len(handle.calls) == 2
    assert caller.retried == 1


def test_a_request_is_retried_once_and_then_given_up() -> None:
    handle = FakeHandle(DIED)
    error = refusal(make_caller(handle))
    assert (error.status, error.headers) == (503, {"Retry-After": "1"})
    assert len(handle.calls) == 2


def test_a_model_that_is_not_safe_to_repeat_is_never_called_twice() -> None:
    handle = FakeHandle(DIED)
    assert refusal(make_caller(handle, safe_to_repeat=False)).status == 503
    assert len(handle.calls) == 1


def test_without_budget_a_lost_request_is_not_retried() -> None:
    handle = FakeHandle(DIED)
    caller = make_caller(handle, budget=Budget(0.0, burst=100.0, initial=0.0))
    assert refusal(caller).status == 503
    assert len(handle.calls) == 1


def test_retries_stay_within_a_fifth_when_everything_dies() -> None:
    handle = FakeHandle(DIED)
    caller = make_caller(handle, budget=Budget(0.2, burst=100.0, initial=0.0, per_s=0.5))
    for _ in range(100):
        refusal(caller)
    assert len(handle.calls) <= 120


def test_a_retry_has_only_the_time_that_is_left() -> None:
    clock = Clock()

    def die_after_20_s(*_: Any) -> Exception:
        clock.now_s += 20.0
        return DIED

    handle = FakeHandle(die_after_20_s, ANSWER)
    infer(make_caller(handle, clock))
    assert [args[2] for _, args in handle.calls] == [30.0, 10.0]


def test_an_actor_error_that_the_model_itself_met_is_a_failure_not_a_loss() -> None:
    handle = FakeHandle(from_model(ActorDiedError()))
    assert refusal(make_caller(handle)).status == 500
    assert len(handle.calls) == 1


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (from_model(ValueError("bad weights\nsecond line")), 500, "the model failed: ValueError: bad weights"),
        (from_model(KeyError("x")), 500, "the model failed: KeyError: 'x'"),
        (from_model(TimeoutError()), 504, "did not answer in time"),
        (BackPressureError(9, 8), 503, "all replicas are full"),
        (from_model(BackPressureError(9, 8)), 503, "all replicas are full"),
        (DeploymentUnavailableError(DeploymentID("m", "a")), 503, "deployment failed"),
        (RuntimeError("handle broke"), 500, "RuntimeError: handle broke"),
    ],
)
def test_failures_have_a_status_and_a_reason_without_a_traceback(raised: Exception, status: int, reason: str) -> None:
    error = refusal(make_caller(FakeHandle(raised)))
    assert error.status == status
    assert reason in error.reason
    assert "secret path" not in error.reason
    assert "second line" not in error.reason
    assert ("Retry-After" in error.headers) == (status == 503)


def test_back_pressure_names_serves_own_waiting_time() -> None:
    raised = BackPressureError(9, 8, retry_after_s=7.0)
    assert refusal(make_caller(FakeHandle(raised))).headers == {"Retry-After": "7"}


def test_input_that_the_model_refuses_is_the_clients_error() -> None:
    error = refusal(make_caller(FakeHandle(Refusal("pixels: too many rows"))))
    assert (error.status, error.reason) == (400, "pixels: too many rows")


def test_a_model_that_never_answers_ends_as_504_and_is_cancelled() -> None:
    handle = FakeHandle(lambda *_: asyncio.Event().wait())
    error = refusal(make_caller(handle), CallOptions(timeout_s=0.02))
    assert error.status == 504
    assert "0.02 s" in error.reason
    assert handle.responses[0].cancelled


class StartingHandle(FakeHandle):
    """Takes requests after .1 s, or as told."""

    def __init__(self, after_s: float = 0.1) -> None:
        super().__init__()
        self._after_s = after_s

    def options(self, **_: Any) -> FakeHandle:
        return self

    def remote(self, *_: Any) -> Any:
        response = FakeResponse(ANSWER)
        response._fetch_future_result_async = lambda: asyncio.sleep(self._after_s)  # type: ignore[attr-defined]
        self.responses.append(response)
        return response


@pytest.mark.parametrize(
    ("looks", "after_s", "answered"),
    [([True, False], 0.5, True), ([False], 9.0, False), ([True, False, False], 9.0, False)],
)
def test_once_the_first_replica_runs_requests_have_their_usual_time_anew(
    looks: list[bool], after_s: float, answered: bool
) -> None:
    """The controller knows of a replica before the routers do; a request that had waited for it was refused then."""
    left = iter(looks)

    async def may_start() -> bool:
        return next(left)

    caller = make_caller(StartingHandle(after_s), queue_timeout_s=0.2, may_start=may_start)
    if answered:
        assert infer(caller) == ANSWER
    else:
        assert refusal(caller).status == 503


def test_a_request_waits_by_its_own_deadline_while_the_first_replica_starts() -> None:
    async def may_start() -> bool:
        return True

    def starting(after_s: float) -> ModelCaller:
        return make_caller(StartingHandle(after_s), queue_timeout_s=0.02, may_start=may_start)

    assert infer(starting(0.1)) == ANSWER
    assert refusal(starting(30.0), CallOptions(timeout_s=0.1)).status == 504


def test_a_request_does_not_wait_by_its_deadline_where_no_replica_starts() -> None:
    async def may_start() -> bool:
        return False

    assert refusal(make_caller(StartingHandle(30.0), queue_timeout_s=0.02, may_start=may_start)).status == 503


def test_full_replicas_end_as_503_long_before_the_deadline() -> None:
    class FullHandle(FakeHandle):
        def options(self, **_: Any) -> FakeHandle:
            return self

        def remote(self, *_: Any) -> Any:
            self.responses.append(FullResponse(None))
            return self.responses[-1]

    handle = FullHandle()
    error = refusal(make_caller(handle, queue_timeout_s=0.02))
    assert (error.status, error.headers) == (503, {"Retry-After": "1"})
    assert "no replica had room within 0.02 s" in error.reason
    assert handle.responses[0].cancelled


def test_a_request_that_its_replica_gave_up_is_answered_by_another() -> None:
    """Serve reports a call that the replica cancelled as a CancelledError in the caller."""
    assert infer(make_caller(FakeHandle(asyncio.CancelledError(), ANSWER))) == ANSWER


def test_a_client_that_leaves_cancels_its_call_and_nothing_is_retried() -> None:
    async def leave() -> FakeHandle:
        started = asyncio.Event()

        async def work() -> None:
            started.set()
            await asyncio.Event().wait()

        handle = FakeHandle(lambda *_: work())
        task = asyncio.create_task(make_caller(handle).infer({}, {}, OPTIONS))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    handle = asyncio.run(leave())
    assert len(handle.calls) == 1
    assert handle.responses[0].cancelled


# ---------------------------------------------------------------- streams


async def numbers(end: int, error: BaseException | None = None) -> AsyncIterator[str]:
    for number in range(end):
        yield str(number)
    if error is not None:
        raise error


def drain(handle: FakeHandle, options: CallOptions = OPTIONS) -> list[Any]:
    async def run() -> list[Any]:
        stream = await make_caller(handle).stream({}, options)
        try:
            return [item async for item in stream.items()]
        finally:
            stream.close()

    return asyncio.run(run())


def test_a_stream_gives_all_items_in_order() -> None:
    handle = FakeHandle(lambda *_: numbers(3))
    assert drain(handle) == ["0", "1", "2"]
    assert handle.calls[0][0] == {"method_name": "generate", "stream": True}
    assert not handle.responses[0].cancelled


def test_an_empty_stream_is_a_stream() -> None:
    assert drain(FakeHandle(lambda *_: numbers(0))) == []


def test_a_stream_is_retried_before_its_first_item() -> None:
    assert drain(FakeHandle(lambda *_: numbers(0, DIED), lambda *_: numbers(2))) == ["0", "1"]


def test_a_stream_is_never_retried_after_its_first_item() -> None:
    handle = FakeHandle(lambda *_: numbers(1, DIED), lambda *_: numbers(2))
    with pytest.raises(ProtocolError, match="the stream broke off"):
        drain(handle)
    assert len(handle.calls) == 1


def test_a_model_that_fails_before_the_first_item_gives_a_status() -> None:
    with pytest.raises(ProtocolError, match="ValueError: no prompt") as caught:
        drain(FakeHandle(lambda *_: numbers(0, from_model(ValueError("no prompt")))))
    assert caught.value.status == 500


def test_input_that_the_model_refuses_before_the_first_item_is_the_clients_error() -> None:
    async def refuse() -> AsyncIterator[Any]:
        yield Refusal("no prompt")

    with pytest.raises(ProtocolError, match="no prompt") as caught:
        drain(FakeHandle(lambda *_: refuse()))
    assert caught.value.status == 400


def test_a_stream_that_stalls_ends_as_504_and_is_cancelled() -> None:
    async def stall() -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    handle = FakeHandle(lambda *_: stall())
    with pytest.raises(ProtocolError, match=r"no answer within 0\.02 s"):
        drain(handle, CallOptions(timeout_s=0.02))
    assert handle.responses[0].cancelled


def test_a_clients_deadline_holds_for_the_whole_stream() -> None:
    async def run() -> int:
        clock = Clock()

        async def slow() -> AsyncIterator[str]:
            while True:
                clock.now_s += 4.0
                yield "item"
                await asyncio.sleep(0)  # where a deadline that has passed takes hold

        caller = make_caller(FakeHandle(lambda *_: slow()), clock)
        stream = await caller.stream({}, CallOptions(timeout_s=10.0, whole_stream=True))
        got: list[Any] = []

        async def take_all() -> None:
            async for item in stream.items():
                got.append(item)

        with pytest.raises(ProtocolError, match="no answer within 10 s"):
            await take_all()
        stream.close()
        return len(got)

    assert asyncio.run(run()) == 3


def test_a_stream_that_is_left_is_cancelled() -> None:
    async def run() -> FakeHandle:
        handle = FakeHandle(lambda *_: numbers(100))
        stream = await make_caller(handle).stream({}, OPTIONS)
        stream.close()
        return handle

    assert asyncio.run(run()).responses[0].cancelled
