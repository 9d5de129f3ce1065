"""One measured value each, from the row files of all benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from bench.forecast_page import SKILLS
from bench.results import Row, comparable, interval, is_older
from train.backtest import mean_of

OURS, DEFAULT, ORACLE, LIVE = "shadecast", "default", "oracle", "live_capacity"
HIGHER_IS_BETTER = frozenset({"pinball_skill_last_value", "pinball_skill_ridge"})
_SIMULATED = {
    "p2c_ray": DEFAULT,
    "round_robin": "round_robin",
    "consistent_hash": "consistent_hash",
    "prequal_tuned": "prequal",
    "live_capacity": LIVE,
    "shadecast_shipped": OURS,
    "clairvoyant": ORACLE,
}
_MICRO = {
    "ray_power_of_two": DEFAULT,
    "ray_default": DEFAULT,
    "ray_round_robin": "round_robin",
    "ray_consistent_hash": "consistent_hash",
    "shadecast": OURS,
}
_LLM = {
    "power of two (Serve)": DEFAULT,
    "round robin": "round_robin",
    "least requests": "least_requests",
    "session hash": "session_hash",
    "Ray prefix router": "ray_prefix",
    "SGLang cache_aware": "sglang",
    "AIBrix prefix-cache": "aibrix",
    "production-stack loadaware": "production_stack",
    "Dynamo KV": "dynamo",
    "llm-d 3:2:2": "llm_d",
    "llm-d predicted, ideal": "llm_d_predicted",
    "LMetric": "lmetric",
    "Shadecast without prefixes": "shadecast_no_prefix",
    "Shadecast": OURS,
}
_LIVE_METRICS = (
    *("requests", "p50_s", "p99_s", "p999_s", "slo_miss_fraction", "slo_misses", "errors", "error_fraction"),
    *("errors_timeout", "newcomer_first_answer_s", "newcomer_full_share_s", "newcomer_share"),
    *("session_stray_fraction", "driver_cpu_ms_per_request"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric of one arm in one scenario: its mean over seeds, and where it comes from."""

    scenario: str
    metric: str
    arm: str
    by_seed: tuple[float, ...]
    seeds: tuple[int, ...]
    code: str
    source: str
    command: str

    @property
    def key(self) -> str:
        """What it is found by."""
        return f"{self.scenario}/{self.metric}/{self.arm}"

    @property
    def value(self) -> float:
        """The mean."""
        return fmean(self.by_seed)

    @property
    def total(self) -> float:
        """Of counts, over all seeds."""
        return sum(self.by_seed)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the mean over seeds (Student); None of one seed."""
        mean, half = interval(self.by_seed)
        return (mean - half, mean + half) if len(self.by_seed) > 1 else None

    @property
    def older(self) -> bool:
        """Whether a decision has changed since what was measured."""
        return any(is_older(code) for code in self.code.split(", "))

    @property
    def unit(self) -> str:
        """By the metric's name."""
        ends = {"_s": "s", "_us": "us", "_ms": "ms", "_fraction": "fraction", "_ms_per_request": "ms", "cores": "cores"}
        return next((unit for end, unit in ends.items() if self.metric.endswith(end)), "")


class Summary:
    """All entries, by scenario, metric and arm."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {(e.scenario, e.metric, e.arm): e for e in entries}

    def get(self, scenario: str, metric: str, arm: str) -> Entry | None:
        """That entry, if it was measured."""
        return self.entries.get((scenario, metric, arm))

    def ratio(self, entry: Entry, against: str = DEFAULT) -> float | None:
        """To the other arm's, over the seeds that both have: the geometric mean; of counts and fractions, of sums."""
        other = self.get(entry.scenario, entry.metric, against)
        if other is None:
            return None
        mine, theirs = (dict(zip(e.seeds, e.by_seed, strict=True)) for e in (entry, other))
        both = sorted(mine.keys() & theirs.keys())
        if not both:
            return entry.value / other.value if other.value else None
        ours, others = [mine[seed] for seed in both], [theirs[seed] for seed in both]
        if entry.unit in ("", "fraction") or min(ours + others) <= 0.0:
            return sum(ours) / sum(others) if sum(others) else None
        return geometric_mean(a / b for a, b in zip(ours, others, strict=True))


def read_all(docs: Path) -> Summary:
    """Everything that is committed under `docs/benchmarks`; files that are not there are left out."""
    found: list[Entry] = []
    readers: Mapping[str, Callable[[Path], Iterable[Entry]]] = {
        "live.json": _live,
        "micro.json": _micro,
        "scale.json": _scale,
        "forecast.json": _forecast,
        "forecast-shipped.json": _forecast,
        "llm_simulation.json": _llm,
    }
    for name, reader in readers.items():
        if (docs / name).exists():
            found += reader(docs / name)
    for path in sorted((docs / "simulation").glob("*.json")):
        found += _simulation(path)
    return Summary(found)


def _live(path: Path) -> Iterator[Entry]:
    rows = comparable(Row(**row) for row in json.loads(path.read_text(encoding="utf-8")))
    for (scenario, arm), runs in _runs(rows).items():
        for run in runs.values():
            values = run.values
            values["slo_misses"] = float(round(values["slo_miss_fraction"] * values["requests"]))
            if scenario.startswith("streams"):
                values.setdefault("errors_timeout", 0.0)
            if "session_stay_fraction_well" in values:
                values["session_stray_fraction"] = 1.0 - values["session_stay_fraction_well"]
        command = f"python -m bench.live --scenario {scenario} --arms {arm} {_seeds(runs)}"
        yield from _entries(scenario, arm, runs, _LIVE_METRICS, source=f"docs/benchmarks/{path.name}", command=command)


