"""When a router looks for its control plane again, and what it says of one that is away or broken."""

from __future__ import annotations

import logging
import math
import random
import time
import weakref
from typing import TYPE_CHECKING

from shadecast.config import LOCAL_ONLY_AGE_S, REPORT_S
from shadecast.errors import MessageError

if TYPE_CHECKING:
    from serve_app.routing.request_router import Router

logger = logging.getLogger("ray.serve")

LONGEST_WAIT_S = 30.0
_OF_ABSENCE = 0.05
"""The next look comes after this part of the time that it has been away."""
_FORGET_S = 60.0
"""What has not been wrong for so long is said again."""


class Absence:
    """One router's control plane while it cannot be used.

    It is looked for each second in the first 20 s, then after a twentieth of the time that it has been away, at last
    every `LONGEST_WAIT_S`: whenever it comes, it is found within 5 % of the time that it was missed. Routers that have
    lost it together do not look together.
    """

    def __init__(self, router: weakref.ref[Router]) -> None:
        self._router = router
        self._deployment = this.deployment if (this := router()) is not None else ""
        self._since_s = math.inf
        self._wrong_s: dict[str, float] = {}
        """What is wrong, and when it was last."""
        self._said = False
        """Whether there is something to take back."""

    def away(self, why: str) -> float:
        """Nobody is there; how long to wait, in seconds. Said once it counts: when routing goes on without tables."""
        now_s = self._begin()
        if now_s - self._since_s >= LOCAL_ONLY_AGE_S:
            self._say(
                "away",
                f"{why}: requests go by power of two choices until there is a control plane (`shadecast up`); it is "
                f"looked for every {LONGEST_WAIT_S:g} s at least",
            )
        return self._wait_s(now_s)

    def broken(self, error: BaseException) -> float:
        """Somebody is there who is of no use; how long to wait, in seconds. Said once for each kind, in one line."""
        now_s = self._begin()
        cause = getattr(error, "cause", None) or error  # Ray's own text is a whole traceback
        text = str(cause).strip().partition("\n")[0][:500]
        if not isinstance(cause, MessageError):
            text = (
                f"the control plane is broken ({type(cause).__name__}: {text}): requests go by power of two choices; "
                "the coordinator's log has more, and `shadecast down` and `shadecast up` start it anew"
            )
        self._say(type(cause).__name__, text)
        return self._wait_s(now_s)

    def over(self) -> None:
        """It has answered as it should."""
        if self._said:
            logger.info(f"shadecast: {self._deployment}: the control plane answers; routing goes by its tables")
        self._since_s, self._said = math.inf, False

    def warn(self, kind: str, text: str) -> bool:
        """Once for each kind, as long as it goes on; whether it was said now."""
        now_s = time.monotonic()
        self._wrong_s = {key: at_s for key, at_s in self._wrong_s.items() if now_s - at_s < _FORGET_S}
        is_new = kind not in self._wrong_s
        self._wrong_s[kind] = now_s
        if is_new:
            logger.warning(f"shadecast: {self._deployment}: {text}")
        return is_new

    def _begin(self) -> float:
        now_s = time.monotonic()
        self._since_s = min(self._since_s, now_s)
        return now_s

    def _say(self, kind: str, text: str) -> None:
        self._said = self.warn(kind, text) or self._said

    def _wait_s(self, now_s: float) -> float:
        if now_s - self._since_s >= LOCAL_ONLY_AGE_S and (router := self._router()) is not None:
            router.make_report()  # and lost: what is gone since the last one is not kept for ever
            router.reported(0, table_wanted=False)
        share_s = min(_OF_ABSENCE * (now_s - self._since_s), LONGEST_WAIT_S)
        return max(REPORT_S * random.uniform(0.95, 1.05), share_s * random.uniform(0.8, 1.0))
