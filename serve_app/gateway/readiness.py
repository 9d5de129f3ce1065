"""Whether the model behind the gateway can answer, by what Serve's controller says."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from ray import serve
from ray.serve.schema import ApplicationStatus

logger = logging.getLogger("ray.serve")


class Readiness:
    """Whether the model has a running replica, asked of Serve's controller at most once a second.

    While the controller does not answer, what was known last holds: readiness must not fail with it.
    """

    def __init__(
        self, app_name: str, deployment: str, now_s: Callable[[], float] = time.monotonic, scales_to_zero: bool = False
    ) -> None:
        self._scales_to_zero, self._may_start = scales_to_zero, False
        self._app_name = app_name
        self._deployment = deployment
        self._now_s = now_s
        self._asked_s = -math.inf
        self._running = False
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self) -> bool:
        """Whether requests would be answered."""
        if self._asking is None and self._now_s() - self._asked_s >= 1.0:
            self._asked_s = self._now_s()
            self._asking = asyncio.ensure_future(self._ask_anew())
        if self._asking is not None:  # probes that arrive together get one answer; one that leaves takes nobody's away
            await asyncio.shield(self._asking)
        return self._running

    async def _ask_anew(self) -> None:
        try:
            self._running = await asyncio.wait_for(asyncio.to_thread(self._ask), timeout=2.0)
        except Exception:  # what was known holds
            logger.debug("the controller did not say whether the model runs", exc_info=True)
        finally:
            self._asking = None

    async def may_start(self) -> bool:
        """Whether there is no replica because none was needed: requests that wait for one start it."""
        await self()
        return self._may_start

    def _ask(self) -> bool:
        application = serve.status().applications[self._app_name]
        states = application.deployments[self._deployment].replica_states
        running = any(count > 0 for state, count in states.items() if str(state).endswith("RUNNING"))
        self._may_start = self._scales_to_zero and not running and application.status == ApplicationStatus.RUNNING
        return running or self._may_start
