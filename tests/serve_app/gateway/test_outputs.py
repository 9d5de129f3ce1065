"""What a model returns arrives as declared, to the byte, or as an error that names the output."""

from __future__ import annotations

import asyncio
import io

import ml_dtypes
import numpy as np
import pytest

from serve_app.gateway.model_server import ModelServer
from serve_app.gateway.outputs import OutputError, as_declared
from serve_app.gateway.tensors import TensorSpec, to_bytes, to_json

BYTES = TensorSpec("y", "BYTES", (-1,))


def archive() -> bytes:
    """Bytes that end in zeros, as every archive of numpy's does."""
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return file.getvalue() + b"\0" * 5


NPZ = archive()


def carried(value, spec=BYTES):
    """One element as a client has it."""
    raw = to_bytes(as_declared({"y": value}, (spec,) if spec else ())["y"])
    return raw[4:]


@pytest.mark.parametrize(
    "value",
    [[NPZ], (NPZ,), np.array([NPZ]), np.array([NPZ], dtype=object), [bytearray(NPZ)], [memoryview(NPZ)]],
    ids=["list", "tuple", "array", "objects", "bytearray", "memoryview"],
)
@pytest.mark.parametrize("spec", [BYTES, None])
def test_bytes_arrive_to_the_byte(value, spec):
    assert carried(value, spec) == NPZ


@pytest.mark.parametrize("value", [NPZ, bytearray(NPZ), memoryview(NPZ), np.array(NPZ)])
def test_a_single_value_has_no_dimension(value):
    scalar = TensorSpec("y", "BYTES", ())
    assert carried(value, scalar) == NPZ
    assert as_declared({"y": value}, (scalar,))["y"].shape == ()


def test_elements_of_different_lengths_keep_their_zeros():
    given = [b"a\0", b"", b"\0\0\0", b"abc"]
    assert as_declared({"y": given}, (BYTES,))["y"].tolist() == given
    nested = as_declared({"y": [[b"a\0", b"b"], [b"", b"\0"]]}, (TensorSpec("y", "BYTES", (2, 2)),))["y"]
    assert nested.tolist() == [[b"a\0", b"b"], [b"", b"\0"]]


def test_text_is_text():
    texts, raw = ["cat", "Zebra"], [b"cat", b"Zebra"]
    for value in (texts, np.array(texts), raw, np.array(raw), np.array(raw, "S9"), np.array(texts, "T")):
        assert to_json("y", as_declared({"y": value}, (BYTES,))["y"]) == ["cat", "Zebra"]
    assert to_json("y", as_declared({"y": ["a\0"]}, (BYTES,))["y"]) == ["a\0"]


@pytest.mark.parametrize("items", [[NPZ, NPZ + b"x"], [b"\1\0\0\0", b"\2\0\0\0"]])
def test_bytes_that_numpy_has_cut_are_an_error_that_says_what_to_return(items):
    with pytest.raises(OutputError, match=r"'y'.*\|S\d+.*list of bytes"):
        as_declared({"y": np.array(items)}, (BYTES,))
    with pytest.raises(OutputError, match=r"'y'.*\|S\d+.*list of bytes"):
        as_declared({"y": [np.array(items)]}, ())


@pytest.mark.parametrize("value", [[b"a", None], [{"a": 1}], np.array([1, 2]), np.array([1.5], dtype=object)])
def test_what_is_neither_bytes_nor_text_is_not_declared_bytes(value):
    with pytest.raises(OutputError, match=r"'y'.*BYTES"):
        as_declared({"y": value}, (BYTES,))


