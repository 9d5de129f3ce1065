"""Numbers of one run, from what its driver wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bench.live.scenario import Scenario

_WINDOW_S = 2.0
_EVEN_S, _EVEN_REQUESTS = 30.0, 50
QUANTILES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}
LOST = ("lost", "cancelled", "unanswered")


@dataclass(frozen=True, slots=True)
class Span:
    """When a fault was there, in seconds after the warm-up, and on which node (its Ray id)."""

    kind: str
    start_s: float
    end_s: float
    node_id: str
    bad: bool


def measure(scenario: Scenario, result: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, float]:
    """All metrics of one run; those that do not apply are left out."""
    records = [r for r in result["records"] if r["at_s"] >= 0.0]
    if not records:
        raise ValueError(f"{scenario.name}: the driver wrote down no request")
    errors = Counter(r["error"] for r in records if r["error"])
    errors["unanswered"] += int(result["unanswered"])
    good = [r for r in records if not r["error"]]
    found: dict[str, float] = {"requests": float(len(records) + result["unanswered"])}
    found |= quantiles([r["latency_s"] for r in good if scenario.kind == "stream" or not r.get("items")])
    missed = sum(not _within_slo(scenario, r) for r in good) + sum(errors.values())
    found["slo_miss_fraction"] = missed / found["requests"]
    found["goodput_per_s"] = (found["requests"] - missed) / scenario.length_s
    found["errors"] = float(sum(errors.values()))
    found["error_fraction"] = found["errors"] / found["requests"]
    found |= {f"errors_{kind}": float(count) for kind, count in errors.items() if count}
    found["lost"] = float(sum(errors[kind] for kind in LOST))
    found["retried"] = float(sum(r["tries"] > 1 for r in records))
    found["driver_cpu_ms_per_request"] = 1000.0 * result["driver_cpu_s"] / found["requests"]
    if scenario.kind == "stream":
        found |= _streams(scenario, good)
    if scenario.sessions:
        found |= _sessions(good, spans)
    if not scenario.faults:
        found |= _evenness(scenario, good)
    found |= _bad_node(scenario, good, spans)
    found |= _newcomer(scenario, good, spans, result.get("states", ()))
    found |= _balancer(result)
    if scenario.soak:
        found |= _leftovers(result)
    return found


def quantiles(latencies_s: Sequence[float], prefix: str = "") -> dict[str, float]:
    """p50 to p99.9 of what was answered well."""
    if not latencies_s:
        return {}
    values = np.quantile(np.asarray(latencies_s), list(QUANTILES.values()), method="higher")
    return {prefix + name: float(value) for name, value in zip(QUANTILES, values, strict=True)}


def cpu_fractions(
    before: Mapping[str, Mapping[int, float]], after: Mapping[str, Mapping[int, float]], seconds: float
) -> dict[str, float]:
    """Of a core, the mean of each kind's processes, from their CPU seconds by process id.

    One that was killed took its count along: only those that were there all the time count.
    """
    found = {}
    for kind, now in after.items():
        spent = [cpu_s - before[kind][pid] for pid, cpu_s in now.items() if pid in before.get(kind, {})]
        if spent:
            found[f"{kind}_cpu_fraction"] = sum(spent) / len(spent) / seconds
    return found


def _within_slo(scenario: Scenario, record: Mapping[str, Any]) -> bool:
    if not record.get("items"):
        return bool(record["latency_s"] <= scenario.slo_s)
    return bool(record["first_item_s"] <= scenario.slo_s and _gap_s(record) <= 2.0 * scenario.item_gap_s)


def _gap_s(record: Mapping[str, Any]) -> float:
    """Mean time between a stream's items."""
    return float((record["latency_s"] - record["first_item_s"]) / max(record["items"] - 1, 1))


