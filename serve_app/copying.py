"""`@copy_safe`: a deployment's own code says which of its methods may be called twice for one request.

    @serve.deployment
    class Model:
        @copy_safe
        async def predict(self, x): ...

Reaches the routers through Serve's replica metadata, so it needs no configuration; `trial.copy_methods` does the same
from outside. Imports nothing but the standard library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

METADATA_KEY = "shadecast_copy_safe"
_HOOK = "record_replica_metadata"


class _Declared:
    """Stands for a method until its class exists, then puts the method itself in its own place."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self._method)
        methods = [*getattr(owner, METADATA_KEY, ()), name]
        setattr(owner, METADATA_KEY, methods)
        if METADATA_KEY in getattr(getattr(owner, _HOOK, None), "__dict__", {}):
            return
        own = getattr(owner, _HOOK, None)

        async def record_replica_metadata(self: Any) -> dict[str, Any]:
            recorded = own(self) if own is not None else None
            if inspect.isawaitable(recorded):
                recorded = await recorded
            return {**(recorded or {}), METADATA_KEY: list(getattr(type(self), METADATA_KEY))}

        record_replica_metadata.__dict__[METADATA_KEY] = True
        setattr(owner, _HOOK, record_replica_metadata)


def copy_safe(method: Callable[..., Any]) -> Any:
    """Declare a method of a deployment class safe to copy to replicas on trial: calling it twice does no harm."""
    return _Declared(method)
