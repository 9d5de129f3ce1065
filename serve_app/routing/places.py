"""Requests that wait until one of this router's calls has ended, because all replicas have as many as they take."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_LONGEST_WAIT_S = 1.0
"""Then Serve asks the replicas itself: should a count here ever be wrong, no request must wait for it for ever."""


class Places:
    """First come, first served."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self, pick: Callable[[], int]) -> int:
        """The first pick with a place, -1 if there is none for long. `pick` gives an index, or -1."""
        place: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(_LONGEST_WAIT_S):
                while (i := pick()) < 0:
                    again, place = place is not None, asyncio.get_running_loop().create_future()
                    (self.waiting.appendleft if again else self.waiting.append)(place)
                    await place
                return i
        except TimeoutError:
            return -1
        except asyncio.CancelledError:
            if place is not None and place.done() and not place.cancelled():
                self.offer()  # it was this one's turn
            raise
        finally:
            if place is not None and place in self.waiting:
                self.waiting.remove(place)

    def offer(self) -> None:
        """A place is free: whoever has waited longest looks again."""
        while self.waiting:
            place = self.waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def offer_all(self) -> None:
        """Replicas have come or gone: everybody looks again."""
        for _ in range(len(self.waiting)):
            self.offer()
