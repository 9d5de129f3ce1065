"""Triton's classification extension: the highest values of an output, each as the text `value:index`."""

from __future__ import annotations

import numpy as np

from serve_app.gateway.tensors import Array, PackedBytes
from serve_app.protocol_error import ProtocolError

MAX_CLASSES = 1_000_000
_MAX_ELEMENTS = 1_000_000


def top_classes(name: str, array: Array | PackedBytes, count: int) -> Array:
    """BYTES tensor of the `count` highest values: `[count]` of one dimension, else `[rows, count]`, a row each.

    The order is Triton's: highest first, of equals the one with the lower index. Raises ProtocolError (400) for an
    output that holds no numbers.
    """
    if isinstance(array, PackedBytes) or array.dtype.kind not in "iuf":
        raise ProtocolError(400, f"output {name!r} holds no numbers: no classes can be made of it")
    if array.size > _MAX_ELEMENTS:
        raise ProtocolError(
            400, f"output {name!r} has {array.size} elements; classes are made of {_MAX_ELEMENTS} at most"
        )
    rows = array.reshape(len(array), -1) if array.ndim > 1 and array.size else array.reshape(1, -1)
    ascending = np.argsort(rows[:, ::-1], axis=1, kind="stable")  # backwards: of equals the first is to be the highest
    order = (rows.shape[1] - 1 - ascending)[:, ::-1][:, :count]
    found = np.empty(order.shape, dtype=object)
    for row, (indices, values) in enumerate(zip(order, np.take_along_axis(rows, order, axis=1), strict=True)):
        found[row] = [_text(value, index) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]
    return found if array.ndim > 1 and array.size else found.reshape(-1)


def _text(value: float, index: int) -> bytes:
    number = f"{value:f}" if isinstance(value, float) else str(value)
    return f"{number}:{index}".encode()
