"""Codec of the Open Inference Protocol v2 over gRPC.

Invariants:
1. The same tensors decode to equal arrays over HTTP and gRPC, raw and typed, for every datatype and shape.
2. Whatever message comes in, decoding gives a request or a ProtocolError with status 400 and a reason.
3. Our messages and those of an unmodified client are the same bytes, and live in one process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tritonclient.grpc import service_pb2

from serve_app.gateway import oip
from serve_app.gateway.grpc_messages import DESCRIPTORS, ModelInferRequest, ModelInferResponse, parse
from serve_app.gateway.oip import InferRequest
from serve_app.gateway.oip_grpc import as_json_object, decode_request, encode_response, item_outputs
from serve_app.gateway.tensors import DTYPES, TensorSpec, to_bytes, to_json
from serve_app.protocol_error import ProtocolError

PIXELS = TensorSpec("pixels", "FP32", (-1, 2), finite=True)
DIGIT = TensorSpec("digit", "INT64", (-1,))
FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2.5]}} | changes


def message(*inputs: Any, **more: Any) -> Any:
    return ModelInferRequest(model_name="digits", inputs=inputs, **more)


def refusal(request: Any) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode_request(request, (PIXELS,), (DIGIT,))
    assert caught.value.status == 400
    return caught.value.reason


def test_id_parameters_and_requested_outputs_are_read() -> None:
    parameters = {
        "timeout": {"int64_param": 5}, "mine": {"string_param": "x"}, "flag": {"bool_param": True},
        "half": {"double_param": 0.5}, "priority": {"uint64_param": 2**63},
        "triton_enable_empty_final_response": {"bool_param": True},
    }  # fmt: skip
    request = decode_request(
        message(tensor(), id="a-1", parameters=parameters, outputs=[{"name": "digit"}]), (PIXELS,), (DIGIT,)
    )
    assert request.id == "a-1"
    assert request.parameters == {"timeout": 5, "mine": "x", "flag": True, "half": 0.5, "priority": 2**63}
    assert request.outputs is not None
    assert [output.name for output in request.outputs] == ["digit"]
    assert request.inputs["pixels"].tolist() == [[1.0, 2.5]]


def arrays_of(datatype: str) -> st.SearchStrategy[Any]:
    shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    if datatype == "BYTES":
        return shapes.flatmap(texts)
    return npst.arrays(DTYPES[datatype], shapes)


def texts(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    count = int(np.prod(shape, dtype=int))
    items = st.lists(st.text(max_size=5).map(str.encode), min_size=count, max_size=count)

    def filled(values: list[bytes]) -> Any:
        array = np.empty(count, dtype=object)
        array[:] = values
        return array.reshape(shape)

    return items.map(filled)


def same(one: Any, other: Any) -> bool:
    equal_nan = one.dtype.kind == "f"
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other, equal_nan=equal_nan)


@given(st.sampled_from(list(DTYPES)).flatmap(lambda name: st.tuples(st.just(name), arrays_of(name))))
def test_the_same_tensor_decodes_to_equal_arrays_over_http_and_grpc(given_: tuple[str, Any]) -> None:
    datatype, array = given_
    announced = {"name": "x", "datatype": datatype, "shape": list(array.shape)}
    raw = to_bytes(array)
    header = json.dumps({"inputs": [announced | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    found = [
        oip.decode_request(header + raw, str(len(header))).inputs["x"],
        decode_request(message(announced, raw_input_contents=[raw])).inputs["x"],
    ]
    if datatype in FIELDS:
        contents = {FIELDS[datatype]: array.ravel().tolist()}
        found.append(decode_request(message(announced | {"contents": contents})).inputs["x"])
    if array.dtype.kind not in "fV" or (array.dtype.kind == "f" and np.isfinite(array).all()):
        body = json.dumps({"inputs": [announced | {"data": to_json("x", array)}]}).encode()
        found.append(oip.decode_request(body).inputs["x"])
    wanted = found[0] if datatype == "BF16" else array  # numpy has no BF16: it arrives as 32-bit floats
    assert all(same(each, wanted) for each in found)


@given(st.sampled_from(list(DTYPES)).flatmap(arrays_of))
def test_what_is_encoded_is_what_an_unmodified_client_reads(array: Any) -> None:
    encoded = encode_response(InferRequest({}, id="q"), {"y": array}, "m", "1").SerializeToString()
    result = triton.InferResult(service_pb2.ModelInferResponse.FromString(encoded))
    read = result.as_numpy("y")
    assert result.get_response().id == "q"
    if array.dtype.kind == "O":
        assert read.ravel().tolist() == array.ravel().tolist()
    elif array.dtype == DTYPES["BF16"]:
        assert (read.shape, read.tobytes()) == (array.shape, array.tobytes())
    else:
        assert same(read, array)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (message(), "at least one tensor"),
        (message(tensor(name="")), "'name' of an input"),
        (message(tensor(name="x" * 300)), "'name' of an input"),
        (message(tensor(name="other")), "unknown input 'other'"),
        (message(tensor(), tensor()), "given twice"),
        (message(tensor(datatype="FP31")), "datatype 'FP31' is not one of"),
        (message(tensor(datatype="")), "datatype '' is not one of"),
        (message(tensor(datatype="FP64")), "the model takes FP32"),
        (message(tensor(shape=[2])), r"shape is [2], the model takes [-1, 2]"),
        (message(tensor(shape=[-1, 2])), "must be a whole number from 0"),
        (message(tensor(shape=[2**62, 2])), "must be a whole number from 0"),
        (message(tensor(shape=[2**40, 2])), "2 elements, but shape"),
        (message(tensor(shape=[1] * 40)), "at most 32 sizes"),
        (message(tensor(contents={})), "0 elements, but shape [1, 2] needs 2"),
        (message(tensor(contents={"fp32_contents": [1]})), "1 elements, but shape [1, 2] needs 2"),
        (message(tensor(contents={"fp64_contents": [1, 2]})), "holds fp64_contents, but FP32 takes fp32_contents"),
        (message(tensor(contents={"fp32_contents": [1, 2], "int_contents": [1]})), "holds int_contents"),
        (message(tensor(contents={"fp32_contents": [1, np.nan]})), "holds NaN or infinity"),
        (message(tensor(), raw_input_contents=[b"12345678"]), "both 'contents' and 'raw_input_contents'"),
        (message(tensor(contents={}), raw_input_contents=[b"1234567"]), "needs 8 bytes"),
        (message(tensor(contents={}), raw_input_contents=[b"12345678", b""]), "2 entries for 1 inputs"),
        (message(tensor(parameters={"x": {}})), "parameter 'x' of input 'pixels' has no value"),
        (message(tensor(parameters={"shared_memory_region": {"string_param": "r"}})), "does not offer that extension"),
        (message(tensor(), outputs=[{"name": "other"}]), "unknown output 'other'; the model gives 'digit'"),
        (message(tensor(), outputs=[{"name": "digit", "parameters": {"shared_memory_region": {"string_param": "r"}}}]),
         "does not offer that extension"),
        (message(*[tensor(name=str(i)) for i in range(300)]), "at most 256 are taken"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_refused_with_the_reason(request_: Any, reason: str) -> None:
    assert reason in refusal(request_)


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [("INT8", "int_contents", 128), ("INT16", "int_contents", -32769), ("UINT8", "uint_contents", 256)],
)
def test_a_number_that_does_not_fit_into_the_type_is_refused(datatype: str, field: str, value: int) -> None:
    entry = {"name": "x", "datatype": datatype, "shape": [1], "contents": {field: [value]}}
    with pytest.raises(ProtocolError, match=f"does not fit into {datatype}"):
        decode_request(message(entry))


@pytest.mark.parametrize("datatype", ["INT8", "UINT64", "FP32", "BYTES"])
def test_long_typed_contents_are_read_whole_and_in_order(datatype: str) -> None:
    numbers = [number % 100 for number in range(150_001)]
    contents = [str(number).encode() for number in numbers] if datatype == "BYTES" else numbers
    entry = {"name": "x", "datatype": datatype, "shape": [150_001], "contents": {FIELDS[datatype]: contents}}
    assert decode_request(message(entry)).inputs["x"].tolist() == contents


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_is_sent_raw(datatype: str) -> None:
    entry = {"name": "x", "datatype": datatype, "shape": [1], "contents": {"fp32_contents": [1]}}
    with pytest.raises(ProtocolError, match="send it in 'raw_input_contents'"):
        decode_request(message(entry))


def test_a_model_that_streams_gets_the_tensors_as_an_object() -> None:
    contents = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": ["hé".encode()]}},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1], "contents": {"int_contents": [5]}},
        {"name": "stop", "datatype": "BYTES", "shape": [2], "contents": {"bytes_contents": [b"a", b"b"]}},
    ]
    request = decode_request(message(*contents, id="q", parameters={"heat": {"double_param": 0.5}}))
    assert as_json_object(request) == {
        "text_input": "hé", "max_tokens": 5, "stop": ["a", "b"], "id": "q", "parameters": {"heat": 0.5}
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("text", b"\xff"), ("id", b"x"), ("parameters", b"x")])
def test_tensors_that_make_no_object_are_refused(name: str, value: bytes) -> None:
    entry = {"name": name, "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [value]}}
    with pytest.raises(ProtocolError) as caught:
        as_json_object(decode_request(message(entry)))
    assert caught.value.status == 400


def test_items_of_a_stream_become_tensors() -> None:
    item = {"text": "hé", "raw": b"\0\xff\0", "n": 3, "p": 0.5, "ok": True, "many": [1, 2], "usage": {"tokens": 5}}
    read = {name: array.tolist() for name, array in item_outputs(item).items()}
    assert read == {
        "text": ["hé"], "raw": [b"\0\xff\0"], "n": [3], "p": [0.5], "ok": [True], "many": [1, 2],
        "usage": ['{"tokens": 5}'],
    }  # fmt: skip
    assert item_outputs("word")["text_output"].tolist() == ["word"]
    encode_response(InferRequest({}), item_outputs(item), "m", "1")


@pytest.mark.parametrize("item", [3, None, {"x": object()}, {"x": {"y": float("nan")}}])
def test_an_item_that_cannot_be_carried_is_the_models_failure(item: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        item_outputs(item)
    assert caught.value.status == 500


VALID = message(
    tensor(parameters={"a": {"string_param": "b"}}), id="q", parameters={"timeout": {"int64_param": 5}},
    outputs=[{"name": "digit"}],
).SerializeToString()  # fmt: skip


@given(
    st.binary(max_size=80)
    | st.builds(
        lambda at, piece, drop: VALID[: at % len(VALID)] + piece + VALID[at % len(VALID) + drop :],
        st.integers(0, 500), st.binary(max_size=4), st.integers(0, 4),
    )
)  # fmt: skip
def test_damaged_messages_give_a_request_or_a_reason(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_request(parse(ModelInferRequest, body), (PIXELS,), (DIGIT,))
        return
    with pytest.raises(ProtocolError) as caught:
        decode_request(parse(ModelInferRequest, body), (PIXELS,), (DIGIT,))
    assert caught.value.status == 400
    assert caught.value.reason


def test_our_messages_are_those_of_an_unmodified_client() -> None:
    theirs = service_pb2.ModelInferRequest.FromString(VALID)
    assert theirs.SerializeToString(deterministic=True) == parse(ModelInferRequest, VALID).SerializeToString(
        deterministic=True
    )
    for name, ours in {"ModelInferRequest": ModelInferRequest, "ModelInferResponse": ModelInferResponse}.items():
        fields = [(f.number, f.name, f.type) for f in ours.DESCRIPTOR.fields]
        assert fields == [(f.number, f.name, f.type) for f in getattr(service_pb2, name).DESCRIPTOR.fields]


@pytest.mark.parametrize(
    "order",
    ["serve_app.gateway.grpc_messages, tritonclient.grpc", "tritonclient.grpc, serve_app.gateway.grpc_messages"],
)
def test_the_messages_and_a_client_live_in_one_process_whichever_comes_first(order: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {order}"], check=True, timeout=60)


def test_the_descriptors_are_compiled_from_the_published_files(tmp_path: Path) -> None:
    made = tmp_path / "made.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "--include_imports"]
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [*command, f"--descriptor_set_out={made}", "grpc_service.proto"], check=True, cwd=DESCRIPTORS.parent, timeout=60
    )
    assert made.read_bytes() == DESCRIPTORS.read_bytes(), "run `make protos`"
