"""Plays recorded load on a node: CPU, memory and network, second by second. Runs alone: standard library only.

    python player.py SECONDS PROCESSES ADDRESS PORT < rows.json

`rows.json` is a list of [second, cpu_s_per_s, memory_bytes, network_bytes_per_s], ascending; each holds until the
next. CPU is shared among PROCESSES: beside many small demands the scheduler leaves a replica what they do not take, as
on a machine that is really busy, and not a half. It ends after SECONDS, whatever the rows say.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

SLICE_S = 0.05
"""CPU and network are spread over slices of this length; what a slice did not get is not made up for."""
PAGE_BYTES = 4096
DATAGRAM_BYTES = 8192

Row = Sequence[float]


class Meters(NamedTuple):
    """Where time and used CPU are read, and how to wait."""

    clock: Callable[[], float] = time.monotonic
    used: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


_REAL = Meters()


def row_at(rows: Sequence[Row], second: float) -> Row:
    """The row that holds at that second: nothing before the first."""
    k = bisect_right(rows, second, key=lambda row: row[0]) - 1
    return rows[k] if k >= 0 else (0.0, 0.0, 0.0, 0.0)


def hold(held: bytearray, size: int) -> None:
    """Make `held` that long, each page touched, so that it counts as used."""
    if size < len(held):
        del held[size:]
        return
    begin = len(held)
    held.extend(bytes(size - begin))
    for at in range(begin, size, PAGE_BYTES):
        held[at] = 1


def play(
    rows: Sequence[Row],
    seconds: float,
    share: float,
    take: Callable[[float, float], None],
    meters: Meters = _REAL,
) -> None:
    """Burn `share` of the rows' CPU until `seconds` have passed; `take(memory_bytes, network_bytes)` once a slice."""
    clock, used = meters.clock, meters.used
    began_s = clock()
    number = 0
    while (now_s := clock() - began_s) < seconds:
        _, cpu, memory_bytes, network_bytes_per_s = row_at(rows, now_s)
        enough_s = used() + cpu * share * SLICE_S
        number = int(now_s / SLICE_S) + 1
        ends_s = began_s + min(number * SLICE_S, seconds)
        take(memory_bytes, network_bytes_per_s * SLICE_S)
        while used() < enough_s and clock() < ends_s:
            pass
        left_s = ends_s - clock()
        if left_s > 0.0:
            meters.sleep(left_s)


def main(argv: Sequence[str]) -> None:
    """Start the processes and play until the end."""
    seconds, processes = float(argv[0]), int(argv[1])
    target = (argv[2], int(argv[3]))
    rows = json.load(sys.stdin)
    is_first = True
    for _ in range(processes - 1):
        if os.fork() == 0:
            is_first = False
            break
    held = bytearray()
    datagram = bytes(DATAGRAM_BYTES)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setblocking(False)

    def take(memory_bytes: float, network_bytes: float) -> None:
        if not is_first:
            return
        if abs(memory_bytes - len(held)) > 16 * PAGE_BYTES:
            hold(held, int(memory_bytes))
        for _ in range(round(network_bytes / DATAGRAM_BYTES)):
            try:
                sender.sendto(datagram, target)
            except OSError:
                return  # the link is full or down: the rest of this slice is lost

    play(rows, seconds, 1.0 / processes, take)


if __name__ == "__main__":
    main(sys.argv[1:])
