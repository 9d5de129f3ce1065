"""The benchmark's end of the driver inside the cluster."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from typing import Any

from bench.live.cgroups import LabError
from bench.live.driver import MARK
from bench.live.hosts import stop


class DriverError(LabError):
    """The driver inside the cluster failed or does not answer."""


class DriverProcess:
    """The other end of `bench.live.driver`: calls by number, events as they come."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._process = process
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._noise: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if not line.startswith(MARK):
                self._noise = [*self._noise[-20:], line.rstrip()]
                continue
            message = json.loads(line[len(MARK) :])
            waiting = self._answers.get(message.get("answer", -1))
            (waiting or self.events).put(message)
        for waiting in list(self._answers.values()):
            waiting.put({"error": "the driver has ended: " + " | ".join(self._noise[-6:])})
        self.events.put({"ended": True})

    def call(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Carry out one command. Raises DriverError if it fails or takes longer."""
        with self._lock:
            self._number += 1
            number = self._number
            answers: queue.Queue[dict[str, Any]] = queue.Queue()
            self._answers[number] = answers
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
                self._process.stdin.flush()
            except OSError:
                raise DriverError("the driver has ended: " + " | ".join(self._noise[-6:])) from None
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise DriverError(f"{do}: no answer from the driver within {timeout_s:g} s") from None
        finally:
            del self._answers[number]
        if "error" in answer:
            raise DriverError(answer["error"])
        return answer

    def event(self, timeout_s: float) -> dict[str, Any]:
        """The next event, {} after the time."""
        try:
            found = self.events.get(timeout=timeout_s) if timeout_s > 0.0 else self.events.get_nowait()
        except queue.Empty:
            return {}
        return found

    @property
    def said(self) -> str:
        """The last lines that were no messages: tracebacks, mostly."""
        return " | ".join(self._noise[-6:])

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        stop(self._process, grace_s=3.0)
