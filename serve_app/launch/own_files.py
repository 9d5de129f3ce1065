"""Where the control plane keeps files of its own, under the folders that the XDG base directories name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def state_folder() -> Path:
    """What must outlive a restart: tokens, the audit log."""
    return _folder("XDG_STATE_HOME", ".local/state")


def cache_folder() -> Path:
    """What may be lost."""
    return _folder("XDG_CACHE_HOME", ".cache")


def audit_file() -> Path:
    """Where orders are written down, unless told otherwise; on the coordinator's node."""
    return state_folder() / "audit.jsonl"


def operate_token_file() -> Path:
    """The token for orders that is made where none is given."""
    return state_folder() / "operate-token"


def _folder(variable: str, below_home: str) -> Path:
    if given := os.environ.get(variable):
        return Path(given) / "shadecast"
    try:
        return Path.home() / below_home / "shadecast"
    except RuntimeError:  # a user without an entry in the password file, as containers may have
        return Path(tempfile.gettempdir()) / f"shadecast-{os.getuid()}"
