"""What `shadecast report` tells of each deployment: in words, tables, for programs, and on a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from serve_app.launch import charts
from serve_app.launch.tables import Column, percent, span, table
from shadecast.observing import Estimate, Side, estimate, usual_s

_USUAL_SLO = 4.0
"""Times the median duration, where no objective is given."""
_REFUSALS = ("trial_failed", "guard_tripped")
_MOST_REFUSALS = 20
HOW = (
    "as Serve chose, Shadecast noted the predicted time on the replica that Serve took, and on the one that it would "
    "have taken itself",
    "what such predictions are worth is measured: m, the mean log duration of requests by their prediction, less what "
    "all requests of the same half minute have in common, rising with the prediction; a request of d seconds would "
    "have taken d x exp(m(the one) - m(the other)); predictions that say nothing claim nothing",
    "each request is moved alone: that the others would have gone elsewhere, too, is not in it, nor is waiting before "
    "a replica accepts; near full load the truth may be less, where queues build up behind a slow replica more",
    "failed requests count as missed; where Shadecast would have sent none, they fail as often as elsewhere",
    "intervals are of 95 %: half minutes (longer spans after four hours) drawn anew 200 times; they hold chance, not "
    "the method's own error: in simulations from half of what was predicted to twice of it came (docs/what_if.md); "
    "other days may differ by more",
)


class DeploymentReport:
    """One deployment's report."""

    def __init__(self, observed: Mapping[str, Any], slo_s: float, status: Mapping[str, Any]) -> None:
        self.name, self.observing, self.blocks = observed["deployment"], observed["observing"], observed["blocks"]
        self.given = slo_s > 0.0
        usual = usual_s(self.blocks)
        self.slo_s = slo_s or (_USUAL_SLO * usual if math.isfinite(usual) else 1.0)
        self.found: Estimate = estimate(self.blocks, self.slo_s, np.random.default_rng(0))
        changes = [each for each in status["transitions"] if each["deployment"] == self.name]
        self.refusals = [each for each in changes if each["event"] in _REFUSALS][-_MOST_REFUSALS:]

    # ------------------------------------------------------------------ in words

    def verdict(self) -> str:
        """One sentence."""
        found = self.found
        if found.ours is None:
            return f"{found.too_little or 'no request went well'}: nothing is estimated yet"
        low, high = found.saved_bounds or (math.nan, math.nan)
        saved = f"{_percent(found.saved_fraction)} of the mean latency {_interval(found.saved_bounds)}"
        avoided = f"{_points(found.avoided_fraction)} points of SLO misses {_interval(found.avoided_bounds, _points)}"
        if low > 0.0:
            return f"Shadecast would have saved about {saved} and avoided {avoided}"
        if high < 0.0:
            return f"Shadecast would have cost {_percent(-found.saved_fraction)} of the mean latency"
        return f"no difference that could not be chance: Shadecast would have saved {saved} and avoided {avoided}"

    def notes(self) -> list[str]:
        """What must be known to read the numbers."""
        found = self.found
        first, last = self.blocks[0]["ago_s"], max(self.blocks[-1]["ago_s"] - self.blocks[-1]["length_s"], 0.0)
        objective = "as given" if self.given else "4 x the median duration, because no --slo was given"
        lines = [
            f"{found.requests} requests in {found.blocks} spans of {self.blocks[0]['length_s']:g} s, from "
            f"{span(first)} to {span(last)} ago (since the coordinator started)",
            f"objective: {self.slo_s:.3g} s, {objective}",
        ]
        if not self.observing:
            lines.append("it observes no more: Shadecast routes by now")
        if found.ours is not None:
            trust = f"{found.trust:.2f} {_interval(found.trust_bounds, _number)}"
            lines.append(f"of the predicted gain the durations bear out {trust}")
        lines.append(self.refused())
        return lines

    def refused(self) -> str:
        """Of requests that we would not have sent where Serve did."""
        found = self.found
        if not found.refused:
            return "Serve sent no request to a replica that Shadecast would have kept out"
        part = found.refused_right / found.refused
        right = f"{found.refused_right} ({_percent(part)} {_interval(found.refused_right_bounds)})"
        return (
            f"Serve sent {found.refused} requests to replicas that Shadecast would have kept out; rightly so for "
            f"{right}, which failed or were late; of all others {_percent(found.others_missed_fraction)}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Serve's routing and ours."""
        sides = (("Serve's, measured", self.found.serve), ("Shadecast, estimated", self.found.ours))
        return [
            (
                name,
                f"{_percent(side.miss_fraction)} {_interval(side.miss_bounds)}".strip(),
                percent(side.failed_fraction) if side.failed_fraction in (0.0, 1.0) else _percent(side.failed_fraction),
                *(f"{value:.3g}" for value in (side.mean_s, side.p50_s, side.p99_s)),
            )
            for name, side in sides
            if side is not None
        ]

    def view(self, width: float) -> list[RenderableType]:
        """For the terminal."""
        columns = [
            Column(heading, [row[k] for row in self.rows()], int(heading == "p50 s"), k > 0)
            for k, heading in enumerate(_HEADINGS)
        ]
        lines = [self.verdict(), *self.notes(), *(_refusal(each) for each in self.refusals)]
        indented = [Padding(Text(line), (0, 0, 0, 2)) for line in lines]
        return [*table(self.name, columns, width)[:-1], *indented, Text()]

    # ------------------------------------------------------------------ for programs, and the page

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "deployment": self.name,
            "observing": self.observing,
            "verdict": self.verdict(),
            "notes": self.notes(),
            "slo_given": self.given,
            **asdict(self.found),
            "too_little": self.found.too_little or None,
            "refusals": [
                {name: each[name] for name in ("replica_id", "event", "reason", "ago_s")} for each in self.refusals
            ],
        }

    def parts(self) -> list[str]:
        """For the page."""
        parts = [
            charts.heading(self.name),
            charts.paragraph(self.verdict()),
            charts.table(_HEADINGS, self.rows()),
            charts.notes([*self.notes(), *HOW]),
        ]
        sides: list[tuple[str, Side | None]] = [("Serve's default", self.found.serve), ("Shadecast", self.found.ours)]
        missed = [(n, 100 * s.miss_fraction, _times(s.miss_bounds)) for n, s in sides if s is not None]
        parts.append(charts.bars("SLO misses", missed, "per cent of the requests; lines are 95 % intervals"))
        parts.append(
            charts.bars("99th percentile of the latency", [(n, s.p99_s, None) for n, s in sides if s], "seconds")
        )
        tails = [(name, [(x, 100 * y) for x, y in side.tail]) for name, side in sides if side is not None]
        parts.append(
            charts.lines("How many requests take longer", tails, "latency, s", "per cent", log_x=True, log_y=True)
        )
        ago_min = [-block["ago_s"] / 60.0 for block in self.blocks]
        requests = [block["requests"] / block["length_s"] for block in self.blocks]
        parts.append(
            charts.lines(
                "Requests", [("all", list(zip(ago_min, requests, strict=True)))], "minutes from now", "a second"
            )
        )
        if self.refusals:
            parts.append(charts.heading("Replicas that Shadecast would have kept out"))
            parts.append(charts.notes([_refusal(each) for each in self.refusals]))
        return parts


_HEADINGS = ("routing", "SLO misses", "failed", "mean s", "p50 s", "p99 s")


def _refusal(change: Mapping[str, Any]) -> str:
    return f"{span(change['ago_s'])} ago, {change['replica_id'][:8]}: {change['reason']}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _points(value: float) -> str:
    return f"{100 * value:.3g}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _interval(bounds: tuple[float, float] | None, shown: Any = _percent) -> str:
    return f"[{shown(bounds[0]).removesuffix(' %')}, {shown(bounds[1]).removesuffix(' %')}]" if bounds else ""


def _times(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    return (100 * bounds[0], 100 * bounds[1]) if bounds else None


def page(told: Sequence[DeploymentReport]) -> str:
    """One HTML file."""
    return charts.page("What Shadecast would have gained", [part for each in told for part in each.parts()])
