"""The gRPC service with an unmodified client, over real gRPC on loopback. No Ray cluster: handles are plain objects."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serve_app.gateway.codec import OFF_LOOP_ELEMENTS
from serve_app.gateway.grpc_messages import ModelInferRequest
from serve_app.gateway.model_server import Refusal
from serve_app.gateway.tensors import TensorSpec
from tests.serve_app.gateway.gateway_fakes import INFO, FakeHandle, call, grpc_client, make_app

DIGIT = {"digit": np.array([7])}
INFER = "/inference.GRPCInferenceService/ModelInfer"
BOTH = replace(INFO, outputs=(TensorSpec("digit", "INT64", (-1,)), TensorSpec("text", "BYTES", (-1,))))
STREAMS = replace(INFO, name="words", inputs=(), outputs=(), infers=False)
ONE_BY_ONE = replace(INFO, generates=False)


def pixels(rows: int = 1) -> triton.InferInput:
    tensor = triton.InferInput("pixels", [rows, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, 2), np.float32))
    return tensor


def text(value: str = "?") -> triton.InferInput:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], object))
    return tensor


def run(talk: Callable[[Any, Any], Any], handle: FakeHandle, **changes: Any) -> Any:
    async def conversation() -> Any:
        async with grpc_client(handle, **changes) as (client, api):
            answer = await talk(client, api)
        assert api.bodies.held_bytes == 0
        return answer

    return asyncio.run(asyncio.wait_for(conversation(), 30.0))


def refused(talk: Callable[[Any, Any], Any], handle: FakeHandle, **changes: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        run(talk, handle, **changes)
    return caught.value


def test_an_inference_comes_back_with_its_id() -> None:
    handle = FakeHandle(DIGIT)
    answer = run(lambda client, _: client.infer("digits", [pixels()], request_id="q"), handle)
    assert answer.as_numpy("digit").tolist() == [7]
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("digits", "1", "q")
    ((inputs, parameters, _),) = [args for _, args in handle.calls]
    assert (inputs["pixels"].tolist(), parameters) == ([[1.0, 1.0]], {})


def test_health_and_metadata_are_what_http_says() -> None:
    async def talk(client: Any, _: Any) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("digits")
        assert await client.is_model_ready("digits", "1")
        assert not await client.is_model_ready("digits", "2")
        assert not await client.is_model_ready("other")
        server = await client.get_server_metadata(as_json=True)
        assert server["name"] == "shadecast"
        model = await client.get_model_metadata("digits", as_json=True)
        assert model["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": ["-1", "2"]}]
        config = (await client.get_model_config("digits")).config
        assert (config.input[0].data_type, list(config.input[0].dims)) == (11, [-1, 2])
        assert [output.data_type for output in config.output] == [9, 13]  # TYPE_INT64, TYPE_STRING
        assert not config.model_transaction_policy.decoupled  # it has an infer, too
        index = await client.get_model_repository_index(as_json=True)
        assert index["models"] == [{"name": "digits", "version": "1", "state": "READY"}]

    run(talk, FakeHandle(DIGIT), info=BOTH)


def test_without_a_replica_nothing_is_ready_and_the_server_lives() -> None:
    async def none() -> bool:
        return False

    async def talk(client: Any, _: Any) -> list[bool]:
        index = await client.get_model_repository_index()
        assert index.models[0].state == "UNAVAILABLE"
        return [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("digits")]

    assert run(talk, FakeHandle(DIGIT), ready=none) == [True, False, False]


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (Refusal("too many rows"), "INVALID_ARGUMENT", "too many rows"),
        (Refusal("no word '\ud83d'"), "INVALID_ARGUMENT", r"no word '\ud83d'"),
        (RuntimeError("broken"), "INTERNAL", "the model failed: RuntimeError: broken"),
        (ActorDiedError(), "UNAVAILABLE", "the request was lost"),
        (BackPressureError(9, 8), "UNAVAILABLE", "all replicas are full"),
        ({"digit": np.zeros(1, np.complex64)}, "INTERNAL", "the protocol cannot carry"),
        ({"other": np.zeros(1)}, "INVALID_ARGUMENT", "unknown output 'digit'"),
        (RuntimeError("é" * 3000), "INTERNAL", "the model failed"),
    ],
)
def test_failures_have_the_code_of_their_http_status(answer: Any, code: str, reason: str) -> None:
    wanted = [triton.InferRequestedOutput("digit")]
    error = refused(lambda client, _: client.infer("digits", [pixels()], outputs=wanted), FakeHandle(answer))
    assert error.status() == f"StatusCode.{code}"
    assert reason in error.message()


@pytest.mark.parametrize(
    ("asked", "code", "reason"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "unknown model 'other'"),
        ({"model_name": "digits", "model_version": "9"}, "NOT_FOUND", "unknown version '9'"),
        ({"model_name": "digits", "timeout": -1}, "INVALID_ARGUMENT", "parameter 'timeout'"),
        ({"model_name": "digits", "headers": {"x-session-id": "a" * 600}}, "INVALID_ARGUMENT", "x-session-id"),
        ({"model_name": "digits", "inputs": [pixels(2000)]}, "RESOURCE_EXHAUSTED", "larger than 10000 bytes"),
    ],
)
def test_wrong_requests_never_reach_the_model(asked: dict[str, Any], code: str, reason: str) -> None:
    handle = FakeHandle(DIGIT)
    arguments = {"inputs": [pixels()]} | asked
    error = refused(lambda client, _: client.infer(**arguments), handle, max_body_bytes=10_000)
    assert (error.status(), handle.calls) == (f"StatusCode.{code}", [])
    assert reason in error.message()


def test_bodies_of_all_protocols_share_one_limit() -> None:
    async def talk(client: Any, api: Any) -> None:
        with api.bodies.hold(9_990):
            await client.infer("digits", [pixels()])

    error = refused(talk, FakeHandle(DIGIT), max_body_bytes=10_000, max_total_body_bytes=10_000)
    assert error.status() == "StatusCode.UNAVAILABLE"


@pytest.mark.parametrize("key", ["x-session-id", "x_session_id", "session_id"])
def test_the_session_is_read_from_metadata(key: str) -> None:
    handle = FakeHandle(DIGIT)
    run(lambda client, _: client.infer("digits", [pixels()], headers={key: "s1"}), handle)
    assert handle.calls[0][0]["session_id"] == "s1"


def test_the_clients_deadline_is_carried_to_the_model() -> None:
    handle = FakeHandle(DIGIT)

    async def talk(client: Any, _: Any) -> None:
        await client.infer("digits", [pixels()], client_timeout=20.0)
        await client.infer("digits", [pixels()], client_timeout=20.0, timeout=5_000_000)
        await client.infer("digits", [pixels()])

    run(talk, handle)
    with_deadline, with_both, with_none = [args[2] for _, args in handle.calls]
    assert with_deadline == pytest.approx(20.0, abs=5.0)
    assert with_both == pytest.approx(5.0)
    assert with_none == pytest.approx(60.0)


def test_no_answer_before_the_deadline_is_deadline_exceeded_and_the_call_is_cancelled() -> None:
    handle = FakeHandle(lambda *_: asyncio.Event().wait())
    error = refused(lambda client, _: client.infer("digits", [pixels()], timeout=20_000), handle)
    assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert "no answer within 0.02 s" in error.message()
    assert handle.responses[0].cancelled


async def until_cancelled(cancelled: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()


def test_a_client_that_leaves_cancels_its_call() -> None:
    left = asyncio.Event()
    handle = FakeHandle(lambda *_: until_cancelled(left))

    async def talk(client: Any, _: Any) -> None:
        answer = asyncio.create_task(client.infer("digits", [pixels()]))
        while not handle.responses:
            await client.is_server_live()
        answer.cancel()
        await left.wait()

    run(talk, handle)
    assert handle.responses[0].cancelled


async def ask(client: Any, *requests: dict[str, Any], **options: Any) -> list[Any]:
    """Answers of one stream with these requests: results, or the texts of errors."""

    async def sent() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield request

    answers = []
    async for result, error in client.stream_infer(sent(), **options):
        answers.append(error.message() if error else result)
    return answers


def test_a_streams_requests_are_answered_in_order_and_an_error_ends_only_its_request() -> None:
    handle = FakeHandle({"digit": np.array([1])}, RuntimeError("broken"), {"digit": np.array([3])})
    requests = [{"model_name": name, "inputs": [pixels()]} for name in ("digits", "other", "digits", "digits")]
    first, unknown, failed, last = run(lambda client, _: ask(client, *requests), handle, info=ONE_BY_ONE)
    assert [first.as_numpy("digit").tolist(), last.as_numpy("digit").tolist()] == [[1], [3]]
    assert "unknown model 'other'" in unknown
    assert failed == "the model failed: RuntimeError: broken"


def test_an_error_in_a_stream_names_its_request() -> None:
    requests = [service_pb2.ModelInferRequest(model_name=name, id=name) for name in ("other", "digits")]

    async def talk(client: Any, _: Any) -> list[str]:
        send = service_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelStreamInfer
        return [answer.infer_response.id async for answer in send(iter(requests)) if answer.error_message]

    assert run(talk, FakeHandle(DIGIT), info=ONE_BY_ONE) == ["other", "digits"]


def test_a_streams_session_and_deadline_hold_for_each_of_its_requests() -> None:
    handle = FakeHandle(DIGIT)
    request = {"model_name": "digits", "inputs": [pixels()]}
    options = {"headers": {"x-session-id": "s1"}, "stream_timeout": 20.0}
    run(lambda client, _: ask(client, request, request, **options), handle, info=ONE_BY_ONE)
    assert [given["session_id"] for given, _ in handle.calls] == ["s1", "s1"]
    assert [args[2] for _, args in handle.calls] == pytest.approx([20.0, 20.0], abs=5.0)


async def words(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def texts(answers: list[Any]) -> list[Any]:
    return [answer if isinstance(answer, str) else answer.as_numpy("text_output")[0].decode() for answer in answers]


def test_a_model_that_generates_answers_a_request_with_its_items() -> None:
    handle = FakeHandle(lambda *_: words("one ", {"text_output": "two", "tokens": 2}))
    request = {"model_name": "words", "inputs": [text("hi")], "request_id": "q", "parameters": {"heat": 0.5}}
    answers = run(lambda client, _: ask(client, request, request), handle, info=STREAMS)
    assert texts(answers) == ["one ", "two"] * 2
    assert answers[1].as_numpy("tokens").tolist() == [2]
    assert answers[0].get_response().id == "q"
    assert handle.calls[0][1] == ({"text_input": "hi", "id": "q", "parameters": {"heat": 0.5}},)


def test_a_streams_responses_have_of_the_requested_outputs_what_their_item_has() -> None:
    handle = FakeHandle(lambda *_: words("one ", {"text_output": "two", "tokens": 2}, {"usage": 5}))

    def asked(*names: str) -> list[Any]:
        outputs = [triton.InferRequestedOutput(name) for name in names]
        request = {"model_name": "words", "inputs": [text()], "outputs": outputs}
        answers: list[Any] = run(lambda client, _: ask(client, request), handle, info=STREAMS)
        return [
            answer if isinstance(answer, str) else [each.name for each in answer.get_response().outputs]
            for answer in answers
        ]

    assert asked("text_output", "tokens") == [["text_output"], ["text_output", "tokens"]]
    assert asked("usage", "other") == [["usage"]]
    assert asked("other") == ["unknown output 'other'; the model gave 'usage'"]


@pytest.mark.parametrize("outputs", [(), ("text_output",)])
def test_the_end_of_a_generation_is_said_where_it_is_asked_for(outputs: tuple[str, ...]) -> None:
    handle = FakeHandle(lambda *_: words("one"))
    asked = service_pb2.ModelInferRequest(model_name="words", inputs=[text()._get_tensor()])
    asked.raw_input_contents.append(text()._get_content())
    asked.parameters["triton_enable_empty_final_response"].bool_param = True
    asked.outputs.extend(service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)

    async def talk(client: Any, _: Any) -> list[Any]:
        send = service_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelStreamInfer
        return [answer.infer_response async for answer in send(iter([asked]))]

    answers = run(talk, handle, info=STREAMS)
    assert [answer.parameters["triton_final_response"].bool_param for answer in answers] == [False, True]
    assert not answers[1].outputs
    assert "parameters" not in handle.calls[0][1][0]


def test_a_generation_that_breaks_ends_with_its_error_and_the_stream_goes_on() -> None:
    handle = FakeHandle(lambda *_: words("one", RuntimeError("broken")), lambda *_: words("two"))
    request = {"model_name": "words", "inputs": [text()]}
    answers = run(lambda client, _: ask(client, request, request), handle, info=STREAMS)
    assert texts(answers) == ["one", "the model failed: RuntimeError: broken", "two"]


def test_a_generation_whose_client_leaves_is_cancelled() -> None:
    left = asyncio.Event()

    async def endless() -> AsyncIterator[str]:
        yield "one"
        await until_cancelled(left)

    handle = FakeHandle(lambda *_: endless())

    async def talk(client: Any, _: Any) -> None:
        async def sent() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "words", "inputs": [text()]}
            await asyncio.Event().wait()

        answers = client.stream_infer(sent())
        assert texts([(await anext(answers))[0]]) == ["one"]
        answers.cancel()
        await left.wait()

    run(talk, handle, info=STREAMS)
    assert handle.responses[0].cancelled


def test_a_model_without_infer_says_which_rpc_to_call() -> None:
    error = refused(lambda client, _: client.infer("words", [text()]), FakeHandle(DIGIT), info=STREAMS)
    assert (error.status(), "ModelStreamInfer" in error.message()) == ("StatusCode.INVALID_ARGUMENT", True)


def test_methods_that_are_not_offered_are_unimplemented() -> None:
    error = refused(lambda client, _: client.load_model("digits"), FakeHandle(DIGIT))
    assert error.status() == "StatusCode.UNIMPLEMENTED"


def test_long_typed_contents_are_decoded_and_refused_like_short_ones() -> None:
    handle = FakeHandle(DIGIT)

    async def talk(client: Any, _: Any) -> None:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelInfer
        asked = service_pb2.ModelInferRequest(model_name="digits")
        tensor = asked.inputs.add(name="pixels", datatype="FP32", shape=[50_000, 2])
        tensor.contents.fp32_contents.extend(range(100_000))
        await infer(asked)
        tensor.contents.fp32_contents[-1] = float("nan")
        call = infer(asked)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(talk, handle)
    ((inputs, _, _),) = [args for _, args in handle.calls]
    assert np.array_equal(inputs["pixels"].ravel(), np.arange(100_000))


def test_long_text_arrives_whole() -> None:
    words = [str(number).encode() for number in range(20_000)]
    tensor = triton.InferInput("text_input", [20_000], "BYTES")
    tensor.set_data_from_numpy(np.array(words, object))
    handle = FakeHandle(lambda inputs, *_: {"text": inputs["text_input"]})
    model = replace(INFO, inputs=(), outputs=(), generates=False)
    answer = run(lambda client, _: client.infer("digits", [tensor]), handle, info=model)
    assert answer.as_numpy("text").tolist() == words


def test_a_sequence_is_a_session_where_no_session_is_named() -> None:
    handle = FakeHandle(DIGIT)

    async def talk(client: Any, _: Any) -> None:
        await client.infer("digits", [pixels()], sequence_id=42)
        await client.infer("digits", [pixels()], sequence_id="words")
        await client.infer("digits", [pixels()], sequence_id=42, headers={"x-session-id": "s1"})

    run(talk, handle)
    assert [given["session_id"] for given, _ in handle.calls] == ["42", "words", "s1"]


def test_the_highest_classes_of_an_output_are_given_where_they_are_asked_for() -> None:
    wanted = [triton.InferRequestedOutput("digit", class_count=2)]
    handle = FakeHandle({"digit": np.array([3, 9, 5])})
    answer = run(lambda client, _: client.infer("digits", [pixels()], outputs=wanted), handle)
    assert answer.as_numpy("digit").tolist() == [b"9:1", b"5:2"]


def test_classes_of_many_values_are_made_off_the_loop() -> None:
    threads: list[threading.Thread] = []

    class Watched(np.ndarray):
        def reshape(self, *shape: Any, **order: Any) -> Any:
            threads.append(threading.current_thread())
            return super().reshape(*shape, **order)

    wanted = [triton.InferRequestedOutput("digit", class_count=1)]
    for size in (10, OFF_LOOP_ELEMENTS):
        handle = FakeHandle({"digit": np.arange(size).view(Watched)})
        answer = run(lambda client, _: client.infer("digits", [pixels()], outputs=wanted), handle)
        assert answer.as_numpy("digit").tolist() == [b"%d:%d" % (size - 1, size - 1)]
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_statistics_count_the_requests_of_both_protocols() -> None:
    handle = FakeHandle(DIGIT, RuntimeError("broken"), DIGIT)

    async def talk(client: Any, api: Any) -> Any:
        await client.infer("digits", [pixels()])
        with pytest.raises(InferenceServerException):
            await client.infer("digits", [pixels()])
        body = b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}'
        assert (await call(make_app(api), "POST", "/v2/models/digits/infer", [], body))[0] == 200
        return (await client.get_inference_statistics("digits")).model_stats[0]

    counted = run(talk, handle)
    assert (counted.name, counted.inference_count) == ("digits", 2)
    assert (counted.inference_stats.success.count, counted.inference_stats.fail.count) == (2, 1)


def test_both_protocols_hand_the_model_the_same_arguments() -> None:
    handle = FakeHandle(DIGIT)

    async def talk(client: Any, api: Any) -> None:
        await client.infer("digits", [pixels()], parameters={"mine": 1})
        body = b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}], "parameters": '
        path = "/v2/models/digits/infer"
        status, _, _ = await call(make_app(api), "POST", path, [(b"x-session-id", b"")], body + b'{"mine": 1}}')
        assert status == 200

    run(talk, handle)
    (over_grpc, over_http) = handle.calls
    assert over_grpc[0] == over_http[0] == {"method_name": "infer"}
    assert np.array_equal(over_grpc[1][0]["pixels"], over_http[1][0]["pixels"])
    assert over_grpc[1][1:] == over_http[1][1:]


VALID = ModelInferRequest(
    model_name="digits", inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 2]}], raw_input_contents=[bytes(8)]
).SerializeToString()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            lambda at, piece, drop: VALID[: at % len(VALID)] + piece + VALID[at % len(VALID) + drop :],
            st.integers(0, 500), st.binary(max_size=4), st.integers(0, 4),
        ),
        min_size=10, max_size=10,
    )
)  # fmt: skip
def test_damaged_messages_are_never_an_internal_error(bodies: list[bytes]) -> None:
    allowed = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)

    async def talk(client: Any, _: Any) -> None:
        send = client._channel.unary_unary(INFER)
        for body in bodies:
            answer = send(body)
            assert await answer.code() in allowed
            assert await answer.code() == grpc.StatusCode.OK or await answer.details()

    run(talk, FakeHandle(DIGIT))
