"""Telemetry on disk: Parquet, one file per node, recording and hour, in a folder or any pyarrow filesystem.

Layout: `<root>/node=<machine>/hour=<YYYYMMDDTHH>/<recording>.parquet` (hours are UTC). A flush writes the hour so far
into a hidden temporary file and moves it over the old one, so a reader sees the old file or the new one, never half of
either; a crash loses at most `flush_s`. Each node bounds its own part by size and age, oldest hours first.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from models.schema import arrow_schema
from shadecast.errors import ConfigError

SUFFIX = ".parquet"


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
class TelemetryLog:
    """Appends rows of one machine's recording. `uri` is a folder or a pyarrow filesystem URI."""

    uri: str
    machine: str
    recording: str
    limits: LogLimits = field(default_factory=LogLimits)
    _fs: Any = None
    _root: str = ""
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _hour: str = ""
    _unflushed: int = 0
    _flushed_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("machine", self.machine), ("recording", self.recording)):
            if not value or any(c in value for c in "/\\\0") or value.startswith("."):
                raise ConfigError(f"telemetry_log.{name} = {value!r}: must be a file name (no slash, no leading dot)")
        self._fs, root = open_filesystem(self.uri)
        self._root = f"{root.rstrip('/')}/node={self.machine}"
        self._fs.create_dir(self._root, recursive=True)
        for info in self._list():
            if info.base_name.startswith("."):
                self._fs.delete_file(info.path)

    def append(self, row: Mapping[str, Any], wall_s: float) -> None:
        """Add one row (missing columns become NaN); writes a file when `flush_s` has passed or the hour is over."""
        hour = datetime.datetime.fromtimestamp(wall_s, datetime.UTC).strftime("%Y%m%dT%H")
        if self._flushed_s is None:
            self._flushed_s = wall_s
        if hour != self._hour and self._rows:
            self.flush(wall_s)
            self._rows.clear()
        self._hour = hour
        self._rows.append({**row, "machine": self.machine, "recording": self.recording, "wall_s": wall_s})
        self._unflushed += 1
        if not 0 <= wall_s - self._flushed_s < self.limits.flush_s:
            self.flush(wall_s)

    def flush(self, wall_s: float) -> None:
        """Write the hour so far; a no-op when nothing is new. Raises OSError where the file system refuses."""
        self._flushed_s = wall_s
        if not self._unflushed:
            return
        folder = f"{self._root}/hour={self._hour}"
        self._fs.create_dir(folder, recursive=True)
        temporary, final = f"{folder}/.{self.recording}.tmp", f"{folder}/{self.recording}{SUFFIX}"
        with self._fs.open_output_stream(temporary) as sink:
            pq.write_table(_table(self._rows), sink, compression="zstd")
        self._fs.move(temporary, final)
        self._unflushed = 0
        self._prune(wall_s)

    def _prune(self, wall_s: float) -> None:
        files = sorted((i for i in self._list() if i.path.endswith(SUFFIX)), key=lambda i: i.path)
        total = sum(info.size for info in files)
        oldest = datetime.datetime.fromtimestamp(wall_s - self.limits.max_age_s, datetime.UTC).strftime("%Y%m%dT%H")
        for info in files:
            hour = info.path.rpartition("hour=")[2].partition("/")[0]
            if hour == self._hour or (total <= self.limits.max_bytes and hour >= oldest):
                continue
            self._fs.delete_file(info.path)
            total -= info.size
            folder = info.path.rpartition("/")[0]
            if not self._fs.get_file_info(pafs.FileSelector(folder)):
                self._fs.delete_dir(folder)

    def _list(self) -> list[Any]:
        found = self._fs.get_file_info(pafs.FileSelector(self._root, recursive=True))
        return [info for info in found if info.is_file]


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Columns straight from buffers: `pa.array` would import pandas, 50 MB in every forecaster."""
    schema, nan = arrow_schema(), float("nan")
    columns = []
    for column in schema:
        if pa.types.is_string(column.type):
            texts = [str(row[column.name]).encode() for row in rows]
            ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
            buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(texts))]
        else:
            kind = np.float64 if pa.types.is_float64(column.type) else np.float32
            buffers = [None, pa.py_buffer(np.array([row.get(column.name, nan) for row in rows], kind).tobytes())]
        columns.append(pa.Array.from_buffers(column.type, len(rows), buffers))
    return pa.Table.from_arrays(columns, schema=schema)


def open_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path in it) for a local folder or a URI; raises ConfigError on one it cannot open."""
    try:
        return tuple(pafs.FileSystem.from_uri(uri)) if "://" in uri else (pafs.LocalFileSystem(), uri)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"telemetry_log.uri = {uri!r}: cannot be opened ({error}); give a folder or file://, s3://, gs://"
        ) from None
