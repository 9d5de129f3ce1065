"""What a visitor asks, which rows answer it, and what they say. Sentences take every number from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.summary.entries import DEFAULT, HIGHER_IS_BETTER, LIVE, ORACLE, OURS, Entry, Summary

ARMS: Mapping[str, str] = {
    DEFAULT: "Serve's default",
    "round_robin": "round robin",
    "capacity_queue": "Ray's capacity queue",
    "consistent_hash": "consistent hash",
    "prequal": "Prequal",
    LIVE: "live capacity alone",
    OURS: "**Shadecast**",
    ORACLE: "oracle",
}
"""Columns, in order."""
_ENOUGH = 1.1
"""What differs by less than a tenth, two seeds cannot tell apart."""


class NotMeasuredError(Exception):
    """A sentence needs a row that is not there, and is left out."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table."""

    label: str
    scenario: str
    metric: str


@dataclass(frozen=True, slots=True)
class Question:
    """One table, the sentences under it, where the details are."""

    name: str
    title: str
    lines: tuple[Line, ...]
    sentences: tuple[Callable[[Summary], str], ...]
    details: str
    columns: Mapping[str, str] | None = None
    """Arms and headings; the usual ones where there are none."""
    note: str = ""


def shown(entry: Entry, value: float | None = None) -> str:
    """A value as people read it: ms or s, percent, counts."""
    number = entry.value if value is None else value
    if entry.unit == "s":
        return f"{_digits(number)} s" if number >= 1.0 else f"{_digits(1000.0 * number)} ms"
    if entry.unit == "fraction":
        return f"{_digits(100.0 * number)} %"
    return f"{_digits(number)} {entry.unit}".rstrip()


def _digits(value: float) -> str:
    """Three digits from 1 on, two below; what is whole as it is."""
    if abs(value) < 5e-4:
        return "0"
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) >= 100.0:
        return f"{value:,.0f}"
    if abs(value) >= 10.0:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def better(entry: Entry, other: Entry) -> bool:
    """Whether one is better than the other by more than a tenth, and in every seed that both have."""
    sign = -1.0 if entry.metric in HIGHER_IS_BETTER else 1.0
    mine, theirs = (dict(zip(e.seeds, e.by_seed, strict=True)) for e in (entry, other))
    always = all(sign * mine[seed] < sign * theirs[seed] for seed in mine.keys() & theirs.keys())
    if sign < 0.0:
        return always and entry.value > other.value * _ENOUGH
    return always and entry.value * _ENOUGH < other.value


def full_label(question: Question, line: Line) -> str:
    """Its label, which says what "the same" is."""
    subject = ""
    for each in question.lines:
        before, colon, _ = each.label.partition(":")
        subject = subject if before == "the same" else before if colon else each.label
        if each == line:
            break
    return line.label.replace("the same", subject, 1) if line.label.startswith("the same") else line.label


@dataclass(frozen=True, slots=True)
class _At:
    """One scenario and metric, as sentences name it."""

    summary: Summary
    scenario: str
    metric: str

    def entry(self, arm: str = OURS) -> Entry:
        """The arm's entry. Raises NotMeasuredError."""
        found = self.summary.get(self.scenario, self.metric, arm)
        if found is None:
            raise NotMeasuredError(f"{self.scenario}/{self.metric}/{arm}")
        return found

    def __call__(self, arm: str = OURS) -> str:
        return shown(self.entry(arm))

    def total(self, arm: str = OURS) -> str:
        """A count over all seeds."""
        return f"{self.entry(arm).total:,.0f}"

    def times(self, arm: str = OURS, against: str = DEFAULT) -> str:
        """The ratio."""
        ratio = self.summary.ratio(self.entry(arm), against)
        if ratio is None:
            raise NotMeasuredError(f"{self.scenario}/{self.metric}/{arm} to {against}")
        return f"{_digits(ratio)} x"

    def beats(self, arm: str = OURS, other: str = DEFAULT) -> int:
        """1 better, -1 worse, 0 too near."""
        mine, theirs = self.entry(arm), self.entry(other)
        return better(mine, theirs) - better(theirs, mine)


_Sentence = Callable[[Summary], str]


def _neighbour(s: Summary) -> str:
    at = _At(s, "hog", "p999_s")
    return (
        f"Of a thousand requests the slowest takes {at()} with Shadecast, {at(DEFAULT)} with Serve's default "
        f"({at.times()}), {at(ORACLE)} with an oracle that is told of the neighbour as it comes."
    )


