"""The live rows of the design's numbers to reach, as checks over measured values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bench.results import Check, interval

Found = Mapping[str, Mapping[str, Sequence[float]]]


def _mean(found: Found, arm: str, metric: str) -> float:
    return float(np.mean(found[arm].get(metric, (0.0,))))


def _ratio(found: Found, metric: str, against: str, limit: float, arm: str = "shadecast") -> Iterator[Check]:
    """Geometric mean of the ratios in the seeds that both have, so that one bad seed does not decide alone."""
    if arm in found and against in found:
        pairs = list(zip(*(found[a].get(metric, (np.nan,)) for a in (arm, against)), strict=False))
        ours, theirs = np.log(np.maximum(pairs, 1e-9)).mean(axis=0).tolist()
        value = float(np.exp(ours - theirs))
        yield Check(f"{metric} <= {limit:g} x {against}", f"{value:.3f} x", value <= limit)


def _pooled(found: Found, metric: str, against: str, limit: float) -> Iterator[Check]:
    """Ratio of sums over the seeds that both have: of fractions, which may be zero in a seed."""
    if against in found:
        pairs = list(zip(found["shadecast"][metric], found[against][metric], strict=False))
        ours, theirs = np.sum(pairs, axis=0).tolist()
        value = ours / theirs if theirs > 0.0 else 0.0 if ours == 0.0 else np.inf
        yield Check(f"{metric} <= {limit:g} x {against}", f"{value:.3f} x", value <= limit)


def _by_pace(found: Found, metric: str, against: str, limit: float) -> Iterator[Check]:
    """The same ratio with each run's time in units of the CPU that the forecasters took in it.

    Their work is the same in every arm, so how fast a machine that is shared happened to be during a run cancels. The
    interval is over seeds, of the logarithm.
    """
    pace = "forecasters_cpu_fraction"
    if all(arm in found and {metric, pace} <= found[arm].keys() for arm in ("shadecast", against)):
        ours, theirs = (np.log(np.divide(found[a][metric], found[a][pace])) for a in ("shadecast", against))
        if len(ours) == len(theirs):
            mean, half = interval((ours - theirs).tolist())
            text = f"{np.exp(mean):.3f} x ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f})"
            name = f"{metric} by the machine's pace in each run <= {limit:g} x {against}"
            yield Check(name, text, bool(np.exp(mean) <= limit))


def _at_most(found: Found, metric: str, limit: float, what: str) -> Iterator[Check]:
    if "shadecast" in found:
        value = _mean(found, "shadecast", metric)
        yield Check(f"{what} <= {limit:g}", f"{value:.4g}", value <= limit)


def _share_of_each(found: Found) -> Iterator[Check]:
    low, high = (found["shadecast"].get(f"half_minute_share_{end}", ()) for end in ("low", "high"))
    if low and high:
        text = f"{100 * min(low):.0f} to {100 * max(high):.0f} %"
        yield Check("each node has 15 to 35 % in every half minute", text, min(low) >= 0.15 and max(high) <= 0.35)


def baseline(scenario: str) -> str:
    """The scenario with the same arrivals and no fault."""
    return "newcomer-none" if scenario.startswith("newcomer") else "calm"


def checks(scenario: str, found: Found, without: Found) -> list[Check]:
    """Checks of one scenario; those whose arms were not run are left out. `without` is found in its baseline."""
    if "shadecast" not in found:
        return []
    if scenario.startswith("chaos"):
        moves = _mean(found, "shadecast", "stream_moves") / max(_mean(found, "shadecast", "requests"), 1.0)
        return [
            *_at_most(found, "errors_wrong", 0.0, "streams with an item lost, twice, out of order or wrong"),
            *_at_most(found, "errors_unanswered", 0.0, "streams that never ended"),
            Check("it was a test: streams that went on elsewhere >= 1 %", f"{100.0 * moves:.1f} %", moves >= 0.01),
        ]
    match scenario.removesuffix("-batched"):
        case "hog":
            made = [*_ratio(found, "p99_s", "oracle", 1.1), *_ratio(found, "p999_s", "oracle", 1.25)]
            return [*made, *_ratio(found, "p999_s", "default", 0.05)]
        case "calm":
            made = [*_ratio(found, "p50_s", "default", 1.03), *_by_pace(found, "p50_s", "default", 1.03)]
            made += [*_ratio(found, "p99_s", "default", 0.9), *_ratio(found, "p99_s", "round_robin", 1.2)]
            made += _share_of_each(found)
            if "default" in found:
                value = _mean(found, "shadecast", "goodput_per_s") / _mean(found, "default", "goodput_per_s")
                made.append(Check("goodput >= 0.98 x default", f"{value:.3f} x", value >= 0.98))
            return made
        case "newcomer-slow" | "newcomer-failing" | "newcomer-wrong":
            return [
                *_at_most(found, "error_fraction", 0.001, "errors seen, as a fraction"),
                *_beside(found, without, 1.05),
            ]
        case "newcomer-well" | "newcomer-well-few" | "newcomer-half-speed":
            low, high = (0.8, 1.2) if scenario.startswith("newcomer-well") else (0.4, 0.6)
            within_s = 45.0 if scenario == "newcomer-well-few" else 20.0
            share = _mean(found, "shadecast", "newcomer_share")
            return [
                *_at_most(found, "newcomer_full_share_s", within_s, "seconds from being listed to its full share"),
                Check(f"its part of a fair share is {low:g} to {high:g}", f"{share:.2f}", low <= share <= high),
            ]
        case "newcomer-half-quota":
            return list(_ratio(found, "p99_s", "default", 1.0))
        case "scale-up-under-load":
            return list(_at_most(found, "newcomer_full_share_s", 12.0, "seconds from being listed to its full share"))
        case "node-kill":
            made = [*_at_most(found, "errors", 0.0, "failed requests")]
            if "oracle" in found:
                made += _ratio(found, "p99_3s_after_fault_s", "oracle", 1.25)
            return made
        case "coordinator-kill" | "partition" | "forecaster-kill":
            return [*_at_most(found, "errors", 0.0, "failed requests"), *_beside(found, without, 1.1)]
        case "sessions-hot":
            stay = _mean(found, "shadecast", "session_stay_fraction_well")
            return [
                Check("requests that stay on their node outside drains >= 0.99", f"{stay:.4f}", stay >= 0.99),
                *_ratio(found, "p99_s", "consistent_hash", 0.2),
            ]
        case "streams" | "streams-periodic" | "hog-periodic" as name:
            limit = {"streams": 0.15, "streams-periodic": 0.1}.get(name, 0.25)
            return [*_pooled(found, "slo_miss_fraction", "default", limit), *_gain(found)]
        case "replay" | "streams-replay":
            return [*_pooled(found, "slo_miss_fraction", "live_capacity", 0.9), *_gain(found)]
        case _:
            return []


def _beside(found: Found, without: Found, limit: float) -> Iterator[Check]:
    if "shadecast" in without:
        yield from _ratio({**found, "the run without it": without["shadecast"]}, "p99_s", "the run without it", limit)


def _gain(found: Found) -> Iterator[Check]:
    """The forecast's own part: paired by seed, a difference with its interval; missed if it surely does harm."""
    if "live_capacity" in found:
        ours, live = (np.asarray(found[a]["slo_miss_fraction"]) for a in ("shadecast", "live_capacity"))
        if len(ours) == len(live) > 1:
            gain, half = interval(100.0 * (live - ours))
            text = f"{gain:.2f} ± {half:.2f} points of SLO misses"
            yield Check("the forecast's own gain over live capacity is not negative", text, gain + half >= 0.0)
