"""What `shadecast status --watch` shows while the control plane answers, is away, and is back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from serve_app.launch.tables import span, status_view

_SAY_BACK_S = 15.0


class Watching:
    """`now_s` is a monotonic clock."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._status: Mapping[str, Any] | None = None
        self._heard_s = self._away_since_s = math.nan
        self._reason = ""
        self._back = (-math.inf, 0.0)
        """When it came back, and how long it had been away."""

    def heard(self, status: Mapping[str, Any]) -> None:
        """It has answered."""
        now_s = self._now_s()
        if self._reason:
            self._back = (now_s, now_s - self._away_since_s)
        self._status, self._heard_s, self._reason = status, now_s, ""

    def away(self, reason: str) -> None:
        """It does not answer."""
        if not self._reason:
            self._away_since_s = self._now_s()
        self._reason = reason

    def headline(self) -> str:
        """How things stand, in one line."""
        now_s = self._now_s()
        if self._reason:
            shown = f"; below is what it said {span(now_s - self._heard_s)} ago" if self._status is not None else ""
            return f"CONTROL PLANE AWAY for {span(now_s - self._away_since_s)}: {self._reason}{shown}"
        since_s, lasted_s = self._back
        back = f"control plane back, it was away for {span(lasted_s)}; " if now_s - since_s < _SAY_BACK_S else ""
        return f"{back}every second; Ctrl-C ends"

    def view(self, width: int, *, wide: bool = False) -> list[RenderableType]:
        """The line, and the last status."""
        line = Text(self.headline(), style="bold red" if self._reason else "dim")
        return [line, Text(), *(status_view(self._status, width, wide=wide) if self._status is not None else ())]

    def plain(self) -> dict[str, Any]:
        """For programs: the status, or `away` with the reason."""
        return {"away": self._reason} if self._reason or self._status is None else dict(self._status)
