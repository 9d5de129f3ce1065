"""Which calls are copies, or are made on behalf of one: their ids say it.

Serve hands the ids of the request that is being handled on to every call that its code makes through a handle, so what
a copy causes in other deployments is known there, whatever routes it. It is routed as any other, for the work is real,
but nothing is learned from it, and it is neither copied nor tried again.
"""

from __future__ import annotations

from typing import Any

from serve_app.ray_api import current_request_ids

SHADOW_SUFFIX = "-shadow"


def is_of_copy(metadata: Any) -> bool:
    """Whether a call is a copy, or is made by the code that handles one."""
    return str(metadata.internal_request_id).endswith(SHADOW_SUFFIX)  # Serve's own id: no client can choose it


def is_shadow() -> bool:
    """Whether the answer to the request that is being handled is thrown away: it is a copy, or is made for one.

    For use in user code, in the tasks that it starts and in `asyncio.to_thread`; a thread that it starts otherwise has
    no part in the request, nor have the calls that are made there. In a method with `@serve.batch`: whether the whole
    batch is.
    """
    ids = current_request_ids()
    return bool(ids) and all(request_id.endswith(SHADOW_SUFFIX) for request_id in ids)
