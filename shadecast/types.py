"""Frozen dataclasses that cross every border: node to coordinator, router to coordinator and back.

Clocks of different hosts do not agree, so messages carry *ages* (`age_s`, seconds before sending) or
are stamped by the receiver's own monotonic clock (`received_s`, `now_s`). They travel by name (`messages`). Shadecast
0.1 sent these classes as they are, by position: add fields at the end only, while it is to be understood (`former`).
Identifiers are plain strings:
`replica_id` is Serve's unique replica id, `node_id` Ray's hexadecimal node id, `deployment` is "app/name".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from shadecast.histogram import Durations

RESOURCES: tuple[str, ...] = ("cpu", "memory", "network")
HORIZONS_S: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0)
QUANTILES: tuple[float, ...] = (0.1, 0.5, 0.9)


class State(StrEnum):
    """State of a connection: what traffic a router may send to one replica."""

    INACTIVE = "inactive"
    """No live and no mirrored traffic."""
    SHADOWING = "shadowing"
    """Copies of a few requests, whose answers are thrown away; no live traffic."""
    SHIFTING = "shifting"
    """Live traffic for a growing fraction of picks, under guards."""
    ACTIVE = "active"
    """Live traffic by score."""
    DRAINING = "draining"
    """No new requests; those under way finish and sessions leave."""


# ---------------------------------------------------------------- node -> coordinator


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """Telemetry of one node over the last second.

    Fractions are of the limit that applies to the node (cgroup quota or limit, process tree, host).
    `*_background_*` is the exogenous part: the total minus what Serve replicas on the node used.
    A value that could not be read is NaN, never guessed.
    """

    cpu_fraction: float = float("nan")
    cpu_background_fraction: float = float("nan")
    memory_fraction: float = float("nan")
    network_fraction: float = float("nan")
    network_background_fraction: float = float("nan")
    net_rx_bytes_per_s: float = float("nan")
    net_tx_bytes_per_s: float = float("nan")
    cpu_pressure_fraction: float = float("nan")
    memory_pressure_fraction: float = float("nan")
    gpu_fraction: float = float("nan")
    gpu_memory_fraction: float = float("nan")


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted exogenous load of one node.

    `quantiles[resource]` has shape [horizon, quantile] in the order of `HORIZONS_S` and `QUANTILES`, as fractions
    of the node's limit in [0, 1]. `skill[resource]` is the forecaster's own recent skill, 1 - L_model/L_best_baseline;
    `gate[resource]` in [0, 1] says how far it may be trusted (0 while unproven).
    """

    quantiles: Mapping[str, tuple[tuple[float, ...], ...]]
    slow_probability: float = float("nan")
    """Told by Shadecast 0.1 alone; it keeps its place, because those messages travel by position."""
    skill: Mapping[str, float] = field(default_factory=dict)
    gate: Mapping[str, float] = field(default_factory=dict)
    model_version: str = ""
    veto_allowed: bool = False
    """Whether the alarms' recent precision permits a veto."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node forecaster sends each second. `forecast` is None where telemetry is missing or not yet enough."""

    node_id: str
    seq: int
    snapshot: NodeSnapshot
    forecast: Forecast | None
    age_s: float = 0.0
    """Seconds between sampling and sending."""
    hostname: str = ""
    rss_bytes: int = 0
    """Resident memory of the forecaster itself."""


# ---------------------------------------------------------------- router -> coordinator


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished live request. `in_flight_at_start` counts the others on the replica when it was accepted."""

    duration_s: float
    in_flight_at_start: float
    ok: bool = True
    cost: float = 1.0
    first_item_s: float = float("nan")
    items: int = 0
    origin: str = ""
    """Of one that failed: a digest of its session or multiplexed model."""
    predicted: float = 0.0
    """Of an observing router: predicted time on the replica that Serve took, 1 = an idle nominal one; 0: not known."""
    predicted_ours: float = 0.0
    """The same on the replica that we would have taken."""
    refused: bool = False
    """We would have sent nothing to the replica that Serve took."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """One live request still under way: a censored observation of its duration."""

    age_s: float
    in_flight_at_start: float
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One router's view of one replica since its last report."""

    replica_id: str
    node_id: str
    max_ongoing: int
    in_flight: int
    started: int = 0
    finished: int = 0
    failed: int = 0
    outcomes: tuple[Outcome, ...] = ()
    """At most a bounded number, the newest."""
    unfinished: tuple[Unfinished, ...] = ()
    """At most a bounded number, the oldest."""
    items: int = 0
    """Items (tokens where these are known) that streams gave, each stream's first one not counted, while somebody was
    waiting for them."""
    stream_s: float = 0.0
    """The time in which they did, summed over the streams."""
    kv_own: float = -1.0
    """Fraction of its memory for keys and values that this router's calls take; below 0 where nobody counts."""
    kv_told: float = -1.0
    """Fraction that is used, as the engine itself says; below 0 where it does not."""


