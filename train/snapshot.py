"""A live log held still: forecasters replace and delete files while a training job reads them, more than once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.series import TelemetryError, telemetry_files


@contextmanager
def snapshot(folder: Path, storage: Path) -> Iterator[Path]:
    """A folder in `storage` with the telemetry files of `folder` as they are now, until the end of the `with` block.

    Each is a hard link, which a file moved over the original leaves alone; where there are none (another file system)
    it is a copy. A file deleted meanwhile is left out. A TelemetryError about the snapshot names the original.
    """
    storage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="telemetry-", dir=storage) as name:
        still = Path(name)
        for path in telemetry_files(folder):
            held = still / path.relative_to(folder)
            held.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                _hold(path.resolve(), held)
        try:
            yield still
        except TelemetryError as error:
            raise TelemetryError(str(error).replace(str(still), str(folder))) from None


def _hold(path: Path, held: Path) -> None:
    try:
        os.link(path, held)
    except OSError:
        shutil.copyfile(path, held)
