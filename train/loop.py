"""The training loop itself: pieces of series in, a better net out. No Ray, no files: the job wraps it.

Loss: pinball over all heads in units of sqrt(local x global change). The local scale alone makes every quiet minute
count as much as a busy one; the global one alone lets the wildest node drown the others; their geometric mean stands
between.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.grid import LONGEST, N_TARGETS, Array
from models.lstm import pinball
from models.series import Series
from models.windows import batch_of
from shadecast.errors import ConfigError
from train.onsets import cold

WARM_UP = 10
LEAST_LOCAL = 0.05
MOST_WEIGHT = 8.0
MOST_OF_DEVICE = 0.7
"""Of an accelerator's free memory, that the data may take; the rest is for the net at work."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What one training run does."""

    epochs: int = 20
    steps: int = 3000
    """Upper bound on optimiser steps, so that a larger log takes fewer epochs and not longer."""
    piece: int = 240
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    cold_weight: float = 4.0
    """Of instants at which others' CPU has been below .4 for 5 s: there an onset may begin."""
    extended: bool = False
    """Whether the net sees the further channels."""
    local: float = 0.5
    """Share of the node's own spread in the loss's unit; 1 is local only, 0 global only."""
    seed: int = 1

    def __post_init__(self) -> None:
        bounds = {
            "epochs": (1, 10_000),
            "steps": (1, 10**9),
            "piece": (LONGEST + WARM_UP + 1, 100_000),
            "batch": (1, 100_000),
            "learning_rate": (1e-6, 1.0),
            "cold_weight": (1.0, 1000.0),
            "seed": (0, 2**31),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"train.{name} = {getattr(self, name)!r}: must be from {low:g} to {high:g}")

    def for_pieces(self, count: int) -> TrainConfig:
        """The same with as many epochs as `steps` allows on `count` pieces, at least 3."""
        per_epoch = max(1, -(-count // self.batch))
        return replace(self, epochs=min(self.epochs, max(3, self.steps // per_epoch)))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Training pieces as arrays: `inputs` [piece, time, target, feature] and so on; `cold` [piece, time] whether
    others' CPU is low and has been for 5 s; `unit` [piece, target] global scale; `weight` [piece] how often a piece is
    drawn, relative to the others."""

    inputs: Array
    anchors: Array
    spread: Array
    truth: Array
    known: Array
    cold: Array
    unit: Array
    weight: Array

    def __len__(self) -> int:
        return len(self.inputs)


def units_of(series: Sequence[Series]) -> Array:
    """Mean absolute 10-sample change per target over series, the global unit of the loss; 1 where nothing moves."""
    sums, counts = np.zeros(N_TARGETS), np.zeros(N_TARGETS)
    for one in series:
        moved = np.abs(one.values[LONGEST:, :N_TARGETS] - one.values[:-LONGEST, :N_TARGETS])
        sums += np.nansum(moved, axis=0)
        counts += np.isfinite(moved).sum(axis=0)
    mean = sums / np.maximum(counts, 1)
    return np.where(mean > 0, mean, 1.0).astype(np.float32)


def pieces_of(
    series: Sequence[Series],
    unit: Array,
    length: int,
    announced: Sequence[Array] | None = None,
    *,
    extended: bool = False,
) -> Pieces:
    """Featurise series whole and cut them into pieces of `length`; the rest of a piece is padded as unknown.

    `unit` [target] for all, or [series, target]. `extended` also featurises the further channels.
    """
    order = sorted(range(len(series)), key=lambda i: len(series[i].values))
    parts: list[Pieces] = []
    for start in range(0, len(order), 64):
        group = order[start : start + 64]
        tables = [series[i].all_values if extended else series[i].values for i in group]
        batch = batch_of(tables, [announced[i] for i in group] if announced else None, extended)
        late = np.arange(batch.values.shape[1])[None, :, None] >= WARM_UP
        truth = np.where((np.isfinite(batch.values) & late)[..., None], batch.truth, np.nan)
        for row, i in enumerate(group):
            size = len(series[i].values)
            quiet = cold(series[i].values[:, 0], series[i].period_s)
            for low in range(0, max(size - WARM_UP, 1), length):
                high = min(low + length, size)
                pad = length - (high - low)

                def part(x: Array, row: int = row, low: int = low, high: int = high, pad: int = pad) -> Array:
                    return np.pad(x[row, low:high], [(0, pad)] + [(0, 0)] * (x.ndim - 2))[None]

                parts.append(
                    Pieces(
                        part(batch.inputs),
                        part(batch.anchors),
                        part(batch.spread),
                        part(np.nan_to_num(truth)),
                        part(np.isfinite(truth)),
                        np.pad(quiet[low:high], (0, pad))[None],
                        (unit if unit.ndim == 1 else unit[i])[None],
                        np.ones(1, np.float32),
                    )
                )
    return join(parts)


def join(parts: Sequence[Pieces]) -> Pieces:
    """All pieces as one."""
    return Pieces(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Pieces)))


def source_weight(pieces: int, largest: int) -> float:
    """Weight of a piece of a source with so many pieces beside the largest source: between none and full balance.

    Without it a source of a few machines is drowned, with full balance its few pieces are learned by heart.
    """
    return min(MOST_WEIGHT, math.sqrt(largest / pieces))


def drawn(weight: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """As many piece numbers as there are pieces, shuffled, each about as often as its weight says.

    Systematic sampling: equal weights draw every piece once.
    """
    edges = np.cumsum(weight, dtype=np.float64)
    at = (np.arange(len(weight)) + rng.random()) / len(weight) * edges[-1]
    return rng.permutation(np.minimum(np.searchsorted(edges, at), len(weight) - 1))


def device_of(name: str) -> str:
    """The device for "auto", "cpu" or "cuda": auto is an accelerator where there is one. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"train.device = {name!r}: must be auto, cpu or cuda")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("train.device = 'cuda': torch finds no CUDA device here; use auto or cpu, or a CUDA build")
    return "cuda" if found and name != "cpu" else "cpu"


def tensors_of(pieces: Pieces, device: str) -> dict[str, Tensor]:
    """All that the loss needs, on the device for the whole run; where that does not fit, in this machine's memory."""
    arrays = {f.name: getattr(pieces, f.name) for f in fields(Pieces) if f.name != "weight"}
    where = device
    if device.startswith("cuda"):
        free_bytes, _ = torch.cuda.mem_get_info(device)
        where = device if sum(a.nbytes for a in arrays.values()) < MOST_OF_DEVICE * free_bytes else "cpu"
    return {name: torch.as_tensor(array).to(where) for name, array in arrays.items()}


def batches(data: dict[str, Tensor], order: NDArray[np.intp], size: int, device: str) -> Iterator[dict[str, Tensor]]:
    """The pieces in this order as batches; what is on the device already is not copied again."""
    index = torch.as_tensor(order, device=data["inputs"].device)
    for part in torch.split(index, size):
        yield {name: tensor[part].to(device) for name, tensor in data.items()}


def loss_of(net: torch.nn.Module, batch: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """Mean loss of one batch; targets become rows, so that one net serves them all."""

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    local, truth, known = rows(batch["spread"]), rows(batch["truth"]), rows(batch["known"])
    quantiles, _ = net(rows(batch["inputs"]), rows(batch["anchors"]), local)
    unit = batch["unit"].flatten()[:, None, None].clamp_min(1e-12)
    # the floor keeps a constant that jumps once from outweighing everything, and padding (spread 0) from making NaN
    units = torch.maximum(local, LEAST_LOCAL * unit).pow(config.local) * unit.pow(1 - config.local)
    per_head = pinball(quantiles, truth).mean(-1) / units
    per_head = torch.where(known, per_head, 0.0)
    weight = (1.0 + (config.cold_weight - 1.0) * batch["cold"]).repeat_interleave(N_TARGETS, dim=0)[..., None]
    return (weight * per_head).sum() / (weight * known).sum().clamp_min(1)


def train_epoch(
    net: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    epoch: Iterable[dict[str, Tensor]],
    config: TrainConfig,
    *,
    device: str = "cpu",
) -> float:
    """One pass; returns the mean loss. On an accelerator matrices are multiplied in bfloat16.

    Nothing in it waits for the accelerator: the loss is read at the end.
    """
    net.train()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    kind = torch.device(device).type
    for batch in epoch:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            loss = loss_of(net, batch, config)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        optimiser.step()
        schedule.step()
        total, count = total + loss.detach(), count + 1
    return float(total) / max(count, 1)


def optimiser_of(
    net: torch.nn.Module, config: TrainConfig, batches_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with one cycle over the whole run (Smith and Topin, 2019)."""
    optimiser = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=max(2, config.epochs * batches_per_epoch + 1)
    )
    return optimiser, schedule


@dataclass(frozen=True, slots=True)
class Progress:
    """All that is needed to go on after a kill: epochs done, states of net, optimiser and schedule."""

    epoch: int
    loss: float
    net: dict[str, Tensor]
    optimiser: dict[str, Any]
    schedule: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save({name: getattr(self, name) for name in ("epoch", "loss", "net", "optimiser", "schedule")}, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read without unpickling code; raises ConfigError on a file that is not one."""
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: no training checkpoint ({error}); delete it to start over") from None


def fit(
    net: torch.nn.Module,
    pieces: Pieces,
    config: TrainConfig,
    done: Progress | None,
    on_epoch: Callable[[Progress], None],
    *,
    wrapped: torch.nn.Module | None = None,
    device: str = "cpu",
) -> None:
    """Train `net` in place from where `done` stands; `on_epoch` gets the progress after every epoch.

    `wrapped` is the same net behind DistributedDataParallel, where there are several workers.

    Shuffling depends only on seed and epoch, so a resumed run ends with the weights of one that was never stopped.
    """
    if device == "cpu":
        torch.set_num_threads(1)  # these matrices are small: a second thread took eight times the CPU and was slower
    net.to(device)
    data = tensors_of(pieces, device)
    optimiser, schedule = optimiser_of(net, config, -(-len(pieces) // config.batch))
    if done is not None:
        net.load_state_dict(done.net)
        optimiser.load_state_dict(done.optimiser)
        schedule.load_state_dict(done.schedule)
    for epoch in range(done.epoch if done else 0, config.epochs):
        rng = np.random.default_rng([config.seed, epoch])
        epoch_data = batches(data, drawn(pieces.weight, rng), config.batch, device)
        loss = train_epoch(wrapped or net, optimiser, schedule, epoch_data, config, device=device)
        on_epoch(Progress(epoch + 1, loss, net.state_dict(), optimiser.state_dict(), schedule.state_dict()))