def _measuring(s: Summary) -> str:
    at = _At(s, "hog", "p999_s")
    verdict = {
        0: "Live capacity alone is as good within noise: short requests need measuring, the forecast adds nothing.",
        1: "Live capacity alone is slower here: the forecast adds something.",
        -1: "Live capacity alone is faster here: the forecast costs something.",
    }
    return verdict[at.beats(OURS, LIVE)]


def _sessions(s: Summary) -> str:
    at, strayed = _At(s, "sessions-hot", "p99_s"), _At(s, "sessions-hot", "session_stray_fraction")
    if at.beats() >= 0:
        raise NotMeasuredError("nothing to explain")
    return (
        f"Serve's default has the better p99 where sessions are sticky and one node is slow ({at(DEFAULT)}, Shadecast "
        f"{at()}), because it does not keep them: {strayed(DEFAULT)} of the requests leave their place, {strayed()} "
        "with Shadecast."
    )


def _newcomer(s: Summary) -> str:
    answer, full = _At(s, "newcomer-well", "newcomer_first_answer_s"), _At(s, "newcomer-well", "newcomer_full_share_s")
    return (
        f"Where nobody waits, its first answer comes after {answer()}, since it is tried first, and it has its full "
        f"share {full()} after Serve lists it; with Serve's default the first answer comes after {answer(DEFAULT)}."
    )


def _scale_up(s: Summary) -> str:
    answer = _At(s, "scale-up-under-load", "newcomer_first_answer_s")
    return (
        f"Where requests wait the trial is skipped: {answer()} to the first answer, {answer(DEFAULT)} with the default."
    )


def _broken(s: Summary) -> str:
    failing, wrong = _At(s, "newcomer-failing", "error_fraction"), _At(s, "newcomer-wrong", "error_fraction")
    return (
        f"A replica that fails a fifth of its requests makes {failing(DEFAULT)} of all answers fail with Serve's "
        f"default, {failing()} with Shadecast; one that answers wrong makes {wrong(DEFAULT)} of them wrong, {wrong()} "
        "with Shadecast, which is told how to compare answers there."
    )


def _slow_newcomer(s: Summary) -> str:
    at = _At(s, "newcomer-slow", "p99_s")
    turns = at("round_robin")
    return f"One that is five times too slow: p99 {at()}, {at(DEFAULT)} with the default, {turns} with round robin."


def _lost(s: Summary) -> str:
    ways = {
        "node-kill": "a node that dies",
        "partition": "one that is cut off",
        "coordinator-kill": "a coordinator",
        "forecaster-kill": "a forecaster that is killed",
        "rolling-update": "a rolling update",
        "gateway-kill": "a gateway that is killed",
    }
    failed = {name: _At(s, name, "errors").entry() for name in ways if s.get(name, "errors", OURS)}
    some = [f"{ways[name]}: {entry.total:,.0f}" for name, entry in failed.items() if entry.total]
    count = sum(_At(s, name, "requests").entry().total for name in failed)
    if some:
        return f"Requests that failed with Shadecast, of {count:,.0f}: " + ", ".join(some) + "."
    return f"No request failed with Shadecast, of {count:,.0f} in all runs of these {len(failed)} scenarios."


def _cut_off(s: Summary) -> str:
    at = _At(s, "node-kill", "p999_s")
    return f"After a node's death the slowest of a thousand takes {at()}, {at(DEFAULT)} with Serve's default."


def _overload(s: Summary) -> str:
    slow, missed = _At(s, "overload", "p99_s"), _At(s, "overload", "slo_miss_fraction")
    verdict = {
        1: "more are in time, too",
        0: "about as many are in time",
        -1: "fewer are in time, because it serves in the order of arrival, so that everybody waits",
    }[missed.beats()]
    return (
        f"What is too much has to wait: p99 {slow()} with Shadecast, {slow(DEFAULT)} with Serve's default. But "
        f"{missed()} of the requests take more than the 2 s of their SLO, {missed(DEFAULT)} with the default: "
        f"{verdict}."
    )


def _streams(s: Summary) -> str:
    missed, all_ = _At(s, "streams", "slo_misses"), _At(s, "streams", "requests")
    stuck = _At(s, "streams", "errors_timeout")
    return (
        f"A neighbour comes mid-stream: {missed.total()} of {all_.total()} streams miss their SLO with Shadecast, "
        f"{stuck.total()} of them stuck until their reader gives up; {missed.total(DEFAULT)} with Serve's default, "
        f"{stuck.total(DEFAULT)} of them stuck. Shadecast may let streams go on elsewhere here (`balance.resume`)."
    )


