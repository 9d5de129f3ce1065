"""Codec of the Open Inference Protocol v2 (REST): request bytes to arrays, arrays to response bytes.

Plain JSON and the binary-data extension (`Inference-Header-Content-Length`, `binary_data_size`, `binary_data`,
`binary_data_output`). Pure: bytes and arrays in, bytes and arrays out; every refusal is a `ProtocolError`.
Specification: kserve/open-inference-protocol `specification/protocol/inference_rest.md` and Triton's
`extension_binary_data.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

from pydantic_core import PydanticSerializationError
from pydantic_core import to_json as to_json_text

from serve_app.gateway.classification import MAX_CLASSES, top_classes
from serve_app.gateway.tensors import (
    DTYPES,
    Array,
    PackedBytes,
    TensorSpec,
    check_finite,
    check_shape,
    check_spec,
    datatype_of,
    from_bytes,
    from_json,
    from_raw,
    raw_shape,
    to_bytes,
    to_json,
    whole_number,
)
from serve_app.protocol_error import ProtocolError

HEADER_LENGTH = "Inference-Header-Content-Length"
_MAX_TENSORS = 256
_MAX_NAME = 256
_UNSUPPORTED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One entry of a request's `outputs`."""

    name: str
    binary: bool
    class_count: int = 0
    """Instead of the tensor, this many of its highest values as texts; 0: the tensor."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded inference request. `outputs` is None when the client wants all of them."""

    inputs: dict[str, Array]
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] | None = None
    binary_by_default: bool = False

    def narrowed(self, given: Container[str]) -> InferRequest:
        """For one item of a stream: asks for those of the requested outputs that it has."""
        if self.outputs is None:
            return self
        return replace(self, outputs=tuple(want for want in self.outputs if want.name in given))

    def packed(self) -> InferRequest:
        """With BYTES tensors as bytes: a million objects would be slow to hand over."""
        inputs: dict[str, Any] = {name: PackedBytes.of(array) for name, array in self.inputs.items()}
        return replace(self, inputs=inputs)


