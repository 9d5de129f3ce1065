"""Codec of the Open Inference Protocol v2 (gRPC): messages to arrays, arrays to messages.

The checks are those of `oip` and `tensors`, so that a request means the same over HTTP and gRPC. Pure; every refusal is
a `ProtocolError`. Specification: kserve/open-inference-protocol `specification/protocol/inference_grpc.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from serve_app.gateway.grpc_messages import Message, ModelInferResponse
from serve_app.gateway.oip import (
    AnnouncedInput,
    InferRequest,
    announced,
    checked_inputs,
    checked_parameters,
    requested_outputs,
    wanted_outputs,
)
from serve_app.gateway.outputs import OutputError, as_declared
from serve_app.gateway.tensors import DTYPES, Array, TensorSpec, datatype_of, from_bytes, reshape, to_bytes
from serve_app.protocol_error import ProtocolError

_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_AT_ONCE = 2**16
"""Elements converted in one go: 3 ms in which no other thread runs."""
_OWN_PARAMETER = "triton_"
"""Parameters that begin so are between Triton's client and the server; a model gets the others."""


def decode_request(
    message: Message, inputs: Sequence[TensorSpec] = (), outputs: Sequence[TensorSpec] = ()
) -> InferRequest:
    """Decodes a ModelInferRequest. `inputs` and `outputs` are what the model declares; empty means anything goes.

    Raises ProtocolError (400) with a reason for everything that does not fit.
    """
    parameters = _parameters(message, "the request")
    if not message.inputs:
        raise ProtocolError(400, "'inputs' must have at least one tensor")
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise ProtocolError(
            400, f"'raw_input_contents' has {len(raw)} entries for {len(message.inputs)} inputs; each needs one"
        )
    asked = [
        {"name": output.name, "parameters": _parameters(output, f"output {output.name[:80]!r}")}
        for output in message.outputs
    ]
    return InferRequest(
        inputs=checked_inputs(len(message.inputs), _announcements(message, raw), inputs),
        id=message.id or None,
        parameters={name: value for name, value in parameters.items() if not name.startswith(_OWN_PARAMETER)},
        outputs=requested_outputs({"outputs": asked}, True, outputs),
        binary_by_default=True,
    )


def _announcements(message: Message, raw: Sequence[bytes]) -> Iterator[AnnouncedInput]:
    for position, tensor in enumerate(message.inputs):
        _parameters(tensor, f"input {tensor.name[:80]!r}")
        entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        name, datatype, shape = announced(entry)
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if raw and filled:
            raise ProtocolError(400, f"input {name!r}: has both 'contents' and 'raw_input_contents'")
        read: Callable[[], Array]
        if raw:
            read = partial(_from_raw, name, datatype, shape, raw, position)
        else:
            read = partial(_from_contents, name, datatype, shape, tensor.contents, filled)
        yield AnnouncedInput(name, datatype, shape, read)


def _from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: Sequence[bytes], position: int) -> Array:
    return from_bytes(name, datatype, shape, memoryview(raw[position]))


def _from_contents(name: str, datatype: str, shape: tuple[int, ...], contents: Message, filled: list[str]) -> Array:
    """Array of the one field of InferTensorContents that belongs to the type. Raises ProtocolError (400)."""
    field = _CONTENTS.get(datatype)
    if field is None:
        raise ProtocolError(400, f"input {name!r}: {datatype} has no typed contents; send it in 'raw_input_contents'")
    wrong = [other for other in filled if other != field]
    if wrong:
        raise ProtocolError(400, f"input {name!r}: 'contents' holds {', '.join(wrong)}, but {datatype} takes {field}")
    given, count = getattr(contents, field), math.prod(shape)
    if len(given) != count:
        raise ProtocolError(400, f"input {name!r}: {len(given)} elements, but shape {list(shape)} needs {count}")
    dtype = DTYPES[datatype]
    wide_dtype = {"i": np.dtype("i8"), "u": np.dtype("u8")}.get(dtype.kind, dtype)
    array: Array = np.empty(count, dtype=dtype)
    for start in range(0, count, _AT_ONCE):
        wide = np.array(given[start : start + _AT_ONCE], dtype=wide_dtype)
        part = array[start : start + _AT_ONCE] = wide.astype(dtype, copy=False)
        if dtype.kind in "iu" and not (part == wide).all():
            raise ProtocolError(400, f"input {name!r}: a number does not fit into {datatype}")
    return reshape(name, array, shape)


def _parameters(message: Message, what: str) -> dict[str, Any]:
    """The parameters of a message as plain values; raises ProtocolError (400)."""
    found: dict[str, Any] = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise ProtocolError(400, f"parameter {name[:80]!r} of {what} has no value")
        found[name] = getattr(parameter, choice)
    checked_parameters({"parameters": found}, what)
    return found


# ---------------------------------------------------------------- response


def encode_response(request: InferRequest, outputs: Mapping[str, Array], name: str, version: str) -> Message:
    """A ModelInferResponse with the outputs that the request asked for, as raw contents.

    Raises ProtocolError: 400 for an output that the model did not give, 500 for one that cannot be carried.
    """
    response = ModelInferResponse(model_name=name, model_version=version, id=request.id or "")
    for want, array in wanted_outputs(request, outputs):
        response.outputs.add(name=want.name, datatype=datatype_of(array), shape=array.shape)
        response.raw_output_contents.append(to_bytes(array))
    return response


# ---------------------------------------------------------------- generate


def as_json_object(request: InferRequest) -> dict[str, Any]:
    """The object that `generate` gets for a request's tensors: a value each, a list where there are several.

    Raises ProtocolError (400) for text that is not UTF-8 and for names that the object has already.
    """
    asked: dict[str, Any] = {"parameters": dict(request.parameters)} if request.parameters else {}
    if request.id is not None:
        asked["id"] = request.id
    for name, array in request.inputs.items():
        if name in ("id", "parameters"):
            raise ProtocolError(400, f"input {name!r}: that name belongs to the request itself")
        asked[name] = _as_json(name, array)
    return asked


def _as_json(name: str, array: Array) -> Any:
    if array.dtype.kind == "O":
        try:
            texts = [item.decode() for item in array.ravel().tolist()]
        except UnicodeDecodeError:
            raise ProtocolError(400, f"input {name!r}: must be UTF-8, as this model takes text") from None
        array = np.array(texts, dtype=object).reshape(array.shape)
    return array.item() if array.size == 1 else array.tolist()


def item_outputs(item: Any) -> dict[str, Array]:
    """An item of a model's stream as tensors: numbers, text and arrays as they are, other values as JSON text.

    Raises ProtocolError (500) for what is no item of a stream, or cannot be carried.
    """
    if isinstance(item, str):
        item = {"text_output": item}
    if not isinstance(item, Mapping):
        raise ProtocolError(500, f"the model's stream gave {type(item).__name__}; it must give dicts or strings")
    return {str(name): _tensor(str(name), value) for name, value in item.items()}


def _tensor(name: str, value: Any) -> Array:
    try:
        array = as_declared({name: value}, ())[name]
    except OutputError:  # ragged lists
        array = np.empty((), dtype=object)
        array[()] = value
    plain = all(isinstance(each, (str, bytes)) for each in array.ravel().tolist()) if array.dtype.kind == "O" else True
    if not plain:
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ProtocolError(500, f"output {name!r} does not fit into a tensor or JSON: {error}") from None
        array = np.array([text], dtype=object)
    return array.reshape(1) if array.ndim == 0 else array
