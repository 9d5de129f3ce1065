"""Functions that users name in their configuration as "module:function".

A module is imported in a thread of its own: it may import torch, or hang, and requests are routed meanwhile as if the
function were not named. Whatever the function does, no request fails with it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from shadecast.compare import answers_equal
from shadecast.config import TrialConfig

logger = logging.getLogger("ray.serve")

_SLOW_S = 30.0
"""An import that takes longer is told of."""


class UserFunction:
    """One function; until it is imported, where it cannot be, and where it fails, a call gives None."""

    def __init__(self, setting: str, path: str, otherwise: str, found: Callable[..., Any] | None = None) -> None:
        """`otherwise` says what happens without the function; for the log, which has each thing once."""
        self._setting, self._path, self._otherwise = setting, path, otherwise
        self._began_s = time.monotonic()
        self._said: set[str] = set()
        self._found = found
        self._is_pending = True
        known = found or _imported(path)
        if known is not None:
            self.settle(known)
        else:
            _import_soon(self, path)

    def __bool__(self) -> bool:
        """Whether it is there."""
        return self._found is not None

    def __call__(self, *args: Any, read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """What the function says, as `read` understands it; None if it says nothing. From any thread."""
        if self._found is None:
            if self._is_pending and time.monotonic() - self._began_s > _SLOW_S:
                self._say("slow", f"is still being imported after {_SLOW_S:g} s: {self._otherwise} until it is there")
            return None
        try:
            return read(self._found(*args))
        except (Exception, SystemExit) as error:  # what it is asked about is a request, which must go on
            self._say("fails", f"failed: {error!r}: {self._otherwise} where it does; further failures are not logged")
            return None

    def settle(self, outcome: object) -> None:
        """It is there, or is an error. From any thread."""
        if isinstance(outcome, BaseException):
            where = "its module must be importable in each process that routes (proxy, gateway, driver)"
            why = f"cannot be imported here: {outcome!r}: {self._otherwise}; {where}: mend it and deploy again"
            self._say("import", why, logging.ERROR)
        elif callable(outcome):
            self._found = outcome
        else:
            self._say("import", f"is not a function: {self._otherwise}", logging.ERROR)
        self._is_pending = False

    def _say(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.log(level, f"shadecast: {self._setting} = {self._path!r} {text}")


_awaited: dict[str, weakref.WeakSet[UserFunction]] = {}
"""Who waits for an import that is under way: one that hangs is begun once, however often settings change."""
_lock = threading.Lock()


def _imported(path: str) -> object:
    """What is at `path` if that needs no import; None otherwise."""
    name, _, attribute = path.partition(":")
    module = sys.modules.get(name)
    if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return vars(module).get(attribute)


def _import_soon(wanted: UserFunction, path: str) -> None:
    with _lock:
        is_new = path not in _awaited
        _awaited.setdefault(path, weakref.WeakSet()).add(wanted)
    if is_new:  # a daemon: no process waits for it at its end
        threading.Thread(target=_import, args=(path,), name=f"shadecast imports {path}", daemon=True).start()


def _import(path: str) -> None:
    name, _, attribute = path.partition(":")
    outcome: object
    try:
        outcome = getattr(importlib.import_module(name), attribute)
    except BaseException as error:  # whatever a user's module does when imported, leaving the process included
        outcome = error
    with _lock:
        wanted = list(_awaited.pop(path))
    for each in wanted:
        each.settle(outcome)


def comparison(config: TrialConfig) -> UserFunction | None:
    """The function that compares answers; None where that is not wanted."""
    setting, path, otherwise = "trial.compare", config.compare, "answers are not compared"
    if path in ("exact", "close"):
        tolerance = config.compare_tolerance if path == "close" else 0.0
        return UserFunction(setting, path, otherwise, functools.partial(answers_equal, tolerance=tolerance))
    return UserFunction(setting, path, otherwise) if path else None
