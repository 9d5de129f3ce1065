"""What a balancer keeps of each replica, of its node, and of a router that reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shadecast import capacity as cap
from shadecast.baseline import SlowMean
from shadecast.connection import Connection
from shadecast.gate import Ruling, Trial
from shadecast.sequential import ErrorGuard
from shadecast.types import NodeReport, RouterReport, State, Unfinished

_ERRORS_HALF_LIFE_S = 120.0
MOST_USUAL_ERRORS = 0.8
"""An error rate that is never taken for usual."""


@dataclass(slots=True)
class Rates:
    """Decayed counts of a replica's live requests, for the guards and the display."""

    half_life_s: float = 10.0
    started: float = 0.0
    finished: float = 0.0
    failed: float = 0.0
    duration_sum_s: float = 0.0

    def fade(self, elapsed_s: float) -> None:
        """So much time has passed."""
        keep = 0.5 ** (max(elapsed_s, 0.0) / self.half_life_s)
        self.started *= keep
        self.finished *= keep
        self.failed *= keep
        self.duration_sum_s *= keep

    @property
    def started_per_s(self) -> float:
        """Arrivals."""
        return self.started * math.log(2.0) / self.half_life_s

    @property
    def per_s(self) -> float:
        """Requests that ended, well or not."""
        return self.finished * math.log(2.0) / self.half_life_s


@dataclass(slots=True)
class Replica:
    """One replica as the balancer knows it."""

    connection: Connection
    speed: cap.SpeedEstimate
    capacity: float = 1.0
    """As published."""
    steady: float = 1.0
    """Capacity but for a veto, which comes and goes at once: only this one moves at a limited rate."""
    queue: float = 0.0
    """Live requests of all routers."""
    open: dict[str, tuple[Unfinished, ...]] = field(default_factory=dict)
    """By router: live requests that were under way when it reported last."""
    kv: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By router: `kv_own` and `kv_told` of its last report."""
    kv_used: float = math.nan
    """`kv_fraction`, as of `kv_used_s`."""
    kv_used_s: float = -math.inf
    max_ongoing: int = 1
    listed: int = 0
    """Routers that list it as alive."""
    progress_s: float = 0.0
    asked_s: float = 0.0
    """When a router last had live requests on it."""
    rates: Rates = field(default_factory=Rates)
    recent: Rates = field(default_factory=lambda: Rates(half_life_s=1.5))
    long: Rates = field(default_factory=lambda: Rates(half_life_s=_ERRORS_HALF_LIFE_S))
    errors: ErrorGuard = field(default_factory=ErrorGuard)
    usual_errors: float = MOST_USUAL_ERRORS
    """The greatest error rate that is taken for usual, as of `usual_s`."""
    usual_s: float = -math.inf
    duration: SlowMean = field(default_factory=SlowMean)
    pace: SlowMean = field(default_factory=SlowMean)
    paced_s: float = -math.inf
    """When items of streams were last seen; for a while after that they alone say how fast it is."""
    trial: Trial | None = None
    memory_before: float = math.nan
    """Fraction of its node's memory that was used when it was admitted."""
    step_outcomes: int = 0
    """Live requests that have ended since the present state, or step of the ramp, was entered."""
    quiet_s: float = 0.0
    """Of the time since then, how much was without requests: in silence nothing shows, for or against it."""
    slow_since_s: float | None = None
    """On the ramp: since when it has been so slow that it is of no use."""
    unexplained: float = 0.0
    """Log speed that its node's telemetry does not explain."""
    ruling: Ruling | None = None
    mirror_fraction: float = 0.0
    doubted_s: float | None = None
    """Since when it is slow by its requests and left out: until it is well, copies go there beside its few requests."""
    slow_capacity: float = 1.0
    """Capacity with a half-life of a minute, which places sessions; a slowed replica they leave by their own rule."""
    session_weight: float = 0.0
    live_capacity: float = 1.0
    outlook: cap.Outlook = cap.NO_OUTLOOK
    vetoed: bool = False

    @property
    def takes_traffic(self) -> bool:
        """Whether live requests may go there."""
        return self.connection.state in (State.ACTIVE, State.SHIFTING)

    @property
    def kv_told(self) -> float:
        """Fraction of an engine's memory for keys and values that is used, as it says; NaN where it does not."""
        return max((min(told, 1.0) for _, told in self.kv.values() if told >= 0.0), default=math.nan)

    @property
    def kv_fraction(self) -> float:
        """The same; where the engine does not say, what the routers count of their calls. NaN where nobody knows.

        The routers count a beginning that calls share with each of them, so that is rather too much.
        """
        if not self.kv or not math.isnan(told := self.kv_told):
            return told if self.kv else math.nan
        own = [own for own, _ in self.kv.values() if own >= 0.0]
        return min(sum(own), 1.0) if own else math.nan


@dataclass(slots=True)
class Node:
    """A node's last report."""

    report: NodeReport
    made_s: float
    headroom: cap.Headroom
    """To go by: of the last samples, as far as they differ by noise alone."""
    changes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Change of log headroom between the last four samples, the greatest of all resources."""
    back_s: float = -math.inf
    """When it was heard of again after silence."""


@dataclass(slots=True)
class Router:
    """A router, as its last report left it."""

    report: RouterReport
    heard_s: float
    in_flight: dict[str, int] = field(default_factory=dict)
    """Its live requests on each replica that it lists as alive."""
