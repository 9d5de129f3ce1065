"""Our own processes import our own packages, whatever folders come first on the import path.

`models`, `train`, `actors` and `bench` are common names. An application folder on the PYTHONPATH of a cluster's
machines hides ours with its own, and the folder that holds a clone makes an empty `shadecast` of it. A finder that is
asked before the import path settles that for our names only. Our folder at the head of the path would settle it, too,
but where it is `site-packages` it would put everything that is installed before the standard library.

Only processes of our own call this: command line, control plane, training. In those of users, users' packages win.
Standard library only, because nothing of ours may be imported before it has run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = ("shadecast", "actors", "models", "serve_app", "train", "bench")
HOME = Path(__file__).absolute().parents[2]


class OwnPackages(MetaPathFinder):
    """Finds our packages, and nothing else, in one folder."""

    def __init__(self, home: Path) -> None:
        self._home = str(home)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the package is; None leaves the search to the finders that come after."""
        return PathFinder.find_spec(fullname, [self._home]) if fullname in PACKAGES else None


def put_first(home: Path = HOME) -> None:
    """Find our packages in `home` from now on, also those that this process has loaded from elsewhere.

    Ray gives an actor no worker that has run tasks (2.60), but a setup hook or a module that workers preload may have
    loaded a user's `models`.
    """
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages(home))
    for package in PACKAGES:
        if (module := sys.modules.get(package)) is not None and not _lies_in(module, home):
            for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
                del sys.modules[name]


SETUP_HOOK = f"{put_first.__module__}.{put_first.__qualname__}"
"""For the runtime environment of a job of ours: Ray calls it as each worker starts."""


def _lies_in(module: ModuleType, home: Path) -> bool:
    places = [Path(place).resolve() for place in getattr(module, "__path__", ())]
    return places == [(home / module.__name__).resolve()]


@contextlib.contextmanager
def users_folder_first(folder: str) -> Iterator[None]:
    """Meanwhile, imports find what a user's folder holds, also under our names."""
    ours = [finder for finder in sys.meta_path if isinstance(finder, OwnPackages)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in ours]
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.meta_path[:0] = ours
