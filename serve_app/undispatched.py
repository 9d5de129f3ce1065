"""Picks whose requests go another way, as with Ray LLM's direct streaming: a proxy sends them to the replica itself.

Serve tells nothing of such requests: neither that they were sent nor that they have ended. So a pick counts on its
replica as long as a request usually stays there (`shadecast.residence`), and while there are picks, replicas are asked
once a second how many requests they have: that stands in place of what was counted, and the usual time is learned
from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import weakref
from typing import TYPE_CHECKING

from ray.serve.request_router import RunningReplica

from shadecast.calls import Event, Phase
from shadecast.config import REPORT_S
from shadecast.residence import Residence

if TYPE_CHECKING:
    from serve_app.routing.live_call import LiveCall
    from serve_app.routing.live_calls import LiveCalls

_MOST_ASKED = 32
"""At a time: a router of a thousand replicas asks each of them twice a minute."""
_IDLE_ROUNDS = 10
"""So many seconds after the last pick nobody is asked any more."""


class Undispatched:
    """One router's picks without a dispatch. All calls come from the router's event loop."""

    def __init__(self, calls: LiveCalls) -> None:
        self._calls = weakref.ref(calls)
        self.residence = Residence()
        self._picked: dict[str, int] = {}
        """Picks of each replica since it was asked last; of all that are asked."""
        self._asked: dict[str, tuple[float, int]] = {}
        """When that was, or its first pick, and how many calls it had accepted from the router itself by then."""
        self._idle_rounds = 0
        self._asks = False
        self._tasks: set[asyncio.Task[None]] = set()

    def picked(self, call: LiveCall) -> None:
        """A replica is chosen for a call that is not sent through the router: taken to be there from now on."""
        calls = self._calls()
        if calls is None or call.phase is not Phase.CHOSEN:
            return
        replica_id = call.replica_id
        call.counts = False  # nothing is known of its end: it is no outcome, and its age is no evidence
        calls.tell(call, Event.SEND)
        calls.tell(call, Event.ACCEPT, others=max(calls.book.in_flight(replica_id) - 1.0, 0.0))
        calls.forget(call)
        call.pending = None
        if replica_id not in self._picked:
            self._picked[replica_id] = 0
            self._asked[replica_id] = time.monotonic(), calls.book.totals(replica_id)[0]
        self._picked[replica_id] += 1
        self._idle_rounds = 0
        if not self._asks:
            self._asks = True
            self._guess(calls)
            calls.loop.call_later(REPORT_S, self._round)
        calls.loop.call_later(self.residence.mean_s, self._over, call)

    def _over(self, call: LiveCall) -> None:
        if (calls := self._calls()) is not None:
            calls.drop(call)

    def _guess(self, calls: LiveCalls) -> None:
        table = calls.routes.table
        self.residence.first_s = calls.ledger.mean_s or (table.reference_s if table is not None else 0.0)

    def _round(self) -> None:
        """Ask once a second, at regular times: after picks only, queues would look longer than they are."""
        calls = self._calls()
        self._idle_rounds += 1
        if calls is None or self._idle_rounds > _IDLE_ROUNDS:
            self._asks = False
            self._picked, self._asked = {}, {}
            return
        self._guess(calls)
        known = calls.routes.picks.index
        for gone in [replica_id for replica_id in self._picked if replica_id not in known]:
            del self._picked[gone], self._asked[gone]
        asked = list(self._picked)
        for replica_id in random.sample(asked, _MOST_ASKED) if len(asked) > _MOST_ASKED else asked:
            task = calls.loop.create_task(self._ask(calls.routes.replicas[known[replica_id]]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        calls.loop.call_later(REPORT_S, self._round)

    async def _ask(self, replica: RunningReplica) -> None:
        """One that does not answer is as if it were not asked: the learned time goes on to hold for it."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(REPORT_S):
                queue = float(await replica.get_queue_len(deadline_s=REPORT_S))
            if (calls := self._calls()) is not None:
                self._told(calls, replica.replica_id.unique_id, queue)

    def _told(self, calls: LiveCalls, replica_id: str, queue: float) -> None:
        now_s, table = time.monotonic(), calls.routes.table
        if replica_id not in self._picked:
            return
        since_s, before = self._asked[replica_id]
        started = calls.book.totals(replica_id)[0]
        routers = max(table.routers, 1) if table is not None else 1
        arrived = (self._picked[replica_id] + max(started - before, 0)) * routers
        self.residence.told(queue, now_s - since_s, arrived, now_s)
        self._picked[replica_id], self._asked[replica_id] = 0, (now_s, started)
        calls.routes.told(replica_id, queue)
