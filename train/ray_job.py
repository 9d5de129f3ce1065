"""The same training on Ray: Ray Data reads and featurises the log, Ray Train runs the loop on 1..N workers.

Pieces are made in parallel (one group per recording, and blocks of made-up series), workers gather their share and
run `train.loop.fit`. Each epoch is reported with a checkpoint; a run of the same name goes on from its last one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.data
import ray.train
import ray.train.torch
import torch

from models.grid import LONGEST, N_TARGETS, Array
from models.lstm import ForecastNet, LstmConfig
from models.series import Series, series_of, source_of
from serve_app.launch.own_installation import SETUP_HOOK
from train.dataset import Split, made_up_pieces, parts
from train.loop import WARM_UP, Pieces, Progress, TrainConfig, fit, pieces_of, source_weight

BLOCK = 64
CHECKPOINT = "progress.pt"
_ARRAYS = tuple(f.name for f in fields(Pieces))


@dataclass(frozen=True, slots=True)
class RayRun:
    """Where and how wide to train. `name` identifies the run: the same name resumes."""

    name: str
    storage: str
    workers: int = 1
    device: str = "auto"
    """cuda: one GPU per worker; auto: the same where the cluster has as many."""
    made_up: int = 0
    address: str = "local"
    """Cluster to train on: "local" starts one for this job, "auto" is the one on this machine."""


def piece_dataset(folder: Path, split: Split, made_up: int, config: TrainConfig) -> Any:
    """Ray dataset of pieces of what `split` trains on and of made-up series.

    Columns: `key` (order), `source`, the arrays of `Pieces`, and `moved`, `counted` [target]: sum and number of
    absolute 10-sample changes in the series, from which the global unit of each source is made afterwards.
    """
    log = ray.data.read_parquet(str(folder), include_paths=True, partitioning=None, file_extensions=["parquet"])
    root, length, until_wall_s = str(folder), config.piece, dict(split.until_wall_s)
    wanted = frozenset(f"{s.source}/{s.machine}" for s in split.train)

    def named(frame: pd.DataFrame) -> pd.DataFrame:
        frame["source"] = [source_of(Path(p), Path(root)) for p in frame.pop("path")]
        return frame[(frame["source"] + "/" + frame["machine"].astype(str)).isin(wanted)]

    def recording(frame: pd.DataFrame) -> dict[str, Any]:
        source = str(frame["source"].iloc[0])
        found = parts(list(series_of(frame, source)), -math.inf, until_wall_s.get(source, math.inf))
        return columns_of([s for s in found if len(s.values) > 2 * WARM_UP], length, extended=config.extended)

    recordings = log.map_batches(named, batch_format="pandas").groupby(["source", "machine", "recording"])
    pieces = recordings.map_groups(recording, batch_format="pandas")
    if made_up:
        blocks = ray.data.range(-(-made_up // BLOCK))

        def invent(row: Mapping[str, Any]) -> list[dict[str, Any]]:
            first = int(row["id"]) * BLOCK
            count = min(BLOCK, made_up - first)
            invented = made_up_pieces(count, length, config.seed, first, extended=config.extended)
            return [r for part in invented for r in rows_of(part, f"~{first:08d}", "made_up")]

        pieces = pieces.union(blocks.flat_map(invent))
    return pieces


def columns_of(series: Sequence[Series], length: int, *, extended: bool = False) -> dict[str, Any]:
    """Pieces of series as table columns; empty columns where there is nothing."""
    rows: list[dict[str, Any]] = []
    for s in series:
        change = np.abs(s.values[LONGEST:, :N_TARGETS] - s.values[:-LONGEST, :N_TARGETS])
        # float64 as in the rows of made-up series: blocks of two types cannot be put together
        moved, counted = np.nansum(change, axis=0, dtype=np.float64), np.isfinite(change).sum(axis=0)
        part = pieces_of([s], np.ones(N_TARGETS, np.float32), length, extended=extended)
        share = 1.0 / len(part)
        for row in rows_of(part, f"{s.source}/{s.machine}/{s.recording}", s.source):
            rows.append({**row, "moved": moved * share, "counted": counted * share})
    if not rows:
        return {}
    return {name: _stacked([r[name] for r in rows]) for name in rows[0]}


def _stacked(values: list[Any]) -> Any:
    return values if isinstance(values[0], str) else np.stack(values)


def rows_of(part: Pieces, key: str, source: str) -> list[dict[str, Any]]:
    """One row per piece."""
    nothing = np.zeros(N_TARGETS)
    return [
        {
            "key": f"{key}#{i:06d}",
            "source": source,
            **{name: getattr(part, name)[i] for name in _ARRAYS},
            "moved": nothing,
            "counted": nothing,
        }
        for i in range(len(part))
    ]


def units_and_weights(dataset: Any) -> tuple[dict[str, list[float]], dict[str, float]]:
    """By source: mean absolute 10-sample change per target of every recorded one, and the weight of its pieces."""
    table = dataset.select_columns(["source", "moved", "counted"]).to_pandas()
    counts = table["source"].value_counts()
    weights = {str(source): source_weight(int(n), int(counts.max())) for source, n in counts.items()}
    units: dict[str, list[float]] = {}
    for source, rows in table[table["source"] != "made_up"].groupby("source"):
        moved, counted = np.stack(rows["moved"]).sum(axis=0), np.stack(rows["counted"]).sum(axis=0)
        mean = moved / np.maximum(counted, 1e-9)
        units[str(source)] = [float(v) if v > 0 else 1.0 for v in mean]
    return units, weights


def train_on_ray(
    dataset: Any, net: LstmConfig, config: TrainConfig, run: RayRun, start: Mapping[str, Any] | None = None
) -> ForecastNet:
    """Train on a materialised piece dataset and return the net; raises what Ray Train raises when retries end."""
    units, weights = units_and_weights(dataset)
    enough = ray.cluster_resources().get("GPU", 0.0) >= run.workers
    use_gpu = run.device == "cuda" or (run.device == "auto" and enough)
    plan = {
        "net": asdict(net),
        "train": asdict(config.for_pieces(-(-dataset.count() // run.workers))),
        "units": units,
        "weights": weights,
        "start": dict(start) if start else None,
    }
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=plan,
        scaling_config=ray.train.ScalingConfig(num_workers=run.workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.storage,
            failure_config=ray.train.FailureConfig(max_failures=2),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": dataset},
    )
    result = trainer.fit()
    with result.checkpoint.as_directory() as folder:
        done = Progress.load(Path(folder) / CHECKPOINT)
    trained = ForecastNet(net)
    trained.load_state_dict(done.net)
    return trained.eval()


def worker(plan: dict[str, Any]) -> None:
    """One worker: gather the shard, go on from the last checkpoint, report every epoch."""
    config = TrainConfig(**plan["train"])
    torch.manual_seed(config.seed)
    net = ForecastNet(LstmConfig.from_mapping(plan["net"]))
    if plan["start"]:
        net.load_state_dict(plan["start"])
    pieces = gather(ray.train.get_dataset_shard("train"), plan["units"], plan["weights"])
    checkpoint = ray.train.get_checkpoint()
    done = None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            done = Progress.load(Path(folder) / CHECKPOINT)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    wrapped = ray.train.torch.prepare_model(net)

    def report(progress: Progress) -> None:
        metrics = {"epoch": progress.epoch, "epochs": config.epochs, "loss": progress.loss}
        if context.get_world_rank() != 0:
            ray.train.report(metrics)
            return
        print(f"epoch {progress.epoch}/{config.epochs} loss {progress.loss:.4f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            progress.save(Path(folder) / CHECKPOINT)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    fit(net, pieces, config, done, report, wrapped=wrapped, device=str(device))


def gather(shard: Any, units: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> Pieces:
    """A worker's share in memory, in the order of its keys, so that the run does not depend on arrival."""
    batches = list(shard.iter_batches(batch_size=256, batch_format="numpy"))
    keys = np.concatenate([np.asarray(b["key"]).astype(str) for b in batches])
    order = np.argsort(keys)
    arrays: dict[str, Array] = {name: np.concatenate([b[name] for b in batches])[order] for name in _ARRAYS}
    sources = np.concatenate([np.asarray(b["source"]).astype(str) for b in batches])[order]
    for source, unit in units.items():
        arrays["unit"][sources == source] = unit
    for source, weight in weights.items():
        arrays["weight"][sources == source] = weight
    return Pieces(**arrays)


def run_on_ray(  # noqa: PLR0917 - what a run consists of
    folder: Path,
    split: Split,
    net: LstmConfig,
    config: TrainConfig,
    run: RayRun,
    start: Mapping[str, Any] | None = None,
) -> ForecastNet:
    """Connect (or start a local cluster), make the pieces, train; the cluster that was started is stopped again."""
    mine = not ray.is_initialized()
    if mine:
        own = {"worker_process_setup_hook": SETUP_HOOK}  # workers, too, import our `models` and `train`, not a user's
        if run.address == "local":
            ray.init(address="local", logging_level="warning", runtime_env=own, include_dashboard=False)
        else:
            ray.init(address=run.address, logging_level="warning", runtime_env=own)
    try:
        dataset = piece_dataset(folder, split, run.made_up, config).materialize()
        return train_on_ray(dataset, net, config, run, start)
    finally:
        if mine:
            ray.shutdown()
