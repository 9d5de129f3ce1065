"""`python -m train --time-rows N`: how many rows of telemetry a second each device here trains on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.features import N_EXTENDED_FEATURES, N_FEATURES
from models.lstm import ForecastNet, LstmConfig
from train.dataset import MADE_UP_LENGTH, made_up_pieces
from train.loop import Pieces, Progress, TrainConfig, device_of, fit, join

DRAWN = 64
"""Made-up series that are featurised; more rows are these again, since a step takes the same time whatever they say."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass over `rows` on one device. `first_s` is the same pass once before: start of the device, copies to it."""

    device: str
    rows: int
    first_s: float
    pass_s: float

    @property
    def rows_per_s(self) -> float:
        """Rows trained on in a second."""
        return self.rows / self.pass_s


def time_rows(rows: int, device: str = "auto", *, extended: bool = False) -> tuple[float, list[Timing]]:
    """(rows featurised a second, timings): one pass over that many rows on every device here, or on the one named."""
    config = TrainConfig(epochs=2, extended=extended)
    started_s = time.perf_counter()
    few = join(made_up_pieces(DRAWN, config.piece, config.seed, extended=extended))
    featurised_per_s = DRAWN * MADE_UP_LENGTH / (time.perf_counter() - started_s)
    again = np.arange(max(1, -(-rows // config.piece))) % len(few)
    many = replace(few, **{f.name: getattr(few, f.name)[again] for f in fields(Pieces)})
    names = dict.fromkeys(["cpu", device_of("auto")]) if device == "auto" else [device_of(device)]
    return featurised_per_s, [_timed(many, config, name) for name in names]


def _timed(pieces: Pieces, config: TrainConfig, device: str) -> Timing:
    torch.manual_seed(config.seed)
    net = ForecastNet(LstmConfig(features=N_EXTENDED_FEATURES if config.extended else N_FEATURES))
    ends_s: list[float] = []

    def epoch_done(_: Progress) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        ends_s.append(time.perf_counter())

    started_s = time.perf_counter()
    fit(net, pieces, config, None, epoch_done, device=device)
    name = torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} thread"
    return Timing(name, len(pieces) * config.piece, ends_s[0] - started_s, ends_s[1] - ends_s[0])


def show(found: tuple[float, Sequence[Timing]]) -> None:
    """A table, and what was not there to be timed."""
    featurised_per_s, timings = found
    table = Table(title=f"one pass of training; featurising beforehand: {featurised_per_s:,.0f} rows/s on one core")
    for column in ("device", "rows", "first pass", "next pass", "rows/s"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for t in timings:
        table.add_row(t.device, f"{t.rows:,}", f"{t.first_s:.1f} s", f"{t.pass_s:.1f} s", f"{t.rows_per_s:,.0f}")
    console = Console()
    console.print(table)
    if not torch.cuda.is_available():
        console.print("No accelerator is present: only the CPU was timed.")
