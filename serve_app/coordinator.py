"""The coordinator as others find it: its name, and the one look-up of it.

Standard library and ray only, because routers in users' processes import this.
"""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "shadecast"
COORDINATOR = "shadecast-coordinator"


def find_coordinator() -> Any | None:
    """The coordinator's handle, None while there is none. Blocks: in an event loop, call it in a thread."""
    try:
        return ray.get_actor(COORDINATOR, namespace=NAMESPACE)
    except ValueError:
        return None
