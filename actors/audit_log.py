"""The audit log: one JSON line for each order, in a file that only its owner reads, rotated by size."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from io import FileIO, TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_BYTES = 5_000_000
"""Of one file; orders are some 300 bytes each."""
OLDER_FILES = 4


class AuditLog:
    """Writes to `path`, and says once in the usual log that it cannot: orders are carried out all the same."""

    def __init__(self, path: str) -> None:
        self.path = os.path.expanduser(path)
        self._file = _File(self.path, maxBytes=MAX_BYTES, backupCount=OLDER_FILES, encoding="utf-8", delay=True)

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Append one line. Blocks; raises nothing."""
        text = json.dumps(entry, default=str, separators=(",", ":"))
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            self._file.cannot(error)
            return
        self._file.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File(RotatingFileHandler):
    """The library's rotation; its files are for their owner alone, and what goes wrong is said once."""

    _said = False

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        return TextIOWrapper(FileIO(descriptor, "a"), encoding="utf-8", write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Called where a line could not be written."""
        self.cannot(sys.exc_info()[1])

    def cannot(self, error: BaseException | None) -> None:
        """Say it once."""
        if not self._said:
            self._said = True
            logger.warning("audit log %s: %s. Orders are carried out, and not written down.", self.baseFilename, error)