@dataclass(frozen=True, slots=True)
class PairedSample:
    """The same request on a primary and, copied, on a candidate. Durations in seconds; NaN where it failed."""

    candidate_id: str
    primary_id: str
    primary_s: float
    shadow_s: float
    primary_in_flight: float
    shadow_in_flight: float
    primary_ok: bool = True
    shadow_ok: bool = True
    answers_equal: bool | None = None
    age_s: float = 0.0
    cold: bool = False
    """The candidate had to load what the primary had: the copy's duration says nothing of its speed."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Requests that another rule routed while ours watched, and their predicted times, 1 = an idle nominal replica."""

    requests: int = 0
    time_taken: float = 0.0
    """Sum over the replicas that were chosen."""
    time_ours: float = 0.0
    """Sum over those that Shadecast would have chosen."""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What a router has seen since its last report; `replicas` is also its view of the membership."""

    router_id: str
    deployment: str
    seq: int
    interval_s: float
    replicas: tuple[ReplicaReport, ...]
    pairs: tuple[PairedSample, ...] = ()
    mirrored: int = 0
    mirror_dropped: int = 0
    uncopyable: int = 0
    """Requests that could not be copied (unsafe method, streamed body) since the last report."""
    rescued: int = 0
    """Requests sent again from a slow replica since the last report."""
    table_epoch: int = 0
    """Epoch of the table that the router holds; 0 without one."""
    level: str = ""
    """Which rung of the fail-open ladder the router stands on."""
    observed: Observed = field(default_factory=Observed)
    """Since the last report, of a router that only observes."""
    held_table: RoutingTable | None = None
    """Sent when the coordinator asks (it has restarted): the table that the router routes by."""
    partial: bool = False
    """`replicas` are only those of which something has changed since the report before; else they are all there are."""
    gone: tuple[str, ...] = ()
    """Of a partial report: replicas that the router lists no more."""
    waiting: int = 0
    """Requests without a replica."""
    retried: int = 0
    """Of `rescued`: cancelled before a replica had accepted them, and sent anew."""
    moved: int = 0
    """Of `rescued`: sent again beside the accepted attempt."""
    resumed: int = 0
    """Of `rescued`: streams that went on from another replica."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """By reason: requests that got no replica since the last report."""
    ejected: tuple[str, ...] = ()
    """Replicas that the router leaves out for a moment because they do not answer."""
    durations: Durations = field(default_factory=Durations)
    """Of live requests that went well, from acceptance to the end, since the last report."""
    first_items: Durations = field(default_factory=Durations)
    """Time to the first item of streams that went well."""
    prompt_tokens: int = 0
    """Of the prompts that replicas were chosen for since the last report."""
    cached_tokens: int = 0
    """Of `prompt_tokens`: those that the chosen replica had, as far as the router knows."""


# ---------------------------------------------------------------- coordinator -> router


@dataclass(frozen=True, slots=True)
class TableRow:
    """One replica in a routing table.

    `share` in [0, 1] is the fraction of picks for which the replica is eligible, `capacity` its relative speed
    (1 = nominal), `queue` the requests on it over all routers, `mirror_fraction` of new requests to copy to it.
    """

    replica_id: str
    node_id: str = ""
    state: State = State.INACTIVE
    share: float = 0.0
    capacity: float = 1.0
    queue: float = 0.0
    mirror_fraction: float = 0.0
    session_weight: float = 0.0
    proven: bool = False
    """Whether the replica has been ACTIVE before."""
    rejections: int = 0
    """Trials failed in a row; sets the back-off."""
    live_capacity: float = 0.0
    """`capacity` without the forecast's part; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """A deployment's routing table. Newer means a greater (epoch, version); an epoch is one life of the coordinator."""

    deployment: str
    epoch: int
    version: int
    routers: int
    rows: tuple[TableRow, ...]
    slots: float = 1.0
    """c, parallel slots of a replica."""
    batch_half: float = 0.0
    """b0, the batch at which a replica's speed halves; 0 means FIFO slots."""
    reference_s: float = 0.0
    """Nominal processing time of a request alone on a replica; 0 until it is known."""
    panic: bool = False
    age_s: float = 0.0
    """Seconds since it was made, at sending."""


# ---------------------------------------------------------------- decisions, recorded


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a connection's state, with the evidence that it rests on."""

    deployment: str
    replica_id: str
    node_id: str
    at_s: float
    before: State
    event: str
    after: State
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
