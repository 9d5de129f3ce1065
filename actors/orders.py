"""What people order, carried out and written down: drain, release, announce, cancel.

Every order passes here, whether it comes from the command line or from the live page. Whoever may call the
coordinator may order: rights are looked at before, by the page, and by Ray's own token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from shadecast.announcements import Announcement, Announcements
from shadecast.errors import OrderError

logger = logging.getLogger(__name__)

_WRITE_S = 2.0
"""No order waits longer for its line in the audit log, however slow the disk is."""
_LONGEST_TEXT = 200
_LONGEST_ID = 512


class Kept(Protocol):
    """Where something outlives the coordinator. Blocks."""

    def load(self) -> list[Any]:
        """As it was saved last."""

    def save(self, items: list[Any]) -> None:
        """Keep these."""


class Forecasters(Protocol):
    """The nodes' forecasters, as far as people have something to tell them. Blocks; may raise anything."""

    def announce(self, node_id: str, starts_in_s: float, lasts_s: float, strength: float) -> None:
        """Tell of a load that is known to come."""

    def cancel(self, node_id: str) -> None:
        """What was told does not come."""


class Orders:
    """Threads: everything on the coordinator's event loop; what blocks runs in its executor."""

    def __init__(
        self,
        hold: Callable[[str, bool], Awaitable[int]],
        knows: Callable[[str], bool],
        *,
        forecasters: Forecasters | None = None,
        kept: Kept | None = None,
        audit: Callable[[dict[str, Any]], None] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`hold(target, out)` drains or releases and says how many replicas that concerns; 0: there is no such id.

        `knows(node_id)`: whether a node has reported. `kept` is where announcements are, `audit` writes an order down
        (it blocks, in a thread of its own, and raises nothing).
        """
        self._hold, self._knows, self._forecasters = hold, knows, forecasters
        self._kept, self._audit, self._wall = kept, audit, wall
        self._announced = Announcements(kept.load() if kept is not None else ())
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._telling: set[asyncio.Task[bool]] = set()

    async def carry_out(self, received: Any) -> dict[str, Any]:
        """The order's answer; `{"refused": why, "unknown": ...}` where it cannot be done. Written down either way.

        `received`: `order`, `target`, what else the order takes, and `who` gave it, as plain values.
        """
        found = received if isinstance(received, Mapping) else {}
        try:
            answer = await self._do(str(found.get("order", "")), _target(found), found)
        except OrderError as error:
            answer = {"refused": str(error), "unknown": isinstance(error, _UnknownError)}
        except Exception as error:
            await self.write_down({**found, "outcome": f"failed: {error!r}"})
            raise
        outcome = f"refused: {answer['refused']}" if "refused" in answer else "done"
        await self.write_down({**found, "outcome": outcome})
        return answer

    async def write_down(self, entry: Mapping[str, Any]) -> None:
        """One line of the audit log: who, what, when, and what came of it."""
        if self._audit is None:
            return
        who = entry.get("who")
        line = {
            "wall_s": round(self._wall(), 3),
            **{str(k): _plain(v) for k, v in entry.items() if k not in ("who", "wall_s")},
            "who": {str(k): _plain(v) for k, v in who.items()} if isinstance(who, Mapping) else {"by": "unknown"},
        }
        writing = asyncio.get_running_loop().run_in_executor(self._writer, self._audit, line)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(writing), _WRITE_S)

    async def _do(self, order: str, target: str, values: Mapping[str, Any]) -> dict[str, Any]:
        match order:
            case "drain" | "release":
                concerned = await self._hold(target, order == "drain")
                if not concerned:
                    raise _UnknownError(f"no replica or node has the id {target!r}")
                return {"order": order, "target": target, "concerned": concerned}
            case "announce" | "cancel" if not self._knows(target):
                raise _UnknownError(f"no node with the id {target!r} has reported")
            case "announce":
                new = self._announced.add(target, values, self._wall())
                await self._keep()
                told = await self._tell(target, new)
                return {"order": order, "target": target, **_wall_times(new), "told": told}
            case "cancel":
                cancelled = self._announced.cancel(target, self._wall())
                await self._keep()
                told = await self._ask(target, "cancel")
                return {"order": order, "target": target, "cancelled": cancelled, "told": told}
            case _:
                raise OrderError(f"order = {order[:20]!r}: must be drain, release, announce or cancel")

    def forecaster_began(self, node_id: str) -> None:
        """A node's forecaster is new, to this coordinator at least: it hears what was announced."""
        for each in self._announced.of(node_id, self._wall()):
            task = asyncio.get_running_loop().create_task(self._tell(node_id, each))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def view(self) -> list[dict[str, Any]]:
        """Announcements that are not over."""
        return self._announced.view(self._wall())

    async def _tell(self, node_id: str, each: Announcement) -> bool:
        starts_in_s, lasts_s = each.left(self._wall())
        return lasts_s <= 0.0 or await self._ask(node_id, "announce", starts_in_s, lasts_s, each.strength)

    async def _ask(self, node_id: str, what: str, *arguments: float) -> bool:
        """Whether the node's forecaster has heard; one that starts again later hears it then."""
        if self._forecasters is None:
            return False
        call = getattr(self._forecasters, what)
        try:
            await asyncio.get_running_loop().run_in_executor(None, call, node_id, *arguments)
        except Exception as error:
            logger.warning("%s: the forecaster of node %s was not told: %r", what, node_id[:8], error)
            return False
        return True

    async def _keep(self) -> None:
        if self._kept is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._kept.save, self._announced.plain())


def _target(received: Mapping[str, Any]) -> str:
    target = received.get("target")
    if not isinstance(target, str) or not 0 < len(target) <= _LONGEST_ID:
        raise OrderError(f"target = {str(target)[:20]!r}: must be the id of a replica or node")
    return target


class _UnknownError(OrderError):
    """Nothing of that id is known."""


def _wall_times(each: Announcement) -> dict[str, float]:
    return {"starts_wall_s": each.starts_wall_s, "ends_wall_s": each.ends_wall_s, "strength": each.strength}


def _plain(value: Any) -> Any:
    """Numbers as they are, all else as text that is not long."""
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)[:_LONGEST_TEXT]
