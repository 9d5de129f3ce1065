"""A `PredictiveRouter` that leaves a mark when it routes, for tests that ask which hop it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.router import PredictiveRouter


class MarkingRouter(PredictiveRouter):
    """Touches `mark` at each choice."""

    def initialize_state(self, mark: str = "", **settings: Any) -> None:
        super().initialize_state(**settings)
        self._mark = Path(mark)

    async def choose_replicas(self, *args: Any, **kwargs: Any) -> Any:
        self._mark.touch()
        return await super().choose_replicas(*args, **kwargs)
