"""`python -m train`: logged telemetry in, a new version of the forecaster in the registry out.

Reads telemetry, holds machines out, trains (on Ray, or with `--local` in this process), judges the challenger and the
champion on the held-out machines, saves a version with its card and backtest plot, and promotes it where it wins.
Stopped and started again with the same arguments it goes on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.features import N_EXTENDED_FEATURES, N_FEATURES
from models.forecaster import Model
from models.grid import N_HORIZONS, N_TARGETS
from models.lstm import ForecastNet, LstmConfig
from models.registry import SHIPPED, Registry, RegistryError
from models.series import Series, read_folder
from shadecast.errors import ShadecastError
from train.backtest import Row, backtest, mean_of
from train.dataset import Split, data_hash, pieces, split_machines, split_recordings
from train.evaluate import Judged, alarm_precision, judge, prior_skill, scaled_baselines
from train.loop import Progress, TrainConfig, device_of, fit
from train.plots import bands_png
from train.snapshot import snapshot
from train.timing import show, time_rows

OWN_DATA = SHIPPED.parent / "data"
DEFAULTS = TrainConfig()
WARM_LEARNING_RATE = 3e-3
"""Going on from a champion takes smaller steps than starting from nothing."""
SKILL_MARGIN = 0.005
"""A challenger has to be better by this much: two trainings of the same thing differ by about as much."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a challenger may replace the champion, and why."""

    promote: bool
    reason: str


