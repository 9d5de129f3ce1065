"""What runs have shown: numbers of each, tables over seeds, targets, the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.llm_real.arms import ARMS, FIRST, SCENARIOS, Scenario
from bench.llm_real.client import Answer, from_columns
from bench.results import Check, Row

RAY, OURS, UNTRIED = "Ray prefix router", "ours", "ours, untried"


@dataclass(slots=True)
class Found:
    """Of one arm in one phase, all seeds together, or of one of them."""

    seconds: float = 0.0
    hits: float = 0.0
    queries: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Another seed's."""
        self.seconds += other.seconds
        self.hits += other.hits
        self.queries += other.queries
        self.answers += other.answers

    @property
    def hit_share(self) -> float:
        """Tokens of prompts that engines had, by their own counters; copies count, too."""
        return self.hits / self.queries if self.queries else math.nan

    @property
    def tokens_per_s(self) -> float:
        """That clients got."""
        return sum(answer.tokens for answer in self.answers) / self.seconds if self.seconds else math.nan

    @property
    def errors(self) -> int:
        """Requests without a whole answer."""
        return sum(bool(answer.error) for answer in self.answers)

    def first_s(self, q: float, turns: tuple[int, ...] | None = None) -> float:
        """A quantile of the time to the first token; a request without one has taken for ever."""
        return quantile(first_times(each for each in self.answers if turns is None or each.turn in turns), q)

    def place_share(self, place: int) -> float:
        """Fraction of the requests that a replica had."""
        return sum(each.place == place for each in self.answers) / len(self.answers) if self.answers else math.nan


def first_times(answers: Iterable[Answer]) -> list[float]:
    """Seconds to the first token of each."""
    return [math.inf if each.error or math.isnan(each.first_s) else each.first_s for each in answers]


def quantile(values: Sequence[float], q: float) -> float:
    """The least value that this part of all does not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else math.nan


def phases(run: Mapping[str, Any]) -> dict[str, Found]:
    """A run's phases that are judged."""
    answers = from_columns(run["requests"])
    return {
        name: Found(
            counted["seconds"], counted["hits"], counted["queries"], [each for each in answers if each.phase == name]
        )
        for name, counted in run["phases"].items()
    }


def newcomer(run: Mapping[str, Any]) -> list[Answer]:
    """The newcomer's first live requests, at most `FIRST`, in the order in which they were sent."""
    scenario = SCENARIOS[run["scenario"]]
    own = [each for each in from_columns(run["requests"]) if each.place >= scenario.replicas]
    return sorted(own, key=lambda each: each.sent_s)[:FIRST]


def rows_of(run: Mapping[str, Any]) -> list[Row]:
    """The numbers of one run."""
    found: dict[str, float] = {}
    for name, phase in phases(run).items():
        later = tuple(range(1, SCENARIOS[run["scenario"]].traffic.turns))
        found |= {
            f"{name}_requests": len(phase.answers),
            f"{name}_errors": phase.errors,
            f"{name}_hit_share": phase.hit_share,
            f"{name}_first_p50_s": phase.first_s(0.5),
            f"{name}_first_p99_s": phase.first_s(0.99),
            f"{name}_later_p50_s": phase.first_s(0.5, later),
            f"{name}_tokens_per_s": phase.tokens_per_s,
        }
    if SCENARIOS[run["scenario"]].joining:
        times = first_times(newcomer(run))
        found |= {
            "newcomer_requests": len(times),
            "newcomer_first_p50_s": quantile(times, 0.5),
            "newcomer_first_p99_s": quantile(times, 0.99),
            "newcomer_copies": run["copies"][-1],
        }
    return [
        Row(run["scenario"], run["arm"], run["seed"], metric, float(value))
        for metric, value in found.items()
        if math.isfinite(value)
    ]


# ---------------------------------------------------------------- over seeds


def pooled(runs: Sequence[Mapping[str, Any]], scenario: str) -> dict[str, dict[str, Found]]:
    """arm -> phase -> all seeds together."""
    found: dict[str, dict[str, Found]] = {}
    for run in runs:
        if run["scenario"] == scenario:
            for name, phase in phases(run).items():
                found.setdefault(run["arm"], {}).setdefault(name, Found()).add(phase)
    return {arm: found[arm] for arm in ARMS if arm in found}


