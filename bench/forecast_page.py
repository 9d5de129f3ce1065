"""The forecast benchmark as a page: tables and plots from one result document, nothing typed in by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from train.backtest import Row, mean_of

SKILLS = ("pinball_skill_last_value", "pinball_skill_ridge", "coverage_80")
TARGETS = {"pinball_skill_last_value": ">= .35", "pinball_skill_ridge": ">= .20", "coverage_80": ".78-.82"}
Key = tuple[str, str, float]


def compact(document: dict[str, Any]) -> str:
    """JSON with one row a line and five digits: a fifth of the size, and differences stay readable."""
    if "rows" not in document:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    rows = [{**r, "value": None if r["value"] is None else float(f"{r['value']:.5g}")} for r in document["rows"]]
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1, allow_nan=False)
    lines = ",\n".join("  " + json.dumps(r, allow_nan=False, separators=(",", ":")) for r in rows)
    return f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def page(document: dict[str, Any], pictures: Sequence[str]) -> str:
    """The whole page in Markdown."""
    rows = document["rows"]
    own = [r for r in rows if r["source"] == "own"]
    public = [r for r in rows if r["source"] != "own"]
    parts = [
        "# Forecasts on machines never trained on",
        f"Written by `{document['command'].strip()}` (`make bench-forecast`); all numbers are in `forecast.json`.",
        f"Trained in {document['train_s']:.0f} s, {document['wall_s']:.0f} s in all, on {document['machine']['cpus']} "
        f"shared cores; Python {document['machine']['python']}, torch {document['versions']['torch']}, "
        f"seed {document['seed']}.",
        "Judged: " + ", ".join(f"`{m}`" for m in document["judged_machines"]) + ". A source with a single machine is "
        "split by time.",
        "Pinball skill is 1 - loss / loss of the other model, both with .1/.5/.9 quantiles: point models carry the "
        "residual quantiles of the training machines of the same source. `lstm` is trained on the training machines, "
        "going on from the shipped version; `shipped` is that version as it is, trained on the project's own "
        "recordings and made-up series alone; `_gated` is what a node acts on: the model where it is winning there, "
        "the best simple forecast elsewhere.",
    ]
    for title, part in (("Public telemetry", public), ("Own recordings", own)):
        if part:
            parts += [f"## {title}: mean over sources and targets, 5 and 10 s", means(part)]
    parts += [
        "## By source, target and horizon",
        "Skill over last value / skill over ridge-60 / coverage of the .1-.9 interval.",
        details(rows),
        "## Onsets",
        "An onset: CPU of others rises above .4 and stays for two samples or more. Recall at a precision of .7 among "
        "the instants after 5 s of quiet, of an onset by then / mean absolute error of the expected log headroom of "
        "CPU.",
        onset_page(rows),
        "## The gate",
        gate_table(rows),
        "## Overload (cpu and memory beyond 90 %, network beyond the 90 % quantile of the training machines)",
        overload(rows),
        "## Where the LSTM does not beat ridge-60",
        losses(rows),
    ]
    if pictures:
        parts += ["## Forecast bands, 5 samples ahead", *(f"![{name}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    out = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(out + [f"| {' | '.join(line)} |" for line in lines])


def means(rows: Sequence[Row]) -> str:
    """Each model's mean skills and coverage."""
    header = ("model", *(f"{name} ({TARGETS[name]})" for name in SKILLS))
    names = dict.fromkeys(r["model"] for r in rows)
    return table(header, ([f"`{m}`", *(f"{mean_of(rows, m, name):.3f}" for name in SKILLS)] for m in names))


def cells(rows: Sequence[Row], metric: str) -> dict[Key, dict[str, float]]:
    """Values of one metric by (source, target, horizon) and model."""
    found: dict[Key, dict[str, float]] = {}
    for r in rows:
        if r["metric"] == metric and r["value"] is not None:
            found.setdefault((r["source"], r["target"], r["horizon_s"]), {})[r["model"]] = float(r["value"])
    return found


