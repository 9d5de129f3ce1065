"""Requests that wait until one of this router's calls has ended: all replicas are at their concurrency limit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_LONGEST_WAIT_S = 1.0
"""Then Serve asks the replicas itself: should a count here ever be wrong, no request must wait for it for ever."""


class Waiting:
    """First come, first served."""

    def __init__(self) -> None:
        self.line: deque[asyncio.Future[None]] = deque()

    async def wait(self, pick: Callable[[], int]) -> int:
        """The first pick with room, -1 if there is none for long. `pick` gives an index, or -1."""
        turn: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(_LONGEST_WAIT_S):
                while (i := pick()) < 0:
                    again, turn = turn is not None, asyncio.get_running_loop().create_future()
                    (self.line.appendleft if again else self.line.append)(turn)
                    await turn
                return i
        except TimeoutError:
            return -1
        except asyncio.CancelledError:
            if turn is not None and turn.done() and not turn.cancelled():
                self.offer()  # it was this one's turn
            raise
        finally:
            if turn is not None and turn in self.line:
                self.line.remove(turn)

    def offer(self) -> None:
        """There is room: whoever has waited longest looks again."""
        while self.line:
            turn = self.line.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def offer_all(self) -> None:
        """Replicas have come or gone: everybody looks again."""
        for _ in range(len(self.line)):
            self.offer()