@dataclass(frozen=True, slots=True)
class AnnouncedInput:
    """What a request says about one input. `read` makes the array of its data; it raises ProtocolError (400)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """Response body; `header_length` is set when binary data follows the JSON part."""

    body: bytes
    header_length: int | None = None


def parse_json_object(text: bytes | memoryview) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes. Raises ProtocolError (400); NaN and Infinity are not JSON."""
    try:
        value = json.loads(str(text, "utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ProtocolError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ProtocolError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ProtocolError(400, "the body is not acceptable JSON: nested too deeply") from None
    except ValueError as error:  # integers of thousands of digits
        raise ProtocolError(400, f"the body is not acceptable JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ProtocolError(
        400, f"the body is not JSON: {constant} is not a JSON number; NaN and infinity need binary data"
    )


def decode_request(
    body: bytes, header_length: str | None = None, inputs: Sequence[TensorSpec] = (), outputs: Sequence[TensorSpec] = ()
) -> InferRequest:
    """Decodes one request. `inputs` and `outputs` are what the model declares; empty means anything goes.

    Raises ProtocolError (400) with a reason for everything that does not fit.
    """
    view = memoryview(body)
    header = json_part(body, header_length)
    split = len(header)
    if header_length is not None and not split:
        return _raw_request(view, inputs)
    request = parse_json_object(header)
    parameters = checked_parameters(request, "the request")
    request_id = request.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError(400, "'id' must be a string")
    arrays = _decode_inputs(request, view[split:], inputs)
    binary_by_default = _flag(parameters, "binary_data_output", "the request")
    return InferRequest(
        inputs=arrays,
        id=request_id,
        parameters=parameters,
        outputs=requested_outputs(request, binary_by_default, outputs),
        binary_by_default=binary_by_default,
    )


def json_part(body: bytes, header_length: str | None) -> memoryview:
    """The JSON part of a body, by the header's text; raises ProtocolError (400)."""
    return memoryview(body)[: _header_length(header_length, len(body))]


def _header_length(given: str | None, size: int) -> int:
    if given is None:
        return size
    text = given.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > size:
        raise ProtocolError(
            400, f"{HEADER_LENGTH} = {given[:40]!r}: must be a whole number up to the body's {size} bytes"
        )
    return int(text)


def _raw_request(body: memoryview, declared: Sequence[TensorSpec]) -> InferRequest:
    """Triton's raw binary request: the body is the data of the model's one input, the outputs are to be binary."""
    if len(declared) != 1:
        raise ProtocolError(400, f"{HEADER_LENGTH} = 0 needs a model that declares one input, not {len(declared)}")
    (spec,) = declared
    shape = raw_shape(spec, len(body))
    given = AnnouncedInput(spec.name, spec.datatype, shape, partial(from_raw, spec.name, spec.datatype, shape, body))
    return InferRequest(checked_inputs(1, [given], declared), binary_by_default=True)


def _decode_inputs(request: Mapping[str, Any], tail: memoryview, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    entries = request.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise ProtocolError(400, "'inputs' must be a list with at least one tensor")
    used = 0

    def read(entry: Mapping[str, Any], name: str, datatype: str, shape: tuple[int, ...]) -> Array:
        nonlocal used
        size = _binary_size(name, entry, len(tail) - used)
        if size is None:
            return from_json(name, datatype, shape, entry["data"])
        used += size
        return from_bytes(name, datatype, shape, tail[used - size : used])

    def announcements() -> Iterator[AnnouncedInput]:
        for entry in entries:
            name, datatype, shape = announced(entry)
            yield AnnouncedInput(name, datatype, shape, partial(read, entry, name, datatype, shape))
        if used != len(tail):
            raise ProtocolError(400, f"{len(tail) - used} bytes after the JSON part belong to no input")

    return checked_inputs(len(entries), announcements(), specs)


def checked_inputs(count: int, inputs: Iterable[AnnouncedInput], declared: Sequence[TensorSpec]) -> dict[str, Array]:
    """The arrays of `count` inputs, each checked against what the model declares before its data is read.

    Raises ProtocolError (400). Whatever way a request came, its inputs go through here.
    """
    if count > _MAX_TENSORS:
        raise ProtocolError(400, f"'inputs' holds {count} tensors; at most {_MAX_TENSORS} are taken")
    specs = {spec.name: spec for spec in declared}
    arrays: dict[str, Array] = {}
    for given in inputs:
        name = given.name
        if name in arrays:
            raise ProtocolError(400, f"input {name!r} is given twice")
        if specs and name not in specs:
            raise ProtocolError(400, f"unknown input {name!r}; the model takes {', '.join(map(repr, specs))}")
        if specs:
            check_spec(specs[name], given.datatype, given.shape)
        arrays[name] = given.read()
        if specs and specs[name].finite:
            check_finite(name, arrays[name])
    missing = [name for name in specs if name not in arrays]
    if missing:
        raise ProtocolError(400, f"missing input {', '.join(map(repr, missing))}")
    return arrays


def _binary_size(name: str, entry: Mapping[str, Any], left: int) -> int | None:
    """Bytes that the input takes from the binary part, which has `left` of them; None for data in JSON."""
    size = checked_parameters(entry, f"input {name!r}").get("binary_data_size")
    if size is None:
        if "data" not in entry:
            raise ProtocolError(400, f"input {name!r}: needs 'data', or the parameter 'binary_data_size'")
        return None
    if entry.get("data") is not None:
        raise ProtocolError(400, f"input {name!r}: has both 'data' and 'binary_data_size'")
    whole = whole_number(size)
    if whole is None or not 0 <= whole <= left:
        raise ProtocolError(400, f"input {name!r}: binary_data_size = {str(size)[:40]}, but {left} bytes are left")
    return whole


def announced(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    """Name, datatype and shape of one entry of `inputs`; raises ProtocolError (400)."""
    if not isinstance(entry, dict):
        raise ProtocolError(400, "each entry of 'inputs' must be an object")
    name = _name(entry, "input")
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise ProtocolError(400, f"input {name!r}: datatype {str(datatype)[:40]!r} is not one of {', '.join(DTYPES)}")
    return name, datatype, check_shape(name, entry.get("shape"))


def requested_outputs(
    request: Mapping[str, Any], binary_by_default: bool, specs: Sequence[TensorSpec]
) -> tuple[RequestedOutput, ...] | None:
    """The entries of a request's `outputs`, or None where it has none; raises ProtocolError (400)."""
    entries = request.get("outputs")
    if entries is None or entries == []:
        return None
    if not isinstance(entries, list) or len(entries) > _MAX_TENSORS:
        raise ProtocolError(400, f"'outputs' must be a list of at most {_MAX_TENSORS} tensors")
    known = {spec.name for spec in specs}
    requested: dict[str, RequestedOutput] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ProtocolError(400, "each entry of 'outputs' must be an object")
        name = _name(entry, "output")
        if known and name not in known:
            raise ProtocolError(400, f"unknown output {name!r}; the model gives {', '.join(map(repr, sorted(known)))}")
        parameters = checked_parameters(entry, f"output {name!r}")
        binary = _flag(parameters, "binary_data", f"output {name!r}", default=binary_by_default)
        requested[name] = RequestedOutput(name, binary, _class_count(parameters, name))
    return tuple(requested.values())


def _class_count(parameters: Mapping[str, Any], name: str) -> int:
    count = whole_number(parameters.get("classification", 0))
    if count is None or not 0 <= count <= MAX_CLASSES:
        raise ProtocolError(
            400, f"parameter 'classification' of output {name!r} must be a whole number from 0 to {MAX_CLASSES}"
        )
    return count


def _name(entry: Mapping[str, Any], what: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ProtocolError(400, f"'name' of an {what} must be a string of 1 to {_MAX_NAME} characters")
    return name


def checked_parameters(entry: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The parameters of a request or a tensor; null is none, as typed clients write what they leave out.

    Raises ProtocolError (400) for extensions that are not offered.
    """
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(400, f"'parameters' of {what} must be an object")
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in _UNSUPPORTED:
        if name in given:
            raise ProtocolError(400, f"parameter {name!r} of {what}: this server does not offer that extension")
    return given


def _flag(parameters: Mapping[str, Any], name: str, what: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(400, f"parameter {name!r} of {what} must be true or false")
    return value


# ---------------------------------------------------------------- response


def encode_response(
    request: InferRequest, outputs: Mapping[str, Array | PackedBytes], model_name: str, model_version: str
) -> EncodedResponse:
    """Encodes a model's outputs as the request asked for them.

    Raises ProtocolError: 400 for an output that the model did not give, 500 for one that cannot be carried.
    """
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for want, array in wanted_outputs(request, outputs):
        entry: dict[str, Any] = {"name": want.name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if want.binary:
            raw = to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = to_json(want.name, array)
        entries.append(entry)
    response: dict[str, Any] = {"model_name": model_name, "model_version": model_version, "outputs": entries}
    if request.id is not None:
        response["id"] = request.id
    header = _to_json(response)
    if not tail:
        return EncodedResponse(header)
    return EncodedResponse(b"".join([header, *tail]), header_length=len(header))


def _to_json(response: dict[str, Any]) -> bytes:
    """JSON text. pydantic's serializer takes a tenth of the standard library's time; it refuses lone surrogates."""
    try:
        return to_json_text(response)
    except PydanticSerializationError:
        return json.dumps(response, separators=(",", ":")).encode()


def wanted_outputs(request: InferRequest, outputs: Mapping[str, Any]) -> Iterator[tuple[RequestedOutput, Any]]:
    """The outputs that the request asked for, or all; raises ProtocolError (400) for one that is not there."""
    wanted = request.outputs
    if wanted is None:
        wanted = tuple(RequestedOutput(name, request.binary_by_default) for name in outputs)
    for want in wanted:
        array = outputs.get(want.name)
        if array is None:
            raise ProtocolError(
                400, f"unknown output {want.name!r}; the model gave {', '.join(map(repr, outputs)) or 'none'}"
            )
        yield want, top_classes(want.name, array, want.class_count) if want.class_count else array
