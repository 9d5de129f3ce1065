"""The page of the simulated routers: targets, and a table for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.llm.routers import NOW
from bench.llm.rules import MAIN, RULES
from bench.llm.run import SLO_FIRST_S, SLO_TOKEN_S
from bench.llm.settings import Setting
from bench.results import Check, interval

RAY = "Ray prefix router"
_COLUMNS = (
    ("slo_fraction", "in SLO", 3),
    ("ttft_p50_s", "TTFT p50 s", 2),
    ("ttft_p99_s", "p99 s", 1),
    ("tpot_p50_ms", "TPOT p50 ms", 1),
    ("mean_s", "mean time s", 2),
    ("hit_fraction", "hits", 3),
)
_NEAR, _MORE, _ENOUGH, _LONGER = 0.01, 1.1, 0.9, 1.1

Found = Mapping[str, Mapping[str, Sequence[float]]]
"""rule -> metric -> values by seed."""


def by_rule(rows: Sequence[Mapping[str, Any]], setting: str) -> dict[str, dict[str, list[float]]]:
    """Of one setting, rules in their order."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if row["setting"] == setting:
            for metric, _, _ in _COLUMNS:
                found.setdefault(row["rule"], {}).setdefault(metric, []).append(float(row[metric]))
    return {rule: found[rule] for rule in RULES if rule in found}


def checks(setting: Setting, found: Found) -> list[Check]:
    """The targets of one setting, by means over the seeds; none before all rivals and ours were run."""
    rivals = {name: found[name] for name in found if RULES[name].rival}
    if NOW not in found or RAY not in rivals:
        return []
    mine = {metric: fmean(values) for metric, values in found[NOW].items()}
    ray = fmean(rivals[RAY]["slo_fraction"])
    if setting.routers > 1:
        return [
            _check(f"in SLO >= {RAY}'s with one tree", mine["slo_fraction"], ray, RAY, met=mine["slo_fraction"] >= ray)
        ]
    name, best = _best(rivals, "slo_fraction", max)
    share = mine["slo_fraction"]
    made = [_check(f"in SLO >= the best rival's - {_NEAR:g}", share, best, name, met=share >= best - _NEAR)]
    if ray < _ENOUGH:
        text = f"in SLO >= {_MORE:g} x {RAY}'s"
        made.append(_check(text, share, ray, f"{share / max(ray, 1e-9):.2f} x", met=share >= _MORE * ray))
    name, best = _best(rivals, "tpot_p50_ms", min)
    pace = mine["tpot_p50_ms"]
    made.append(_check("TPOT p50 <= the best rival's", pace, best, name, met=pace <= best, digits=1))
    if min(setting.speeds) < 1.0 == setting.speeds[1]:
        name, best = _best(rivals, "ttft_p99_s", min)
        p99 = mine["ttft_p99_s"]
        made.append(_check(f"TTFT p99 <= {_LONGER:g} x the best rival's", p99, best, name, met=p99 <= _LONGER * best))
    return made


def _best(rivals: Found, metric: str, which: Any) -> tuple[str, float]:
    name = which(rivals, key=lambda each: fmean(rivals[each][metric]))
    return name, fmean(rivals[name][metric])


def _check(text: str, mine: float, theirs: float, who: str, *, met: bool, digits: int = 3) -> Check:
    return Check(text, f"{mine:.{digits}f} against {theirs:.{digits}f} ({who})", met)


def write(path: Path, settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]], made: Mapping[str, str]) -> None:
    """The page; hand-written notes beside it survive."""
    verdicts: list[tuple[Setting, Check]] = []
    sections: list[str] = []
    for setting in settings:
        found = by_rule(rows, setting.name)
        if not found:
            continue
        verdicts += [(setting, check) for check in checks(setting, found)]
        sections += [f"### {setting.name}", "", _about(setting, found), "", *_table(found, MAIN)]
        parts = [rule for rule in found if rule not in MAIN]
        if parts:
            seeds = _common_seeds(rows, setting.name, [NOW, *parts])
            same = by_rule([row for row in rows if row["seed"] in seeds], setting.name)
            title = f"Parts of ours, seeds {', '.join(map(str, sorted(seeds)))}:"
            sections += [title, "", *_table(same, [NOW, *parts])]
    met = sum(check.met for _, check in verdicts)
    about = ", ".join(f"{key} {value}" for key, value in made.items())
    notes = path.with_name("llm_simulation-notes.md")
    head = [
        "# Simulated language models",
        "",
        f"Made by `make bench-llm`; do not edit but the notes. ± is the half width of the 95 % interval over seeds; in "
        f"SLO are requests with their first token within {SLO_FIRST_S:g} s and {1000 * SLO_TOKEN_S:g} ms a token; "
        f"{about}.",
        "",
        *([*notes.read_text(encoding="utf-8").rstrip().splitlines(), ""] if notes.exists() else []),
        "## Targets",
        "",
        f"{met} of {len(verdicts)} are met.",
        "",
        "| setting | target | measured | met |",
        "|---|---|---|---|",
        *(f"| {setting.name} | {c.text} | {c.measured} | {'yes' if c.met else '**no**'} |" for setting, c in verdicts),
        "",
        "## Results",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *sections]).rstrip() + "\n", encoding="utf-8")


def _common_seeds(rows: Sequence[Mapping[str, Any]], setting: str, rules: Sequence[str]) -> set[int]:
    """Of runs that all of the rules have had, so that they are compared on the same requests."""
    ran = [{int(row["seed"]) for row in rows if (row["setting"], row["rule"]) == (setting, rule)} for rule in rules]
    return set.intersection(*ran)


def _about(setting: Setting, found: Found) -> str:
    seeds = max(len(metrics["slo_fraction"]) for metrics in found.values())
    known = (
        "constants of rules were chosen on this traffic, other seeds" if setting.known else "no rule was chosen on it"
    )
    routers = "" if setting.routers == 1 else f", {setting.routers} routers"
    return f"{seeds} seeds{routers}; {known}."


def _table(found: Found, rules: Sequence[str]) -> list[str]:
    lines = ["| rule | " + " | ".join(label for _, label, _ in _COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    for rule in rules:
        if rule in found:
            cells = []
            for metric, _, digits in _COLUMNS:
                mean, half = interval(found[rule][metric])
                cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
            name = f"**{rule}**" if rule == NOW else rule
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]
