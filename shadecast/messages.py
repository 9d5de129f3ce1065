"""What travels between routers, forecasters and the coordinator: plain values by name, with a schema number.

A reader ignores names that it does not know and takes the default where one is missing, so that processes of different
versions work side by side while an upgrade rolls through a cluster. A writer whose message cannot be understood in that
way says so by `needs`: readers of an older schema refuse it with a line that names both versions.

Many objects of one kind travel as columns, {field: [value of each]}; a column of defaults is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from shadecast.errors import MessageError
from shadecast.version import VERSION

SCHEMA = 2
"""1 was Shadecast 0.1, which sent its dataclasses as they are; see `shadecast.former`."""
NEEDS = 2
"""Least schema whose readers understand what this version writes."""

T = TypeVar("T")
_FIELDS: dict[type[Any], tuple[tuple[str, Any], ...]] = {}


def message(kind: str, **values: Any) -> dict[str, Any]:
    """A message of this version."""
    return {"kind": kind, "schema": SCHEMA, "needs": NEEDS, "version": VERSION, **values}


def check(received: Any, kind: str) -> Mapping[str, Any]:
    """The message if it can be read; raises MessageError, one line that names both versions."""
    if not isinstance(received, Mapping) or not isinstance(received.get("schema"), int):
        raise MessageError(
            f"a {type(received).__name__} where Shadecast {VERSION} (schema {SCHEMA}) expects the message {kind!r}: "
            "its sender is of another version; upgrade the older one"
        )
    version, schema, needs = received.get("version", "?"), received["schema"], received.get("needs", SCHEMA)
    if needs > SCHEMA:
        raise MessageError(
            f"the message {kind!r} of Shadecast {version} (schema {schema}) cannot be read by Shadecast {VERSION} "
            f"(schema {SCHEMA}, needed: {needs}): upgrade the latter"
        )
    if received.get("kind") != kind:
        raise MessageError(
            f"a {received.get('kind')!r} of Shadecast {version} (schema {schema}) where Shadecast {VERSION} "
            f"(schema {SCHEMA}) expects {kind!r}"
        )
    return received


def to_columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Objects of one dataclass as columns."""
    if not rows:
        return {}
    columns = {}
    for name, default in _fields(type(rows[0])):
        column = [getattr(row, name) for row in rows]
        if default is dataclasses.MISSING or any(value != default for value in column):
            columns[name] = column
    return columns


def from_columns(kind: type[T], columns: Any) -> list[T]:
    """Objects of a dataclass from columns; raises MessageError where these cannot be such objects."""
    return [kind(*values) for values in rows_of(kind, columns)]


def rows_of(kind: type[Any], columns: Any) -> Iterable[tuple[Any, ...]]:
    """The fields of each object, in order, from columns; raises MessageError as `from_columns`."""
    if not isinstance(columns, Mapping) or not all(isinstance(column, list) for column in columns.values()):
        raise MessageError(f"{kind.__name__}: columns are expected, not {type(columns).__name__}")
    counts = {len(column) for column in columns.values()}
    if not counts:
        return []
    if len(counts) > 1:
        raise MessageError(f"{kind.__name__}: columns of {sorted(counts)} values")
    (count,) = counts
    found = []
    for name, default in _fields(kind):
        column = columns.get(name)
        if column is None:
            if default is dataclasses.MISSING:
                raise MessageError(f"{kind.__name__}: the column {name!r} is missing")
            column = [default] * count
        found.append(column)
    return zip(*found, strict=True)


def to_mapping(value: Any) -> Any:
    """A dataclass, and those in its fields, as mappings."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def from_mapping(kind: type[T], values: Any, **inner: Any) -> T:
    """A dataclass from a mapping, `inner` being fields that are known already; raises MessageError."""
    if not isinstance(values, Mapping):
        raise MessageError(f"{kind.__name__}: a mapping is expected, not {type(values).__name__}")
    known = {name: values[name] for name, _ in _fields(kind) if name in values}
    try:
        return kind(**{**known, **inner})
    except TypeError as error:
        raise MessageError(f"{kind.__name__}: {error}") from None


def _fields(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """Name and default of each field, in order; MISSING where it must be given."""
    known = _FIELDS.get(kind)
    if known is not None:
        return known
    found = []
    for f in dataclasses.fields(kind):
        made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        found.append((f.name, made))
    _FIELDS[kind] = tuple(found)
    return _FIELDS[kind]


def as_list(values: Any, what: str) -> list[Any]:
    """A list from a message; raises MessageError if it is none."""
    if not isinstance(values, (list, tuple)):
        raise MessageError(f"{what}: a list is expected, not {type(values).__name__}")
    return list(values)


def number_of(value: Any) -> float:
    """A number of a message; NaN where there is none."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain else math.nan


def numbers(message: Any, names: Iterable[str]) -> list[Any]:
    """Numbers of a message by name, 0 where they are missing; raises MessageError."""
    if not isinstance(message, Mapping):
        raise MessageError(f"{', '.join(names)}: a mapping is expected, not {type(message).__name__}")
    found = [message.get(name, 0) for name in names]
    for name, value in zip(names, found, strict=True):
        if not math.isfinite(number_of(value)):
            raise MessageError(f"{name} = {value!r}: a number is expected")
    return found
