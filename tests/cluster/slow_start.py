"""A model that takes some seconds to start, as those do that load weights."""

from __future__ import annotations

import time
from typing import Any

START_S = 6.0


class SlowStart:
    """Answers what it was asked."""

    name = "slow"
    inputs = (("x", "INT64", [-1]),)
    outputs = (("x", "INT64", [-1]),)

    def __init__(self) -> None:
        time.sleep(START_S)

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"x": inputs["x"]}
