"""A node's loop keeps time and goes on whatever its borders do."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from actors.forecaster_actor import ForecasterSettings
from actors.node_forecaster import UNKNOWN, NodeForecaster
from actors.telemetry import Sample
from models.forecaster import Model
from models.registry import Registry
from shadecast.errors import ConfigError
from shadecast.types import HORIZONS_S, QUANTILES, RESOURCES, NodeReport, NodeSnapshot
from tests.actors.proc_tree import Clock


@pytest.fixture(scope="module")
def model() -> Model:
    registry = Registry()
    return registry.load(registry.champion())


@dataclass
class FakeSampler:
    """Gives a busy-enough node; can be told to fail or to lack values."""

    fail: bool = False
    missing: bool = False
    n: int = 0

    def read(self) -> Sample:
        self.n += 1
        if self.fail:
            raise OSError("no /proc today")
        cpu = math.nan if self.missing else 0.5 + 0.3 * math.sin(self.n / 3)
        return Sample(NodeSnapshot(cpu, cpu, 0.4, 0.1, 0.1, 1e6, 2e6), "host", 2.0, load1=1.0)


@dataclass
class Rig:
    """A forecaster with everything around it faked."""

    sampler: FakeSampler = field(default_factory=FakeSampler)
    clock: Clock = field(default_factory=Clock)
    sent: list[NodeReport] = field(default_factory=list)
    rows: list[tuple[dict[str, Any], float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forecaster = NodeForecaster(
            "node-1", self.sampler, self.sent.append, self.clock, lambda: 5.0, lambda r, w: self.rows.append((r, w))
        )

    def ticks(self, count: int) -> NodeReport:
        for _ in range(count):
            self.forecaster.tick()
            self.clock.now_s += 1.0
        return self.sent[-1]


@pytest.fixture
def rig(model: Model) -> Rig:
    rig = Rig()
    rig.forecaster.use(model)
    return rig


def test_a_report_carries_rising_quantiles_in_bounds_for_every_resource(rig: Rig, model: Model) -> None:
    report = rig.ticks(30)
    assert report.seq == 30
    assert report.forecast is not None
    assert set(report.forecast.quantiles) == set(RESOURCES)
    for rows in report.forecast.quantiles.values():
        table = np.asarray(rows)
        assert table.shape == (len(HORIZONS_S), len(QUANTILES))
        assert (np.diff(table, axis=1) >= 0).all()
        assert table.min() >= 0
        assert table.max() <= 1
    assert report.forecast.model_version == model.version
    assert set(report.forecast.gate) == set(RESOURCES)
    assert report.rss_bytes > 0


def test_there_is_no_forecast_before_enough_samples_or_without_a_model(model: Model) -> None:
    rig = Rig()
    assert rig.ticks(20).forecast is None
    rig.forecaster.use(model)
    assert rig.ticks(1).forecast is None
    assert rig.ticks(15).forecast is not None


def test_missing_cpu_means_no_forecast_and_its_return_a_forecast_again(rig: Rig) -> None:
    rig.ticks(30)
    rig.sampler.missing = True
    report = rig.ticks(1)
    assert report.forecast is None
    assert math.isnan(report.snapshot.cpu_fraction)
    rig.sampler.missing = False
    assert rig.ticks(1).forecast is not None


def test_a_sampler_that_raises_is_reported_as_unknown_and_the_loop_lives(rig: Rig) -> None:
    rig.ticks(30)
    rig.sampler.fail = True
    report = rig.ticks(5)
    assert report.snapshot is UNKNOWN
    assert report.forecast is None
    assert rig.forecaster.failures == 5
    rig.sampler.fail = False
    assert rig.ticks(2).forecast is not None


def test_a_sender_or_log_that_raises_never_stops_the_loop(model: Model) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("gone")

    forecaster = NodeForecaster("n", FakeSampler(), broken, Clock(), lambda: 0.0, broken)
    forecaster.use(model)
    for _ in range(3):
        forecaster.tick()
    assert forecaster.failures == 6


def test_a_model_that_raises_is_started_afresh(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ticks(30)
    with monkeypatch.context() as patch:
        patch.setattr("models.forecaster.OnlineForecaster.step", lambda *_: 1 / 0)
        assert rig.ticks(1).forecast is None
    assert rig.ticks(15).forecast is not None


def test_a_promoted_version_goes_on_without_a_pause_and_is_named_in_the_next_report(rig: Rig, model: Model) -> None:
    rig.ticks(30)
    rig.forecaster.use(replace(model, version="v-next"))
    report = rig.ticks(1)
    assert report.forecast is not None
    assert report.forecast.model_version == "v-next"


def test_a_challenger_is_scored_in_shadow_and_never_reported(rig: Rig, model: Model) -> None:
    rig.forecaster.use(replace(model, version="challenger"), challenger=True)
    report = rig.ticks(40)
    assert report.forecast is not None
    assert report.forecast.model_version == model.version
    versions = rig.forecaster.versions()
    assert versions["challenger"]["version"] == "challenger"
    assert set(versions["challenger"]["skill"]) == set(RESOURCES)
    rig.forecaster.drop_challenger()
    assert set(rig.forecaster.versions()) == {"champion"}


def test_a_long_gap_starts_the_forecaster_afresh(rig: Rig) -> None:
    rig.ticks(30)
    rig.clock.now_s += 500.0
    assert rig.ticks(1).forecast is None
    assert rig.ticks(15).forecast is not None


def test_the_log_gets_each_sample_with_time_since_the_start_and_what_serve_carries(rig: Rig) -> None:
    rig.forecaster.note_serving(in_flight=3.0, arrivals_per_s=12.0)
    rig.ticks(3)
    row, wall_s = rig.rows[-1]
    assert (row["t_s"], wall_s) == (2.0, 5.0)
    assert (row["in_flight"], row["arrivals_per_s"], row["memory_fraction"]) == (3.0, 12.0, 0.4)


def test_an_announced_event_reaches_the_model_at_the_horizons_it_covers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = type(rig.forecaster._champion).step  # type: ignore[union-attr]

    def spy(self: Any, values: Any, announced: Any = None) -> Any:
        seen.append(None if announced is None else announced[0].tolist())
        return real(self, values, announced)

    monkeypatch.setattr("models.forecaster.OnlineForecaster.step", spy)
    rig.forecaster.announce(starts_in_s=2.5, lasts_s=3.0, strength=0.8)
    rig.ticks(8)
    assert seen[0] == pytest.approx([0, 0, 0.8, 0.8, 0, 0])
    assert seen[2] == pytest.approx([0.8, 0.8, 0.8, 0, 0, 0])
    assert seen[7] is None


def test_what_is_cancelled_counts_no_more(rig: Rig) -> None:
    rig.ticks(15)
    rig.forecaster.announce(starts_in_s=0.0, lasts_s=60.0, strength=0.97)
    told = rig.ticks(1).forecast
    rig.forecaster.cancel()
    after = rig.ticks(1).forecast
    assert told is not None
    assert after is not None
    assert min(row[0] for row in told.quantiles["cpu"]) >= 0.97
    assert max(row[0] for row in after.quantiles["cpu"]) < 0.97


def test_what_is_announced_counts_in_full_whatever_the_models_skill(rig: Rig) -> None:
    calm = rig.ticks(15).forecast
    assert calm is not None
    rig.forecaster.announce(starts_in_s=5.5, lasts_s=1.5, strength=0.97)
    told = rig.ticks(2).forecast
    assert told is not None
    assert [row[0] >= 0.97 for row in told.quantiles["cpu"]] == [False, False, False, True, False, False]
    assert told.gate["cpu"] == 1.0
    assert told.veto_allowed
    after = rig.ticks(10).forecast
    assert after is not None
    assert max(row[0] for row in after.quantiles["cpu"]) < 0.97


def test_a_disturbance_that_recurs_is_announced_before_its_third_start(rig: Rig) -> None:
    busy = frozenset(t for k in range(4) for t in range(20 + 60 * k, 40 + 60 * k))

    def read() -> Sample:
        rig.sampler.n += 1
        cpu = 0.95 if rig.sampler.n in busy else 0.1
        return Sample(NodeSnapshot(cpu, cpu, 0.4, 0.1, 0.1, 1e6, 2e6), "host", 2.0, load1=1.0)

    rig.sampler.read = read  # type: ignore[method-assign]
    rig.ticks(77)
    before_second = rig.sent[-1].forecast
    rig.ticks(60)
    before_third = rig.sent[-1].forecast
    assert before_second is not None
    assert before_third is not None
    assert max(row[1] for row in before_second.quantiles["cpu"][:3]) < 0.5
    assert 0.45 <= before_third.quantiles["cpu"][2][0] < 0.6, "3 s ahead"
    assert before_third.gate["cpu"] == 1.0
    assert before_third.veto_allowed == before_second.veto_allowed, "it may be wrong"


@pytest.mark.parametrize("event", [(-1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.0, math.inf, 1.0), (0.0, 1.0, 1.5)])
def test_an_impossible_event_is_refused(rig: Rig, event: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="announce"):
        rig.forecaster.announce(*event)


class StopAfter(threading.Event):
    """An event whose wait moves the fake clock, and that is set after some waits."""

    def __init__(self, clock: Clock, waits: int, oversleep_s: float) -> None:
        super().__init__()
        self._clock, self._left, self._oversleep_s = clock, waits, oversleep_s
        self.due_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.due_s.append(self._clock.now_s + (timeout or 0.0))
        self._clock.now_s = self.due_s[-1] + self._oversleep_s
        self._left -= 1
        if self._left <= 0:
            self.set()
        return self.is_set()


def test_a_late_tick_does_not_shift_the_ones_after_it(rig: Rig) -> None:
    stop = StopAfter(rig.clock, waits=10, oversleep_s=0.04)
    start_s = rig.clock.now_s
    rig.forecaster.run(stop)
    assert stop.due_s == pytest.approx([start_s + k for k in range(1, 11)])


def test_missed_ticks_are_skipped_not_caught_up(rig: Rig) -> None:
    real = rig.sampler.read

    def slow_once() -> Sample:
        if rig.sampler.n == 3:
            rig.clock.now_s += 3.4
        return real()

    rig.sampler.read = slow_once  # type: ignore[method-assign]
    stop = StopAfter(rig.clock, waits=6, oversleep_s=0.0)
    start_s = rig.clock.now_s
    rig.forecaster.run(stop)
    assert stop.due_s == pytest.approx([start_s + k for k in (1, 2, 3, 7, 8, 9)])


def test_settings_are_checked_before_an_actor_is_started() -> None:
    assert ForecasterSettings.from_mapping({"link_bytes_per_s": 1e9}).link_bytes_per_s == 1e9
    with pytest.raises(ConfigError, match=r"forecaster\.perod_s.*unknown"):
        ForecasterSettings.from_mapping({"perod_s": 1.0})
    with pytest.raises(ConfigError, match=r"forecaster\.period_s = 0"):
        ForecasterSettings.from_mapping({"period_s": 0})
    for where in ("/log", "~/log", "s3://bucket/log"):
        assert ForecasterSettings(telemetry_log=where).telemetry_log == where
    with pytest.raises(ConfigError, match=r"forecaster\.telemetry_log = 'log': must be a whole path"):
        ForecasterSettings(telemetry_log="log")


def test_all_threads_of_a_forecaster_get_the_usual_priority_where_the_system_allows_it() -> None:
    with subprocess.Popen([sys.executable, "-c", NICED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        may, allowed, *priorities = process.stdout.read().split()
    assert allowed == may
    assert len(priorities) == 2
    assert set(priorities) == ({"0"} if allowed == "True" else {"15"})


NICED = """
import os, threading
from actors.forecaster_actor import stand_up_to_others
os.setpriority(os.PRIO_PROCESS, 0, 15)
may = True
try:
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 15)
except OSError:
    may = False
