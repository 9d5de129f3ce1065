"""The page and the machine-readable summary, as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.summary.entries import DEFAULT, ORACLE, OURS, Entry, Summary
from bench.summary.questions import ARMS, QUESTIONS, Line, Question, better, full_label, losses, sentences, shown

PICTURES = {
    "summary-latency.svg": "Latencies, as multiples of Serve's default",
    "summary-misses.svg": "Requests that fail, are wrong or too late, in percent",
}
_HEAD = """\
Each table answers one question, with Shadecast beside what else you can use with Ray Serve. `python -m bench.summary`
writes this page and [summary.json](summary.json) from the committed rows; no number is typed by hand.

Less is better, but for skills. **Bold**: nothing in the row is better by more than a tenth and in every seed that both
ran. The oracle does not compete: it is told of a disturbance as it comes. *Live capacity alone* is Shadecast without
its forecast. ¹ one seed or run. ° of our code before a decision that has changed it, not run again since. An empty cell
was not run. Live rows: four isolated hosts of a quarter of a core each on one Linux machine with two cores, real Ray
clusters, real faults, the same requests for every column ([how it is measured](live.md)).
"""


def page(summary: Summary) -> str:
    """The page in Markdown."""
    parts = ["# Benchmarks: Shadecast beside the alternatives", _HEAD.strip()]
    parts += [f"![{caption}]({name})" for name, caption in PICTURES.items()]
    asked = [question for question in QUESTIONS if _measured(question, summary)]
    for question in asked:
        parts += list(_question(question, summary))
    parts += [
        "# Details",
        _wrapped("Mean, lowest and highest seed, the 95 % interval of the mean (Student), seeds, code."),
    ]
    for question in asked:
        parts += [f"<details><summary>{question.title}</summary>", _details(question, summary), "</details>"]
    return "\n\n".join(parts) + "\n"


def document(summary: Summary) -> str:
    """The summary as JSON, one value a line."""
    asked = {(line.scenario, line.metric): question.name for question in QUESTIONS for line in question.lines}
    rows = [_row(entry, summary, asked) for entry in summary.entries.values()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{"schema": 1, "default": "{DEFAULT}", "rows": [\n{lines}\n]}}\n'


def _row(entry: Entry, summary: Summary, asked: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    ratio = summary.ratio(entry)
    return {
        "key": entry.key,
        "question": asked.get((entry.scenario, entry.metric)),
        "scenario": entry.scenario,
        "metric": entry.metric,
        "arm": entry.arm,
        "unit": entry.unit,
        "value": _short(entry.value),
        "interval": None if entry.interval is None else [_short(end) for end in entry.interval],
        "seeds": list(entry.seeds),
        "by_seed": [_short(value) for value in entry.by_seed],
        "ratio_to_default": None if ratio is None else _short(ratio),
        "code": entry.code,
        "code_is_of_now": not entry.older,
        "source": entry.source,
        "command": entry.command,
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _measured(question: Question, summary: Summary) -> list[Line]:
    """Its lines for which there is anything of ours."""
    names = question.columns or ARMS
    return [line for line in question.lines if any(summary.get(line.scenario, line.metric, arm) for arm in names)]


def _question(question: Question, summary: Summary) -> Iterator[str]:
    lines = _measured(question, summary)
    names = question.columns or ARMS
    arms = [arm for arm in names if any(summary.get(line.scenario, line.metric, arm) for line in lines)]
    yield f"## {question.title}"
    rows = [f"| | {' | '.join(names[arm] for arm in arms)} |", "|---|" + "---:|" * len(arms)]
    found = [e for line in lines for arm in arms if (e := summary.get(line.scenario, line.metric, arm)) is not None]
    marks = _Marks(older=not all(e.older for e in found), single=not all(len(e.seeds) == 1 for e in found))
    rows += [f"| {line.label} | {' | '.join(_cells(line, arms, summary, marks))} |" for line in lines]
    yield "\n".join(rows)
    told = [*sentences(question, summary), question.note]
    told += [] if marks.single else ["All of this table is of one run."]
    told += [] if marks.older else ["All of it is of older code."]
    yield _wrapped(" ".join(part for part in told if part))
    lost = losses(question, summary)
    if len(arms) > 1 and OURS in arms:
        yield _wrapped(f"Where Shadecast loses: {'; '.join(lost) if lost else 'in no row by more than a tenth'}.")
    yield _wrapped(f"More: {question.details}. Again:")
    yield "\n".join(["```", *_commands(found), "```"])


@dataclass(frozen=True, slots=True)
class _Marks:
    """Which cells are marked: what is true of a whole table is said once."""

    older: bool
    single: bool


def _cells(line: Line, arms: Sequence[str], summary: Summary, marks: _Marks) -> Iterator[str]:
    found = {arm: summary.get(line.scenario, line.metric, arm) for arm in arms}
    rivals = [entry for arm, entry in found.items() if entry is not None and arm != ORACLE]
    judged = len(rivals) > 1 and line.metric != "coverage_80"
    for arm in arms:
        entry = found[arm]
        if entry is None:
            yield ""
            continue
        text = shown(entry)
        if judged and arm != ORACLE and not any(better(other, entry) for other in rivals):
            text = f"**{text}**"
        yield text + "°" * (marks.older and entry.older) + "¹" * (marks.single and len(entry.seeds) == 1)


def _commands(found: Sequence[Entry]) -> Iterator[str]:
    """One command for all arms that were run with the same seeds."""
    together: dict[str, dict[str, None]] = {}
    for entry in found:
        before, option, rest = entry.command.partition(" --arms ")
        arm, _, after = rest.partition(" ")
        together.setdefault(f"{before}{option}{{}} {after}" if option else entry.command, {})[arm] = None
    for command, names in together.items():
        yield command.replace("{}", ",".join(names))


def _details(question: Question, summary: Summary) -> str:
    names = question.columns or ARMS
    rows = ["| | arm | mean | lowest to highest | 95 % | seeds | code |", "|---|---|---:|---:|---:|---|---|"]
    for line in _measured(question, summary):
        for arm, name in names.items():
            entry = summary.get(line.scenario, line.metric, arm)
            if entry is None:
                continue
            low, high = (shown(entry, end(entry.by_seed)) for end in (min, max))
            spread = f"{low} to {high}" if len(entry.seeds) > 1 else ""
            inside = " to ".join(shown(entry, max(end, 0.0)) for end in entry.interval or ())
            seeds = ", ".join(map(str, entry.seeds))
            cells = (
                full_label(question, line),
                name.strip("*"),
                shown(entry),
                spread,
                inside,
                seeds,
            )
            rows.append(f"| {' | '.join(cells)} | {entry.code} |")
    return "\n".join(rows)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
