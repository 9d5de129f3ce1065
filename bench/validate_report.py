"""`python -m bench.validate_report FOLDER|--simulated`: does `shadecast report` predict what switching over brings?

`--simulated` plays scenarios of `bench.simulate` under Serve's rule with the product looking on, and again under the
product's own: minutes, no root. FOLDER is of live runs: it holds the series of both arms on the same arrivals, by
scenario and seed, as this writes them (root; some hours):

    python -m bench.live --scenario hog-periodic,slow-node,newcomer-failing,calm --arms shadecast_observe,shadecast \
        --seeds 7 --series FOLDER

Predicted is what the report says of the observing runs, realised the difference between the two arms, both with
intervals over half minutes of all seeds. Latencies of the arms count from when a request was due, the report's from
acceptance by a replica; what is the same in both arms, the client's own time say, makes realised fractions smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.simulate.arms.observing import Observing
from bench.simulate.arms.product import Product
from bench.simulate.run import play
from bench.simulate.scenario import find, make_world
from shadecast.blocks import BLOCK_S, draws, middle, too_little
from shadecast.observing import Bounds, estimate

OBSERVING, OURS = "shadecast_observe", "shadecast"
_SIMULATED = "short-antagonist,tokens-antagonist,heterogeneous-cold,homogeneous"


@dataclass(frozen=True, slots=True)
class Change:
    """A fraction with its interval."""

    value: float
    bounds: Bounds

    def text(self) -> str:
        """In per cent."""
        if self.bounds is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} [{100 * self.bounds[0]:.1f}, {100 * self.bounds[1]:.1f}]"

    def overlaps(self, other: Change) -> bool:
        """Whether the two intervals have something in common; False where there is none."""
        if self.bounds is None or other.bounds is None:
            return False
        return self.bounds[0] <= other.bounds[1] and other.bounds[0] <= self.bounds[1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One scenario: what the report predicts, and what came."""

    scenario: str
    seeds: int
    too_little: str
    predicted_saved: Change
    realised_saved: Change
    predicted_avoided: Change
    realised_avoided: Change
    trust: float

    @property
    def holds(self) -> bool:
        """Whether both predictions agree with what came, within their intervals."""
        saved = self.predicted_saved.overlaps(self.realised_saved)
        return saved and self.predicted_avoided.overlaps(self.realised_avoided)


