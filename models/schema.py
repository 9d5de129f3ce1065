"""The telemetry schema that samplers write and training reads: one row a second and node.

Version 2. The first ten columns are those of public telemetry sets; the rest are ours, foreign files may lack them.
Version 1, which has no `NEW_COLUMNS`, is still read: they are unknown there.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 2
VERSION_KEY = b"shadecast_telemetry_version"

COMMON_COLUMNS: tuple[str, ...] = (
    "machine",
    "recording",
    "t_s",
    "cpu_fraction",
    "memory_fraction",
    "net_rx_bytes_per_s",
    "net_tx_bytes_per_s",
    "disk_busy_fraction",
    "load1",
    "context_switches_per_s",
)
OWN_COLUMNS: tuple[str, ...] = (
    "wall_s",
    "cpu_background_fraction",
    "network_fraction",
    "network_background_fraction",
    "cpu_pressure_fraction",
    "memory_pressure_fraction",
    "gpu_fraction",
    "gpu_memory_fraction",
    "runnable",
    "replicas",
    "in_flight",
    "arrivals_per_s",
)
NEW_COLUMNS: tuple[str, ...] = (
    "blocked",
    "process_starts_per_s",
    "system_fraction",
    "io_wait_fraction",
    "page_faults_per_s",
    "io_bytes_per_s",
)
REQUIRED_COLUMNS: tuple[str, ...] = COMMON_COLUMNS[:7]
_WIDE = ("t_s", "wall_s")


def arrow_schema() -> pa.Schema:
    """Arrow schema of the log: text keys, clocks in 64 bits, values in 32; missing values are NaN, not null."""
    text = [pa.field(name, pa.string()) for name in COMMON_COLUMNS[:2]]
    numbers = [
        pa.field(name, pa.float64() if name in _WIDE else pa.float32())
        for name in (*COMMON_COLUMNS[2:], *OWN_COLUMNS, *NEW_COLUMNS)
    ]
    return pa.schema([*text, *numbers], metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})
