"""Codec of the Open Inference Protocol v2.

Invariants:
1. What is encoded decodes to the same arrays, as JSON and as binary, for every datatype and shape.
2. Whatever bytes come in, decoding gives a request or a ProtocolError with a 4xx status and a reason.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from serve_app.gateway.classification import top_classes
from serve_app.gateway.oip import InferRequest, RequestedOutput, decode_request, encode_response
from serve_app.gateway.tensors import DTYPES, TensorSpec, from_bf16, to_bf16
from serve_app.protocol_error import ProtocolError

PIXELS = TensorSpec("pixels", "FP32", (-1, 2), finite=True)
DIGIT = TensorSpec("digit", "INT64", (-1,))


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5]} | changes


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs)} | more).encode()


def decode(raw: bytes, header_length: str | None = None) -> InferRequest:
    return decode_request(raw, header_length, (PIXELS,), (DIGIT,))


def refusal(raw: bytes, header_length: str | None = None) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decode(raw, header_length)
    assert caught.value.status == 400
    return caught.value


def test_flat_and_nested_data_mean_the_same() -> None:
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        array = decode(body(entry(shape=[2, 2], data=data))).inputs["pixels"]
        assert array.dtype == np.float32
        assert array.tolist() == [[1, 2], [3, 4]]


def test_id_parameters_and_requested_outputs_are_read() -> None:
    raw = body(
        entry(),
        id="a-1",
        parameters={"timeout": 5, "binary_data_output": True, "mine": "x"},
        outputs=[{"name": "digit", "parameters": {"binary_data": False}}],
    )
    request = decode(raw)
    assert request.id == "a-1"
    assert request.parameters["mine"] == "x"
    assert request.binary_by_default
    assert request.outputs == (RequestedOutput("digit", binary=False),)


def test_null_is_what_a_typed_client_leaves_out() -> None:
    nothing = dict.fromkeys(("binary_data", "classification", "shared_memory_region"))
    described = entry(data=None, parameters={"binary_data_size": 8, "shared_memory_offset": None})
    header = body(
        described,
        id=None,
        parameters=dict.fromkeys(("binary_data_output", "timeout", "sequence_id", "mine")),
        outputs=[{"name": "digit", "parameters": nothing}],
    )
    request = decode(header + bytes(8), str(len(header)))
    assert request == InferRequest(request.inputs, outputs=(RequestedOutput("digit", binary=False),))
    data = entry(parameters={"binary_data_size": None})
    assert decode(body(data, outputs=None, parameters=None)).outputs is None


def test_binary_output_by_default_holds_for_requested_outputs_too() -> None:
    raw = body(entry(), parameters={"binary_data_output": True}, outputs=[{"name": "digit"}])
    assert decode(raw).outputs == (RequestedOutput("digit", binary=True),)


def test_a_batch_of_nothing_is_a_batch() -> None:
    assert decode(body(entry(shape=[0, 2], data=[]))).inputs["pixels"].shape == (0, 2)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "not acceptable JSON"),
        (b"{}", "'inputs' must be a list"),
        (body(), "'inputs' must be a list"),
        (body(*[entry()] * 300), "at most 256"),
        (body(3), "must be an object"),
        (body(entry(), entry()), "given twice"),
        (body(entry(name="")), "'name' of an input"),
        (body(entry(name=7)), "'name' of an input"),
        (body(entry(name="x" * 300)), "'name' of an input"),
        (body(entry(name="voxels")), "unknown input 'voxels'; the model takes 'pixels'"),
        (body(entry(datatype="FP8")), "is not one of BOOL"),
        (body(entry(datatype=["FP32"])), "is not one of BOOL"),
        (body(entry(datatype="INT64", data=[1, 2])), "datatype is INT64, the model takes FP32"),
        (body(entry(shape=2)), "'shape' must be a list"),
        (body(entry(shape=[-1, 2])), "must be a whole number from 0"),
        (body(entry(shape=[1.5, 2])), "must be a whole number from 0"),
        (body(entry(shape=[True, 2])), "must be a whole number from 0"),
        (body(entry(shape=[10**30, 2])), "must be a whole number from 0"),
        (body(entry(shape=[2])), "shape is [2], the model takes [-1, 2]"),
        (body(entry(shape=[1, 3], data=[1, 2, 3])), "shape is [1, 3], the model takes [-1, 2]"),
        (body(entry(shape=[2, 2])), "2 elements, but shape [2, 2] needs 4"),
        (body(entry(data=None)), "'data' must be a list"),
        (body(entry(data="abc")), "'data' must be a list"),
        (body(entry(data={"0": 1})), "'data' must be a list"),
        (body(entry(data=[1, "a"])), "data holds strings, but FP32 takes numbers"),
        (body(entry(data=[1, None])), "data holds null"),
        (body(entry(data=[True, 1])), "data holds booleans"),
        (body(entry(data=[[1, 2], [3]])), "does not follow shape"),
        (body(entry(data=[[[1], [2]]])), "nested deeper"),
        (body(entry(data=[[1], [2]])), "does not follow shape"),
        (body(entry(data=[[1, 2], [3, 4]])), "2 rows, but shape [1, 2] needs 1"),
        (body(entry(data=[1, 1e39])), "does not fit into FP32"),
        (body(entry(data=[1, -3.402823466385289e38])), "does not fit into FP32"),
        (b'{"inputs":[{"name":"pixels","datatype":"FP32","shape":[1,2],"data":[1,NaN]}]}', "NaN is not a JSON number"),
        (b'{"inputs":[{"name":"pixels","datatype":"FP32","shape":[1,2],"data":[1,-Infinity]}]}', "not a JSON number"),
        (b'{"inputs":[{"name":"pixels","datatype":"FP32","shape":[1,2],"data":[1,1e999]}]}', "does not fit"),
        (body({k: v for k, v in entry().items() if k != "data"}), "needs 'data'"),
        (body(entry(parameters=[])), "'parameters' of input 'pixels' must be an object"),
        (body(entry(parameters={"shared_memory_region": "r"})), "does not offer that extension"),
        (body(entry(parameters={"binary_data_size": 8})), "both 'data' and 'binary_data_size'"),
        (body(entry(), id=7), "'id' must be a string"),
        (body(entry(), parameters="x"), "'parameters' of the request must be an object"),
        (body(entry(), parameters={"binary_data_output": 1}), "must be true or false"),
        (body(entry(), outputs={}), "'outputs' must be a list"),
        (body(entry(), outputs=["digit"]), "must be an object"),
        (body(entry(), outputs=[{"name": "odds"}]), "unknown output 'odds'; the model gives 'digit'"),
        (body(entry(), outputs=[{"name": "digit", "parameters": {"classification": "3"}}]), "whole number"),
        (body(entry(), outputs=[{"name": "digit", "parameters": {"binary_data": "yes"}}]), "true or false"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(raw: bytes, reason: str) -> None:
    assert reason in refusal(raw).reason


def test_every_missing_input_is_named() -> None:
    specs = (PIXELS, TensorSpec("mask", "BOOL", (-1,)), TensorSpec("scale", "FP64", (1,)))
    with pytest.raises(ProtocolError, match="missing input 'mask', 'scale'"):
        decode_request(body(entry()), None, specs)


def test_without_declared_tensors_any_input_is_taken() -> None:
    request = decode_request(body(entry(name="anything", datatype="INT8", shape=[2], data=[1, -128])))
    assert request.inputs["anything"].tolist() == [1, -128]


# ---------------------------------------------------------------- binary data


def binary(raw: bytes, size: Any = None, **changes: Any) -> tuple[bytes, str]:
    described = entry(parameters={"binary_data_size": len(raw) if size is None else size}, **changes)
    del described["data"]
    header = body(described)
    return header + raw, str(len(header))


def test_binary_input_is_read_in_order_without_a_copy() -> None:
    first, second = np.array([1, 2], "<f4"), np.array([3, 4, 5], "<i2")
    header = json.dumps(
        {
            "inputs": [
                {"name": "a", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
                {"name": "b", "datatype": "BOOL", "shape": [1], "data": [True]},
                {"name": "c", "datatype": "INT16", "shape": [3], "parameters": {"binary_data_size": 6}},
            ]
        }
    ).encode()
    raw = header + first.tobytes() + second.tobytes()
    inputs = decode_request(raw, str(len(header))).inputs
    assert inputs["a"].tolist() == [1, 2]
    assert inputs["b"].tolist() == [True]
    assert inputs["c"].tolist() == [3, 4, 5]
    assert not inputs["a"].flags.owndata


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (binary(b"1234"), "FP32 [1, 2] needs 8 bytes"),
        (binary(b"12345678", size=7), "binary_data_size is 7"),
        (binary(b"12345678", size=9), "binary_data_size = 9, but 8 bytes are left"),
        (binary(b"12345678", size=-1), "binary_data_size = -1"),
        (binary(b"12345678", size=8.5), "binary_data_size = 8.5"),
        (binary(b"12345678", size=True), "binary_data_size = True"),
        (binary(b"12345678", size="8"), "binary_data_size = 8"),
        (binary(b"12345678", size="\ud800"), r"binary_data_size = \ud800, but"),
        (binary(np.array([1, np.nan], "<f4").tobytes()), "holds NaN or infinity"),
        ((body(entry()) + b"left", str(len(body(entry())))), "4 bytes after the JSON part belong to no input"),
        ((body(entry()), "999999"), "must be a whole number up to"),
        ((body(entry()), "-1"), "must be a whole number"),
        ((body(entry()), "1e2"), "must be a whole number"),
        ((body(entry()), "²"), "must be a whole number"),
        ((body(entry()), ""), "must be a whole number"),
        ((b"1234567", "0"), "binary_data_size is 7, but FP32 [0, 2] needs 0 bytes"),
        ((np.array([1, np.nan], "<f4").tobytes(), "0"), "holds NaN or infinity"),
    ],
)
def test_damaged_binary_requests_are_refused(request_: tuple[bytes, str], reason: str) -> None:
    assert reason in refusal(*request_).reason


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "wanted"),
    [
        ("FP32", (-1, 2), np.array([1, 2, 3, 4], "<f4").tobytes(), [[1, 2], [3, 4]]),
        ("INT8", (2, 1), b"\x01\xff", [[1], [-1]]),
        ("BOOL", (2, -1), b"", [[], []]),
        ("BYTES", (1,), b"\x89PNG\0", [b"\x89PNG\0"]),
        ("BYTES", (-1, 1), b"", [[b""]]),
        ("FP32", (-1, -1), bytes(8), "8 bytes do not tell the shape of [-1, -1]"),
        ("FP32", (2, -1), bytes(12), "FP32 [2, 1] needs 8 bytes"),
        ("FP32", (2, 0, -1), bytes(4), "needs 0 bytes"),
        ("BYTES", (-1, 2), b"ab", "the body is one element"),
    ],
)
def test_a_body_without_json_is_the_data_of_the_one_input(
    datatype: str, shape: tuple[int, ...], raw: bytes, wanted: Any
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(ProtocolError, match=re.escape(wanted)):
            decode_request(raw, "0", (TensorSpec("x", datatype, shape),))
        return
    request = decode_request(raw, "0", (TensorSpec("x", datatype, shape),))
    assert request.inputs["x"].tolist() == wanted
    assert request.binary_by_default
    for declared in ((), (PIXELS, DIGIT)):
        with pytest.raises(ProtocolError, match="needs a model that declares one input"):
            decode_request(raw, "0", declared)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x05\x00\x00\x00ab", "ends inside an element of 5 bytes"),
        (b"\xff\xff\xff\xffab", "ends inside an element"),
        (b"\x01\x00", "ends inside a length"),
        (b"\x01\x00\x00\x00a\x01\x00\x00\x00b", "2 BYTES elements, but the shape needs 1"),
    ],
)
def test_damaged_byte_strings_are_refused(raw: bytes, reason: str) -> None:
    request, length = binary(raw, datatype="BYTES", shape=[1])
    with pytest.raises(ProtocolError, match=reason):
        decode_request(request, length)


def test_a_boolean_byte_of_two_is_refused() -> None:
    request, length = binary(b"\x02", datatype="BOOL", shape=[1])
    with pytest.raises(ProtocolError, match="must be 0 or 1"):
        decode_request(request, length)


def test_half_a_surrogate_pair_is_refused() -> None:
    raw = b'{"inputs":[{"name":"t","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}'
    with pytest.raises(ProtocolError, match="surrogate"):
        decode_request(raw)


@pytest.mark.parametrize("datatype", [name for name, dtype in DTYPES.items() if dtype.kind in "iuf"])
def test_the_ends_of_every_range_fit_and_what_lies_beyond_does_not(datatype: str) -> None:
    dtype = DTYPES[datatype]
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    ends = [limits.min.item(), limits.max.item()] if dtype.kind == "f" else [int(limits.min), int(limits.max)]
    one = {"name": "t", "datatype": datatype, "shape": [2], "data": ends}
    assert decode_request(body(one)).inputs["t"].tolist() == ends
    for beyond in (ends[0] * 2 - 1, ends[1] * 2 + 1):
        text = "1e999" if beyond in (np.inf, -np.inf) else json.dumps(beyond)
        raw = body(one | {"data": [0, 111]}).replace(b"111", text.encode())
        with pytest.raises(ProtocolError, match=f"does not fit into {datatype}"):
            decode_request(raw)


# ---------------------------------------------------------------- round trips


def arrays(datatype: str) -> st.SearchStrategy[np.ndarray]:
    shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    if datatype == "BYTES":
        texts = st.text(st.characters(codec="utf-8")).map(str.encode)
        return npst.arrays(object, shapes, elements=texts, fill=st.nothing())
    return npst.arrays(DTYPES[datatype], shapes)


anything = st.sampled_from(sorted(DTYPES)).flatmap(arrays)


@given(anything, st.booleans(), st.none() | st.text(max_size=5))
def test_encoded_outputs_decode_to_the_same_arrays(array: np.ndarray, as_binary: bool, request_id: str | None) -> None:
    asked = InferRequest(inputs={}, id=request_id, binary_by_default=as_binary)
    wanted = from_bf16(array) if array.dtype == DTYPES["BF16"] else array  # which numpy has no type for
    if not as_binary and wanted.dtype.kind == "f" and not np.isfinite(wanted).all():
        with pytest.raises(ProtocolError, match="binary_data") as caught:
            encode_response(asked, {"t": array}, "m", "1")
        assert caught.value.status == 500
        return
    answer = encode_response(asked, {"t": array}, "m", "1")
    split = answer.header_length if answer.header_length is not None else len(answer.body)
    head = json.loads(answer.body[:split])
    assert head.get("id") == request_id
    (output,) = head["outputs"]
    # an output and an input are written alike: what the server says, it must understand
    request = json.dumps({"inputs": [output]}).encode()
    decoded = decode_request(request + answer.body[split:], str(len(request))).inputs["t"]
    assert decoded.shape == array.shape
    assert decoded.dtype == wanted.dtype
    np.testing.assert_array_equal(decoded, wanted)


@given(st.binary(max_size=200), st.none() | st.integers(1, 250).map(str))
def test_random_bytes_never_do_worse_than_a_refusal(raw: bytes, header_length: str | None) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(raw, header_length)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
keys = st.sampled_from(["inputs", "outputs", "id", "parameters", "name", "shape", "datatype", "data"])


@given(
    st.dictionaries(keys, json_values, max_size=4),
    st.lists(st.dictionaries(keys, json_values | st.sampled_from(["pixels", "FP32", [1, 2]])), max_size=2),
)
def test_near_requests_never_do_worse_than_a_refusal(request: dict[str, Any], inputs: list[Any]) -> None:
    found: ProtocolError | None = None
    try:
        decode(json.dumps({"inputs": inputs} | request).encode())
    except ProtocolError as error:
        found = error
    assert found is None or (found.status == 400 and found.reason)


# ---------------------------------------------------------------- responses


def test_an_output_that_the_model_did_not_give_is_named() -> None:
    asked = InferRequest(inputs={}, outputs=(RequestedOutput("b", binary=False),))
    with pytest.raises(ProtocolError, match="unknown output 'b'; the model gave 'a'"):
        encode_response(asked, {"a": np.zeros(1)}, "m", "1")


def test_only_requested_outputs_are_sent_in_the_requested_order() -> None:
    asked = InferRequest(inputs={}, outputs=(RequestedOutput("b", binary=False), RequestedOutput("a", binary=True)))
    answer = encode_response(asked, {"a": np.arange(2), "b": np.zeros(1), "c": np.ones(1)}, "m", "1")
    head = json.loads(answer.body[: answer.header_length])
    assert [output["name"] for output in head["outputs"]] == ["b", "a"]


def test_a_type_that_the_protocol_lacks_is_the_models_failure() -> None:
    with pytest.raises(ProtocolError, match="complex128") as caught:
        encode_response(InferRequest(inputs={}), {"a": np.zeros(1, complex)}, "m", "1")
    assert caught.value.status == 500


def test_strings_and_foreign_byte_order_are_carried() -> None:
    outputs = {"s": np.array(["ä", "b"]), "n": np.array([1, 2], ">i4")}
    head = json.loads(encode_response(InferRequest(inputs={}), outputs, "m", "1").body)
    assert [output["data"] for output in head["outputs"]] == [["ä", "b"], [1, 2]]
    raw = encode_response(InferRequest(inputs={}, binary_by_default=True), {"n": outputs["n"]}, "m", "1")
    assert raw.body[raw.header_length :] == np.array([1, 2], "<i4").tobytes()


@pytest.mark.parametrize(("number", "rounded"), [(1.0, 1.0), (1.00390625, 1.0), (1.01171875, 1.015625), (-2.5, -2.5)])
def test_bf16_is_rounded_to_the_nearest_and_of_two_to_the_even_one(number: float, rounded: float) -> None:
    assert from_bf16(to_bf16(np.array([number], np.float32))).tolist() == [rounded]
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan, -np.nan], np.float32)))).all()


@pytest.mark.parametrize(("data", "found"), [([1.0, -2.0], [1, -2]), ([1e3, 2], [1000, 2])])
def test_a_whole_number_may_be_written_with_a_point(data: list[float], found: list[int]) -> None:
    one = {"name": "t", "datatype": "INT32", "shape": [2], "data": data}
    assert decode_request(body(one)).inputs["t"].tolist() == found


@pytest.mark.parametrize(
    ("values", "count", "texts"),
    [
        (np.array([[2, 9, 9, -3]], np.int64), 3, [[b"9:1", b"9:2", b"2:0"]]),
        (np.array([0, 2**64 - 1], np.uint64), 1, [b"18446744073709551615:1"]),
        (np.array([-(2**63), 5], np.int64), 5, [b"5:1", b"-9223372036854775808:0"]),
        (np.array([1.1, 3.3, 0.5, 2.4], np.float64), 2, [b"3.300000:1", b"2.400000:3"]),
        (np.zeros((0, 3), np.float32), 2, []),
    ],
)
def test_classes_come_highest_first_of_equals_the_first(values: np.ndarray, count: int, texts: list[Any]) -> None:
    assert top_classes("t", values, count).tolist() == texts