stop = threading.Event()
threading.Thread(target=stop.wait).start()
allowed = stand_up_to_others()
print(may, allowed, *(os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")), flush=True)
stop.set()
"""


def test_live_errors_are_sums_over_the_samples_at_which_all_were_judged_after_a_warm_up(rig: Rig, model: Model) -> None:
    rig.ticks(200)
    alone = rig.forecaster.live_errors()
    assert (alone["champion_version"], alone["challenger_version"], alone["challenger"]) == (model.version, "", None)
    assert 0 < alone["seconds"] <= 200 - 120
    assert alone["champion"] < alone["last_value"], "it foresees a sine"
    rig.forecaster.use(replace(model, version="same"), challenger=True)
    rig.ticks(100)
    assert rig.forecaster.live_errors()["seconds"] == 0, "another race, and neither has warmed up"
    rig.ticks(200)
    both = rig.forecaster.live_errors()
    assert both["challenger_version"] == "same"
    assert both["challenger"] == pytest.approx(both["champion"], rel=0.25), "on equal terms: it knows the node as well"
    seconds = both["seconds"]
    rig.sampler.missing = True
    rig.ticks(30)
    rig.sampler.missing = False
    rig.ticks(30)
    assert seconds < rig.forecaster.live_errors()["seconds"] <= seconds + 30, "what was not known is not judged"
