"""The engines' processes from outside: their counters, the cores that they run on, and hogs beside one of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

_COUNTERS = {
    "vllm:prefix_cache_queries_total": "queries",
    "vllm:prefix_cache_hits_total": "hits",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "answer_tokens",
    "vllm:num_preemptions_total": "preemptions",
}
"""Of vLLM. Queries and hits are tokens of prompts: looked for in the cache, and found there."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica and its engine, which is a child of its process."""

    place: int
    replica: str
    pid: int
    port: int

    def counters(self) -> dict[str, float]:
        """What the engine has counted since its start."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
        found = dict.fromkeys(_COUNTERS.values(), 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in _COUNTERS:
                    found[_COUNTERS[sample.name]] += sample.value
        return found

    def pin(self, core: int) -> None:
        """The engine, not the process that serves it, runs on this core alone from now on."""
        engines = psutil.Process(self.pid).children(recursive=True)
        if not engines:
            raise RuntimeError(f"replica {self.replica} has no engine process beneath {self.pid}")
        for engine in engines:
            for thread in engine.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})


def find_engines(folder: Path) -> list[Engine]:
    """All that have said who they are, by place."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted((Engine(**each) for each in told), key=lambda engine: engine.place)


def served(folder: Path, place: int) -> list[tuple[int, bool]]:
    """The client's requests that a replica had, in order, and whether each was a copy."""
    lines = (folder / f"{place}.served").read_text(encoding="utf-8").split("\n")[:-1]
    return [(int(number), copy == "1") for number, copy in (line.split() for line in lines)]


def total(counters: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums over engines."""
    return {name: sum(each[name] for each in counters) for name in _COUNTERS.values()}


class Hogs:
    """Processes that take all that they can get of one core; use as a context manager."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, core: int, count: int) -> None:
        """So many on a core: an engine that is pinned there keeps one part in count + 1."""
        code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
        self._processes += [
            subprocess.Popen([sys.executable, "-S", "-c", code])  # noqa: S603 - the line above
            for _ in range(count)
        ]

    def stop(self) -> None:
        """End them all."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