def details(rows: Sequence[Row]) -> str:
    """The LSTM's skills in every cell, 1, 5 and 10 s ahead."""
    by = [cells(rows, name) for name in SKILLS]
    shown = [m for m in dict.fromkeys(r["model"] for r in rows) if m.removesuffix("_gated") in ("lstm", "shipped")]
    shown += [m for m in ("gradient_boosting",) if any(r["model"] == m for r in rows)]

    def cell(key: Key, model: str) -> str:
        return " / ".join(f"{c[key][model]:.2f}" if model in c.get(key, {}) else "-" for c in by)

    keys = [k for k in sorted(by[0]) if k[2] in (1.0, 5.0, 10.0)]
    return table(
        ("source", "target", "ahead", *(f"`{m}`" for m in shown)),
        ([k[0], k[1], f"{k[2]:g} s", *(cell(k, m) for m in shown)] for k in keys),
    )


def gate_table(rows: Sequence[Row]) -> str:
    """How often the gate was open, what it gained, and the worst cell against the last value."""
    opened, skill = cells(rows, "gate_open"), cells(rows, "pinball_skill_last_value")
    lines = []
    for model in [m for m in dict.fromkeys(r["model"] for r in rows) if m.endswith("_gated")]:
        for source in sorted({k[0] for k in skill}):
            keys = [k for k in skill if k[0] == source and model in skill[k]]
            worst = min(keys, key=lambda k: skill[k][model])
            share = sum(opened[k][model] for k in keys) / len(keys)
            gain = sum(skill[k][model] for k in keys) / len(keys)
            where = f"{skill[worst][model]:+.3f} ({worst[1]}, {worst[2]:g} s)"
            lines.append([f"`{model}`", source, f"{share:.0%}", f"{gain:+.3f}", where])
    header = ("model", "source", "gate open", "mean skill over last value, all horizons", "worst cell")
    return table(header, lines) + "\n\nAllowed: no worse than -0.02."


def overload(rows: Sequence[Row]) -> str:
    """Precision / recall of the medians, mean over horizons, where there was any overload."""
    precision, recall = cells(rows, "overload_precision"), cells(rows, "overload_recall")
    shown = [m for m in ("last_value", "mean10", "ridge60", "lstm", "lstm_gated") if any(r["model"] == m for r in rows)]
    pairs = sorted({k[:2] for k in recall})

    def cell(pair: tuple[str, str], model: str) -> str:
        values = [[c[k][model] for k in c if k[:2] == pair and model in c[k]] for c in (precision, recall)]
        return " / ".join(f"{sum(v) / len(v):.2f}" if v else "-" for v in values)

    return table(("source", "target", *(f"`{m}`" for m in shown)), ([*p, *(cell(p, m) for m in shown)] for p in pairs))


def onset_page(rows: Sequence[Row]) -> str:
    """Recall and headroom error of every model by source; "-" where nothing came or the horizon is not judged."""
    recall, error = cells(rows, "onset_recall_p70"), cells(rows, "headroom_error")
    horizons = (1.0, 2.0, 3.0, 5.0, 10.0)

    def cell(source: str, model: str, ahead_s: float) -> str:
        key = (source, "cpu", ahead_s)
        values = (by.get(key, {}).get(model) for by in (recall, error))
        return " / ".join("-" if v is None else f"{v:.2f}" for v in values)

    pairs = dict.fromkeys((k[0], model) for k in sorted(error) if k[1] == "cpu" for model in error[k])
    header = ("source", "model", *(f"{h:g} s" for h in horizons))
    return table(header, ([s, f"`{m}`", *(cell(s, m, h) for h in horizons)] for s, m in pairs))


def losses(rows: Sequence[Row]) -> str:
    """Cells in which the model's skill over ridge is below 0."""
    by = cells(rows, "pinball_skill_ridge")
    found = [
        f"- `{m}`: {k[0]} {k[1]} {k[2]:g} s, {v[m]:+.3f}"
        for m in ("lstm", "shipped")
        for k, v in sorted(by.items())
        if m in v and v[m] < 0
    ]
    return "\n".join(found) or "In none of the cells above."
