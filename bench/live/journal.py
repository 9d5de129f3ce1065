"""What a run brings, one JSON line each as it comes: a run of hours must not fill the driver, which is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self


class Journal:
    """Written line by line; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._file = open(self._path, "w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, kind: str, value: Any) -> None:
        """One line."""
        self._file.write(json.dumps({kind: plain(value)}) + "\n")


def read_journal(path: Path) -> dict[str, Any]:
    """All of a run: its records and states in order, and what there is once."""
    found: dict[str, Any] = {"records": [], "states": []}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            ((kind, value),) = json.loads(line).items()
            if kind in ("record", "state"):
                found[f"{kind}s"].append(value)
            else:
                found[kind] = value
    return found


def plain(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
