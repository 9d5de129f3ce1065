"""The one HTML file that a command writes: whole or not at all, and refused before any work where it cannot be."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shadecast.errors import ConfigError


def html_path(given: str) -> Path | None:
    """Where to write; None for none. Raises ConfigError where no file could be put there."""
    if not given:
        return None
    path = Path(given)
    if path.is_dir():
        raise ConfigError(f"--html {given}: is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html {given}: there is no folder {path.absolute().parent}; make it, or name another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f'--html {given}: cannot be written; name another file, or "" for none')
    return path


def write_html(path: Path, text: str) -> None:
    """Write the file, whole or not at all. Raises ConfigError."""
    part = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            part = Path(file.name)
            file.write(text)
        part.chmod(0o644)
        part.replace(path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror})") from None
