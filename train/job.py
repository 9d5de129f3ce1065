"""`python -m train`: logged telemetry in, a new version of the forecaster in the registry out."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from models.forecaster import Model
from models.lstm import ForecastNet, LstmConfig
from models.registry import SHIPPED, Registry
from models.series import read_folder
from shadecast.errors import ShadecastError
from train.dataset import data_hash, pieces, split_machines
from train.evaluate import judge, prior_skill, scaled_baselines
from train.loop import TrainConfig, batches, optimiser_of, train_epoch

OWN_DATA = SHIPPED.parent / "data"
DEFAULTS = TrainConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ShadecastError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--telemetry", type=Path, default=OWN_DATA, help="folder of Parquet telemetry or a log")
    parser.add_argument("--registry", default=str(SHIPPED), help="folder or pyarrow filesystem URI")
    parser.add_argument("--version", default="", help="name of the new version; default: time and data hash")
    parser.add_argument("--made-up", type=int, default=1500, help="made-up series beside the recorded ones")
    parser.add_argument("--epochs", type=int, default=DEFAULTS.epochs)
    parser.add_argument("--hidden", type=int, default=LstmConfig().hidden)
    parser.add_argument("--hold-out", type=float, default=0.25, help="fraction of machines kept for the backtest")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed)
    parser.add_argument("--promote", action="store_true", help="make it the champion whatever the backtest says")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    config = TrainConfig(epochs=arguments.epochs, seed=arguments.seed)
    series = read_folder(arguments.telemetry)
    split = split_machines(series, arguments.hold_out, arguments.seed)
    started_s = time.time()
    rows = sum(len(s.values) for s in series)
    print(f"{len(series)} series, {rows} rows; held out: {', '.join(sorted({s.machine for s in split.held}))}")
    data = pieces(split.train, arguments.made_up, config.piece, config.seed)
    torch.manual_seed(config.seed)
    net = ForecastNet(LstmConfig(hidden=arguments.hidden))
    rng = np.random.default_rng(config.seed)
    optimiser, schedule = optimiser_of(net, config, -(-len(data) // config.batch))
    for epoch in range(config.epochs):
        loss = train_epoch(net, optimiser, schedule, batches(data, config.batch, rng), config)
        print(f"epoch {epoch + 1}/{config.epochs} loss {loss:.4f} {time.time() - started_s:.0f} s", flush=True)
    ridge, residuals = scaled_baselines(split.train)
    fingerprint = data_hash(series)
    version = arguments.version or time.strftime("%Y%m%d-%H%M%S-", time.gmtime(started_s)) + fingerprint[:6]
    nothing = np.full((3, 6), np.nan, np.float32)
    model = Model(version, net.eval(), ridge, residuals, nothing)
    skill = prior_skill(judge(model, split.held))
    model = replace(model, prior_skill=skill)
    card = {
        "created_wall_s": round(started_s, 3),
        "data_sha256": fingerprint,
        "rows": rows,
        "machines": len({(s.source, s.machine) for s in series}),
        "held_out": sorted({f"{s.source}/{s.machine}" for s in split.held}),
        "made_up": arguments.made_up,
        "train": asdict(config),
        "train_s": round(time.time() - started_s, 1),
        "code_version": importlib.metadata.version("shadecast"),
        "command": "python -m train " + " ".join(sys.argv[1:]),
        "prior_skill": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in skill],
    }
    registry = Registry(arguments.registry)
    registry.save(model, card)
    print(f"{version}: saved; skill over the best baseline by target: {np.nanmean(skill, axis=1).round(3)}")
    if arguments.promote:
        registry.promote(version)
        print(f"{version}: champion of {arguments.registry}")
    return 0