def _replay(s: Summary) -> str:
    at = _At(s, "simulated replay", "slo_miss_fraction")
    return (
        f"Recorded jobs of machines that the model has not seen: {at.times()} the misses of Serve's rule, "
        f"{at.times(OURS, LIVE)} those of live capacity alone."
    )


def _expected(s: Summary) -> str:
    at = _At(s, "simulated periodic", "slo_miss_fraction")
    return f"Neighbours at an interval: {at.times()} and {at.times(OURS, LIVE)}."


def _periodic(s: Summary) -> str:
    at, all_ = _At(s, "streams-periodic", "slo_misses"), _At(s, "streams-periodic", "requests")
    return (
        f"A neighbour that comes back every minute is expected: {at.total()} of {all_.total()} miss, "
        f"{at.total(LIVE)} with live capacity alone, {at.total(DEFAULT)} with the default."
    )


def _random(s: Summary) -> str:
    at = _At(s, "simulated tokens-antagonist", "slo_miss_fraction")
    return (
        f"Neighbours that come at random, simulated: {at.times()} the misses of Serve's rule, {at.times(OURS, LIVE)} "
        "those of live capacity alone: nobody can foresee them."
    )


def _pauses(s: Summary) -> str:
    at = _At(s, "simulated short-pauses", "p999_s")
    return f"Pauses that are announced, simulated: p99.9 is {at.times()} that of Serve's rule."


def _calm(s: Summary) -> str:
    at = _At(s, "calm", "p99_s")
    told = f"p99 is {at.times()} Serve's default's and {at.times(OURS, 'round_robin')} round robin's"
    if at.beats(OURS, "round_robin") > 0:
        return f"{told}."
    return f"{told}: on equal nodes with equal requests nothing beats taking turns."


def _decision(s: Summary) -> str:
    one = _At(s, "decision, 8 replicas", "median_us")
    many = _At(s, "decision, 1000 replicas", "median_us")
    way = _At(s, "way_to_a_replica, 8 replicas", "median_us")
    return (
        f"Choosing takes Shadecast {one()}, Serve's default {one(DEFAULT)}; from {one()} at 8 replicas it grows to "
        f"{many()} at 1,000. With Serve's own part a request is {way()} and {way(DEFAULT)} in the router: Serve's "
        "default starts a task for each, Shadecast chooses at once."
    )


def _scale(s: Summary) -> str:
    cpu, tick = _At(s, "scale 1000x100", "coordinator_cores"), _At(s, "scale 1000x100", "tick_p99_s")
    return (
        f"At 1,000 replicas and 100 routers the one coordinator takes {cpu()} and decides within {tick()} "
        "(p99), every half second."
    )


def _forecasts(s: Summary) -> str:
    last, ridge = _At(s, "forecast", "pinball_skill_last_value"), _At(s, "forecast", "pinball_skill_ridge")
    return (
        f"On machines that it never saw the LSTM, trained on others of the same sources, errs {_percent(last, 'lstm')} "
        f'less than "as it is now" and {_percent(ridge, "lstm")} less than ridge regression; as shipped, trained on '
        f"our own recordings alone, {_percent(last, 'shipped')} and {_percent(ridge, 'shipped')} less."
    )


def _percent(at: _At, arm: str) -> str:
    return f"{100.0 * at.entry(arm).value:.0f} %"


def _llm(s: Summary) -> str:
    at = _At(s, "llm tool agents", "slo_miss_fraction")
    return (
        f"Agents with tools: {at()} of the requests miss (first token within 3 s, 100 ms a token), {at('ray_prefix')} "
        f"with Ray's prefix router, {at(DEFAULT)} with Serve's default, which knows nothing of prompts."
    )