@pytest.mark.parametrize(
    ("value", "datatype", "expected"),
    [
        ([0.1, 0.2], "FP32", np.array([0.1, 0.2], "f4")),
        ([1, 2], "FP32", np.array([1, 2], "f4")),
        ([1.0, 2.0], "INT64", np.array([1, 2], "i8")),
        (np.array([1, 2], "i8"), "INT32", np.array([1, 2], "i4")),
        (np.array([1, 0]), "BOOL", np.array([True, False])),
        (np.array([True, False]), "UINT8", np.array([1, 0], "u1")),
        (np.array([np.nan, np.inf]), "FP16", np.array([np.nan, np.inf], "f2")),
        (np.array([1, 2], ">i4"), "INT32", np.array([1, 2], "i4")),
        ([], "FP32", np.array([], "f4")),
        (np.array([2**63], "u8"), "FP64", np.array([2.0**63])),
        ([2**63 + 1, 1], "UINT64", np.array([2**63 + 1, 1], "u8")),  # numpy makes floats of the two
        (np.array([1.5], ml_dtypes.bfloat16), "FP32", np.array([1.5], "f4")),
        ([], "BYTES", np.array([], object)),
    ],
)
def test_numbers_are_cast_where_their_values_stay(value, datatype, expected):
    made = as_declared({"y": value}, (TensorSpec("y", datatype, (-1,)),))["y"]
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        ([0.5], "INT64"),
        ([np.nan], "INT32"),
        ([np.inf], "INT64"),
        ([300], "UINT8"),
        ([-1], "UINT64"),
        ([2**40], "INT32"),
        (np.array([2**63], "u8"), "INT64"),
        ([2.0**63], "INT64"),
        ([2**53 + 1], "FP64"),
        ([2**63 + 1, 0.5], "UINT64"),
        ([257], "BF16"),
        ([1e300], "FP32"),
        ([70000.0], "FP16"),
        ([2], "BOOL"),
        (["1"], "INT64"),
        ([1j], "FP32"),
        ([None], "FP32"),
        ([[1], [1, 2]], "FP32"),
        (np.array(["2020-01-01"], "M8[D]"), "INT64"),
        ([1, b"a\0"], "BYTES"),
        (np.array([1j]), None),
        (np.array([1], "M8[D]"), None),
        ([b"a", None], None),
        ([["a"], ["b", "c"]], None),
        ({1, 2}, None),
    ],
)
def test_what_would_change_by_that_is_an_error_that_names_the_output(value, datatype):
    with pytest.raises(OutputError, match="output 'y'"):
        as_declared({"y": value}, (TensorSpec("y", datatype, (-1,)),) if datatype else ())


def test_missing_outputs_and_other_shapes_are_errors_that_name_the_output():
    specs = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (1,)))
    with pytest.raises(OutputError, match="output 'z' is declared, but infer returned 'y'"):
        as_declared({"y": np.zeros((1, 2), "f4")}, specs)
    with pytest.raises(OutputError, match=r"output 'z'.*None"):
        as_declared({"y": np.zeros((1, 2), "f4"), "z": None}, specs)
    with pytest.raises(OutputError, match=r"output 'y': shape is \[2\], declared is \[-1, 2\]"):
        as_declared({"y": [1.0, 2.0], "z": [1]}, specs)
    with pytest.raises(OutputError, match="must return a dict"):
        as_declared([1.0], specs)
    assert set(as_declared({"y": np.zeros((1, 2)), "z": [1], "more": [1.5]}, specs)) == {"y", "z", "more"}


# ---------------------------------------------------------------- the model's side


class InPlace:
    """Scales what it was given, as image models do."""

    outputs = (("y", "FP32", (-1,)),)

    def infer(self, inputs):
        inputs["x"] /= 255
        return {"y": inputs["x"].tolist()}


async def answer(model, inputs, monkeypatch):
    monkeypatch.setattr("serve_app.gateway.model_server.load_class", lambda _: model)
    return await ModelServer("model").infer(inputs)


def test_a_model_may_change_its_input(monkeypatch):
    given = np.frombuffer(np.array([255.0, 51.0], "f4").tobytes(), "f4")
    made = asyncio.run(answer(InPlace, {"x": given}, monkeypatch))
    np.testing.assert_array_equal(made["y"], np.array([1.0, 0.2], "f4"))
    assert given[0] == 255.0, "what others read has not changed"
