"""A live log held still: forecasters replace and delete files while a training job reads them, more than once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq

from models.series import TelemetryError, telemetry_files


@contextmanager
def snapshot(folder: Path, storage: Path, most_rows: int | None = None) -> Iterator[Path]:
    """A folder in `storage` with the telemetry files of `folder` as they are now, until the end of the `with` block.

    Of a log with more than `most_rows` only the newest hours, of all nodes, that have as many; at least the last one.

    Each is a hard link, which a file moved over the original leaves alone; where there are none (another file system)
    it is a copy. A file deleted meanwhile is left out. A TelemetryError about the snapshot names the original.
    """
    storage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="telemetry-", dir=storage) as name:
        still = Path(name)
        found = telemetry_files(folder)
        for path in found if most_rows is None else newest(found, most_rows):
            held = still / path.relative_to(folder)
            held.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                _hold(path.resolve(), held)
        try:
            yield still
        except TelemetryError as error:
            raise TelemetryError(str(error).replace(str(still), str(folder))) from None


def newest(files: list[Path], most_rows: int) -> list[Path]:
    """Files of the newest hours (folders `hour=...`) that together have at most `most_rows`; of the last hour all."""
    hours: dict[str, list[Path]] = {}
    for path in files:
        hours.setdefault(next((part for part in path.parts if part.startswith("hour=")), ""), []).append(path)
    kept: list[Path] = []
    rows = 0
    for hour in sorted(hours, reverse=True):
        rows += sum(_rows(path) for path in hours[hour])
        if kept and rows > most_rows:
            break
        kept += hours[hour]
    return sorted(kept)


def _rows(path: Path) -> int:
    """Of a file; 0 where it is gone, or cannot be read, which whoever reads it says."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError):
        return 0


def _hold(path: Path, held: Path) -> None:
    try:
        os.link(path, held)
    except OSError:
        shutil.copyfile(path, held)
