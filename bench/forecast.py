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

from models.forecaster import Model
from models.grid import N_HORIZONS, N_TARGETS, Array
from models.lstm import ForecastNet, LstmConfig
from models.registry import SHIPPED, Registry
from models.series import Series, read_folder
from shadecast.errors import ShadecastError
from shadecast.types import QUANTILES
from train.backtest import backtest, mean_of
from train.dataset import data_hash, pieces, split_machines, split_recordings
from train.evaluate import Instants, instants, judge, prior_skill, scaled_baselines
from train.loop import TrainConfig, fit

OWN = SHIPPED.parent / "data"


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


def train_model(train: Sequence[Series], config: TrainConfig, made_up: int) -> Model:
    """A fresh LSTM on the training machines and made-up series; the gate's prior comes from recordings left out."""
    fitted, check = split_recordings(train, 0.12, config.seed)
    data = pieces(fitted, made_up, config.piece, config.seed)
    config = config.for_pieces(len(data))
    torch.manual_seed(config.seed)
    net = ForecastNet(LstmConfig())
    with Progress() as bar:
        task = bar.add_task(f"training on {len(data)} pieces", total=config.epochs)
        fit(net, data, config, None, lambda _: bar.advance(task))
    ridge, residuals = scaled_baselines(fitted)
    model = Model("bench", net.eval(), ridge, residuals, np.full((N_TARGETS, N_HORIZONS), np.nan, np.float32))
    return replace(model, prior_skill=prior_skill(judge(model, check)))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything but printing: the JSON document."""
    started_s = time.time()
    series = [s for folder in arguments.telemetry for s in read_folder(folder)]
    if arguments.judge:
        train, held = series, [s for folder in arguments.judge for s in read_folder(folder)]
    else:
        split = split_machines(series, arguments.hold_out, arguments.seed)
        train, held = split.train, split.held
    config = TrainConfig(epochs=arguments.epochs, seed=arguments.seed)
    shipped = Registry(arguments.registry)
    model = shipped.load(shipped.champion()) if arguments.champion else train_model(train, config, arguments.made_up)
    trained_s = time.time() - started_s
    rows = backtest(train, held, {"lstm": model}, boosted if arguments.boosting else None)
    return {
        "schema": 1,
        "model_version": model.version,
        "champion": arguments.champion,
        "train": asdict(config) if not arguments.champion else None,
        "seed": arguments.seed,
        "data_sha256": data_hash(series),
        "trained_machines": sorted({f"{s.source}/{s.machine}" for s in train}),
        "judged_machines": sorted({f"{s.source}/{s.machine}" for s in held}),
        "sources_without_own_baselines": sorted({s.source for s in held} - {s.source for s in train}),
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


def default_folders() -> list[Path]:
    """The project's own recordings, and the public telemetry where it is present."""
    root = Path(__file__).resolve().parent.parent
    public = Path(os.environ.get("SHADECAST_DATA", root / "../shared/data")) / "telemetry"
    return [OWN, *([public] if public.is_dir() else [])]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.forecast", description=__doc__)
    parser.add_argument("--telemetry", type=Path, nargs="+", help="folders of Parquet telemetry to train on")
    parser.add_argument("--judge", type=Path, nargs="+", help="judge on all of these instead of held-out machines")
    parser.add_argument("--champion", action="store_true", help="judge the shipped model, train nothing but baselines")
    parser.add_argument("--registry", default=str(SHIPPED), help="where the champion lives")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--plots", type=Path, help="folder for plots of forecast bands")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    parser.add_argument("--made-up", type=int, default=200, help="made-up series beside the recorded ones")
    parser.add_argument("--hold-out", type=float, default=0.3, help="fraction of machines to judge on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--boosting", action="store_true", help="also quantile gradient boosting at 5 and 10 s (slow)")
    arguments = parser.parse_args(argv)
    arguments.telemetry = arguments.telemetry or default_folders()
    try:
        document = run(arguments)
    except ShadecastError as error:
        print(f"bench.forecast: {error}", file=sys.stderr)
        return 2
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    show(document, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
