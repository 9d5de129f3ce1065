"""The targets of the simulation, as ratios between arms of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_rel

from bench.results import Check


@dataclass(frozen=True, slots=True)
class Target:
    """`metric` of `arm` is at most `limit` times that of `reference`."""

    arm: str
    metric: str
    reference: str
    limit: float
    t_above: float = -np.inf
    """How sure the difference must be: Student's t of the differences by seed."""


_FREE, _HARMLESS = 1.01, 1.02
"""Where nothing can be foreseen a forecast costs nothing; never, wrong or right, does it make p99 worse by more."""
_REPLAY = (
    Target("shadecast_shipped", "slo_miss_fraction", "live_capacity", 0.90, t_above=3.0),
    Target("shadecast_shipped_handover", "slo_miss_fraction", "live_capacity", 0.45),
)
_DEAR = tuple(
    Target(f"{arm}_handover", "slo_miss_fraction", "live_capacity", 1.0)
    for arm in ("live_capacity", "shadecast", "shadecast_shipped")
)
"""Where a beginning costs much, hand-over must not make things worse."""
_TOKENS = (
    Target("shadecast_shipped", "slo_miss_fraction", "live_capacity", _FREE),
    Target("shadecast", "slo_miss_fraction", "live_capacity", 0.5),
    Target("shadecast", "p99_slowdown", "clairvoyant", 1.4),
    *(Target(arm, "p99_slowdown", "live_capacity", _HARMLESS) for arm in ("shadecast_wrong", "shadecast_shipped")),
)
_CALM = (
    *(
        Target(arm, "p99_s", "live_capacity", _HARMLESS)
        for arm in ("shadecast", "shadecast_perfect", "shadecast_wrong", "shadecast_shipped")
    ),
    *(Target(arm, "p99_s", "p2c_ray", 1.03) for arm in ("live_capacity", "shadecast", "shadecast_wrong")),
)
TARGETS: Mapping[str, Sequence[Target]] = {
    "hand-over": (
        Target("live_capacity_handover", "slo_miss_fraction", "p2c_true", 0.15),
        Target("shadecast_shipped_handover", "slo_miss_fraction", "p2c_true", 0.15),
    ),
    "hand-over@0.3": _DEAR,
    "hand-over@1": _DEAR,
    "replay": _REPLAY,
    "replay@0.6": _REPLAY,
    "periodic": (Target("shadecast_shipped", "slo_miss_fraction", "p2c_true", 0.20),),
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
        *(Target(arm, "p99_s", "live_capacity", _HARMLESS) for arm in ("shadecast_wrong", "shadecast_shipped")),
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
        met = ratio <= target.limit
        if np.isfinite(target.t_above):
            text += f", paired t > {target.t_above:g}"
            t = float(ttest_rel(theirs, ours).statistic) if len(ours) > 1 else np.nan
            spread += f", t = {t:.1f}, {len(ours)} seeds"
            met = met and t > target.t_above
        done.append(Check(text, f"{ratio:.3g}{spread}", met))
    return done
