"""Keeps a router in touch with the coordinator: one call at a time brings it a report and waits for the next table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from serve_app.absence import Absence
from serve_app.coordinator import NAMESPACE, find_coordinator
from serve_app.ray_api import shared_secret
from shadecast.config import REPORT_S, TICK_S
from shadecast.errors import MessageError
from shadecast.messages import SCHEMA, check, message
from shadecast.tables import unpack_table

if TYPE_CHECKING:
    from serve_app.routing.request_router import Router

logger = logging.getLogger("ray.serve")

_FAST_S = 0.05
"""Least time between two calls."""
_TIMEOUT_S = 2.0
_SHUTDOWN_S = 5.0
"""Ray has shut down for sure after so long."""


async def keep_in_touch(router: weakref.ref[Router]) -> None:
    """Report and take tables until the router or Ray is gone. Never raises.

    A router without replicas says so once and is quiet then: Serve keeps the routers of applications that were deleted
    for as long as the process lives.

    Ray is asked for before every call, because a call on a process that has shut Ray down would start a new cluster.
    What it handed out is kept until it has shut down: to drop a call's object meanwhile ends the process (Ray 2.60).
    """
    link = Link(router)
    known_secret = False
    loop = asyncio.get_running_loop()
    try:
        while ray.is_initialized() and (this := router()) is not None:
            if not known_secret:
                with contextlib.suppress(Exception):  # tried again
                    this.use_secret(await loop.run_in_executor(None, _cluster_secret))
                    known_secret = True
            del this
            due_s = await link.exchange() + time.monotonic()
            while (left_s := due_s - time.monotonic()) > 0.0 and ray.is_initialized() and router():  # noqa: ASYNC110
                await asyncio.sleep(min(left_s, REPORT_S))
        if link.holds_something and not ray.is_initialized():
            await asyncio.sleep(_SHUTDOWN_S)
    finally:
        if (this := router()) is not None:
            this.use_secret(None)


class Link:
    """One router's connection to one coordinator after the other."""

    def __init__(self, router: weakref.ref[Router]) -> None:
        self._router = router
        self._absence = Absence(router)
        self.read_table = unpack_table
        self._coordinator: Any = None
        self._found: Any = None
        """The last handle, of any version, and the last call's object: see `keep_in_touch`."""
        self._taken: Any = None
        self._reported_s = -math.inf
        self._builds_on_ours = True
        self._quiet = False

    @property
    def holds_something(self) -> bool:
        """Whether something of Ray's is held."""
        return self._found is not None or self._taken is not None

    async def exchange(self) -> float:
        """One call, if somebody is there to take it; how long to wait until the next one, in seconds. Never raises."""
        if (router := self._router()) is None:
            return REPORT_S
        empty = not router.has_replicas()
        self._quiet = self._quiet and empty
        if self._quiet:
            return REPORT_S
        try:
            if not await self._find() or not ray.is_initialized():
                return self._absence.away("no control plane is found")
            self._taken = self._coordinator.exchange.remote(self._message(router))
            del router  # it may go while we wait
            async with asyncio.timeout(REPORT_S + _TIMEOUT_S):
                answer = check(await self._taken, "answer")
            self._quiet = empty
            if (router := self._router()) is not None:
                wait_s = self._take(router, answer)
                self._absence.over()
                return wait_s
        except Exception as error:  # whatever a coordinator does, routing goes on
            self._coordinator = None
            if isinstance(error, (RayActorError, TimeoutError)):
                return self._absence.away("the control plane does not answer")
            return self._absence.broken(error)
        return REPORT_S

    async def _find(self) -> bool:
        """Whether there is a coordinator that knows messages by name; that of Shadecast 0.1 does not."""
        if self._coordinator is None:
            self._coordinator = await asyncio.get_running_loop().run_in_executor(None, find_coordinator)
            self._found = self._coordinator or self._found
        if self._coordinator is None or hasattr(self._coordinator, "exchange"):
            return self._coordinator is not None
        raise MessageError(
            f"the control plane is of Shadecast 0.1 (schema 1), this router speaks schema {SCHEMA}: it routes by power "
            "of two choices until you run `shadecast down` and `shadecast up` with the newer version"
        )

    def _message(self, router: Router) -> dict[str, Any]:
        """What the coordinator is asked, with a report where the last one is nearly a second old."""
        now_s, held = time.monotonic(), router.table if self._builds_on_ours else None
        report = None
        if now_s - self._reported_s >= (_FAST_S if router.is_overdue() else REPORT_S - TICK_S / 2.0):
            report, self._reported_s = router.make_report(), now_s
        epoch, version = (held.epoch, held.version) if held is not None else (0, 0)
        return message(
            "exchange",
            deployment=router.deployment,
            epoch=epoch,
            table_version=version,
            wait_s=min(max(self._reported_s + REPORT_S - now_s, _FAST_S), router.between_s),
            report=report,
            prefixes=router.post(),
        )

    def _take(self, router: Router, answer: Mapping[str, Any]) -> float:
        """Go by the table and the settings that have come; how long to wait, in seconds. Raises MessageError."""
        if "acknowledged" in answer:
            wanted = bool(answer.get("table_wanted"))
            router.reported(int(answer["acknowledged"]), table_wanted=wanted)
            if wanted or not answer["acknowledged"]:
                self._reported_s = -math.inf  # a new coordinator: it waits for our table, or for all of our counts
        elif "refused" in answer:
            self._absence.warn("refused", str(answer["refused"]))
        router.hear(answer)
        if answer.get("table") is not None:
            router.use_settings(bool(answer.get("observing")), answer.get("settings"))
            table = self.read_table(answer["table"], router.table)
            self._builds_on_ours = table is not None
            if table is not None:
                router.take_table(table)
        return _FAST_S


def _cluster_secret() -> bytes:
    """What session ids are hashed with, made by the first router of a cluster. Blocks: call it in a thread."""
    return shared_secret(b"session-secret", os.urandom(16), NAMESPACE)
