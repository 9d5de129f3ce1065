"""Samples one node, forecasts its load, reports: a plain object with every border injected.

`run` paces `tick` on a fixed grid of `period_s`; a late tick does not shift the ones after it, missed ones are told
to the forecaster as missing samples. No exception of a border (sampler, model, sender, log) ends the loop.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.procfs import read_text
from actors.telemetry import Sample, log_row
from models.forecaster import Model, OnlineForecaster, forecast_of
from models.grid import CHANNELS, EXTENDED, STEPS
from models.recurrence import Event, Recurrence
from shadecast.types import Forecast, NodeReport, NodeSnapshot

logger = logging.getLogger(__name__)

NAN = float("nan")
FORGET_AFTER = 60
"""After so many missing samples in a row the forecaster starts afresh."""
UNKNOWN = NodeSnapshot(NAN, NAN, NAN, NAN, NAN, NAN, NAN)
PAGE_BYTES = 4096
WARM_UP = 120
"""Samples that do not count after a change of versions: a net that has seen little of the node is worse than it is."""


@dataclass(slots=True)
class Race:
    """Sums of live errors of the expected headroom since these versions run, over samples at which all were judged."""

    versions: tuple[str, str] = ("", "")
    """Champion and challenger, "" where there is none."""
    seen: int = 0
    samples: int = 0
    champion: float = 0.0
    challenger: float = 0.0
    last_value: float = 0.0

    def add(self, versions: tuple[str, str], champion: float, challenger: float, last_value: float) -> None:
        """Take one sample's errors; NaN is not judged. `challenger` counts only where there is one."""
        if versions != self.versions:
            self.versions, self.seen, self.samples = versions, 0, 0
            self.champion = self.challenger = self.last_value = 0.0
        if math.isnan(champion) or math.isnan(last_value) or (versions[1] and math.isnan(challenger)):
            return
        self.seen += 1
        if self.seen > WARM_UP:
            self.samples += 1
            self.champion += champion
            self.last_value += last_value
            self.challenger += challenger if versions[1] else 0.0


class Reader(Protocol):
    """Where samples come from; `actors.telemetry.Sampler` in production."""

    def read(self) -> Sample:
        """One reading."""
        ...