def _simulation(path: Path) -> Iterator[Entry]:
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    for (scenario, arm), runs in _runs(rows).items():
        if arm in _SIMULATED:
            command = f"python -m bench.simulate --scenario {scenario} --arms {arm} {_seeds(runs)}"
            metrics = ("requests", "p50_s", "p99_s", "p999_s", "slo_miss_fraction")
            source = f"docs/benchmarks/simulation/{path.name}"
            yield from _entries(f"simulated {scenario}", _SIMULATED[arm], runs, metrics, source=source, command=command)


@dataclass(slots=True)
class _Run:
    values: dict[str, float]
    code: str


def _runs(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, _Run]]:
    """(scenario, arm) -> seed -> its metrics."""
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    for row in rows:
        run = found.setdefault((row.scenario, row.arm), {}).setdefault(row.seed, _Run({}, row.code or "unknown"))
        run.values[row.metric] = row.value
    return found


def _seeds(runs: Mapping[int, object]) -> str:
    first = min(runs)
    return (f"--first-seed {first} " if first else "") + f"--seeds {max(runs) - first + 1}"


def _entries(
    scenario: str, arm: str, runs: Mapping[int, _Run], metrics: Sequence[str], *, source: str, command: str
) -> Iterator[Entry]:
    for metric in metrics:
        seeds = tuple(seed for seed in sorted(runs) if metric in runs[seed].values)
        if seeds:
            values = tuple(runs[seed].values[metric] for seed in seeds)
            code = ", ".join(sorted({runs[seed].code for seed in seeds}))
            yield Entry(scenario, metric, arm, values, seeds, code, source, command)


def _several(found: Mapping[tuple[str, str, str], list[dict[str, Any]]], source: str, command: str) -> Iterator[Entry]:
    """Entries of what was run once or more often, without seeds: runs are counted."""
    for (scenario, metric, arm), rows in found.items():
        values = tuple(float(row["value"]) for row in rows)
        code = ", ".join(sorted({row["code"] for row in rows}))
        yield Entry(scenario, metric, arm, values, tuple(range(len(rows))), code, source, command)


def _micro(path: Path) -> Iterator[Entry]:
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        name = f"{row['name']}, {row['replicas']} replicas" if row["replicas"] else row["name"]
        if row["arm"] in _MICRO and row["metric"].startswith(("median", "ratio")):
            found.setdefault((name, row["metric"], _MICRO[row["arm"]]), []).append(row)
    yield from _several(found, f"docs/benchmarks/{path.name}", "python -m bench.micro --no-throughput")


def _scale(path: Path) -> Iterator[Entry]:
    names = {"cpu": "coordinator_cores", "tick_p99_s": "tick_p99_s", "kept_up": "reports_in_time", "rss_mb": "rss_mb"}
    for row in (rows := json.loads(path.read_text(encoding="utf-8"))):
        size = f"{row['replicas']}x{row['routers']}"
        same = [each for each in rows if (each["replicas"], each["routers"]) == (row["replicas"], row["routers"])]
        if row is same[0]:
            found = {
                (f"scale {size}", metric, OURS): [{"value": each[name], "code": each["code"]} for each in same]
                for name, metric in names.items()
            }
            yield from _several(found, f"docs/benchmarks/{path.name}", f"python -m bench.scale --sizes {size}")


def _forecast(path: Path) -> Iterator[Entry]:
    document = json.loads(path.read_text(encoding="utf-8"))
    public = [row for row in document["rows"] if row["source"] != "own"]
    shipped = {"lstm": "shipped", "lstm_gated": "shipped_gated"} if document["champion"] else {}
    command = "python -m bench.forecast" + (" --champion --json again.json" if document["champion"] else "")
    for model in dict.fromkeys(row["model"] for row in public):
        for metric in SKILLS:
            values = (float(mean_of(public, model, metric)),)
            source = f"docs/benchmarks/{path.name}"
            arm = shipped.get(model, model)
            yield Entry("forecast", metric, arm, values, (document["seed"],), document["code"], source, command)


def _llm(path: Path) -> Iterator[Entry]:
    document = json.loads(path.read_text(encoding="utf-8"))
    code = document.get("code", "unknown")
    found: dict[tuple[str, str], dict[int, _Run]] = {}
    for row in document["rows"]:
        if row["rule"] in _LLM:
            values = {"slo_miss_fraction": 1.0 - row["slo_fraction"], "first_token_p99_s": row["ttft_p99_s"]}
            values["first_token_p50_s"] = row["ttft_p50_s"]
            found.setdefault((row["setting"], row["rule"]), {})[row["seed"]] = _Run(values, code)
    for (setting, rule), runs in found.items():
        command = f'python -m bench.llm --setting "{setting}" --rule "{rule}" {_seeds(runs)}'
        metrics = ("slo_miss_fraction", "first_token_p50_s", "first_token_p99_s")
        source = f"docs/benchmarks/{path.name}"
        yield from _entries(f"llm {setting}", _LLM[rule], runs, metrics, source=source, command=command)