_LLM_TRAFFIC = (
    *("tool agents", "agents", "conversation", "synthetic", "code", "tool calls"),
    "tool agents, four routers",
)
_LIVE_PAGE = "[live clusters](live.md), [what each scenario shows](live-notes.md)"
QUESTIONS: tuple[Question, ...] = (
    Question(
        "neighbour",
        "A neighbour takes a node's CPU: how long are the slowest answers?",
        (
            Line("CPU hog on one of four nodes: p99.9", "hog", "p999_s"),
            Line("the same: p99", "hog", "p99_s"),
            Line("hog that comes back every minute: requests beyond .3 s", "hog-periodic", "slo_miss_fraction"),
            Line("one node at 40 % of the others: p99", "slow-node", "p99_s"),
            Line("one node's link slow, large requests: p99", "slow-link", "p99_s"),
            Line("one node's memory fills up: p99", "memory-leak", "p99_s"),
            Line("sticky sessions, one node slow: p99", "sessions-hot", "p99_s"),
            Line("the same: requests that leave their place on well nodes", "sessions-hot", "session_stray_fraction"),
        ),
        (_neighbour, _measuring, _sessions),
        _LIVE_PAGE,
        note="Prequal's probes are calls of Ray actors here, which cost it more than they would elsewhere.",
    ),
    Question(
        "new-replica",
        "A new replica is well: when does it work?",
        (
            Line("a fourth replica, nobody waits: its first answer after its start", "newcomer-well",
                 "newcomer_first_answer_s"),
            Line("the same: full share after Serve lists it", "newcomer-well", "newcomer_full_share_s"),
            Line("the same: p99", "newcomer-well", "p99_s"),
            Line("at a quarter of that load: full share", "newcomer-well-few", "newcomer_full_share_s"),
            Line("a newcomer on a machine of half the speed: p99", "newcomer-half-speed", "p99_s"),
            Line("two replicas too busy become four: first answer", "scale-up-under-load", "newcomer_first_answer_s"),
            Line("the same: full share", "scale-up-under-load", "newcomer_full_share_s"),
            Line("the same: p99", "scale-up-under-load", "p99_s"),
        ),
        (_newcomer, _scale_up),
        _LIVE_PAGE,
        note="Other routers give a replica its full share as soon as Serve lists it.",
    ),
    Question(
        "broken-replica",
        "A new replica is broken: do users see it?",
        (
            Line("a newcomer fails 20 %: answers that fail", "newcomer-failing", "error_fraction"),
            Line("a newcomer answers wrong: wrong answers", "newcomer-wrong", "error_fraction"),
            Line("a newcomer is five times too slow: p99", "newcomer-slow", "p99_s"),
        ),
        (_broken, _slow_newcomer),
        _LIVE_PAGE,
    ),
    Question(
        "death",
        "A node dies, is cut off, the control plane dies: are requests lost?",
        (
            Line("a node loses power: failed requests a run", "node-kill", "errors"),
            Line("the same: p99", "node-kill", "p99_s"),
            Line("the same: p99.9", "node-kill", "p999_s"),
            Line("a node's link is down for 10 s: failed requests", "partition", "errors"),
            Line("the same: p99", "partition", "p99_s"),
            Line("our coordinator is killed: failed requests", "coordinator-kill", "errors"),
            Line("a node's forecaster is killed: failed requests", "forecaster-kill", "errors"),
            Line("one of two HTTP gateways is killed: failed requests", "gateway-kill", "errors"),
            Line("a new version rolls over all replicas: failed requests", "rolling-update", "errors"),
            Line("the same: p99", "rolling-update", "p99_s"),
        ),
        (_lost, _cut_off),
        _LIVE_PAGE,
        note="A run has about 2,000 requests. Requests that are lost with their replica are sent once more, by our "
        "gateway, in every column.",
    ),
    Question(
        "overload",
        "More requests than the machines can do",
        (
            Line("1.3 x what four nodes can do: p99", "overload", "p99_s"),
            Line("the same: requests beyond 2 s", "overload", "slo_miss_fraction"),
            Line("the same: rejected or lost, a run", "overload", "errors"),
            Line("bursts of a real trace, and a hog: p99", "trace", "p99_s"),
            Line("the same: requests beyond .3 s", "trace", "slo_miss_fraction"),
        ),
        (_overload,),
        _LIVE_PAGE,
    ),
    Question(
        "streams",
        "Token streams",
        (
            Line("a hog arrives mid-stream: streams that miss their SLO", "streams", "slo_miss_fraction"),
            Line("the same: stuck until the reader gives up, a run", "streams", "errors_timeout"),
            Line("a hog that comes back every minute: streams that miss", "streams-periodic", "slo_miss_fraction"),
            Line("simulated, neighbours at random: miss", "simulated tokens-antagonist", "slo_miss_fraction"),
            Line("simulated, neighbours at an interval: miss", "simulated periodic", "slo_miss_fraction"),
            Line("simulated, recorded jobs: miss", "simulated replay", "slo_miss_fraction"),
            Line("simulated, short requests, announced pauses: p99.9", "simulated short-pauses", "p999_s"),
        ),
        (_streams, _periodic, _random, _replay, _expected, _pauses),
        _LIVE_PAGE + ", [simulation](simulation.md)",
        note="Simulated rows: Prequal is tuned for them, the oracle is a scheduler that knows every node's future.",
    ),
    Question(
        "calm",
        "Nothing is wrong: what does it cost?",
        (
            Line("four equal nodes: p50", "calm", "p50_s"),
            Line("the same: p99", "calm", "p99_s"),
            Line("the same: p99.9", "calm", "p999_s"),
            Line("CPU of router and client for a request", "calm", "driver_cpu_ms_per_request"),
            Line("throughput of an empty deployment, times the default's", "throughput, 4 replicas",
                 "ratio_to_default"),
        ),
        (_calm,),
        _LIVE_PAGE + ", [request path](micro.md)",
    ),
    Question(
        "decision",
        "What does a decision cost?",
        (
            Line("choose one of 8 replicas", "decision, 8 replicas", "median_us"),
            Line("choose one of 1,000", "decision, 1000 replicas", "median_us"),
            Line("from arrival in the router to the replica, 8", "way_to_a_replica, 8 replicas", "median_us"),
            Line("the same, 1,000", "way_to_a_replica, 1000 replicas", "median_us"),
        ),
        (_decision,),
        "[request path](micro.md)",
    ),
    Question(
        "scale",
        "How far does it scale?",
        tuple(
            Line(f"{replicas:,} replicas, {routers:,} routers: {what}", f"scale {replicas}x{routers}", metric)
            for replicas, routers in ((100, 10), (1_000, 10), (1_000, 100), (3_000, 300))
            for metric, what in (("coordinator_cores", "CPU of the coordinator"), ("tick_p99_s", "a tick of it, p99"))
        ),
        (_scale,),
        "[scale](scale.md)",
        columns={OURS: "**Shadecast**"},
        note="Only Shadecast has a coordinator.",
    ),
    Question(
        "forecasts",
        "Are forecasts right?",
        (
            Line("skill over the last value, 5 and 10 s ahead (1: no error)", "forecast", "pinball_skill_last_value"),
            Line("skill over ridge regression", "forecast", "pinball_skill_ridge"),
            Line("truth within the .1 to .9 band (.8 is right)", "forecast", "coverage_80"),
        ),
        (_forecasts,),
        "[forecast](forecast.md)",
        columns={
            "last_value": "last value",
            "ewma": "moving average",
            "ridge60": "ridge regression",
            "dlinear": "DLinear",
            "shipped": "**LSTM as shipped**",
            "lstm": "**LSTM trained there**",
        },
    ),
    Question(
        "llm",
        "LLM traffic, simulated engines",
        tuple(
            Line(f"{traffic}: {what}", f"llm {traffic}", metric)
            for traffic in _LLM_TRAFFIC
            for metric, what in (("slo_miss_fraction", "requests that miss"), ("first_token_p99_s", "first token, p99"))
        ),
        (_llm,),
        "[each traffic and rule, with parts of ours left out](llm_simulation.md), [language models](../llm.md)",
        columns={
            DEFAULT: "Serve's default",
            "round_robin": "round robin",
            "least_requests": "least requests",
            "session_hash": "session hash",
            "ray_prefix": "Ray's prefix router",
            "sglang": "SGLang",
            "aibrix": "AIBrix",
            "production_stack": "production-stack",
            "dynamo": "Dynamo",
            "llm_d": "llm-d",
            "llm_d_predicted": "llm-d, ideal predictor",
            "lmetric": "LMetric",
            "shadecast_no_prefix": "Shadecast, prefix off",
            OURS: "**Shadecast, prefix on**",
        },
        note="Miss: first token after more than 3 s, or more than 100 ms a token.",
    ),
)  # fmt: skip


def losses(question: Question, summary: Summary) -> list[str]:
    """What of a table another arm does better than ours by more than a tenth; oracles do not count."""
    found = []
    for line in question.lines:
        mine = summary.get(line.scenario, line.metric, OURS)
        if mine is None:
            continue
        names = question.columns or ARMS
        others = [summary.get(line.scenario, line.metric, arm) for arm in names if arm not in (OURS, ORACLE)]
        ahead = [each for each in others if each is not None and better(each, mine)]
        if ahead:
            best = min(ahead, key=lambda each: each.value)
            name = names[best.arm].strip("*")
            found.append(f"{full_label(question, line)} ({name} {shown(best)}, Shadecast {shown(mine)})")
    return found


def sentences(question: Question, summary: Summary) -> list[str]:
    """Those whose rows are there."""
    found = []
    for sentence in question.sentences:
        try:
            found.append(sentence(summary))
        except NotMeasuredError:
            continue
    return found
