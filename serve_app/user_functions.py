"""Functions that users name in their configuration as "module:function"."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from shadecast.compare import answers_equal
from shadecast.config import TrialConfig

logger = logging.getLogger("ray.serve")


def load_function(setting: str, path: str) -> Callable[..., Any] | None:
    """The function at `path`; None, with one logged line, where it cannot be had: routing goes on without it."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises when imported
        logger.error(f"shadecast: {setting} = {path!r} cannot be imported here: {error}. It is left out.")  # noqa: TRY400
        return None
    if not callable(found):
        logger.error(f"shadecast: {setting} = {path!r} is not a function. It is left out.")
        return None
    return found  # type: ignore[no-any-return]


def comparison(config: TrialConfig) -> Callable[[Any, Any], Any] | None:
    """The function that compares answers; None where it is not wanted."""
    match config.compare:
        case "":
            return None
        case "exact":
            return answers_equal
        case "close":
            return functools.partial(answers_equal, tolerance=config.compare_tolerance)
        case path:
            return load_function("trial.compare", path)
