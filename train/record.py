"""`python -m train.record`: telemetry of our own, from a local Ray cluster under loads of ours.

Starts several raylets on this machine, a node forecaster on each with a telemetry log, and one load worker per node
that burns CPU, grows and frees memory and moves bytes over loopback by seeded schedules (`train.loads`). Loopback
counts here, where a real node leaves it out, since there is no other traffic to record. Everything ends with the
command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import track

from models.grid import Array
from train.loads import mixture

SLICE_S = 0.1
CHUNK = bytes(65_536)


class LoadWorker:
    """Follows schedules on its node: CPU as a share of one core, memory in bytes held, network in bytes per second."""

    def __init__(self) -> None:
        self._held: list[bytearray] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self._out = socket.create_connection(listener.getsockname())
        self._in, _ = listener.accept()
        threading.Thread(target=self._swallow, daemon=True).start()

    def run(self, cpu: Array, memory_bytes: Array, network_bytes_per_s: Array) -> int:
        """Work through the schedules, one entry a second; returns the seconds done."""
        os.nice(10)
        start_s = time.monotonic()
        for second in range(len(cpu)):
            self._hold(int(memory_bytes[second]))
            for piece in range(round(1 / SLICE_S)):
                due_s = start_s + second + (piece + 1) * SLICE_S
                for _ in range(int(network_bytes_per_s[second] * SLICE_S / len(CHUNK))):
                    self._out.sendall(CHUNK)
                until_s = time.thread_time() + float(cpu[second]) * SLICE_S
                while time.thread_time() < until_s and time.monotonic() < due_s:
                    sum(range(500))
                time.sleep(max(0.0, due_s - time.monotonic()))
        return len(cpu)

    def _hold(self, wanted_bytes: int) -> None:
        block = 1 << 20
        while len(self._held) * block < wanted_bytes:
            self._held.append(bytearray(b"\x01") * block)
        del self._held[max(0, wanted_bytes // block) :]

    def _swallow(self) -> None:
        while self._in.recv(1 << 20):
            pass


def schedules(rng: np.random.Generator, length_s: int, cpu_share: float) -> tuple[Array, Array, Array]:
    """CPU share, bytes held, bytes per second for one node; patterns change about every two minutes."""

    def chained(scale: float) -> Array:
        parts, left = [], length_s
        while left > 0:
            n = min(left, int(rng.integers(60, 180)))
            parts.append(mixture(rng, n))
            left -= n
        return scale * np.concatenate(parts)

    return chained(cpu_share), chained(400e6), chained(float(np.exp(rng.uniform(np.log(1e5), np.log(5e7)))))


def record(folder: Path, minutes: float, nodes: int, seed: int, cpu_share: float) -> pd.DataFrame:
    """Record and return the log as one table; the cluster is gone when this returns."""
    from serve_app.launch.processes import start_forecaster  # noqa: PLC0415

    length_s = int(minutes * 60)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        settings: Mapping[str, Any] = {"telemetry_log": str(folder), "count_loopback": True, "log_flush_s": 10.0}
        running, forecasters = [], []
        for index, node in enumerate(ray.nodes()):
            forecasters.append(start_forecaster(settings, node["NodeID"], 1.0))
            pin = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            worker = ray.remote(LoadWorker).options(num_cpus=0, scheduling_strategy=pin).remote()
            plan = schedules(np.random.default_rng([seed, index]), length_s, cpu_share)
            running.append(worker.run.remote(*plan))
        for _ in track(range(length_s), description="recording"):
            done, _ = ray.wait(running, num_returns=len(running), timeout=1.0)
            if len(done) == len(running):
                break
        ray.get(running)
        ray.get([f.stop.remote() for f in forecasters])
    finally:
        ray.shutdown()
        cluster.shutdown()
    return pd.concat([pd.read_parquet(p, partitioning=None) for p in sorted(folder.rglob("*.parquet"))])


def main() -> None:
    """Parse arguments, record, write one Parquet file."""
    parser = argparse.ArgumentParser(prog="python -m train.record", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--cpu-share", type=float, default=0.45, help="largest share of a core that one node's load takes"
    )
    parser.add_argument("--out", type=Path, default=Path("models/data/own_1s.parquet"))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shadecast-record-"))
    try:
        table = record(folder, arguments.minutes, arguments.nodes, arguments.seed, arguments.cpu_share)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = {node: f"own-{arguments.seed}-{i}" for i, node in enumerate(sorted(table["machine"].unique()))}
    table["machine"] = table["machine"].map(names)
    table = table.sort_values(["machine", "t_s"], ignore_index=True)
    table["wall_s"] = table["wall_s"].round()  # to split by time; whole seconds pack well
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(arguments.out, index=False, compression="zstd")
    print(f"{len(table)} rows of {len(names)} nodes -> {arguments.out}")


if __name__ == "__main__":
    main()