def verdict(rows: Sequence[Row], champion: str) -> Verdict:
    """Compare on held-out machines, all horizons: it must beat ridge-60 and, where there is one, the champion."""
    everywhere = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0)
    skill = mean_of(rows, "challenger", "pinball_skill_ridge", everywhere)
    if math.isnan(skill):
        return Verdict(False, "no held-out machine could be judged")
    if skill <= 0:
        return Verdict(False, f"does not beat ridge-60 on held-out machines (mean skill {skill:+.3f})")
    if not champion:
        return Verdict(True, f"beats ridge-60 (mean skill {skill:+.3f}); there was no champion")
    other = mean_of(rows, "champion", "pinball_skill_ridge", everywhere)
    if skill < other + SKILL_MARGIN:
        return Verdict(False, f"mean skill over ridge-60 {skill:+.3f} against the champion's {other:+.3f} ({champion})")
    return Verdict(True, f"mean skill over ridge-60 {skill:+.3f}, the champion {champion} had {other:+.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.time_rows:
            show(time_rows(arguments.time_rows, arguments.device, extended=arguments.channels == "extended"))
            return 0
        run(arguments)
    except ShadecastError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `python -m train`."""
    options = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    options.add_argument("--telemetry", type=Path, default=OWN_DATA, help="folder of Parquet telemetry or a log")
    options.add_argument("--registry", default=str(SHIPPED), help="folder or pyarrow filesystem URI")
    options.add_argument("--version", default="", help="name of the new version; default: time and data hash")
    options.add_argument("--made-up", type=int, default=1500, help="made-up series beside the recorded ones")
    options.add_argument("--epochs", type=int, default=DEFAULTS.epochs, help="at most; --steps may allow fewer")
    options.add_argument("--steps", type=int, default=DEFAULTS.steps, help="upper bound on optimiser steps")
    options.add_argument("--hidden", type=int, default=LstmConfig().hidden)
    options.add_argument("--start", choices=("champion", "nothing"), default="champion", help="weights to go on from")
    options.add_argument("--hold-out", type=float, default=0.25, help="fraction of machines kept for the backtest")
    options.add_argument("--seed", type=int, default=DEFAULTS.seed)
    options.add_argument("--workers", type=int, default=1, help="Ray Train workers")
    options.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "local"), help="Ray cluster; default: own")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: one GPU per worker")
    options.add_argument("--channels", choices=("standard", "extended"), default="standard", help="what the net sees")
    options.add_argument(
        "--time-rows", type=int, default=0, metavar="N", help="time N rows on each device here instead"
    )
    options.add_argument("--local", action="store_true", help="same loop in this process, without Ray")
    options.add_argument("--storage", type=Path, default=Path(".shadecast/train"), help="checkpoints of running jobs")
    options.add_argument("--promote", choices=("auto", "always", "never"), default="auto")
    return options


def run(arguments: argparse.Namespace) -> str:
    """Do it all; returns the new version. Raises ShadecastError with one line on what is wrong."""
    with snapshot(arguments.telemetry.absolute(), arguments.storage.absolute()) as telemetry:
        return _run(arguments, telemetry)


@dataclass(frozen=True, slots=True)
class Made:
    """A trained version that is not judged yet, and what its card says of the training."""

    model: Model
    card: Mapping[str, Any]


def make(
    arguments: argparse.Namespace, telemetry: Path, series: Sequence[Series], split: Split, champion: Model | None
) -> Made:
    """Train on `split.train` of `series`, which are those of the folder `telemetry`."""
    extended = arguments.channels == "extended"
    shape = LstmConfig(features=N_EXTENDED_FEATURES if extended else N_FEATURES, hidden=arguments.hidden)
    start = champion if champion and arguments.start == "champion" and champion.net.config == shape else None
    rate = WARM_LEARNING_RATE if start else DEFAULTS.learning_rate
    config = TrainConfig(
        epochs=arguments.epochs, steps=arguments.steps, learning_rate=rate, seed=arguments.seed, extended=extended
    )
    started_s = time.time()
    rows = sum(len(s.values) for s in series)
    held_names = sorted({f"{s.source}/{s.machine}" for s in split.held})
    print(f"{len(series)} series, {rows} rows; held out: {', '.join(held_names)}", flush=True)
    print(f"starting from {start.version if start else 'nothing'}", flush=True)
    fingerprint = data_hash(series)
    net = _train(arguments, telemetry, config, shape, split, fingerprint, start)
    fit_part, _ = split_recordings(split.train, 0.0, config.seed)
    ridge, residuals = scaled_baselines(fit_part)
    version = arguments.version or time.strftime("%Y%m%d-%H%M%S-", time.gmtime(started_s)) + fingerprint[:6]
    unknown = np.full((N_TARGETS, N_HORIZONS), np.nan, np.float32)
    card = {
        "created_wall_s": round(started_s, 3),
        "data_sha256": fingerprint,
        "rows": rows,
        "machines": len({(s.source, s.machine) for s in series}),
        "trained_on": sorted({f"{s.source}/{s.machine}" for s in split.train}),
        "held_out": held_names,
        "started_from": start.version if start else None,
        "made_up": arguments.made_up,
        "train": asdict(config),
        "seconds": {"train": round(time.time() - started_s, 1)},
        "code_version": importlib.metadata.version("shadecast"),
    }
    return Made(Model(version, net, ridge, residuals, unknown), card)


def _run(arguments: argparse.Namespace, telemetry: Path) -> str:
    registry = Registry(arguments.registry)
    champion = champion_of(registry)
    started_s = time.time()
    series = read_folder(telemetry)
    read_s = time.time() - started_s
    split = split_machines(series, arguments.hold_out, arguments.seed)
    made = make(arguments, telemetry, series, split, champion)
    judging_s = time.time()
    challenger, _ = with_record(made.model, split)
    version = challenger.version
    candidates = {"challenger": challenger} | ({"champion": champion} if champion else {})
    table = backtest(split.train, split.held, candidates)
    decision = verdict(table, champion.version if champion else "")
    seconds = {"read": read_s, **made.card["seconds"], "judge": time.time() - judging_s}
    card = {
        **made.card,
        "created_wall_s": round(started_s, 3),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "command": "python -m train " + " ".join(sys.argv[1:]),
        **record_of(challenger),
        "judged_against": champion.version if champion else None,
        "verdict": decision.reason,
        "backtest": [{**r, "value": None if r["value"] is None else float(f"{r['value']:.5g}")} for r in table],
    }
    registry.save(challenger, card, bands_png(challenger, split.held))
    for model in candidates:
        last, over = (mean_of(table, model, f"pinball_skill_{n}") for n in ("last_value", "ridge"))
        print(f"{model}: skill on held-out machines {last:.3f} over last value, {over:.3f} over ridge (5 and 10 s)")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"{version}: saved in {arguments.registry}; {decision.reason}")
    if arguments.promote == "always" or (arguments.promote == "auto" and decision.promote):
        registry.promote(version)
        print(f"{version}: champion; forecasters load it within 10 s")
    return version


def with_record(model: Model, split: Split) -> tuple[Model, Judged]:
    """The version with the skill and alarms that it has on what was held out, and how it was judged there."""
    judged = judge(model, split.held)
    return replace(model, prior_skill=prior_skill(judged), alarm_precision=alarm_precision(judged)), judged


def record_of(model: Model) -> dict[str, Any]:
    """The same as a card has it."""
    return {"prior_skill": _plain(model.prior_skill), "alarm_precision": round(model.alarm_precision, 3)}


def _train(  # noqa: PLR0917 - what a run consists of
    arguments: argparse.Namespace,
    telemetry: Path,
    config: TrainConfig,
    shape: LstmConfig,
    split: Split,
    fingerprint: str,
    start: Model | None,
) -> ForecastNet:
    """Train locally or on Ray, going on where an earlier call with the same arguments was stopped."""
    rest = [fingerprint, arguments.made_up, arguments.workers, arguments.hold_out, start.version if start else ""]
    weights = start.net.state_dict() if start else None
    plan = json.dumps([asdict(config), asdict(shape), *rest])
    name = "run-" + hashlib.sha256(plan.encode()).hexdigest()[:12]
    folder = arguments.storage.absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    net = _train_here(arguments, config, shape, split, folder, weights) if arguments.local else None
    if net is None:
        from train.ray_job import RayRun, run_on_ray  # noqa: PLC0415 - the local path needs no Ray

        where = RayRun(
            name,
            str(arguments.storage.absolute()),
            workers=arguments.workers,
            device=arguments.device,
            made_up=arguments.made_up,
            address=arguments.address,
        )
        net = run_on_ray(telemetry, split, shape, config, where, weights)
    shutil.rmtree(folder, ignore_errors=True)
    return net


def _train_here(  # noqa: PLR0917 - what a run consists of
    arguments: argparse.Namespace,
    config: TrainConfig,
    shape: LstmConfig,
    split: Split,
    folder: Path,
    start: Mapping[str, Any] | None,
) -> ForecastNet:
    device = device_of(arguments.device)
    data = pieces(split.train, arguments.made_up, config.piece, config.seed, extended=config.extended)
    config = config.for_pieces(len(data))
    torch.manual_seed(config.seed)
    net = ForecastNet(shape)
    if start:
        net.load_state_dict(start)
    saved = folder / "progress.pt"
    done = Progress.load(saved) if saved.exists() else None
    if done:
        print(f"going on after epoch {done.epoch}", flush=True)

    def report(progress: Progress) -> None:
        progress.save(saved)
        print(f"epoch {progress.epoch}/{config.epochs} loss {progress.loss:.4f}", flush=True)

    fit(net, data, config, done, report, device=device)
    return net.cpu().eval()


def champion_of(registry: Registry) -> Model | None:
    """The champion; None where there is none, or it cannot be loaded, which is printed."""
    try:
        return registry.load(registry.champion())
    except RegistryError as error:
        print(f"no champion to compare with: {error}", flush=True)
        return None


def _plain(table: Any) -> list[list[float | None]]:
    return [[None if math.isnan(v) else round(float(v), 4) for v in row] for row in table]
