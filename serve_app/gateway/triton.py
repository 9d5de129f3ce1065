"""Triton's extensions that describe a model and count its requests, as far as they are true here.

Formats: triton-inference-server/server `docs/protocol/extension_model_configuration.md`, `extension_statistics.md` and
`extension_model_repository.md`; fields of the configuration are those of its `model_config.proto`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.tensors import TensorSpec

NOT_OFFERED = {
    "systemsharedmemory": "shared memory",
    "cudasharedmemory": "CUDA shared memory",
    "tpusharedmemory": "TPU shared memory",
    "trace": "tracing",
    "logging": "changing log settings",
}
"""Extensions that are not there: part of their path, and what they are called."""
_PHASES = ("compute_input", "compute_infer", "compute_output")
_QUEUE = "queue"
"""Waiting is not known apart: each success counts with 0 ns. `perf_analyzer` looks here for whether requests came."""
_NEVER = ("cache_hit", "cache_miss")
"""Not there: they stay at "collected 0 times"."""


def model_config(info: ModelInfo) -> dict[str, Any]:
    """Triton's ModelConfig as JSON. `max_batch_size` is 0: shapes are whole, no batch is put together by the server."""
    return {
        "name": info.name,
        "platform": info.platform,
        "backend": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            _tensor(spec) | {"format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": False}
            for spec in info.inputs
        ],
        "output": [_tensor(spec) | {"label_filename": ""} for spec in info.outputs],
        "model_transaction_policy": {"decoupled": info.generates and not info.infers},
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    datatype = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    return {"name": spec.name, "data_type": datatype, "dims": list(spec.shape), "is_shape_tensor": False}


def index_entry(info: ModelInfo, *, ready: bool) -> dict[str, Any]:
    """The model's entry in the repository index."""
    state, reason = ("READY", "") if ready else ("UNAVAILABLE", "no replica of the model is running yet")
    return {"name": info.name, "version": info.version, "state": state, "reason": reason}


class Statistics:
    """Counts and times of the inferences of one gateway since it started; the way to a replica is part of them."""

    def __init__(
        self,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._now_ns = now_ns
        self._wall_ns = wall_ns
        self._totals = {name: [0, 0] for name in ("success", "fail", _QUEUE, *_NEVER, *_PHASES)}
        self._last_wall_ms = 0
        self._inferences = 0

    def request(self) -> Timed:
        """A request that begins now; a failure unless it is told that it succeeded."""
        self._last_wall_ms = self._wall_ns() // 1_000_000
        return Timed(self, self._now_ns)

    def add(self, name: str, ns: int) -> None:
        """Counts one occurrence of `name` that took `ns`."""
        total = self._totals[name]
        total[0] += 1
        total[1] += ns
        if name == "success":
            self._inferences += 1

    def describe(self, info: ModelInfo) -> dict[str, Any]:
        """The statistics response. Batches are not put together here, so there are no batch statistics."""
        stats = {name: {"count": count, "ns": ns} for name, (count, ns) in self._totals.items()}
        entry = {
            "name": info.name,
            "version": info.version,
            "last_inference": self._last_wall_ms,
            "inference_count": self._inferences,
            "execution_count": self._inferences,
            "inference_stats": stats,
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }
        return {"model_stats": [entry]}


class Timed:
    """One request's times; a context manager that counts it at its end."""

    __slots__ = ("_began_ns", "_now_ns", "_phase_began_ns", "_phases", "_statistics", "_succeeded")

    def __init__(self, statistics: Statistics, now_ns: Callable[[], int]) -> None:
        self._statistics = statistics
        self._now_ns = now_ns
        self._began_ns = self._phase_began_ns = now_ns()
        self._phases: list[tuple[str, int]] = []
        self._succeeded = False

    def ends(self, phase: str) -> None:
        """A `compute_` phase ends here; it began where the one before ended. Counted only if the request succeeds."""
        now_ns = self._now_ns()
        self._phases.append((phase, now_ns - self._phase_began_ns))
        self._phase_began_ns = now_ns

    def begins(self) -> None:
        """The first phase begins here."""
        self._phase_began_ns = self._now_ns()

    def succeeded(self) -> None:
        """The answer is there."""
        self._succeeded = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._succeeded:
            for name, ns in ((_QUEUE, 0), *self._phases):
                self._statistics.add(name, ns)
        self._statistics.add("success" if self._succeeded else "fail", self._now_ns() - self._began_ns)
