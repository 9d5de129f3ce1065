"""The routers that are compared, and the scenarios in which they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.llm_real.workload import Traffic
from examples.llm.serving import OURS, SETTINGS


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to route."""

    name: str
    router: str
    """Empty: Serve's default."""
    settings: Mapping[str, Any] | None = None
    control_plane: bool = False
    """It runs beside our router alone, on the same cores: what it takes is part of what ours costs."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("power of two", ""),
        Arm("Ray prefix router", "ray.serve.llm.request_router:PrefixCacheAffinityRouter"),
        Arm("ours", OURS, SETTINGS, control_plane=True),
        Arm("ours, untried", OURS, SETTINGS),
    )
}
"""Serve's default is power of two choices. "untried" has no control plane, so a newcomer has its share at once."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens to the replicas, and when, in seconds since the traffic began."""

    name: str
    title: str
    traffic: Traffic
    arms: tuple[str, ...]
    warm_s: float
    """Not judged: processes and caches are cold."""
    steady_s: float
    then_s: float
    """Of the second phase: with a hog, or with a newcomer."""
    replicas: int = 2
    joining: int = 0
    hogs: int = 0

    def quick(self) -> Scenario:
        """The same with short phases."""
        return replace(self, warm_s=3.0, steady_s=8.0, then_s=8.0)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "conversations",
            "two replicas; then three hogs on the core of one of them",
            Traffic(per_s=1.0, turns=4, answer_tokens=24, think_s=1.5),
            ("power of two", "Ray prefix router", "ours"),
            warm_s=8.0,
            steady_s=36.0,
            then_s=36.0,
            hogs=3,
        ),
        Scenario(
            "newcomer",
            "questions to 20 assistants, two replicas; then a third joins",
            Traffic(per_s=6.0, turns=1, answer_tokens=8, think_s=1.0, turn_bytes=(40, 120)),
            ("power of two", "Ray prefix router", "ours, untried", "ours"),
            warm_s=5.0,
            steady_s=16.0,
            then_s=85.0,
            joining=1,
        ),
    )
}
FIRST = 100
"""Live requests of a newcomer that are judged."""