@dataclass(slots=True)
class NodeForecaster:
    """One node's loop. `send` takes each report, `log` each row (column -> value) with its wall time."""

    node_id: str
    sampler: Reader
    send: Callable[[NodeReport], None]
    clock: Callable[[], float]
    wall: Callable[[], float]
    log: Callable[[dict[str, Any], float], None] | None = None
    period_s: float = 1.0
    hostname: str = ""
    failures: int = 0
    """Borders that raised since the start."""
    _seq: int = 0
    _started_s: float = NAN
    _last_s: float = NAN
    _champion: OnlineForecaster | None = None
    _challenger: OnlineForecaster | None = None
    _serving: dict[str, float] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)
    _recurrence: Recurrence = field(default_factory=Recurrence)
    _race: Race = field(default_factory=Race)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def use(self, model: Model, challenger: bool = False) -> None:
        """Forecast with this version from the next tick on; a challenger is scored beside the champion, never reported.

        A new version goes on from what the champion's features have seen of the node: there is no pause in forecasts,
        and a challenger is compared on equal terms.
        """
        with self._lock:
            if challenger and self._champion is not None:
                self._challenger = copy.deepcopy(self._champion)
                self._challenger.swap(model)
            elif challenger:
                self._challenger = OnlineForecaster(model)
            elif self._champion is None:
                self._champion = OnlineForecaster(model)
            else:
                self._champion.swap(model)

    def drop_challenger(self) -> None:
        """Score the champion alone from now on."""
        with self._lock:
            self._challenger = None

    def versions(self) -> dict[str, Any]:
        """Versions in use with their live skill per target, for status pages and tests."""
        with self._lock:
            pairs = (("champion", self._champion), ("challenger", self._challenger))
            return {name: {"version": f.model.version, "skill": f.live_skill()} for name, f in pairs if f}

    def live_errors(self) -> dict[str, Any]:
        """Errors of the expected headroom since the present versions run: seconds judged, and sums by forecast.

        `challenger` is None where there is none.
        """
        with self._lock:
            race = self._race
            return {
                "champion_version": race.versions[0],
                "challenger_version": race.versions[1],
                "seconds": race.samples * self.period_s,
                "champion": race.champion,
                "challenger": race.challenger if race.versions[1] else None,
                "last_value": race.last_value,
            }

    def announce(self, starts_in_s: float, lasts_s: float, strength: float = 1.0) -> None:
        """Tell of a load that is known to come (a batch job, a scheduled pause); raises ValueError on nonsense."""
        if not (starts_in_s >= 0 and 0 < lasts_s < math.inf and 0 <= strength <= 1):
            raise ValueError(
                f"announce(starts_in_s={starts_in_s!r}, lasts_s={lasts_s!r}, strength={strength!r}): "
                "must be >= 0, > 0 and in [0, 1]"
            )
        start_s = self.clock() + starts_in_s
        with self._lock:
            self._events.append(Event(start_s, start_s + lasts_s, strength))

    def cancel(self) -> None:
        """What was announced does not come, or is over early."""
        with self._lock:
            self._events = []

    def note_serving(self, in_flight: float, arrivals_per_s: float) -> None:
        """What Serve has on this node just now; only logged."""
        with self._lock:
            self._serving = {"in_flight": in_flight, "arrivals_per_s": arrivals_per_s}

    def tick(self) -> NodeReport:
        """Sample, forecast, report and log once."""
        now_s = self.clock()
        sample = self._read()
        with self._lock:
            forecast = self._forecast(sample, now_s) if sample else None
            serving = dict(self._serving)
        self._seq += 1
        report = NodeReport(
            node_id=self.node_id,
            seq=self._seq,
            snapshot=sample.snapshot if sample else UNKNOWN,
            forecast=forecast,
            age_s=max(0.0, self.clock() - now_s),
            hostname=self.hostname,
            rss_bytes=own_rss_bytes(),
        )
        self._attempt("report", lambda: self.send(report))
        if self.log is not None and sample is not None:
            if math.isnan(self._started_s):
                self._started_s = now_s
            row = log_row(sample, now_s - self._started_s) | serving
            log = self.log
            self._attempt("log", lambda: log(row, self.wall()))
        return report

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop` is set."""
        next_s = self.clock()
        while not stop.is_set():
            self.tick()
            next_s += self.period_s
            behind = math.floor((self.clock() - next_s) / self.period_s)
            next_s += max(0, behind + 1) * self.period_s
            stop.wait(max(0.0, next_s - self.clock()))

    def _read(self) -> Sample | None:
        try:
            return self.sampler.read()
        except Exception as error:
            self._failed("telemetry", error)
            return None

    def _forecast(self, sample: Sample, now_s: float) -> Forecast | None:
        missed = 0 if math.isnan(self._last_s) else max(0, round((now_s - self._last_s) / self.period_s) - 1)
        self._last_s = now_s
        self._recurrence.step(now_s, sample.snapshot.cpu_background_fraction)
        values, announced = channel_values(sample), self._announced(now_s)
        forecast = None
        for name, model in (("champion", self._champion), ("challenger", self._challenger)):
            if model is None:
                continue
            try:
                if missed > FORGET_AFTER:
                    model.forget()
                for _ in range(missed if missed <= FORGET_AFTER else 0):
                    model.step(np.full_like(values, np.nan))
                prediction = model.step(values, announced)
                if name == "champion":
                    forecast = forecast_of(prediction, model.model.version, announced)
            except Exception as error:
                self._failed(name, error)
                model.forget()
        self._judge_live()
        return forecast

    def _judge_live(self) -> None:
        champion, challenger = self._champion, self._challenger
        if champion is None:
            return
        versions = (champion.model.version, challenger.model.version if challenger is not None else "")
        error, last_value = champion.headroom_error
        self._race.add(versions, error, challenger.headroom_error[0] if challenger is not None else NAN, last_value)

    def _announced(self, now_s: float) -> np.ndarray[Any, Any] | None:
        """Strength at each horizon of events that were announced or that recur, [1, horizon]; None without any."""
        self._events = [e for e in self._events if e.ends_s > now_s]
        events = [*self._events, *self._recurrence.expected()]
        if not events:
            return None
        at_s = [now_s + h * self.period_s for h in STEPS]
        strengths = [max((e.strength for e in events if e.starts_s <= t < e.ends_s), default=0.0) for t in at_s]
        return np.asarray([strengths], np.float32)

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        """Count every failure, write only the 1st, 2nd, 4th ... so that a broken file cannot fill the log."""
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:
            logger.warning("node %s: %s failed (%d failures so far): %r", self.node_id, what, self.failures, error)


def channel_values(sample: Sample) -> np.ndarray[Any, Any]:
    """What a model may see of a sample, [1, channel]: the exogenous load, not ours; behind it the further channels."""
    snapshot = sample.snapshot
    known = {
        "cpu": snapshot.cpu_background_fraction,
        "memory": snapshot.memory_fraction,
        "network": snapshot.network_background_fraction,
        "context_switches": sample.context_switches_per_s,
        "load": sample.load1,
        "disk_busy": sample.disk_busy_fraction,
        "process_starts": sample.process_starts_per_s,
        "runnable": sample.runnable,
        "blocked": sample.blocked,
        "system": sample.system_fraction,
        "io_wait": sample.io_wait_fraction,
        "page_faults": sample.page_faults_per_s,
        "io_bytes": sample.io_bytes_per_s,
    }
    return np.asarray([[known[name] for name in CHANNELS + EXTENDED]], np.float32)


def own_rss_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not tell."""
    words = (read_text(Path("/proc/self/statm")) or "").split()
    return int(words[1]) * PAGE_BYTES if len(words) > 1 else 0
