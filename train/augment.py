"""Made-up telemetry: patterns of `train.loads` seen through the noise, grain and gaps of real meters.

A few hours recorded on one machine show a model too few kinds of node. These series show it many: any level, noise
colour, period, grain and coupling between channels. Nothing here is fitted to a public telemetry set. (The idea of
training forecasters on a wide synthetic prior: Dooley et al., ForecastPFN, NeurIPS 2023; Ansari et al., Chronos, TMLR
2024.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from models.grid import CHANNELS, STEPS, Array
from models.schema import COMMON_COLUMNS
from models.series import Series
from train.loads import Rng, mixture, periodic, ramps, steps


def noise(rng: Rng, length: int) -> Array:
    """Unit-variance noise: white, AR(1), heavy-tailed or with quiet and loud spells."""
    shocks = rng.standard_t(rng.choice([3.0, 6.0, 30.0]), length)
    if rng.random() < 0.3:
        spell = np.repeat(np.exp(rng.normal(0.0, 0.8, length // 20 + 1)), 20)[:length]
        shocks = shocks * spell
    if rng.random() < 0.5:
        keep = rng.choice([0.3, 0.7, 0.9])
        for i in range(1, length):
            shocks[i] += keep * shocks[i - 1]
    return np.asarray(shocks / max(float(shocks.std()), 1e-9))


def _cpu(rng: Rng, length: int) -> Array:
    base = 0.0 if rng.random() < 0.3 else rng.uniform(0.0, 0.4)
    level = base + rng.uniform(0.05, 1.2) * mixture(rng, length)
    if rng.random() < 0.15:  # a node that is nearly idle
        level = level * rng.uniform(0.01, 0.2)
    if rng.random() < 0.2:  # a node that is nearly always full
        level = 1.0 - 0.2 * level
    amount = np.exp(rng.uniform(np.log(0.001), np.log(0.12)))
    depth = np.sqrt(np.clip(level, 0.01, 1.0)) if rng.random() < 0.5 else 1.0
    return np.asarray(np.clip(level + amount * depth * noise(rng, length), 0.0, 1.0))


def _memory(rng: Rng, length: int, cpu: Array, network: Array) -> Array:
    kind = rng.integers(6)
    base = rng.uniform(0.03, 0.9)
    if kind == 0:
        out = np.full(length, base)
    elif kind == 1:
        out = base + rng.uniform(0.001, 0.4) * ramps(rng, length)
    elif kind == 2:
        out = base + rng.uniform(0.001, 0.3) * steps(rng, length)
    elif kind == 3:
        out = base + np.cumsum(rng.standard_t(3, length)) * np.exp(rng.uniform(np.log(1e-5), np.log(3e-3)))
    elif kind == 4:  # files that are read and written fill the page cache up to a limit
        speed = np.exp(rng.uniform(np.log(1e-4), np.log(0.02))) / max(float(network.mean()), 1e-9)
        out = np.minimum(
            base + np.cumsum(network + network.mean() * steps(rng, length)) * speed, rng.uniform(base, 1.0)
        )
        out = out - rng.choice([0.0, 0.1, 0.3]) * base * steps(rng, length)
    else:  # work allocates, a collector frees
        out = base + np.exp(rng.uniform(np.log(1e-4), np.log(0.02))) * (np.cumsum(cpu - cpu.mean()))
    out = out + np.exp(rng.uniform(np.log(1e-6), np.log(2e-3))) * noise(rng, length)
    return np.asarray(np.clip(out, 0.0, 1.0))


def _network(rng: Rng, length: int, cpu: Array) -> Array:
    shape = mixture(rng, length)
    if rng.random() < 0.3:
        shape = 0.3 * shape + 0.7 * np.roll(cpu, rng.integers(0, 4))
    if rng.random() < 0.25:
        shape = shape * periodic(rng, length)
    wild = rng.uniform(0.05, 1.2)
    out = shape * np.exp(wild * noise(rng, length) - wild**2 / 2) + 10 ** rng.uniform(-5, -1)
    spikes = rng.random(length) < rng.choice([0.0, 0.01, 0.05])
    out = out + spikes * rng.pareto(1.5, length) * 0.2
    return np.asarray(np.clip(out, 0.0, 50.0)) * 10 ** rng.uniform(-4, 8)


def made_up(rng: Rng, length: int, name: str) -> tuple[Series, Array]:
    """One series and its announced events [time, horizon]."""
    period = int(rng.choice([1, 1, 1, 5]))  # some meters average over 5 s
    fine = length * period
    cpu = _cpu(rng, fine)
    events = np.zeros(fine)
    if rng.random() < 0.15:
        for _ in range(1 + fine // 120):
            at, lasts = int(rng.integers(0, fine)), int(rng.integers(2, 30))
            events[at : at + lasts] = rng.uniform(0.3, 1.0)
        cpu = np.clip(cpu + events * rng.uniform(0.7, 1.0), 0.0, 1.0)
    network = _network(rng, fine, cpu)
    memory = _memory(rng, fine, cpu, network)
    switches = np.abs(200 + rng.uniform(500, 8000) * cpu * np.exp(0.2 * noise(rng, fine)))
    load = np.convolve(cpu * rng.uniform(1, 8), np.exp(-np.arange(60) / 20.0) / 20.0)[:fine]
    disk = np.clip(steps(rng, fine) * (rng.random() < 0.5) + 0.02 * noise(rng, fine), 0.0, 1.0)
    table = np.stack([cpu, memory, network, switches, load, disk], axis=1)
    table = table.reshape(length, period, len(CHANNELS)).mean(axis=1)
    for column, choices in ((0, (0.01, 0.001, 0.005, 0.0)), (1, (0.001, 1e-4, 0.0, 0.0))):
        if grain := rng.choice(choices):
            table[:, column] = np.round(table[:, column] / grain) * grain
    if rng.random() < 0.4:  # meters that some machines lack
        table[:, rng.integers(3, len(CHANNELS), 2)] = np.nan
    if rng.random() < 0.15:
        table[:, 2 if rng.random() < 0.7 else 1] = np.nan
    if rng.random() < 0.2:
        table[rng.random(length) < 0.02] = np.nan
    coarse = events.reshape(length, period).mean(axis=1) if period == 1 else np.zeros(length)
    ahead = np.stack([np.concatenate([coarse[h:], np.zeros(h)]) for h in STEPS], axis=1)
    return Series("made_up", name, "0", float(period), table.astype(np.float32)), ahead.astype(np.float32)


def main() -> None:
    """`python -m train.augment`: made-up telemetry as a file, to try out or time a retraining without a cluster."""
    parser = argparse.ArgumentParser(prog="python -m train.augment", description=main.__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--machines", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a folder; one file is written into it")
    arguments = parser.parse_args()
    length = 600
    tables = []
    for i in range(-(-arguments.rows // length)):
        series, _ = made_up(np.random.default_rng([arguments.seed, 11, i]), length, str(i))
        cpu, memory, network, switches, load, disk = series.values.T
        values = (np.arange(length) * 1.0, cpu, memory, network, network, disk, load, switches)
        names = {"machine": f"made-up-{i % arguments.machines}", "recording": str(i)}
        tables.append(pd.DataFrame(names | dict(zip(COMMON_COLUMNS[2:], values, strict=True))))
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "invented_1s.parquet"
    pd.concat(tables).to_parquet(file, index=False, compression="zstd")
    print(f"{len(tables) * length} rows -> {file}")


if __name__ == "__main__":
    main()
