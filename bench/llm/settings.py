"""The settings in which rules are compared: traffic, engines, and how much of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.llm.engine import Job, Machine
from bench.llm.run import Change
from bench.llm.traffic import TOOLS, Agents, agents, tool_calls, trace
from bench.recordings import shared_data

GPU = Machine()
HOST = Machine(cache_tokens=2_280_000)
_EIGHT = (1.0,) * 8
_UNEQUAL = (1.0, 0.6) * 4
_TRACE_S = 900.0
"""Of a trace, at the pace of the setting."""
_SLOW, _SLOW_S, _BETWEEN_S = 0.35, 30.0, 270.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One experiment. `known` says that rules were chosen on this traffic, with other seeds."""

    name: str
    machine: Machine
    make: Callable[[int, float], list[Job]]
    """Its requests, of a seed and so many times its own load."""
    speeds: tuple[float, ...] = _EIGHT
    episodes: bool = False
    """Whether replicas are slow for half a minute now and then; no rule is told."""
    routers: int = 1
    known: bool = False
    needs: Path | None = field(default=None)
    """The trace that it plays."""

    def changes(self, seed: int, until_s: float) -> list[Change]:
        """Of speeds."""
        return _episodes(len(self.speeds), seed, until_s) if self.episodes else []


def settings(traces: Path | None = None) -> list[Setting]:
    """All of them; traces are looked for in `traces`, else in the folder of public data."""
    folder = traces or shared_data() / "traces"
    conversation = _first(folder, "conversation_trace")
    synthetic = _first(folder, "synthetic_trace")
    code = _first(folder, "AzureLLMInferenceTrace_code")

    def talk(name: str, machine: Machine, rate: float, **more: Any) -> Setting:
        return Setting(name, machine, _player(conversation, rate), needs=conversation, **more)

    return [
        talk("conversation", GPU, 4.76, known=True),
        talk("conversation, host tier", HOST, 6.12, known=True),
        Setting("agents", GPU, _drawn(Agents(), 11.0), known=True),
        talk("conversation, one of eight at .4", GPU, 3.4, speeds=(0.4, *_EIGHT[1:])),
        talk("conversation, episodes at .35", GPU, 3.4, episodes=True),
        talk("conversation, every other at .6", GPU, 3.4, speeds=_UNEQUAL),
        talk("conversation, host tier, episodes at .35", HOST, 4.42, episodes=True),
        talk("conversation, host tier, every other at .6", HOST, 4.42, speeds=_UNEQUAL),
        Setting("many agents, host tier", HOST, _drawn(Agents(prompts=150, zipf=0.6), 14.0)),
        Setting("tool agents", GPU, _drawn(TOOLS, 18.5), known=True),
        Setting("tool agents, every other at .6", GPU, _drawn(TOOLS, 14.5), _UNEQUAL, known=True),
        Setting("synthetic", GPU, _player(synthetic, 5.5), needs=synthetic, known=True),
        Setting("synthetic, host tier", HOST, _player(synthetic, 9.0), needs=synthetic, known=True),
        Setting("code", GPU, _player(code, 10.0), needs=code, known=True),
        Setting("tool calls", GPU, _calls(17.0)),
        Setting("tool calls, host tier", HOST, _calls(21.0)),
        Setting("tool agents, four routers", GPU, _drawn(TOOLS, 18.5), routers=4, known=True),
        talk("conversation, four routers", GPU, 4.76, routers=4),
        talk("conversation, host tier, four routers", HOST, 6.12, routers=4),
        Setting("agents, four routers", GPU, _drawn(Agents(), 11.0), routers=4),
        Setting("tool calls, four routers", GPU, _calls(17.0), routers=4),
    ]


def _drawn(shape: Agents, rate: float) -> Callable[[int, float], list[Job]]:
    return lambda seed, load: agents(shape, load * rate, 600.0, seed)


def _calls(rate: float) -> Callable[[int, float], list[Job]]:
    return lambda seed, load: tool_calls(load * rate, 600.0, seed)


def _player(path: Path, rate: float) -> Callable[[int, float], list[Job]]:
    return lambda seed, load: trace(path, seed, load * rate, _TRACE_S)


def _episodes(replicas: int, seed: int, until_s: float) -> list[Change]:
    """Each replica is slow for half a minute once in five minutes, at times of its own."""
    found = []
    for i in range(replicas):
        rng = random.Random(f"{seed}/{i}/episodes")
        at_s = rng.expovariate(1.0 / _BETWEEN_S)
        while at_s < until_s:
            found += [Change(at_s, i, _SLOW), Change(at_s + _SLOW_S, i, 1.0)]
            at_s += _SLOW_S + rng.expovariate(1.0 / _BETWEEN_S)
    return found


def _first(folder: Path, name: str) -> Path:
    found = [folder / (name + end) for end in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")]
    return next((path for path in found if path.is_file()), found[1])