def _streams(scenario: Scenario, good: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    first = quantiles([r["first_item_s"] for r in good], "first_item_")
    slowdown = quantiles([_gap_s(r) / scenario.item_gap_s for r in good])
    moves = {"stream_moves": float(sum(r.get("moves", 0) for r in good))}
    return moves | first | {"item_slowdown_" + name.removesuffix("_s"): value for name, value in slowdown.items()}


def _sessions(good: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> dict[str, float]:
    """Moves between consecutive answers of a session; those off a bad node are drains, not losses of place."""
    last: dict[str, str] = {}
    moved = strayed = seen = 0
    bad = {span.node_id for span in spans if span.bad}
    for record in sorted(good, key=lambda r: r["at_s"]):
        before = last.get(record["session"])
        last[record["session"]] = record["node"]
        if before is None:
            continue
        seen += 1
        if before != record["node"]:
            moved += 1
            strayed += not ({before, record["node"]} & bad)
    return {
        "sessions_moved": float(moved),
        "session_stay_fraction": 1.0 - moved / max(seen, 1),
        "session_stay_fraction_well": 1.0 - strayed / max(seen, 1),
    }


def _evenness(scenario: Scenario, good: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The smallest and the largest part that one of equal nodes had in any half minute with enough requests."""
    parts = []
    for start_s in np.arange(0.0, scenario.length_s - _EVEN_S + 1.0, 5.0):
        nodes = Counter(r["node"] for r in good if start_s <= r["at_s"] < start_s + _EVEN_S)
        if nodes.total() >= _EVEN_REQUESTS:
            parts += [count / nodes.total() for count in nodes.values()] + [0.0] * (scenario.replicas - len(nodes))
    return {"half_minute_share_low": min(parts), "half_minute_share_high": max(parts)} if parts else {}


def _bad_node(scenario: Scenario, good: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> dict[str, float]:
    """Share of the bad node while it was bad, seconds until it was avoided, and until it was used again."""
    bad = [span for span in spans if span.bad and span.start_s < scenario.length_s]
    if not bad:
        return {}
    node = bad[0].node_id
    sent = sorted((r["at_s"], r["node"] == node) for r in good)
    at_s = np.array([t for t, _ in sent])
    there = np.array([is_bad for _, is_bad in sent], float)
    during = np.zeros(len(at_s), bool)
    for span in bad:
        during |= (at_s >= span.start_s) & (at_s < span.end_s)
    fair = 1.0 / (scenario.replicas + scenario.joins)
    found = {"share_bad_node": float(there[during].mean()) if during.any() else 0.0}
    found |= quantiles([r["latency_s"] for r in good if any(s.start_s <= r["at_s"] < s.end_s for s in bad)], "fault_")
    after = [r["latency_s"] for r in good if r["at_s"] >= bad[0].start_s + 3.0]
    if after:
        found["p99_3s_after_fault_s"] = float(np.quantile(after, 0.99, method="higher"))
    first, last = bad[0], bad[-1]
    found["avoided_s"] = _until(
        at_s, there, first.start_s, min(first.end_s, scenario.length_s), lambda s: s < fair / 3.0
    )
    if last.end_s < scenario.length_s - 2.0 * _WINDOW_S:
        found["used_again_s"] = _until(at_s, there, last.end_s, scenario.length_s, lambda s: s >= fair / 2.0)
    return found


def _newcomer(
    scenario: Scenario,
    good: Sequence[Mapping[str, Any]],
    spans: Sequence[Span],
    states: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """When the first newcomer answered, and what it got in the second half of its time, over a fair share.

    Of ours also from when the coordinator listed it until it had its full share of picks, by samples of a second; the
    whole time if never.
    """
    joined = next((span for span in spans if span.kind.startswith("newcomer")), None)
    if joined is None:
        return {}
    node, start_s, end_s = joined.node_id, joined.start_s, scenario.length_s
    late = [r["node"] == node for r in good if r["at_s"] >= 0.5 * (start_s + end_s)]
    answers_s = [r["at_s"] for r in good if r["node"] == node and r["at_s"] >= start_s]
    found = {
        "newcomer_share": (scenario.replicas + scenario.joins) * sum(late) / max(len(late), 1),
        "newcomer_first_answer_s": min(answers_s, default=end_s) - start_s,
    }
    seen = [
        (state["at_s"], row["share"])
        for state in states
        for row in state["replicas"]
        if row["node_id"] == node and state["at_s"] >= start_s
    ]
    if seen:
        found["newcomer_full_share_s"] = next((at_s for at_s, share in seen if share >= 1.0), end_s) - seen[0][0]
    return found


def _until(at_s: Any, there: Any, start_s: float, end_s: float, reached: Any) -> float:
    """Seconds from `start_s` until the node's share over a window satisfies `reached`; the whole time if never."""
    for begin_s in np.arange(max(start_s, 0.0), end_s, 0.1):
        window = (at_s >= begin_s) & (at_s < begin_s + _WINDOW_S)
        if window.any() and reached(float(there[window].mean())):
            return float(begin_s - max(start_s, 0.0))
    return end_s - max(start_s, 0.0)


def _leftovers(result: Mapping[str, Any]) -> dict[str, float]:
    """After a soak: requests that the balancer still counts, and replicas that are not back in full use."""
    replicas = ((result["after"] or {}).get("deployment") or {}).get("replicas", [])
    return {
        "left_in_flight": float(sum(view["queue"] for view in replicas)),
        "left_not_active": float(sum(view["state"] != "active" for view in replicas)),
    }


def _balancer(result: Mapping[str, Any]) -> dict[str, float]:
    """Mirrored and rescued requests, as the coordinator counts them; one that was killed begins anew."""
    before, after = ((result[key] or {}).get("deployment") for key in ("before", "after"))
    if not after:
        return {}
    samples = [before or dict.fromkeys(("mirrored", "rescued", "finished"), 0), *result.get("states", ()), after]

    def counted(key: str) -> float:
        values = [value for sample in samples if (value := sample.get(key)) is not None]
        return float(sum(now - then if now >= then else now for then, now in pairwise(values)))

    mirrored, rescued = counted("mirrored"), counted("rescued")
    return {
        "mirrored": mirrored,
        "rescued": rescued,
        "mirrored_fraction": mirrored / max(counted("finished"), 1.0),
    }
