"""The settings in which rules are compared: traffic, engines, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.llm.engine import Job, Machine
from bench.llm.traffic import TOOLS, Agents, agents, trace
from bench.recordings import shared_data

GPU = Machine()
HOST = Machine(cache_tokens=2_280_000)
_EIGHT = (1.0,) * 8


@dataclass(frozen=True, slots=True)
class Setting:
    """One experiment. `known` says that the factor 2 was found on this traffic."""

    name: str
    machine: Machine
    make: Callable[[int, float], list[Job]]
    """Its requests, of a seed and so many times its own load."""
    speeds: tuple[float, ...] = _EIGHT
    routers: int = 1
    known: bool = False
    needs: Path | None = field(default=None)
    """The trace that it plays."""


def settings(traces: Path | None = None) -> list[Setting]:
    """All of them; traces are looked for in `traces`, else in the folder of public data."""
    folder = traces or shared_data() / "traces"
    unequal = (1.0, 0.6) * 4
    made = [
        Setting("agents", GPU, _drawn(Agents(), 11.0), known=True),
        Setting("many agents, host tier", HOST, _drawn(Agents(prompts=150, zipf=0.6), 14.0)),
        Setting("tool agents", GPU, _drawn(TOOLS, 18.5)),
        Setting("tool agents, every other at .6", GPU, _drawn(TOOLS, 14.5), unequal),
        Setting("tool agents, four routers", GPU, _drawn(TOOLS, 18.5), routers=4),
    ]
    for name, file, machine, rate, known in (
        ("conversation", "conversation_trace", GPU, 4.76, True),
        ("conversation, host tier", "conversation_trace", HOST, 6.12, True),
        ("synthetic", "synthetic_trace", GPU, 5.5, False),
        ("synthetic, host tier", "synthetic_trace", HOST, 9.0, False),
        ("code", "AzureLLMInferenceTrace_code", GPU, 10.0, False),
    ):
        path = _first(folder, file)
        made.append(Setting(name, machine, _player(path, rate), known=known, needs=path))
    return made


def _drawn(shape: Agents, rate: float) -> Callable[[int, float], list[Job]]:
    return lambda seed, load: agents(shape, load * rate, 600.0, seed)


def _player(path: Path, rate: float) -> Callable[[int, float], list[Job]]:
    return lambda seed, load: trace(path, seed, load * rate, 900.0 if rate < 20.0 else 180.0)


def _first(folder: Path, name: str) -> Path:
    found = [folder / (name + end) for end in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")]
    return next((path for path in found if path.is_file()), found[1])
