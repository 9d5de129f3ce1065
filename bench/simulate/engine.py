"""The engine: a heap of events, replicas that share their speed among requests, and the paths of a request.

A replica serves up to `max_active` requests at once; each progresses at `speed * share(n)` work units a second, so
all that are active have received the same *virtual service* V since any common moment (Kleinrock 1967, egalitarian
processor sharing). A request that enters at V = v with work w leaves when V = v + w: one heap per replica and no
event per token. FIFO slots are the case share(n) = 1 with few places, continuous batching share(n) = 1/(1 + n/b0).
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.simulate.sticky import pick_sticky

if TYPE_CHECKING:
    from bench.simulate.arms.base import Arm

Action = Callable[[Any], None]
INFINITE = math.inf
_DONE = 1e-9
"""Work units below which a request counts as finished (rounding of V)."""
_TIMED_PICKS = 8
"""One pick in so many is timed."""


class Request:
    """One request of a user, or a mirrored copy of one (`on_copy_end` set)."""

    __slots__ = (
        *("arrived_s", "attempts", "ends_at", "entered_seq", "fails", "id", "items", "on_copy_end", "open", "others"),
        *("replica", "router", "sent_s", "session", "turn", "work_s"),
    )

    def __init__(self, id_: int, arrived_s: float, work_s: float, router: int) -> None:
        self.id = id_
        self.arrived_s = arrived_s
        self.work_s = work_s
        self.router = router
        self.session: Session | None = None
        self.turn = 0
        self.items = 0
        self.replica = -1
        self.sent_s = arrived_s
        self.others = 0
        """Requests on the replica when it was accepted, this one not counted."""
        self.ends_at = 0.0
        """V of the replica at which it is done."""
        self.entered_seq = -1
        """Order of entry among the active ones; -1 while it waits."""
        self.attempts = 0
        self.fails = False
        self.open = False
        self.on_copy_end: Callable[[Request, bool], None] | None = None


@dataclass(slots=True)
class Session:
    """A conversation: `turns` requests, each after the last one's answer and a pause to think."""

    id: int
    works_s: list[float]
    thinks_s: list[float]
    replica: int = -1
    """Where its last request went."""


def slots_share(slots: int) -> list[float]:
    """share(n) of `slots` places that do not disturb each other; index n."""
    return [1.0] * (slots + 1)


def batching_share(batch_half: float, max_active: int) -> list[float]:
    """share(n) = 1/(1 + n/b0) of continuous batching; index n."""
    return [1.0 / (1.0 + n / batch_half) for n in range(max_active + 1)]


