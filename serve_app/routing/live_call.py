"""One call of a router, and what the router keeps beside it."""

from __future__ import annotations

import contextvars
import hashlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest

from serve_app.shadow import is_of_copy
from shadecast.calls import Call
from shadecast.pairs import Pair
from shadecast.reading import Reading

if TYPE_CHECKING:
    from serve_app.routing.watched_result import WatchedResult


class LiveCall(Call):
    """A call and what a router keeps beside it."""

    result: weakref.ref[WatchedResult] | None = None
    reading: Reading | None = None
    """How a stream, or an answer sent by value, is read."""
    pair: Pair | None = None
    answered = False
    """Its caller has the answer."""
    retriable = False
    """Safe to be sent again."""
    had: list[Any] | None = None
    """All items that the reader of a stream that may go on elsewhere has had."""
    pinned = False
    """Meant for that very replica: reserved there, or broadcast to all."""
    is_second = False
    """An attempt of the router's own, beside or in place of another one."""
    paid_s = 0.0
    """What going on elsewhere has cost its reader so far."""
    prompt_tokens = ahead_tokens = 0.0
    """Of its prompt, and of prompts to compute until this one's is, from its choice on; 0 where there is none."""
    context_tokens = 0.0
    """Of the prompts of the requests that its replica had at its choice."""
    before = 0.0
    """Units that its reader has had from other attempts."""
    whole: PendingRequest | None = None
    """What its caller has asked for, where this attempt is for the rest; `mend` makes its items fit."""
    mend: Callable[[Any], Any] | None = None
    after_loss = False
    """A replica has died of this stream, or under it, before: there is no third attempt."""
    context: contextvars.Context | None = None
    """That the request was sent in, for another attempt of it."""

    def __init__(self, pending: PendingRequest | None, metadata: Any) -> None:
        self.pending, self.metadata = pending, metadata
        self.counts = not is_of_copy(metadata)

    @property
    def origin(self) -> str:
        """A digest of its session, or multiplexed model."""
        whose = self.metadata.session_id or self.metadata.multiplexed_model_id
        return hashlib.blake2b(whose.encode(), digest_size=8).hexdigest() if whose else ""

    @property
    def units(self) -> float:
        """Of a stream: tokens that its reader has had from all attempts, or items."""
        if self.reading is not None and self.reading.count is not None:
            return self.before + self.reading.units
        return self.items if self.had is None else len(self.had)

    @property
    def attempt(self) -> WatchedResult | None:
        """Its result, while somebody holds it."""
        return self.result() if self.result is not None else None
