"""Why a replica, or a node, stands where it does: the balancer's own numbers, and sentences that people read.

Nothing is decided here, and nothing is kept for it: it reads what the balancer knows when somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shadecast import capacity as cap
from shadecast.config import LOST_AFTER_S
from shadecast.estimates import Estimates
from shadecast.fleet import Fleet
from shadecast.gate import NEWCOMER_LIMIT
from shadecast.pick import load_cost
from shadecast.replica import Replica
from shadecast.trials import ACTIVE_LIMIT
from shadecast.types import HORIZONS_S, NodeReport, State

_NOTICED = 0.02
"""Difference of two capacities that is worth a word."""
_SHOWN_HORIZON_S = 5.0


def explain_replica(
    known: Replica,
    fleet: Fleet,
    estimates: Estimates,
    *,
    share: float,
    panic: bool,
    urgent: str,
    why: str = "",
    ejected_by: int = 0,
) -> dict[str, Any]:
    """One replica: plain values, and what they mean in `sentences`; NaN is "not known".

    `share` is what the table gives it, `why` the reason of its last change of state, `urgent` why there is no time for
    trials now, `ejected_by` how many routers leave it out for a moment.
    """
    c, now_s, config = known.connection, fleet.now_s, fleet.config
    since_s, retry_in_s = now_s - c.since_s, max(c.not_before_s - now_s, 0.0)
    curve = estimates.cautious_curve
    cost = load_cost(max(known.queue, 0.0) + 1.0, curve.slots, curve.batch_half)
    forecast_factor = math.exp(config.balance.forecast_weight * known.outlook.log_change)
    trial = _trial(known, now_s)
    sentences = [_state(c.state, since_s, why)]
    sentences += _share(known, fleet, share=share, panic=panic, urgent=urgent, retry_in_s=retry_in_s)
    sentences += trial["sentences"]
    sentences += _guards(known, fleet)
    if ejected_by:
        sentences.append(f"{_count(ejected_by, 'router')} leave it out for a moment: it does not answer.")
    sentences += _capacity(known, estimates, forecast_factor, config.balance.forecast_weight)
    score, is_it = cost / max(known.capacity, 1e-3), "is" if share > 0.0 else "would be"
    sentences.append(
        f"Its score {is_it} {score:.2f}: a cost of {cost:.2f} with {known.queue:g} requests there, over a capacity of "
        f"{known.capacity:.2f}. The least score wins."
    )
    return {
        "replica_id": c.replica_id,
        "node_id": c.node_id,
        "deployment": fleet.deployment,
        "state": c.state.value,
        "since_s": since_s,
        "why": why,
        "share": share,
        "held": fleet.is_held(known),
        "rejections": c.rejections,
        "retry_in_s": retry_in_s if c.state is State.INACTIVE else 0.0,
        "panic": panic,
        "urgent": urgent,
        "ejected_by": ejected_by,
        "mirror_fraction": known.mirror_fraction,
        "score": {"score": score, "cost": cost, "queue": known.queue},
        "capacity": {
            "capacity": known.capacity,
            "live_capacity": known.live_capacity,
            "by_requests": math.exp(known.unexplained),
            "by_telemetry": estimates.by_telemetry(known),
            "forecast_factor": forecast_factor,
            "vetoed": known.vetoed,
        },
        "guard": {
            "score": known.errors.score,
            "limit": ACTIVE_LIMIT if c.state is State.ACTIVE else NEWCOMER_LIMIT,
            "failed": known.errors.failed,
            "requests": known.errors.requests,
            "usual_errors": known.usual_errors,
        },
        "trial": trial["values"],
        "sentences": sentences,
    }


def _state(state: State, since_s: float, why: str) -> str:
    return f"It has been {state.value} for {_span(since_s)}{': ' + why if why else ''}."


def _share(known: Replica, fleet: Fleet, *, share: float, panic: bool, urgent: str, retry_in_s: float) -> list[str]:
    """Why it gets what it gets."""
    c, config = known.connection, fleet.config.trial
    held = fleet.is_held(known)
    found = []
    if held:
        found.append("An operator, or Ray, keeps it or its node out of traffic.")
    if panic and share > 0.0 and not known.takes_traffic:
        return [*found, "It gets its share all the same: too few of the replicas that were good serve (panic)."]
    match c.state:
        case State.ACTIVE:
            found.append("It may get any request; the scores say how many.")
        case State.SHIFTING:
            steps = ", ".join(f"{100 * step:g} %" for step in config.ramp)
            found.append(f"It may get {100 * share:g} % of the picks: step {c.step + 1} of its ramp of {steps}.")
            found.append(f"The next step comes after {config.step_s:g} s with requests, or 20 of them, without harm.")
            if urgent:
                found.append(f"Steps are short now: {urgent}.")
        case State.SHADOWING:
            part = f"{100 * known.mirror_fraction:.0f} %"
            found.append(f"It gets no requests, only copies of {part} of them, until its trial has a verdict.")
        case State.DRAINING:
            found.append(
                f"It gets no new requests; {known.queue:g} are still there. At the latest after "
                f"{config.drain_s:g} s it is done."
            )
        case State.INACTIVE:
            found.append("It gets nothing.")
            found += [] if held else _why_it_waits(known, fleet, retry_in_s)
    return found


def _why_it_waits(known: Replica, fleet: Fleet, retry_in_s: float) -> list[str]:
    rejections = known.connection.rejections
    if retry_in_s > 0.0:
        return [f"It was turned away {_times(rejections)}: its next trial may begin in {_span(retry_in_s)}."]
    if known.vetoed:
        return ["Its trial waits: the forecast says that its node is about to be nearly lost."]
    node = fleet.nodes.get(known.connection.node_id)
    if node is not None and fleet.now_s - node.made_s > LOST_AFTER_S:
        return [f"Its trial waits: its node has not reported for {_span(fleet.now_s - node.made_s)}."]
    trials = sum(1 for r in fleet.replicas.values() if r.connection.state is State.SHADOWING)
    return [f"It waits for its trial; {trials} are under way." if trials else "Its trial begins with the next table."]


def _trial(known: Replica, now_s: float) -> dict[str, Any]:
    """What a trial has found; of one that is over, its ruling, while that is known."""
    trial, ruling = known.trial, known.ruling
    if trial is None:
        return {"values": None, "sentences": []}
    ruling = ruling or trial.rule(now_s, quiet_s=known.quiet_s)
    evidence, missing = dict(ruling.evidence), trial.missing()
    pairs_left, left_s = trial.left(now_s, known.quiet_s)
    sentences = [
        f"Its trial has {_count(trial.pairs, 'pair')} of a request and its copy: "
        f"{evidence['errors_shadow_only']:.0f} failed on it alone, "
        f"{evidence['errors_primary_only']:.0f} on the others alone."
    ]
    if math.isfinite(mean := evidence["mean_log_ratio"]):
        low, high = evidence["lower"], evidence["upper"]
        sure = math.isfinite(low) and math.isfinite(high)
        within = f"surely {_ratio(low)} to {_ratio(high)}" if sure else "how sure that is cannot be said yet"
        judged = _count(round(evidence["judged"]), "pair")
        sentences.append(f"A copy takes {_ratio(mean)} times as long as its request: {within}; {judged} judged.")
    sentences += [f"What is missing: {each}." for each in missing]
    sentences.append(f"The trial ends after {pairs_left} more pairs, or in {_span(left_s)}, at the latest.")
    if known.quiet_s >= 1.0:
        sentences.append(f"{_span(known.quiet_s)} without requests do not count: in silence nothing shows.")
    if evidence["error_score"] > 0.0:
        sentences.append(f"Errors speak against it: {evidence['error_score']:.1f} of {NEWCOMER_LIMIT:g} end the trial.")
    values = {
        "verdict": ruling.verdict.value,
        "reason": ruling.reason,
        "evidence": evidence,
        "missing": list(missing),
        "pairs_left": pairs_left,
        "left_s": left_s,
    }
    return {"values": values, "sentences": sentences}


def _guards(known: Replica, fleet: Fleet) -> list[str]:
    """What speaks against one that serves."""
    found = []
    if known.takes_traffic and known.errors.score > 0.0:
        limit = ACTIVE_LIMIT if known.connection.state is State.ACTIVE else NEWCOMER_LIMIT
        found.append(
            f"Errors speak against it: {known.errors.excess()}; the guard stands at {known.errors.score:.1f} "
            f"of {limit:g}, at which it is taken out."
        )
    if known.slow_since_s is not None:
        found.append(f"It has been far slower than the others for {_span(fleet.now_s - known.slow_since_s)}.")
    if known.doubted_s is not None:
        found.append(
            f"It was slower than others, so that nobody chose it; for {_span(fleet.now_s - known.doubted_s)} copies of "
            "requests have shown whether it is well again."
        )
    return found


def _capacity(known: Replica, estimates: Estimates, forecast_factor: float, weight: float) -> list[str]:
    """Where its capacity comes from."""
    by_requests, by_telemetry = math.exp(known.unexplained), estimates.by_telemetry(known)
    found = [
        f"Its capacity is {known.capacity:.2f} of a usual replica's. Without a forecast: {known.live_capacity:.2f} "
        f"({by_telemetry:.2f} by its node's telemetry, times {by_requests:.2f} by its requests, "
        "less what may be chance)."
    ]
    if abs(forecast_factor - 1.0) > _NOTICED:
        ahead_s = estimates.look_ahead_s()
        found.append(
            f"What is forecast of its node multiplies that by {forecast_factor:.2f} (requests last {ahead_s:.1f} s)."
        )
    elif weight <= 0.0:
        found.append("Forecasts do not count here (balance.forecast_weight is 0).")
    if known.vetoed:
        found.append(f"Its node is left for a moment (veto): x{cap.VETO_FACTOR:g}, because the forecast is dire.")
    if abs(known.steady - known.live_capacity * forecast_factor) > _NOTICED:
        found.append(
            f"It is on its way there: capacity rises by {cap.RISE_PER_S:g} and falls by {cap.FALL_PER_S:g} a second "
            "at most."
        )
    return found


def explain_decision(d: Mapping[str, Any]) -> list[str]:
    """One decision of a router, as `shadecast.decisions.check` gives it, in sentences."""
    found = [_LEVELS.get(d["level"], f"The router was on the level {d['level']!r}."), *_went(d)]
    waited = f"waited for {d['waited_s']:.2f} s" if (d["waited_s"] or 0.0) >= _WAITED_S else ""
    if d["special"] in ("waited", "came back"):
        found.append(f"It {waited or d['special']}: {d['detail']}.")
    elif waited:
        found.append(f"It {waited}.")
    if d["model"]:
        found.append(f"It asked for the multiplexed model {d['model']!r}: replicas that have it are preferred.")
    if d["of_copy"]:
        found.append("It is for nobody: code called it while it handled a copy.")
    if d["copied_to"]:
        found.append(f"A copy of it went to {d['copied_to']}, which is on trial.")
    return found


def _went(d: Mapping[str, Any]) -> list[str]:
    """Where a request went, and why."""
    chosen, of = d["chosen"], f"({d['eligible']} were eligible, {d['alive']} alive)"
    looked = [c for c in d["candidates"] if c["looked_at"]]
    score = next((c["score"] for c in d["candidates"] if c["replica_id"] == chosen), None)
    if d["special"] == "refused":
        return [f"It got no replica: {d['detail']}."]
    if d["special"] in _ELSEWHERE:
        return [f"It was {d['special']}: {d['detail']}."]
    if d["special"] == "session moved":
        return [f"It went to {chosen}: {d['detail']}."]
    if d["prompt_tokens"]:
        return _by_prompt(d, looked, of)
    if d["session"] and not looked:
        return [f"It went to {chosen}, which has its session, or stands in for the one that has it."]
    if not looked or score is None:
        return [f"It went to {chosen} {of}."]
    lower = [c["score"] for c in looked if c["score"] is not None and c["score"] < score and not c["out"]]
    least = "within a tenth of the least of" if lower else "the least of"
    if lower and min(lower) < _EQUAL * score:
        least = "the least whose share of the picks was drawn, of"
    return [f"It went to {chosen}: its score, {score:.2f}, was {least} the {len(looked)} that were drawn {of}."]


def _by_prompt(d: Mapping[str, Any], looked: Sequence[Mapping[str, Any]], of: str) -> list[str]:
    """Of a request that was placed by its prompt."""
    chosen, prompt = d["chosen"], f"Its prompt has about {d['prompt_tokens']} tokens"
    compared = [c for c in looked if c["prefix_score"] is not None]
    its = next((c for c in compared if c["replica_id"] == chosen), None)
    if its is None:
        return [f"{prompt}.", f"It went to {chosen} {of}: what its prompt chose had no place any more."]
    score = its["prefix_score"]
    shown = f"{score:.{0 if score >= 100.0 else 2}f}"
    least = "the least" if score <= min(c["prefix_score"] for c in compared) else "within a tenth of the least"
    found = [
        f"{prompt}; {chosen} has {its['cached_tokens']:.0f} of them in its cache, "
        f"and {its['waiting_tokens']:.0f} of other prompts wait there to be computed.",
        f"It went there: its prefix score, {shown}, was {least} of the {len(compared)} that were compared {of}.",
    ]
    if not any(c["cached_tokens"] for c in compared):
        found.append(
            "Nobody has its beginning: of those within a tenth of the best it went to the beginning's own place."
        )
    return found


_WAITED_S = 0.005
_EQUAL = 0.9
"""Scores whose ratio is nearer to 1 count as equal (`shadecast.pick`)."""
_ELSEWHERE = ("retried", "moved", "resumed")
_LEVELS = {
    "table": "The router went by a fresh table: the full rule.",
    "stale_table": "The router's table was stale: it left out what was forecast.",
    "power_of_two": "The router had no usable table: of two random replicas, it took the one with the shorter queue.",
    "observing": "Serve's own rule chose; Shadecast only watched.",
}


def explain_node(
    node_id: str,
    report: NodeReport | None,
    age_s: float,
    *,
    held: bool,
    leaving: bool,
    announced: Sequence[Mapping[str, Any]],
    replicas: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """One node, and each replica there in a sentence. `replicas` as `explain_replica` has them."""
    sentences = []
    if held:
        sentences.append("An operator keeps it out of traffic.")
    if leaving:
        sentences.append("Ray is about to take it away: nothing new goes there.")
    forecast = report.forecast if report is not None else None
    if report is None:
        sentences.append("It has never reported: its replicas are scored by their requests alone.")
    else:
        late = ", which is late: it is silent" if age_s > LOST_AFTER_S else ""
        sentences.append(f"It is {report.hostname or 'without a name'} and reported {_span(age_s)} ago{late}.")
        sentences += _loads(report)
    for each in announced:
        starts_in_s, ends_in_s = float(each["starts_in_s"]), float(each["ends_in_s"])
        when = f"in {_span(starts_in_s)}" if starts_in_s > 0.0 else "now"
        sentences.append(
            f"Announced: {100 * float(each['strength']):.0f} % of it is taken, {when}; over in {_span(ends_in_s)}."
        )
    there = list(replicas)
    for each in there:
        numbers = f"a share of {100 * each['share']:g} %, a capacity of {each['capacity']['capacity']:.2f}"
        sentences.append(f"{each['replica_id']} of {each['deployment']} is {each['state']}, with {numbers}.")
    if not there:
        sentences.append("No replica that Shadecast knows runs there.")
    return {
        "node_id": node_id,
        "hostname": report.hostname if report is not None else "",
        "age_s": age_s if report is not None else math.nan,
        "held": held,
        "leaving": leaving,
        "announced": [dict(each) for each in announced],
        "forecast": {
            "known": forecast is not None,
            "model_version": forecast.model_version if forecast is not None else "",
            "gate": dict(forecast.gate) if forecast is not None else {},
            "skill": dict(forecast.skill) if forecast is not None else {},
            "veto_allowed": forecast.veto_allowed if forecast is not None else False,
        },
        "replicas": [each["replica_id"] for each in there],
        "sentences": sentences,
    }


def _loads(report: NodeReport) -> list[str]:
    """What others take of it, now and soon, and how far that is believed."""
    now, forecast = report.snapshot, report.forecast
    loads = {
        "cpu": now.cpu_background_fraction,
        "memory": now.memory_fraction,
        "network": now.network_background_fraction,
    }
    known = ", ".join(f"{100 * value:.0f} % of the {name}" for name, value in loads.items() if math.isfinite(value))
    found = [f"Others take {known}." if known else "Its telemetry tells nothing."]
    if forecast is None:
        return [*found, "It has no forecast yet: its replicas are scored on live capacity."]
    row = HORIZONS_S.index(_SHOWN_HORIZON_S)
    soon = ", ".join(
        f"{100 * rows[row][1]:.0f} % of the {name}"
        for name, rows in forecast.quantiles.items()
        if len(rows) == len(HORIZONS_S) and math.isfinite(rows[row][1])
    )
    if soon:
        found.append(f"In {_SHOWN_HORIZON_S:g} s they are expected to take {soon} (medians).")
    gates = ", ".join(f"{name} {gate:.2f}" for name, gate in forecast.gate.items() if math.isfinite(gate))
    if gates:
        found.append(f"The forecast counts as far as its gate is open, 0 to 1: {gates}.")
    allowed = "may" if forecast.veto_allowed else "may not yet"
    found.append(f"It {allowed} have a node left altogether.")
    return found


def _ratio(log_ratio: float) -> str:
    return f"{math.exp(min(log_ratio, 20.0)):.2f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times in a row")


def _span(value_s: float) -> str:
    if not math.isfinite(value_s):
        return "an unknown time"
    return (
        f"{value_s:.1f} s"
        if value_s < 100.0
        else f"{value_s / 60.0:.0f} min"
        if value_s < 6000.0
        else f"{value_s / 3600.0:.0f} h"
    )