class Replica:
    """A server: up to `max_active` requests progress together, the rest wait in FIFO order."""

    __slots__ = (
        "_due_s", "_markers", "_seq", "_share", "_sim", "active", "alive", "fail_fraction", "finished_works",
        "index", "max_active", "node", "queue", "rate", "running", "speed", "v", "v_at_s",
    )  # fmt: skip

    def __init__(self, sim: Simulation, index: int, node: int, share: Sequence[float], speed: float) -> None:
        self._sim = sim
        self.index = index
        self.node = node
        self._share = share
        self.max_active = len(share) - 1
        self.speed = speed
        self.alive = True
        self.fail_fraction = 0.0
        self.active: list[tuple[float, int, Request]] = []
        self._markers: list[tuple[float, int, Action, Any]] = []
        self.queue: deque[Request] = deque()
        self.running = 0
        self.rate = 0.0
        self.v = 0.0
        self.v_at_s = 0.0
        self._due_s = INFINITE
        self._seq = 0
        self.finished_works = 0.0

    def load(self) -> int:
        """Requests on the replica, active and waiting."""
        return self.running + len(self.queue)

    def works_left(self) -> tuple[list[float], list[float]]:
        """Work that is left of the active requests, ascending, and of the waiting ones, in order."""
        self._advance()
        active = sorted(max(ends - self.v, 0.0) for ends, _, _ in self.active)
        return active, [request.work_s for request in self.queue]

    def submit(self, request: Request) -> None:
        """Accept a request now."""
        request.replica = self.index
        request.sent_s = self._sim.now_s
        request.others = self.running + len(self.queue)
        request.open = True
        request.entered_seq = -1
        if self.running < self.max_active:
            self._advance()
            self._enter(request)
            self._plan()
        else:
            self.queue.append(request)

    def set_speed(self, speed: float) -> None:
        """The node's speed has changed."""
        if speed != self.speed:
            self._advance()
            self.speed = speed
            self._plan()

    def received_s(self, request: Request) -> float:
        """Work that a request has got so far, here and before; 0 while it waits or once it is gone."""
        if not request.open or request.entered_seq < 0:
            return 0.0
        self._advance()
        return max(self.v - (request.ends_at - request.work_s), 0.0)

    def mark(self, request: Request, after_work_s: float, action: Action, argument: Any) -> bool:
        """Call `action` when an *active* request has received `after_work_s` of work; False if it still waits."""
        if not request.open or request.entered_seq < 0:
            return False
        self._advance()
        self._seq += 1
        at = request.ends_at - request.work_s + after_work_s
        heapq.heappush(self._markers, (at, self._seq, action, argument))
        self._plan()
        return True

    def swap(self, leaves: Request, enters: Request) -> None:
        """One request takes the place of an active one, with the work that is left of that."""
        at = next(k for k, entry in enumerate(self.active) if entry[2] is leaves)
        leaves.open = False
        enters.replica, enters.open = self.index, True
        enters.ends_at, enters.entered_seq, _ = entry = (*self.active[at][:2], enters)
        self.active[at] = entry

    def cancel(self, request: Request) -> None:
        """Take a request off the replica; nothing happens if it is not there any more."""
        if not request.open:
            return
        request.open = False
        if request.entered_seq < 0:
            self.queue.remove(request)
            return
        self._advance()
        self.active = [entry for entry in self.active if entry[2] is not request]
        heapq.heapify(self.active)
        self.running = len(self.active)
        self._refill()
        self._plan()

    def crash(self) -> list[Request]:
        """Die; returns the requests that were on it."""
        lost = [request for _, _, request in self.active] + list(self.queue)
        for request in lost:
            request.open = False
        self.active.clear()
        self._markers.clear()
        self.queue.clear()
        self.running = 0
        self.alive = False
        self._due_s = INFINITE
        return lost

    def _advance(self) -> None:
        now_s = self._sim.now_s
        self.v += (now_s - self.v_at_s) * self.rate
        self.v_at_s = now_s

    def _enter(self, request: Request) -> None:
        self._seq += 1
        request.ends_at = self.v + request.work_s
        request.entered_seq = self._seq
        heapq.heappush(self.active, (request.ends_at, self._seq, request))
        self.running += 1

    def _refill(self) -> None:
        while self.queue and self.running < self.max_active:
            self._enter(self.queue.popleft())

    def _plan(self) -> None:
        """Set the rate for the present number of requests and see to it that an event comes in time.

        An event that comes too early looks again, so only an earlier due time needs a new one.
        """
        active = self.active
        if not active:
            self.rate = 0.0
            return
        self.rate = rate = self.speed * self._share[self.running]
        next_v = active[0][0]
        if self._markers and self._markers[0][0] < next_v:
            next_v = self._markers[0][0]
        if rate <= 0.0:
            return
        due_s = self._sim.now_s + max(next_v - self.v, 0.0) / rate
        if due_s < self._due_s:
            self._due_s = due_s
            self._sim.at(due_s, self._on_due, due_s)

    def _on_due(self, due_s: float) -> None:
        if due_s != self._due_s:
            return  # superseded by an earlier one
        self._due_s = INFINITE
        if not self.active:
            return
        self._advance()
        v = self.v + _DONE
        markers = self._markers
        while markers and markers[0][0] <= v:
            _, _, action, argument = heapq.heappop(markers)
            action(argument)
        active = self.active
        ended: list[Request] = []
        while active and active[0][0] <= v:
            ended.append(heapq.heappop(active)[2])
        if ended:
            self.running = len(active)
            if not active:
                self.v = 0.0 if not self.queue and not markers else self.v
            if self.queue:
                self._refill()
        self._plan()
        for request in ended:
            request.open = False
            self.finished_works += request.work_s
            self._sim.ended(request)