def judge(scenario: str, runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Verdict:
    """From (observing, ours) of each seed, as `bench.live` keeps them."""
    slo_s = float(runs[0][0]["slo_s"])
    blocks = [block for observing, _ in runs for block in observing["observed"]]
    told = estimate(blocks, slo_s, np.random.default_rng(0))
    sides = [np.concatenate([_by_block(pair[k], slo_s) for pair in runs]) for k in (0, 1)]
    used = (sides[0][:, 0] > 0) & (sides[1][:, 0] > 0)
    before, after = sides[0][used], sides[1][used]
    why_not = told.too_little or too_little(len(before), float(before[:, 0].sum()))
    saved, avoided = _changes(np.ones((1, len(before))), before, after)
    bounds: tuple[Bounds, Bounds] = (None, None)
    if not why_not:
        drawn = _changes(draws(len(before), np.random.default_rng(0)), before, after)
        bounds = middle(drawn[0]), middle(drawn[1])
    return Verdict(
        scenario,
        len(runs),
        why_not,
        Change(told.saved_fraction, told.saved_bounds),
        Change(float(saved[0]), bounds[0]),
        Change(told.avoided_fraction, told.avoided_bounds),
        Change(float(avoided[0]), bounds[1]),
        told.trust,
    )


def _by_block(run: Mapping[str, Any], slo_s: float) -> NDArray[Any]:
    """[half minute, (requests, answered well, their seconds, late or failed)]."""
    records = [r for r in run["records"] if r[0] >= 0.0]
    sums = np.zeros((int(run["length_s"] // BLOCK_S) + 1, 4))
    for at_s, latency_s, _, error in records:
        row = sums[min(int(at_s // BLOCK_S), len(sums) - 1)]
        row += (1.0, 0.0, 0.0, 1.0) if error else (1.0, 1.0, latency_s, float(latency_s > slo_s))
    return sums


def _changes(drawn: NDArray[Any], before: NDArray[Any], after: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Part of the mean latency that was saved, and of all requests that miss no more, for each draw."""
    a, b = drawn @ before, drawn @ after
    with np.errstate(divide="ignore", invalid="ignore"):
        saved = 1.0 - (b[:, 2] / b[:, 1]) / (a[:, 2] / a[:, 1])
        return saved, a[:, 3] / a[:, 0] - b[:, 3] / b[:, 0]


def read_runs(folder: Path) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Seeds of each scenario that have both arms. Raises ValueError where there is none."""
    found: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for path in sorted(folder.glob(f"*-{OBSERVING}-*.json")):
        scenario, _, seed = path.stem.rpartition(f"-{OBSERVING}-")
        other = folder / f"{scenario}-{OURS}-{seed}.json"
        if other.exists():
            pair = (json.loads(path.read_text(encoding="utf-8")), json.loads(other.read_text(encoding="utf-8")))
            if pair[0].get("observed"):
                found.setdefault(scenario, []).append(pair)
    if not found:
        raise ValueError(f"{folder}: no scenario with both arms, {OBSERVING} and {OURS}; see --help")
    return found


def simulated(name: str, seeds: int, on_progress: Callable[[str], None] = lambda text: None) -> Verdict:
    """The same from `bench.simulate`. Raises ValueError for an unknown scenario."""
    scenario = find(name, exact=True)[0]
    slo_s = 2.0 * scenario.work.mean_s + scenario.work.slo_s(0.0)  # one for all requests, as the report has it
    runs = []
    for seed in range(seeds):
        pair = []
        for arm in (Observing(None), Product(None)):
            on_progress(f"{name}, seed {seed}, {type(arm).__name__.lower()}")
            played = play(make_world(scenario, seed), arm)
            requests = zip(played.arrived_s - scenario.warmup_s, played.latency_s, strict=True)
            records = [[float(at_s), float(latency_s), "", ""] for at_s, latency_s in requests]
            observed = arm.observations.plain(arm.sim.now_s) if isinstance(arm, Observing) else []
            length_s = scenario.horizon_s - scenario.warmup_s
            pair.append({"slo_s": slo_s, "length_s": length_s, "records": records, "observed": observed})
        runs.append((pair[0], pair[1]))
    return judge(name, runs)


def main(
    folder: Annotated[Path | None, typer.Argument(help="series of bench.live")] = None,
    *,
    simulate: Annotated[bool, typer.Option("--simulated", help="by bench.simulate")] = False,
    scenario: Annotated[str, typer.Option(help="of the simulated ones, with commas")] = _SIMULATED,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="of the simulated ones")] = 3,
) -> None:
    """Compare what `shadecast report` predicted with what came."""
    console = Console(width=160)
    try:
        if simulate:
            names = [name.strip() for name in scenario.split(",")]
            verdicts = [simulated(name, seeds, Console(stderr=True).print) for name in names]
        else:
            verdicts = [judge(name, runs) for name, runs in read_runs(folder or Path()).items()]
    except ValueError as error:
        console.print(f"bench.validate_report: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    table = Table(title="Per cent, with 95 % intervals", title_justify="left")
    for name in ("scenario", "seeds", "latency saved: predicted", "realised", "misses avoided: predicted", "realised"):
        table.add_column(name)
    table.add_column("trust")
    table.add_column("holds")
    for v in verdicts:
        changes = (v.predicted_saved, v.realised_saved, v.predicted_avoided, v.realised_avoided)
        holds = v.too_little or ("yes" if v.holds else "NO")
        table.add_row(v.scenario, str(v.seeds), *(each.text() for each in changes), f"{v.trust:.2f}", holds)
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
