"""The targets of the simulation, as ratios between arms of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.results import Check


@dataclass(frozen=True, slots=True)
class Target:
    """`metric` of `arm` is at most `limit` times that of `reference`."""

    arm: str
    metric: str
    reference: str
    limit: float


_TOKENS = (
    *(
        Target("shadecast", "slo_miss_fraction", peer, 0.20)
        for peer in ("p2c_true", "p2c_ray", "prequal", "prequal_tuned")
    ),
    Target("shadecast", "slo_miss_fraction", "live_capacity", 0.5),
    Target("shadecast", "p99_slowdown", "clairvoyant", 1.4),
    Target("shadecast_wrong", "p99_slowdown", "live_capacity", 1.05),
)
_CALM = (
    Target("shadecast", "p99_s", "live_capacity", 1.05),
    Target("shadecast_perfect", "p99_s", "live_capacity", 1.05),
    Target("shadecast_wrong", "p99_s", "live_capacity", 1.05),
    *(Target(arm, "p99_s", "p2c_ray", 1.03) for arm in ("live_capacity", "shadecast", "shadecast_wrong")),
)
TARGETS: Mapping[str, Sequence[Target]] = {
    "tokens-antagonist": _TOKENS,
    "tokens-crash": tuple(
        Target("shadecast", "lost_requests", peer, 0.40) for peer in ("p2c_true", "p2c_ray", "prequal_tuned")
    ),
    "short-pauses": tuple(
        Target("shadecast", "p999_s", peer, 0.55) for peer in ("p2c_true", "p2c_ray", "prequal", "prequal_tuned")
    ),
    "short-antagonist": (
        Target("shadecast", "p99_s", "p2c_true", 0.65),
        Target("shadecast", "p99_s", "p2c_ray", 0.45),
        Target("shadecast", "p99_s", "clairvoyant", 1.35),
        Target("shadecast_wrong", "p99_s", "live_capacity", 1.05),
    ),
    "sessions": tuple(
        Target("shadecast", "slo_miss_fraction", peer, 0.05) for peer in ("p2c_true", "p2c_ray", "p2c_local")
    ),
    "homogeneous": _CALM,
    "homogeneous@tokens": _CALM,
}


def checks(scenario: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Check]:
    """The targets of a scenario whose arms were run: ratio of means, and its range over seeds."""
    done = []
    for target in TARGETS.get(scenario, ()):
        if target.arm not in found or target.reference not in found:
            continue
        ours = np.asarray(found[target.arm][target.metric])
        theirs = np.asarray(found[target.reference][target.metric])
        text = f"{target.arm} {target.metric} <= {target.limit:g} x {target.reference}"
        if theirs.mean() <= 0.0:
            measured = f"{ours.mean():.2g} where {target.reference} has none"
            done.append(Check(text, measured, bool(ours.mean() <= 0.0)))
            continue
        ratio = float(ours.mean() / theirs.mean())
        each = ours / np.maximum(theirs, 1e-12)
        spread = f" ({each.min():.2f} to {each.max():.2f} by seed)" if theirs.min() > 0.0 else ""
        done.append(Check(text, f"{ratio:.2f}{spread}", ratio <= target.limit))
    return done
