"""The demo's arrivals: the published Azure code trace where it is at hand, else one drawn from its statistics."""

from __future__ import annotations

import os
import random
from pathlib import Path

from bench.simulate.workload import TraceRow, load_trace

AZURE_CODE = "traces/AzureLLMInferenceTrace_code.csv.gz"


def data_folder() -> Path:
    """Public data for measuring: SHADECAST_DATA, or `../shared/data` beside the checkout."""
    return Path(os.environ.get("SHADECAST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def drawn(seconds: float, seed: int) -> list[TraceRow]:
    """Arrivals as bursty as the Azure code trace: 2.57/s on average, 73 % of the seconds empty, the others in bursts.

    Statistics of AzureLLMInferenceTrace_code (Patel et al., Splitwise, ISCA 2024): medians of 1,930 context tokens
    and 13 generated ones. The size of a burst is geometric, which gives an index of dispersion near the trace's 13.
    """
    rng = random.Random(seed)
    rows = []
    for second in range(int(seconds)):
        if rng.random() < 0.73:
            continue
        size = 1
        while rng.random() < 1.0 - 0.27 / 2.57:
            size += 1
        for _ in range(size):
            context = min(int(rng.lognormvariate(7.565, 0.9)) + 1, 8000)
            rows.append(TraceRow(second + rng.random(), context, int(rng.lognormvariate(2.565, 0.8)) + 1))
    return sorted(rows, key=lambda row: row.at_s)


def arrivals(seconds: float, speed: float, seed: int) -> tuple[list[TraceRow], str]:
    """Requests of `seconds` at `speed` times the recorded pace, times from 0, and a sentence on their origin."""
    path = data_folder() / AZURE_CODE
    if path.exists():
        rows = load_trace(path, random.Random(seed))
        start_s = random.Random(seed).uniform(0.0, max(rows[-1].at_s - seconds * speed, 0.0))
        origin = f"Azure code trace (Splitwise, ISCA 2024) from {start_s:.0f} s on"
        rows = [row for row in rows if start_s <= row.at_s < start_s + seconds * speed]
    else:
        rows, start_s, origin = drawn(seconds * speed, seed), 0.0, "drawn from the Azure code trace's statistics"
    moved = [TraceRow((row.at_s - start_s) / speed, row.prompt_tokens, row.generated_tokens) for row in rows]
    return moved, f"{origin}, {speed:g} x as fast: {len(moved)} requests in {seconds:.0f} s"
