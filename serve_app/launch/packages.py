"""Finds packages of others that hide ours: `models` and `train` are common names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from shadecast.errors import ShadecastError

_OURS = ("shadecast", "actors", "models", "serve_app", "train")


class ShadowedPackageError(ShadecastError):
    """Another package of the same name comes first on the import path."""


def check_packages(home: Path | None = None) -> None:
    """Raise ShadowedPackageError, naming both paths, if an import would find another package in place of ours."""
    home = home or Path(__file__).resolve().parents[2]
    for name in _OURS:
        ours = home / name
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        found = Path(origin).resolve().parent if origin else None
        if found is None and spec is not None and spec.submodule_search_locations:
            found = Path(next(iter(spec.submodule_search_locations))).resolve()
        if found != ours.resolve():
            raise ShadowedPackageError(
                f"package {name!r}: an import finds {found or 'nothing'}, but Shadecast needs {ours}. "
                f"Start it from a folder without a {name!r} of its own, or take that folder off PYTHONPATH."
            )
