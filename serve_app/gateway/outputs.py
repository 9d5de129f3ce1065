"""What a model returns, as the tensors that it declared: to the byte, or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from serve_app.gateway.tensors import DTYPES, Array, TensorSpec, datatype_of, from_bf16, to_bf16
from serve_app.protocol_error import ProtocolError

_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1f]")
"""Bytes that text does not hold."""


class OutputError(TypeError):
    """A model's output is not what it declared, or no tensor at all. The replica is at fault: a 500, and logged."""


def as_declared(outputs: Any, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """A model's outputs as arrays of the declared types; those that it has not declared as they are.

    Raises OutputError, which names the output: one is missing, has another shape, or does not fit into its type.
    """
    if not isinstance(outputs, Mapping):
        raise OutputError(f"infer returned {type(outputs).__name__}; it must return a dict of arrays by output name")
    declared = {spec.name: spec for spec in specs}
    given = {str(name): value for name, value in outputs.items()}
    for name in declared:
        if given.get(name) is None:
            got = ", ".join(map(repr, given)) or "nothing"
            raise OutputError(f"output {name!r} is declared, but infer returned {got if name not in given else None}")
    return {name: _array(name, value, declared.get(name)) for name, value in given.items()}


def _array(name: str, value: Any, spec: TensorSpec | None) -> Array:
    is_bytes = spec is None or spec.datatype == "BYTES"
    if isinstance(value, bytes) or (isinstance(value, (bytearray, memoryview)) and is_bytes):
        array = np.empty((), dtype=object)
        array[()] = bytes(value)
    else:
        try:
            array = _listed(value, spec) if isinstance(value, (list, tuple)) else np.asarray(value)
        except Exception as error:  # whatever a ragged list, or a tensor on a GPU, raises
            raise OutputError(f"output {name!r}: no array can be made of it: {error}") from None
    if array.dtype.kind == "S":
        array = _to_the_byte(name, array)
    elif array.dtype.kind == "T":  # strings of any length
        array = array.astype(object)
    if spec is None:
        return _undeclared(name, array)
    _check_shape(name, array, spec)
    return _cast(name, array, spec)


def _listed(value: Any, spec: TensorSpec | None) -> Array:
    """An array of nested lists, none of whose elements numpy has turned into another kind."""
    if _holds_bytes(value):
        return np.array(_with_bytes(value), dtype=object)
    array = np.asarray(value)
    if array.dtype.kind in "SU":
        objects = np.array(value, dtype=object)
        return array if all(isinstance(item, (bytes, str)) for item in objects.flat) else objects
    if array.dtype.kind == "f" and spec is not None and spec.datatype == "UINT64":  # of whole numbers from 2^63 on
        with suppress(OverflowError):
            exact = np.array(value, dtype=np.uint64)
            return exact if (exact == array).all() else array
    return array


def _holds_bytes(value: Any) -> bool:
    """Whether nested lists begin with bytes or a string: numpy would cut their trailing zeros off."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (bytes, bytearray, memoryview, str))


def _with_bytes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_with_bytes(item) for item in value]
    return bytes(value) if isinstance(value, (bytearray, memoryview)) else value


def _to_the_byte(name: str, array: Array) -> Array:
    """A fixed-width array as objects. What is shorter than the width is padded text, or has lost its last zeros."""
    items, width = array.ravel().tolist(), array.dtype.itemsize
    found = np.empty(len(items), dtype=object)
    found[:] = items
    if any(map(_CONTROLS.search, items)) and any(len(item) < width for item in items):
        if len(items) > 1:
            raise OutputError(
                f"output {name!r}: an array of {array.dtype} has lost the zeros at the end of its bytes; return a list "
                "of bytes, or an array with dtype=object"
            )
        found[0] = array.tobytes()
    return found.reshape(array.shape)


def _check_shape(name: str, array: Array, spec: TensorSpec) -> None:
    fits = array.ndim == len(spec.shape) and all(w in (-1, d) for w, d in zip(spec.shape, array.shape, strict=True))
    if not fits:
        raise OutputError(
            f"output {name!r}: shape is {list(array.shape)}, declared is {list(spec.shape)} (-1: any size)"
        )


def _undeclared(name: str, array: Array) -> Array:
    """As it is, where the protocol has a type for it."""
    try:
        if datatype_of(array) == "BYTES":
            _check_texts(name, array, "")
    except ProtocolError as error:
        raise OutputError(f"output {name!r}: {error.reason}") from None
    return array


def _check_texts(name: str, array: Array, declared: str) -> None:
    wrong = {type(item).__name__ for item in array.ravel().tolist() if not isinstance(item, (bytes, str))}
    if array.dtype.kind not in "OU" or wrong:
        what = ", ".join(sorted(wrong)) or str(array.dtype)
        raise OutputError(f"output {name!r}: {declared}BYTES is bytes or strings, not {what}")


def _cast(name: str, array: Array, spec: TensorSpec) -> Array:
    """In the declared type, where no value changes by that but for the precision of fractions."""
    wanted, kind = DTYPES[spec.datatype], array.dtype.kind
    if spec.datatype == "BYTES":
        array = array if array.size else array.astype(object)  # an empty list tells no type
        _check_texts(name, array, "declared is BYTES, and ")
        return array
    if array.dtype == wanted:
        return array
    if kind == "V" and np.can_cast(array.dtype, np.float32):  # bfloat16 of JAX
        return _cast(name, array.astype(np.float32), spec)
    if kind not in "biuf":
        raise OutputError(f"output {name!r}: declared is {spec.datatype}, an array of {array.dtype} was returned")
    with np.errstate(all="ignore"):
        made = to_bf16(array) if spec.datatype == "BF16" else array.astype(wanted)
        numbers = from_bf16(made) if spec.datatype == "BF16" else made
        if numbers.dtype.kind == "f" and kind == "f":
            same = np.isfinite(numbers) == np.isfinite(array)
        else:
            same = (numbers.astype(array.dtype) == array) & _in_range(array, wanted)
    if not same.all():
        value = array[~same].flat[0]
        raise OutputError(
            f"output {name!r}: declared is {spec.datatype}, into which {value} ({array.dtype}) does not fit"
        )
    return made


def _in_range(array: Array, wanted: np.dtype[Any]) -> Any:
    """Whether each value is within an integer type's limits; casting back does not show that it was not."""
    if wanted.kind not in "iu" or array.dtype.kind == "b":
        return True
    limits = np.iinfo(wanted)
    if array.dtype.kind == "f":
        return (array >= float(limits.min)) & (array < float(limits.max) + 1.0)
    own = np.iinfo(array.dtype)
    return (array >= max(int(limits.min), int(own.min))) & (array <= min(int(limits.max), int(own.max)))