class Simulation:
    """One run: the clock, the replicas, the routers' own counts, and what happens to each request."""

    def __init__(self, routers: int, share: Sequence[float], seed: str) -> None:
        self.now_s = 0.0
        self.routers = routers
        self.share = share
        self.replicas: list[Replica] = []
        self.members: list[int] = []
        """Indices of the replicas that the routers are told of (Serve's membership)."""
        self.mine: list[list[int]] = [[] for _ in range(routers)]
        """Live requests of each router on each replica."""
        self.max_ongoing = 1_000_000
        self.arm: Arm
        self._pick: Callable[[Request], int]
        self.moved_sessions = 0
        self.on_end: Callable[[Request, bool], None] = lambda request, ok: None
        self.on_lost: Callable[[Request], None] = lambda request: None
        self.move_cost_s = 0.0
        self.decision_s: list[float] = []
        self._picks = 0
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._seq = 0
        self._failures = random.Random(f"{seed}/failures")

    def bind(self, arm: Arm) -> None:
        """Route by this arm; sessions are kept in place for arms that do not do so themselves."""
        self.arm = arm
        self._pick = (lambda request: pick_sticky(arm, request)) if arm.sticky else arm.pick

    # ------------------------------------------------------------------ clock

    def at(self, time_s: float, action: Action, argument: Any = None) -> None:
        """Call `action(argument)` at `time_s`."""
        self._seq += 1
        heapq.heappush(self._heap, (time_s, self._seq, action, argument))

    def run(self, until_s: float) -> None:
        """Work off events up to `until_s`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self.now_s, _, action, argument = pop(heap)
            action(argument)
        self.now_s = max(self.now_s, until_s)

    # ------------------------------------------------------------------ members

    def join(self, node: int, speed: float, fail_fraction: float = 0.0) -> Replica:
        """A replica starts on a node and every router is told."""
        replica = Replica(self, len(self.replicas), node, self.share, speed)
        replica.v_at_s = self.now_s
        replica.fail_fraction = fail_fraction
        self.replicas.append(replica)
        self.members.append(replica.index)
        for counts in self.mine:
            counts.append(0)
        self.arm.on_members()
        return replica

    def leave(self, replica: Replica) -> None:
        """A replica dies: the routers are told, what was on it is lost and sent again from where it came."""
        lost = replica.crash()
        self.members.remove(replica.index)
        for request in lost:
            if request.on_copy_end is None:
                self.mine[request.router][replica.index] -= 1
                self.arm.on_done(request, False)
            else:
                request.on_copy_end(request, False)
        self.arm.on_members()
        for request in lost:
            if request.on_copy_end is None:
                self.on_lost(request)
                self.dispatch(request)

    # ------------------------------------------------------------------ requests

    def dispatch(self, request: Request) -> None:
        """Route a request: ask the arm, send, or wait where it says that all are full (-1)."""
        self._picks += 1
        if self._picks % _TIMED_PICKS:
            chosen = self._pick(request)
        else:
            began = time.perf_counter()
            chosen = self._pick(request)
            self.decision_s.append(time.perf_counter() - began)
        if chosen >= 0:
            replica = self.replicas[chosen]
            if replica.running + len(replica.queue) < self.max_ongoing:
                self._send(request, replica)
                return
            self.arm.on_rejected(request, chosen)
        request.attempts += 1
        self.at(self.now_s + self.arm.backoff_s(request.attempts), self.dispatch, request)

    def _send(self, request: Request, replica: Replica) -> None:
        if request.session is not None:
            session = request.session
            if session.replica != replica.index:
                if session.replica >= 0:
                    self.moved_sessions += 1
                    request.work_s += self.move_cost_s
                session.replica = replica.index
        if replica.fail_fraction and self._failures.random() < replica.fail_fraction:
            request.fails = True
            request.work_s *= 0.05
        self.mine[request.router][replica.index] += 1
        replica.submit(request)
        self.arm.on_sent(request)

    def begin_elsewhere(
        self, stream: Request, chosen: int, left_s: float, on_end: Callable[[Request, bool], None]
    ) -> Request | None:
        """Begin a running stream on `chosen`, too: `left_s` of work there. None if it would have to wait for a place.

        `on_end(beginning, ok)` if it ends before it has taken over.
        """
        replica = self.replicas[chosen]
        if replica.running >= replica.max_active:
            return None
        beginning = Request(stream.id, self.now_s, left_s, stream.router)
        beginning.items, beginning.on_copy_end = stream.items, on_end
        replica.submit(beginning)
        self.mine[stream.router][chosen] += 1
        return beginning

    def drop_beginning(self, beginning: Request) -> None:
        """It is not needed any more."""
        self.replicas[beginning.replica].cancel(beginning)
        self.mine[beginning.router][beginning.replica] -= 1

    def take_over(self, stream: Request, beginning: Request) -> None:
        """The stream leaves its replica and is from now on what was begun elsewhere."""
        self.replicas[stream.replica].cancel(stream)
        self.mine[stream.router][stream.replica] -= 1
        self.replicas[beginning.replica].swap(beginning, stream)

    def send_copy(
        self, original: Request, chosen: int, work_s: float, on_end: Callable[[Request, bool], None]
    ) -> Request:
        """Send a copy of a request whose answer is dropped; `on_end(copy, ok)` when it is done."""
        replica = self.replicas[chosen]
        copy = Request(original.id, self.now_s, work_s, original.router)
        copy.on_copy_end = on_end
        if replica.fail_fraction and self._failures.random() < replica.fail_fraction:
            copy.fails = True
            copy.work_s *= 0.05
        replica.submit(copy)
        return copy

    def move(self, request: Request, chosen: int) -> None:
        """Cancel a live request where it is and send it to `chosen` from the start (rescue)."""
        self.replicas[request.replica].cancel(request)
        self.mine[request.router][request.replica] -= 1
        self._send(request, self.replicas[chosen])

    def ended(self, request: Request) -> None:
        """A replica has finished with a request."""
        ok = not request.fails
        if request.on_copy_end is not None:
            request.on_copy_end(request, ok)
            return
        self.mine[request.router][request.replica] -= 1
        self.arm.on_done(request, ok)
        self.on_end(request, ok)