def checks(runs: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The targets, as far as there are runs of both arms; only seeds that both have."""
    found: list[Check] = []
    both = _common(runs, "conversations", (RAY, OURS))
    if both:
        arms = pooled(both, "conversations")
        ray, ours = arms[RAY], arms[OURS]
        found.append(
            Check(
                "hit share, calm: at least Ray's prefix router's",
                f"{ours['steady'].hit_share:.3f} and {ray['steady'].hit_share:.3f}",
                ours["steady"].hit_share >= ray["steady"].hit_share,
            )
        )
        later = tuple(range(1, SCENARIOS["conversations"].traffic.turns))
        found.append(
            _ratio(
                "TTFT p50 of later turns, calm, over Ray's prefix router's",
                ours["steady"].first_s(0.5, later),
                ray["steady"].first_s(0.5, later),
                1.0,
            )
        )
        found.append(
            _ratio(
                "TTFT p99 with a hog, over Ray's prefix router's",
                ours["hog"].first_s(0.99),
                ray["hog"].first_s(0.99),
                0.5,
            )
        )
    both = _common(runs, "newcomer", (UNTRIED, OURS))
    if both:
        first = {
            arm: quantile([t for run in both if run["arm"] == arm for t in first_times(newcomer(run))], 0.5)
            for arm in (UNTRIED, OURS)
        }
        found.append(_ratio("TTFT p50 of a newcomer's first requests, over untried", first[OURS], first[UNTRIED], 0.7))
    return found


def _ratio(text: str, ours: float, theirs: float, most: float) -> Check:
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0.0):
        return Check(f"{text}: at most {most:g}", f"{ours:.3f} and {theirs:.3f} s", False)
    return Check(
        f"{text}: at most {most:g}", f"{ours / theirs:.2f} ({ours:.3f} and {theirs:.3f} s)", ours <= most * theirs
    )


def _common(runs: Sequence[Mapping[str, Any]], scenario: str, arms: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """Runs of these arms with the seeds that all of them have."""
    seeds = [{run["seed"] for run in runs if run["scenario"] == scenario and run["arm"] == arm} for arm in arms]
    shared = set.intersection(*seeds)
    return [run for run in runs if run["scenario"] == scenario and run["arm"] in arms and run["seed"] in shared]


def tables(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Scenario, str, list[list[str]]]]:
    """For each scenario and phase its table: a heading row and one for each arm."""
    found = []
    for scenario in SCENARIOS.values():
        arms = pooled(runs, scenario.name)
        seeds = {arm: {r["seed"] for r in runs if (r["scenario"], r["arm"]) == (scenario.name, arm)} for arm in arms}
        names = ("steady", "hog") if scenario.hogs else ("steady", "newcomer")
        for phase in names:
            turns = range(scenario.traffic.turns)
            by_turn = [f"turn {turn + 1} p50" for turn in turns] if len(turns) > 1 else ["TTFT p50"]
            heading = ["arm", "runs", "requests", "errors", "hits", *by_turn, "TTFT p90", "TTFT p99", "tokens/s"]
            heading += [f"replica {place + 1}" for place in range(scenario.replicas + scenario.joining)]
            lines = [heading]
            for arm, by_phase in arms.items():
                got = by_phase.get(phase)
                if got is None or not got.answers:
                    continue
                lines.append(
                    [
                        arm,
                        str(len(seeds[arm])),
                        str(len(got.answers)),
                        str(got.errors),
                        f"{got.hit_share:.3f}",
                        *(f"{got.first_s(0.5, (turn,)):.3f}" for turn in turns),
                        f"{got.first_s(0.9):.2f}",
                        f"{got.first_s(0.99):.2f}",
                        f"{got.tokens_per_s:.0f}",
                        *(f"{100 * got.place_share(k):.0f} %" for k in range(scenario.replicas + scenario.joining)),
                    ]
                )
            if len(lines) > 1:
                found.append((scenario, phase, lines))
        if scenario.joining and (lines := _newcomers(runs, scenario)):
            found.append((scenario, f"first {FIRST} of the newcomer", lines))
    return found


def _newcomers(runs: Sequence[Mapping[str, Any]], scenario: Scenario) -> list[list[str]]:
    lines = [
        ["arm", "runs", "copies", "live requests", "the first after s", "TTFT p50", "mean", "TTFT p99", "p50 by run"]
    ]
    for arm in scenario.arms:
        own = [run for run in runs if run["scenario"] == scenario.name and run["arm"] == arm]
        each = [newcomer(run) for run in own]
        times = [t for answers in each for t in first_times(answers)]
        if not times:
            continue
        begun = scenario.warm_s + scenario.steady_s
        after = [answers[0].sent_s - begun for answers in each if answers]
        finite = [t for t in times if math.isfinite(t)]
        lines.append(
            [
                arm,
                str(len(own)),
                str(sum(run["copies"][-1] for run in own)),
                str(len(times)),
                " ".join(f"{s:.0f}" for s in after),
                f"{quantile(times, 0.5):.3f}",
                f"{sum(finite) / len(finite):.3f}" if finite else "-",
                f"{quantile(times, 0.99):.2f}",
                " ".join(f"{quantile(first_times(answers), 0.5):.3f}" for answers in each if answers),
            ]
        )
    return lines if len(lines) > 1 else []


# ---------------------------------------------------------------- the page


def write_page(path: Path, made: Mapping[str, str], runs: Sequence[Mapping[str, Any]]) -> None:
    """Targets, tables by scenario, and the notes beside the page, `<page>-notes.md`."""
    told = ", ".join(f"{key} {value}" for key, value in made.items()) or "No run yet"
    lines = ["# Language models, with real engines", ""]
    lines += [f"Made by `python -m bench.llm_real --markdown`; do not edit. {told}.", ""]
    if verdicts := checks(runs):
        lines += ["## Targets", "", "| target | measured | |", "|---|---|---|"]
        lines += [f"| {each.text} | {each.measured} | {'met' if each.met else '**missed**'} |" for each in verdicts]
        lines.append("")
    notes = path.with_name(f"{path.stem}-notes.md")
    if notes.exists():
        lines += [notes.read_text(encoding="utf-8").strip(), ""]
    named = ""
    for scenario, phase, table in tables(runs):
        if scenario.name != named:
            named = scenario.name
            lines += [f"## {scenario.title[0].upper()}{scenario.title[1:]}", ""]
        lines += [f"{phase.capitalize()}; times in seconds:", ""]
        lines += [f"| {' | '.join(row)} |" for row in table[:1]] + [f"|{'---|' * len(table[0])}"]
        lines += [f"| {' | '.join(row)} |" for row in table[1:]] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")
