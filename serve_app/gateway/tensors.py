"""Tensors of the Open Inference Protocol v2 as numpy arrays: JSON data, raw little-endian bytes, datatypes.

Nothing here loops in Python over the elements of a numeric tensor. BYTES tensors are object arrays of `bytes`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from serve_app.protocol_error import ProtocolError

Array = NDArray[Any]

_BF16 = np.dtype([("bf16", "<u2")])
"""The upper half of a 32-bit float, which numpy has no type for: what a BF16 output is on the wire."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": _BF16,
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_RANK = 32
_MAX_DIM = 2**40
_JSON_TYPES: Mapping[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "true or false"),
    "u": (frozenset({int}), "whole numbers"),
    "i": (frozenset({int}), "whole numbers"),
    "f": (frozenset({int, float}), "numbers"),
    "V": (frozenset({int, float}), "numbers"),
    "O": (frozenset({str}), "strings"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model declares about one tensor. A dimension of -1 takes any size.

    `finite` refuses NaN and infinity in a floating-point input.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    finite: bool = False

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"tensor name = {self.name!r}: must be a non-empty string")
        if self.datatype not in DTYPES:
            raise ValueError(
                f"datatype of tensor {self.name!r} = {self.datatype!r}: must be one of {', '.join(DTYPES)}"
            )
        if len(self.shape) > _MAX_RANK or not all(type(d) is int and d >= -1 for d in self.shape):
            raise ValueError(f"shape of tensor {self.name!r} = {self.shape!r}: must be sizes, or -1 for any size")

    def describe(self) -> dict[str, Any]:
        """The tensor's entry in the protocol's model metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class PackedBytes:
    """A BYTES tensor as binary data: what travels between processes instead of a large array of objects."""

    raw: bytes
    """Each element as a 4-byte little-endian length and its bytes, in row-major order."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Array) -> Array | Self:
        """An array of objects packed; any other array as it is."""
        return cls(to_bytes(array), array.shape) if array.dtype.kind == "O" else array

    def unpack(self) -> Array:
        """The array of `bytes`, its owner's own."""
        return _unpack_bytes("", memoryview(self.raw), math.prod(self.shape)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class RawJson:
    """A JSON object that was checked already, as text: what travels between processes instead of many objects."""

    text: bytes

    def load(self) -> dict[str, Any]:
        """The object."""
        loaded: dict[str, Any] = json.loads(str(self.text, "utf-8-sig"))
        return loaded


def datatype_of(array: Array | PackedBytes) -> str:
    """The protocol's name of an array's type. Raises ProtocolError (500) for a type that the protocol lacks."""
    if isinstance(array, PackedBytes):
        return "BYTES"
    if array.dtype.kind in "OSU":
        return "BYTES"
    name = _NAMES.get(array.dtype if array.dtype == _BF16 else array.dtype.newbyteorder("<"))
    if name is None:
        raise ProtocolError(500, f"the model returned an array of {array.dtype}, which the protocol cannot carry")
    return name


def whole_number(value: Any) -> int | None:
    """A JSON number without a fraction, however it is written (2.0 is 2); None for everything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A request's shape as a tuple; raises ProtocolError (400)."""
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise ProtocolError(400, f"input {name!r}: 'shape' must be a list of at most {_MAX_RANK} sizes")
    dims = [whole_number(dim) for dim in shape]
    for dim, given in zip(dims, shape, strict=True):
        if dim is None or not 0 <= dim <= _MAX_DIM:
            raise ProtocolError(400, f"input {name!r}: size {_short(given)} in 'shape' must be a whole number from 0")
    return tuple(dim for dim in dims if dim is not None)


def check_spec(spec: TensorSpec, datatype: str, shape: tuple[int, ...]) -> None:
    """Compares what a request announces with what the model declares; raises ProtocolError (400)."""
    if datatype != spec.datatype:
        raise ProtocolError(400, f"input {spec.name!r}: datatype is {datatype}, the model takes {spec.datatype}")
    fits = len(shape) == len(spec.shape) and all(want in (-1, got) for want, got in zip(spec.shape, shape, strict=True))
    if not fits:
        raise ProtocolError(
            400, f"input {spec.name!r}: shape is {list(shape)}, the model takes {list(spec.shape)} (-1: any size)"
        )


def check_finite(name: str, array: Array) -> None:
    """Raises ProtocolError (400) when a floating-point array holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(400, f"input {name!r}: holds NaN or infinity; the model takes finite numbers")


# ---------------------------------------------------------------- JSON


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    """Array of the given type and shape from JSON data, nested like the shape or flat in row-major order.

    Raises ProtocolError (400) on a wrong element type, count, nesting or range, and on NaN or infinity.
    """
    flat = _flatten(name, shape, data)
    count = math.prod(shape)
    if len(flat) != count:
        raise ProtocolError(400, f"input {name!r}: {len(flat)} elements, but shape {list(shape)} needs {count}")
    dtype = DTYPES[datatype]
    allowed, wanted = _JSON_TYPES[dtype.kind]
    wrong = set(map(type, flat)) - allowed
    if wrong == {float} and dtype.kind in "ui" and all(number.is_integer() for number in flat if type(number) is float):
        flat, wrong = [int(number) for number in flat], set()  # JSON has one kind of number: 2.0 is 2
    if wrong:
        got = ", ".join(sorted(_json_name(kind) for kind in wrong))
        raise ProtocolError(400, f"input {name!r}: data holds {got}, but {datatype} takes {wanted}")
    return reshape(name, _typed(name, datatype, flat), shape)


def _flatten(name: str, shape: tuple[int, ...], data: Any) -> list[Any]:
    """Element list of nested or flat data; nesting must follow the shape."""
    if not isinstance(data, list):
        if shape == () and not isinstance(data, dict) and data is not None:
            return [data]
        raise ProtocolError(400, f"input {name!r}: 'data' must be a list")
    flat: list[Any] = data
    depth = 1
    while flat and isinstance(flat[0], list):
        if depth >= len(shape):
            raise ProtocolError(400, f"input {name!r}: data is nested deeper than shape {list(shape)}")
        if set(map(type, flat)) != {list} or set(map(len, flat)) != {shape[depth]}:
            raise ProtocolError(400, f"input {name!r}: nested data does not follow shape {list(shape)}")
        if depth == 1 and len(flat) != shape[0]:
            raise ProtocolError(400, f"input {name!r}: {len(flat)} rows, but shape {list(shape)} needs {shape[0]}")
        flat = list(chain.from_iterable(flat))
        depth += 1
    if 1 < depth < len(shape) and flat:
        raise ProtocolError(400, f"input {name!r}: data must be flat or nested like shape {list(shape)}")
    return flat


def _typed(name: str, datatype: str, flat: list[Any]) -> Array:
    dtype = DTYPES[datatype]
    if dtype.kind == "O":
        return _strings(name, flat)
    if dtype.kind == "b":
        return np.array(flat, dtype=dtype)
    if dtype == _BF16:
        rounded = to_bf16(_typed(name, "FP32", flat))
        if not np.isfinite(from_bf16(rounded)).all():
            raise ProtocolError(400, f"input {name!r}: a number does not fit into BF16")
        return from_bf16(rounded)
    try:
        wide: Array = np.array(flat, dtype={"f": np.float64, "u": np.uint64, "i": np.int64}[dtype.kind])
        limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        fits = not wide.size or bool(limits.min <= wide.min() and wide.max() <= limits.max)
    except OverflowError:
        fits = False
    if not fits:
        raise ProtocolError(400, f"input {name!r}: a number does not fit into {datatype}")
    return wide.astype(dtype)


def _strings(name: str, flat: list[Any]) -> Array:
    array = np.empty(len(flat), dtype=object)
    try:
        array[:] = [text.encode() for text in flat]
    except UnicodeEncodeError:
        raise ProtocolError(400, f"input {name!r}: a string holds half of a surrogate pair, not Unicode") from None
    return array


def to_json(name: str, array: Array | PackedBytes) -> list[Any]:
    """Flat element list, row-major. Raises ProtocolError (500) for what JSON cannot carry."""
    if isinstance(array, PackedBytes):
        array = array.unpack()
    if array.dtype == _BF16:
        array = from_bf16(array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(
            500, f"output {name!r} holds NaN or infinity, which JSON cannot carry; request it with binary_data"
        )
    flat: list[Any] = array.ravel().tolist()
    if array.dtype.kind in "OS":
        try:
            return [bytes(i).decode() if isinstance(i, (bytes, bytearray, memoryview)) else str(i) for i in flat]
        except UnicodeDecodeError:
            raise ProtocolError(
                500, f"output {name!r} holds bytes that are not UTF-8; request it with binary_data"
            ) from None
    return flat


# ---------------------------------------------------------------- binary


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> Array:
    """Array over `raw` (little-endian, row-major; not copied, read-only). Raises ProtocolError (400)."""
    count = math.prod(shape)
    dtype = DTYPES[datatype]
    if dtype.kind == "O":
        return reshape(name, _unpack_bytes(name, raw, count), shape)
    if len(raw) != count * dtype.itemsize:
        raise ProtocolError(
            400,
            f"input {name!r}: binary_data_size is {len(raw)}, but {datatype} {list(shape)} needs "
            f"{count * dtype.itemsize} bytes",
        )
    if dtype.kind == "b":
        flags = np.frombuffer(raw, dtype=np.uint8)
        if flags.size and flags.max() > 1:
            raise ProtocolError(400, f"input {name!r}: a BOOL byte must be 0 or 1")
    array = np.frombuffer(raw, dtype=dtype)
    return reshape(name, from_bf16(array) if dtype == _BF16 else array, shape)


def raw_shape(spec: TensorSpec, size: int) -> tuple[int, ...]:
    """The shape of `size` bytes as this tensor, of which at most one dimension is free; BYTES are one element.

    Raises ProtocolError (400) where the size does not say it.
    """
    dtype = DTYPES[spec.datatype]
    if dtype.kind == "O":
        return tuple(1 if dim == -1 else dim for dim in spec.shape)
    if spec.shape.count(-1) > 1:
        raise ProtocolError(
            400, f"input {spec.name!r}: {size} bytes do not tell the shape of {list(spec.shape)}; send it with JSON"
        )
    row = math.prod(dim for dim in spec.shape if dim != -1) * dtype.itemsize
    return tuple(size // max(row, 1) if dim == -1 else dim for dim in spec.shape)


def from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> Array:
    """`from_bytes` of a body that is nothing but the tensor: one element of BYTES has no length before it."""
    if DTYPES[datatype].kind != "O":
        return from_bytes(name, datatype, shape, raw)
    if math.prod(shape) != 1:
        raise ProtocolError(400, f"input {name!r}: the body is one element, not as many as shape {list(shape)} has")
    array = np.empty(shape, dtype=object)
    array[...] = bytes(raw)
    return array


def to_bf16(array: Array) -> Array:
    """32-bit floats as BF16, each rounded to the nearest (of two equally near to the even one); NaN stays NaN."""
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    halves = np.where(np.isnan(array), 0x7FC0, rounded).astype("<u2")
    return halves.view(_BF16).reshape(array.shape)


def from_bf16(array: Array) -> Array:
    """BF16 as the 32-bit floats that they are the upper half of."""
    halves = np.ascontiguousarray(array).view("<u2").reshape(array.shape)
    floats: Array = (halves.astype("<u4") << 16).view("<f4")
    return floats


def _unpack_bytes(name: str, raw: memoryview, count: int) -> Array:
    """BYTES elements: each a 4-byte little-endian length, then the bytes."""
    items: list[bytes] = []
    offset, size = 0, len(raw)
    while offset < size:
        if offset + 4 > size:
            raise ProtocolError(400, f"input {name!r}: BYTES data ends inside a length")
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4
        if offset + length > size:
            raise ProtocolError(400, f"input {name!r}: BYTES data ends inside an element of {length} bytes")
        items.append(bytes(raw[offset : offset + length]))
        offset += length
    if len(items) != count:
        raise ProtocolError(400, f"input {name!r}: {len(items)} BYTES elements, but the shape needs {count}")
    array = np.empty(count, dtype=object)
    array[:] = items
    return array


def to_bytes(array: Array | PackedBytes) -> bytes:
    """Little-endian, row-major bytes; BYTES elements with a 4-byte length before each."""
    if isinstance(array, PackedBytes):
        return array.raw
    if array.dtype.kind in "OSU":
        items = [item if type(item) is bytes else _raw(item) for item in array.ravel().tolist()]
        lengths = np.fromiter(map(len, items), "<u4", len(items)).tobytes()
        parts: list[bytes] = [b""] * (2 * len(items))
        parts[::2] = [lengths[at : at + 4] for at in range(0, len(lengths), 4)]
        parts[1::2] = items
        return b"".join(parts)
    if array.dtype == _BF16:
        return array.tobytes()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _raw(item: Any) -> bytes:
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    return str(item).encode(errors="replace")


def reshape(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """`array` in `shape`; raises ProtocolError (400) where numpy cannot hold the shape."""
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise ProtocolError(400, f"input {name!r}: shape {list(shape)} is too large") from None


def _json_name(kind: type) -> str:
    names = {
        str: "strings", bool: "booleans", dict: "objects", list: "lists", float: "fractions", int: "whole numbers"
    }  # fmt: skip
    return names.get(kind, "null")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
