"""Telemetry on disk: Parquet, one file per node, recording and hour, in a folder or any pyarrow filesystem.

Layout: `<root>/node=<machine>/hour=<YYYYMMDDTHH>/<recording>.parquet` (hours are UTC). A flush writes the hour so far
into a hidden temporary file and moves it over the old one, so a reader sees the old file or the new one, never half of
either; a crash loses at most `flush_s`. Each node bounds its own part by size and age, oldest hours first.

The wall clock may step. Rows of an hour that comes back, and is no longer in memory, go into a second file of that hour
(`<recording>.2.parquet`); a file is only ever replaced by one with the same rows and more. Readers sort by `t_s`, which
is monotonic. Age deletes nothing within an hour of a start or a step: the clock may be wrong, and no file be old.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import math
import os
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from models.schema import arrow_schema
from shadecast.errors import ConfigError

logger = logging.getLogger(__name__)

SUFFIX = ".parquet"
HOUR_S = 3600.0
MAX_ROWS = 100_000
"""In memory, while the file system refuses to take them: a day at one a second, some 200 MB."""


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How much a node keeps. `flush_s` is also what a crash can lose."""

    flush_s: float = 60.0
    max_bytes: int = 512 * 1024 * 1024
    max_age_s: float = 30 * 86_400.0

    def __post_init__(self) -> None:
        for name, low in (("flush_s", 1.0), ("max_bytes", 1024), ("max_age_s", 60.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value >= low:
                raise ConfigError(f"telemetry_log.{name} = {value!r}: must be a number of at least {low:g}")


@dataclass(slots=True)
class _Hour:
    """Rows of one hour, and the file that holds the first `written` of them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    name: str = ""


@dataclass(slots=True)
class TelemetryLog:
    """Appends rows of one machine's recording. `uri` is a folder or a pyarrow filesystem URI.

    A folder that cannot be used (a disk that is full, read-only, not mounted) is tried again with each flush.
    """

    uri: str
    machine: str
    recording: str
    limits: LogLimits = field(default_factory=LogLimits)
    _fs: Any = None
    _root: str = ""
    _opened: bool = False
    _hours: dict[str, _Hour] = field(default_factory=dict)
    """Rows in memory by hour, the hour written to last at the end."""
    _flushed_s: float | None = None
    _wall_s: float = -math.inf
    _steady_s: float = math.inf
    """Since when the wall clock has gone on without a step."""

    def __post_init__(self) -> None:
        for name, value in (("machine", self.machine), ("recording", self.recording)):
            if not value or any(c in value for c in "/\\\0") or value.startswith("."):
                raise ConfigError(f"telemetry_log.{name} = {value!r}: must be a file name (no slash, no leading dot)")
        self._fs, root = open_filesystem(self.uri)
        self._root = f"{root.rstrip('/')}/node={self.machine}"
        with contextlib.suppress(OSError):
            self._open()

    def _open(self) -> None:
        """Clear up what a crash left behind, and take a name that is free."""
        if self._opened:
            return
        self._fs.create_dir(self._root, recursive=True)
        names: set[str] = set()
        for info in self._list():
            if info.base_name.startswith("."):
                self._fs.delete_file(info.path)
            names.add(info.base_name)
        # A machine without a clock of its own starts at the same second with the same pid each time.
        again = (f"{self.recording}-{n}" for n in itertools.count(2))
        free = (r for r in (self.recording, *itertools.islice(again, len(names))) if not _taken(r, names))
        self.recording = next(free)
        self._opened = True

    def append(self, row: Mapping[str, Any], wall_s: float) -> bool:
        """Add one row (missing columns become NaN); writes files when `flush_s` has passed or the hour is another.

        Whether it wrote. Raises OSError where the file system refuses; the row is kept and written with a later one.
        """
        label = _label(wall_s)
        new_hour = bool(self._hours) and label != next(reversed(self._hours))
        self._hours[label] = hour = self._hours.pop(label, _Hour())
        hour.rows.append({**row, "wall_s": wall_s})
        if not 0.0 <= wall_s - self._wall_s <= HOUR_S:
            self._steady_s = wall_s
        self._wall_s = wall_s
        if self._flushed_s is None:
            self._flushed_s = wall_s
        due = new_hour or not 0 <= wall_s - self._flushed_s < self.limits.flush_s
        return due and self.flush(wall_s)

    def flush(self, wall_s: float) -> bool:
        """Write what is new; whether anything was. Raises OSError where the file system refuses."""
        self._flushed_s = wall_s
        wrote = False
        try:
            self._open()
            for label, hour in self._hours.items():
                if len(hour.rows) > hour.written:
                    self._write(label, hour)
                    wrote = True
        finally:
            self._forget()
        if wrote:
            self._prune(wall_s)
        return wrote

    def _write(self, label: str, hour: _Hour) -> None:
        folder = f"{self._root}/hour={label}"
        self._fs.create_dir(folder, recursive=True)
        if not hour.name:
            later = (f"{self.recording}.{n}" for n in itertools.count(2))
            names = itertools.chain([self.recording], later)
            hour.name = next(n for n in names if not self._exists(f"{folder}/{n}{SUFFIX}"))
        temporary = f"{folder}/.{hour.name}.tmp"
        with self._fs.open_output_stream(temporary) as sink:
            pq.write_table(_table(hour.rows, self.machine, self.recording), sink, compression="zstd")
        self._fs.move(temporary, f"{folder}/{hour.name}{SUFFIX}")
        hour.written = len(hour.rows)

    def _forget(self) -> None:
        """Keep the last two hours, for a clock that goes back and forth; what is not written only up to a bound."""
        labels = list(self._hours)
        rows = sum(len(self._hours[label].rows) for label in labels)
        for n, label in enumerate(labels[:-1]):
            hour = self._hours[label]
            if (hour.written == len(hour.rows) and n < len(labels) - 2) or rows > MAX_ROWS:
                rows -= len(hour.rows)
                del self._hours[label]

    def _prune(self, wall_s: float) -> None:
        files = sorted((i for i in self._list() if i.path.endswith(SUFFIX)), key=lambda i: i.path)
        total = sum(info.size for info in files)
        steady = wall_s - self._steady_s >= HOUR_S
        oldest = _label(wall_s - self.limits.max_age_s) if steady else ""
        for info in files:
            hour = info.path.rpartition("hour=")[2].partition("/")[0]
            if hour in self._hours or (total <= self.limits.max_bytes and hour >= oldest):
                continue
            self._fs.delete_file(info.path)
            total -= info.size
            folder = info.path.rpartition("/")[0]
            if not self._fs.get_file_info(pafs.FileSelector(folder)):
                self._fs.delete_dir(folder)

    def _exists(self, path: str) -> bool:
        return bool(self._fs.get_file_info(path).type != pafs.FileType.NotFound)

    def _list(self) -> list[Any]:
        found = self._fs.get_file_info(pafs.FileSelector(self._root, recursive=True))
        return [info for info in found if info.is_file]


class LogWriter:
    """Puts what the sampling thread hands over into a log, which is opened when there is something to write.

    A log that cannot be opened or written is a `problem`, and takes neither telemetry nor forecasts along.
    """

    def __init__(self, uri: str, open_log: Callable[[], TelemetryLog]) -> None:
        self.problem = ""
        """Why nothing was written the last time that something should have been."""
        self._uri, self._open_log = uri, open_log
        self._log: TelemetryLog | None = None
        self._rows: queue.SimpleQueue[tuple[Mapping[str, Any], float]] = queue.SimpleQueue()

    def put(self, row: Mapping[str, Any], wall_s: float) -> None:
        """From any thread; never waits."""
        self._rows.put((row, wall_s))

    def write(self, *, to_the_end_s: float | None = None) -> None:
        """Take over what was put; with `to_the_end_s`, the wall clock, everything goes into files. Never raises."""
        try:
            wrote = False
            while not self._rows.empty():
                row, wall_s = self._rows.get()  # where the address cannot be used at all, nothing is kept
                self._log = self._log or self._open_log()
                wrote = self._log.append(row, wall_s) or wrote
            if self._log is not None and to_the_end_s is not None:
                wrote = self._log.flush(to_the_end_s) or wrote
            self.problem = "" if wrote else self.problem
        except (OSError, ConfigError) as error:
            problem = f"telemetry log {self._uri}: cannot be written ({error})"
            if problem != self.problem:
                logger.warning("%s; tried again", problem)
            self.problem = problem


def _taken(recording: str, names: set[str]) -> bool:
    return any(name.startswith(recording + ".") for name in names)


def _label(wall_s: float) -> str:
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).strftime("%Y%m%dT%H")


def _table(rows: list[dict[str, Any]], machine: str, recording: str) -> pa.Table:
    """Columns straight from buffers: `pa.array` would import pandas, 50 MB in every forecaster."""
    schema, nan = arrow_schema(), float("nan")
    columns = []
    for column in schema:
        if pa.types.is_string(column.type):
            text = {"machine": machine, "recording": recording}[column.name].encode()
            ends = np.arange(len(rows) + 1, dtype=np.int32) * len(text)
            buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(text * len(rows))]
        else:
            kind = np.float64 if pa.types.is_float64(column.type) else np.float32
            buffers = [None, pa.py_buffer(np.array([row.get(column.name, nan) for row in rows], kind).tobytes())]
        columns.append(pa.Array.from_buffers(column.type, len(rows), buffers))
    return pa.Table.from_arrays(columns, schema=schema)


def open_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path in it) for a local folder or a URI; raises ConfigError on one it cannot open."""
    try:
        return (
            tuple(pafs.FileSystem.from_uri(uri)) if "://" in uri else (pafs.LocalFileSystem(), os.path.expanduser(uri))
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"telemetry_log.uri = {uri!r}: cannot be opened ({error}); give a folder or file://, s3://, gs://"
        ) from None
