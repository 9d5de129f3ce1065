"""`python -m bench.forecast`: every forecasting model side by side on machines that none of them has seen.

Trains on some machines of `--telemetry` and judges on the others, or on all of `--judge`; `--champion` judges the
shipped model without training it. All models predict at the same instants (60 samples of history, truth known). Point
models carry the quantiles of their residuals on the training machines of the same source; a source that was not
trained on gets those of all training machines. Horizons are judged where a source's period allows (a 5 s source: 5
and 10 s, 1 and 2 samples).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.forecast_cost import measure_cost
from bench.forecast_page import compact, page
from bench.results import code_version
from models.forecaster import Model
from models.grid import N_HORIZONS, N_TARGETS, Array
from models.lstm import ForecastNet, LstmConfig
from models.registry import SHIPPED, Registry
from models.series import Series, read_folder
from shadecast.errors import ShadecastError
from shadecast.types import QUANTILES
from train.backtest import backtest, mean_of
from train.dataset import data_hash, pieces, split_machines, split_recordings
from train.evaluate import Instants, horizon_indices, instants, judge, onset_truth, prior_skill, scaled_baselines
from train.job import WARM_LEARNING_RATE
from train.loop import TrainConfig, device_of, fit
from train.onsets import onsets
from train.plots import bands_png

OWN = SHIPPED.parent / "data"
DOCS = Path(__file__).resolve().parent.parent / "docs/benchmarks/forecast"


def boosted(train: Sequence[Series]) -> Callable[[Instants, int, int], Array]:
    """Quantile gradient boosting on the lags of one source, a benchmark only: slow to train and too large to ship."""
    from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415

    seen = instants(train)

    def table(lags: Array) -> tuple[Array, Array]:
        newest = lags[:, -1:]
        unit = np.abs(np.diff(lags, axis=1)).mean(axis=1, keepdims=True) + 1e-9
        return np.concatenate([np.arcsinh((lags - newest) / unit), newest, np.log(unit)], axis=1), unit[:, 0]

    def predict(held: Instants, target: int, horizon: int) -> Array:
        known = np.isfinite(seen.truth[:, target, horizon])
        inputs, unit = table(seen.lags[known, target])
        answer = (seen.truth[known, target, horizon] - seen.lags[known, target, -1]) / unit
        held_inputs, held_unit = table(held.lags[:, target])
        columns = []
        for tau in QUANTILES:
            fitted = HistGradientBoostingRegressor(
                loss="quantile", quantile=tau, max_iter=150, learning_rate=0.06, max_leaf_nodes=24, random_state=0
            ).fit(inputs, answer, sample_weight=unit / unit.mean())
            columns.append(held.lags[:, target, -1] + held_unit * fitted.predict(held_inputs))
        return np.sort(np.stack(columns, axis=1), axis=1).astype(np.float32)

    return predict


def train_model(train: Sequence[Series], config: TrainConfig, made_up: int, start: Model | None) -> Model:
    """An LSTM trained on the training machines and made-up series, from the weights of `start` or from nothing.

    The gate's prior comes from recordings left out.
    """
    fitted, check = split_recordings(train, 0.12, config.seed)
    data = pieces(fitted, made_up, config.piece, config.seed)
    config = config.for_pieces(len(data))
    torch.manual_seed(config.seed)
    net = ForecastNet(start.net.config if start else LstmConfig())
    if start is not None:
        net.load_state_dict(start.net.state_dict())
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"training on {len(data)} pieces", total=config.epochs)
        fit(net, data, config, None, lambda _: bar.advance(task), device=device_of("auto"))
    ridge, residuals = scaled_baselines(fitted)
    model = Model("bench", net.cpu().eval(), ridge, residuals, np.full((N_TARGETS, N_HORIZONS), np.nan, np.float32))
    return replace(model, prior_skill=prior_skill(judge(model, check)))


def models_of(
    arguments: argparse.Namespace, train: Sequence[Series], held: Sequence[Series]
) -> tuple[dict[str, Model], TrainConfig | None]:
    """The models to judge by name, and how `lstm` was trained, None where it is the shipped one.

    Training goes on from the shipped weights, unless these were trained on one of the machines to be judged.
    """
    registry = Registry(arguments.registry)
    given = {"retrained": version_of(arguments.weights, held)} if arguments.weights else {}
    if arguments.champion:
        return {"lstm": registry.load(registry.champion()), **given}, None
    start = None
    if arguments.start == "champion":
        start = registry.load(registry.champion())
        seen = set(registry.card(start.version).get("trained_on", [])) & {f"{s.source}/{s.machine}" for s in held}
        if seen:
            print(f"{start.version} was trained on {', '.join(sorted(seen))}: starting from nothing", file=sys.stderr)
            start = None
    config = TrainConfig(
        epochs=arguments.epochs,
        learning_rate=WARM_LEARNING_RATE if start else TrainConfig().learning_rate,
        seed=arguments.seed,
    )
    trained = train_model(train, config, arguments.made_up, start)
    return {"lstm": trained} | ({"shipped": start} if start else {}) | given, config


def version_of(path: Path, held: Sequence[Series]) -> Model:
    """The version in this folder, or the champion of the registry that it is; says so where it knows what is judged."""
    registry = Registry(str(path if (path / "champion.json").exists() else path.parent))
    version = registry.champion() if (path / "champion.json").exists() else path.name
    seen = set(registry.card(version).get("trained_on", [])) & {f"{s.source}/{s.machine}" for s in held}
    if seen:
        print(f"{version} was trained on {', '.join(sorted(seen))}, which are judged here", file=sys.stderr)
    return registry.load(version)


def onset_counts(held: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """By source: onsets in all, instants after 5 s of quiet, and the share of these before an onset by each horizon."""
    found: dict[str, dict[str, Any]] = {}
    for source in sorted({s.source for s in held}):
        mine = [s for s in held if s.source == source]
        calm, came = onset_truth(mine)
        share = {}
        for index, horizon_s in horizon_indices(mine[0].period_s):
            known = came[calm & np.isfinite(came[:, index]), index]
            share[f"{horizon_s:g}"] = round(float(known.mean()), 4) if len(known) else None
        onsets_in_all = sum(int(onsets(s.values[:, 0]).sum()) for s in mine)
        found[source] = {"onsets": onsets_in_all, "instants": int(calm.sum()), "share": share}
    return found


def draw(folder: Path, model: Model, held: Sequence[Series]) -> list[Path]:
    """One picture of forecast bands per source."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for source in sorted({s.source for s in held}):
        picture = bands_png(model, [s for s in held if s.source == source])
        if picture is not None:
            made.append(folder / f"forecast-{source}.png")
            made[-1].write_bytes(picture)
    return made


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything but printing: the JSON document."""
    started_s = time.time()
    series = [s for folder in arguments.telemetry for s in read_folder(folder)]
    if arguments.judge:
        train, held = series, [s for folder in arguments.judge for s in read_folder(folder)]
    else:
        split = split_machines(series, arguments.hold_out, arguments.seed)
        train, held = split.train, split.held
    models, config = models_of(arguments, train, held)
    trained_s = time.time() - started_s
    rows = backtest(train, held, models, boosted if arguments.boosting else None)
    if arguments.plots:
        draw(arguments.plots, models["lstm"], held)
    return {
        "schema": 1,
        "model_version": models["lstm"].version,
        "champion": arguments.champion,
        "train": asdict(config) if config else None,
        "command": "python -m bench.forecast " + " ".join(arguments.shown),
        "code": code_version(),
        "seed": arguments.seed,
        "data_sha256": data_hash(series),
        "trained_machines": sorted({f"{s.source}/{s.machine}" for s in train}),
        "judged_machines": sorted({f"{s.source}/{s.machine}" for s in held}),
        "sources_without_own_baselines": sorted({s.source for s in held} - {s.source for s in train}),
        "onsets": onset_counts(held),
        "train_s": round(trained_s, 1),
        "wall_s": round(time.time() - started_s, 1),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "rows": rows,
    }


def show(document: dict[str, Any], console: Console) -> None:
    """Tables: means by model, then the LSTM by source and target."""
    table = Table(title="mean over sources and targets, 5 and 10 s ahead")
    names = ("pinball_skill_last_value", "pinball_skill_ridge", "coverage_80")
    for column in ("model", *names):
        table.add_column(column)
    for name in dict.fromkeys(row["model"] for row in document["rows"]):
        table.add_row(name, *(f"{mean_of(document['rows'], name, metric):.3f}" for metric in names))
    console.print(table)
    for source in dict.fromkeys(row["source"] for row in document["rows"]):
        console.print(onset_table(document, source))
    detail = Table(title="skill over last value / ridge-60, coverage")
    for column in ("source", "target", "horizon", "lstm", "lstm_gated", "gate open"):
        detail.add_column(column)
    cells = {(r["source"], r["target"], r["horizon_s"], r["model"], r["metric"]): r["value"] for r in document["rows"]}

    def cell(key: tuple[str, str, float], model: str) -> str:
        values = [cells.get((*key, model, n)) for n in names]
        return " / ".join("-" if v is None else f"{v:.2f}" for v in values)

    for key in sorted({(r["source"], r["target"], r["horizon_s"]) for r in document["rows"]}):
        opened = cells.get((*key, "lstm_gated", "gate_open"))
        shown = "-" if opened is None else f"{opened:.0%}"
        detail.add_row(key[0], key[1], f"{key[2]:g} s", cell(key, "lstm"), cell(key, "lstm_gated"), shown)
    console.print(detail)


def onset_table(document: dict[str, Any], source: str) -> Table:
    """Onset recall and headroom error of every model on one source."""
    counts = document["onsets"][source]
    table = Table(
        title=f"{source}: recall of onsets after 5 s of quiet at precision .7 / error of the expected log headroom "
        f"({counts['onsets']} onsets, {counts['instants']} instants)"
    )
    cells: dict[str, dict[float, dict[str, float]]] = {}
    for row in document["rows"]:
        is_ours = (row["source"], row["target"]) == (source, "cpu")
        if is_ours and row["metric"] in ("onset_recall_p70", "headroom_error"):
            by_horizon = cells.setdefault(row["model"], {}).setdefault(row["horizon_s"], {})
            by_horizon[row["metric"]] = row["value"]
    horizons = sorted({h for by in cells.values() for h in by})
    table.add_column("model")
    for h in horizons:
        share = counts["share"].get(f"{h:g}")
        table.add_column(f"{h:g} s" + (f" ({share:.3f})" if share is not None else ""))
    for model, by in cells.items():
        pairs = [by.get(h, {}) for h in horizons]
        table.add_row(model, *(f"{_shown(p, 'onset_recall_p70')} / {_shown(p, 'headroom_error')}" for p in pairs))
    return table


def _shown(values: dict[str, float], name: str) -> str:
    value = values.get(name)
    return "-" if value is None else f"{value:.3f}"


def default_folders() -> list[Path]:
    """The project's own recordings, and the public telemetry where it is present."""
    root = Path(__file__).resolve().parent.parent
    public = Path(os.environ.get("SHADECAST_DATA", root / "../shared/data")) / "telemetry"
    if not public.is_dir():
        print(f"no public telemetry at {public} (SHADECAST_DATA): own recordings alone are judged", file=sys.stderr)
        return [OWN]
    return [OWN, public]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.forecast", description=__doc__)
    parser.add_argument("--telemetry", type=Path, nargs="+", help="folders of Parquet telemetry to train on")
    parser.add_argument("--judge", type=Path, nargs="+", help="judge on all of these instead of held-out machines")
    parser.add_argument("--champion", action="store_true", help="judge the shipped model, train nothing but baselines")
    parser.add_argument("--weights", type=Path, help="judge this version, too: a registry or a version in it")
    parser.add_argument("--registry", default=str(SHIPPED), help="where the champion lives")
    parser.add_argument("--start", choices=("champion", "nothing"), default="champion", help="weights to train on from")
    parser.add_argument("--json", type=Path, help=f"result file; without it {DOCS}.json, .md and plots are written")
    parser.add_argument("--markdown", type=Path, help="also a page with tables and plots")
    parser.add_argument("--plots", type=Path, help="folder for plots of forecast bands")
    parser.add_argument("--cost", action="store_true", help="measure what a node's forecaster costs instead, on Ray")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long --cost measures")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    parser.add_argument("--made-up", type=int, default=0, help="made-up series beside the recorded ones")
    parser.add_argument("--hold-out", type=float, default=0.3, help="fraction of machines to judge on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--boosting", action="store_true", help="also quantile gradient boosting at 5 and 10 s (slow)")
    arguments = parser.parse_args(argv)
    arguments.shown = sys.argv[1:] if argv is None else list(argv)
    arguments.telemetry = arguments.telemetry or default_folders()
    if arguments.json is None:
        arguments.json = DOCS.with_name("forecast-cost.json") if arguments.cost else DOCS.with_suffix(".json")
        arguments.markdown = None if arguments.cost else arguments.markdown or DOCS.with_suffix(".md")
    if arguments.markdown:
        arguments.plots = arguments.plots or arguments.markdown.parent
    try:
        document = measure_cost(arguments.seconds, arguments.registry) if arguments.cost else run(arguments)
    except ShadecastError as error:
        print(f"bench.forecast: {error}", file=sys.stderr)
        return 2
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(compact(document))
    if arguments.cost:
        print(json.dumps(document, indent=1))
        return 0
    if arguments.markdown:
        pictures = sorted(arguments.plots.glob("forecast-*.png"))
        arguments.markdown.write_text(page(document, [p.name for p in pictures]))
    show(document, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
