"""The telemetry log never shows half a file, stays within its bounds, and reads back what was written."""

from __future__ import annotations

import contextlib
import datetime
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.telemetry_log import LogLimits, LogWriter, TelemetryLog
from models.schema import SCHEMA_VERSION, VERSION_KEY, arrow_schema
from models.series import read_folder
from shadecast.errors import ConfigError

HOUR_S = 3600.0
START_S = 1_700_000_400.0


def row(t_s: float, cpu: float = 0.25) -> dict[str, Any]:
    return {
        "t_s": t_s,
        "cpu_fraction": cpu,
        "memory_fraction": 0.5,
        "net_rx_bytes_per_s": 1.0,
        "net_tx_bytes_per_s": 2.0,
    }


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_rows_come_back_with_schema_version_and_nan_for_what_was_missing(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "node-a", "run-1")
    for t in range(5):
        log.append(row(float(t)), START_S + t)
    log.flush(START_S + 5)
    (path,) = files(tmp_path)
    assert path.parent.name.startswith("hour=20231114T22")
    assert path.parent.parent.name == "node=node-a"
    table = pq.read_table(path, partitioning=None)
    assert table.schema.equals(arrow_schema())
    assert table.schema.metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["machine"], first["recording"], first["cpu_fraction"]) == ("node-a", "run-1", 0.25)
    assert math.isnan(first["gpu_fraction"])


def test_a_log_is_a_telemetry_source_like_any_other(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "node-a", "run-1")
    for t in range(100):
        log.append(row(float(t), cpu=t / 100), START_S + t)
    log.flush(START_S + 100)
    (series,) = read_folder(tmp_path)
    assert (series.source, series.machine, series.period_s, len(series.values)) == ("own", "node-a", 1.0, 100)
    assert series.values[50, 0] == pytest.approx(0.5)


def test_each_hour_and_recording_has_its_own_file_and_no_row_is_lost(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(flush_s=60))
    for t in range(0, 2 * 3600, 30):
        log.append(row(float(t)), START_S + t)
    log.flush(START_S + 7200)
    found = files(tmp_path)
    assert len({p.parent.name for p in found}) == len(found) == 3
    assert sum(pq.read_metadata(p).num_rows for p in found) == 240


def test_a_reader_sees_the_old_file_or_the_new_one_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r")
    log.append(row(0.0), START_S)
    log.flush(START_S)

    def torn(table: object, sink: Any, **_: object) -> None:
        sink.write(b"PAR1 half a file")
        raise OSError("disk full")

    log.append(row(1.0), START_S + 1)
    monkeypatch.setattr("actors.telemetry_log.pq.write_table", torn)
    with pytest.raises(OSError, match="disk full"):
        log.flush(START_S + 1)
    (visible,) = tmp_path.rglob("*.parquet")
    assert pq.read_metadata(visible).num_rows == 1
    monkeypatch.undo()
    log.flush(START_S + 2)
    assert pq.read_metadata(visible).num_rows == 2, "the row that could not be written is kept and written later"


def test_what_a_crash_left_behind_is_removed_at_the_next_start_and_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "node=n" / "hour=20231114T22"
    folder.mkdir(parents=True)
    (folder / ".r.tmp").write_bytes(b"PAR1 half")
    log = TelemetryLog(str(tmp_path), "n", "r2")
    assert files(tmp_path) == []
    for t in range(30):
        log.append(row(float(t)), START_S + t)
    log.flush(START_S + 30)
    (folder / ".other.tmp").write_bytes(b"PAR1 half")
    assert len(read_folder(tmp_path)) == 1


def test_old_hours_go_by_age_and_the_oldest_first_by_size(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(max_age_s=3 * HOUR_S))
    for hour in range(8):
        log.append(row(0.0), START_S + hour * HOUR_S)
    log.flush(START_S + 7 * HOUR_S)
    assert len(files(tmp_path)) == 4
    size = files(tmp_path)[0].stat().st_size
    small = TelemetryLog(str(tmp_path), "n", "r2", LogLimits(max_bytes=max(1024, int(2.5 * size))))
    small.append(row(0.0), START_S + 8 * HOUR_S)
    small.flush(START_S + 8 * HOUR_S)
    left = [p.parent.name for p in files(tmp_path)]
    assert len(left) == 2
    assert max(left) == "hour=20231115T06", "the hour being written stays"


STEPS = {
    "back-into-a-former-hour": [0, 3600, 7200, 10, 3610, 20],
    "back-within-the-hour": [1000, 1001, 5, 6],
    "forward-over-hours": [0, 1, 6 * 3600, 6 * 3600 + 1, 2],
    "to-the-epoch-and-back": [0, 1, -START_S + 5, -START_S + 6, 2, 3],
    "to-2038-and-back": [0, 1, 4.5e8, 4.5e8 + 1, 2, 3],
    "back-and-forth": [3599, 3600, 3599, 3600, 7200, 3599, 3600, 10800, 3599, 3600],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_wall_clock_that_steps_loses_no_row(tmp_path: Path, steps: list[float]) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(flush_s=1.0))
    t_s = 0.0
    for step_s in steps:
        for i in range(30):
            log.append(row(t_s), START_S + step_s + i)
            t_s += 1.0
    log.flush(START_S + steps[-1] + 60)
    tables = [pq.read_table(p, partitioning=None) for p in files(tmp_path)]
    found = sorted(t for table in tables for t in table["t_s"].to_pylist())
    assert found == [float(i) for i in range(30 * len(steps))]
    for path, table in zip(files(tmp_path), tables, strict=True):
        hours = {
            datetime.datetime.fromtimestamp(w, datetime.UTC).strftime("%Y%m%dT%H") for w in table["wall_s"].to_pylist()
        }
        assert path.parent.name == f"hour={hours.pop()}"
        assert not hours
    series = read_folder(tmp_path)
    assert sum(len(s.values) for s in series) == len(found)


def test_series_tell_the_calendar_time_on_either_side_of_a_step(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r")
    for t in range(100):
        log.append(row(float(t)), (5.0 if t < 40 else START_S) + t)
    log.flush(START_S + 100)
    assert [(s.began_wall_s, len(s.values)) for s in read_folder(tmp_path)] == [(5.0, 40), (START_S + 40, 60)]


def test_a_clock_that_leaps_ahead_deletes_nothing_until_it_has_stood_an_hour(tmp_path: Path) -> None:
    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(max_age_s=24 * HOUR_S))
    log.append(row(0.0), START_S)
    leap_s = START_S + 365 * 24 * HOUR_S
    for t in range(0, 3000, 60):
        log.append(row(1.0 + t), leap_s + t)
    assert len(list(tmp_path.rglob("hour=20231114T22/*.parquet"))) == 1
    for t in range(3000, 8000, 60):
        log.append(row(1.0 + t), leap_s + t)
    assert not list(tmp_path.rglob("hour=20231114T22/*.parquet"))


def test_a_recording_of_the_same_name_is_another_recording(tmp_path: Path) -> None:
    """A machine that starts at the epoch each time, in a container whose pids are always the same."""
    for value in (0.25, 0.5, 0.75):
        log = TelemetryLog(str(tmp_path), "n", "19700101T000005-57")
        for t in range(30):
            log.append(row(float(t), value), 5.0 + t)
        log.flush(40.0)
    assert sorted(s.values[0, 0] for s in read_folder(tmp_path)) == [0.25, 0.5, 0.75]


def test_rows_outlive_a_file_system_that_refuses_over_the_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(flush_s=60.0))
    monkeypatch.setattr("actors.telemetry_log.pq.write_table", full)
    for t in range(0, 4 * 3600, 30):
        with contextlib.suppress(OSError):
            log.append(row(float(t)), START_S + t)
    monkeypatch.undo()
    log.flush(START_S + 4 * HOUR_S)
    assert sum(pq.read_metadata(p).num_rows for p in files(tmp_path) if p.suffix == ".parquet") == 480


@pytest.mark.parametrize("scheme", ["", "nosuch://"])
def test_a_log_that_cannot_be_written_is_a_problem_until_rows_are_written(tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "mounted later"
    folder.touch()
    uri = f"{scheme}{folder}"
    writer = LogWriter(uri, lambda: TelemetryLog(uri, "n", "r"))
    writer.put(row(0.0), START_S)
    writer.write(to_the_end_s=START_S)
    assert f"telemetry log {uri}: cannot be written" in writer.problem
    folder.unlink()
    uri = str(folder)
    writer.put(row(1.0), START_S + 1)
    writer.write()
    assert writer.problem, "nothing is written yet"
    writer.write(to_the_end_s=START_S + 2)
    assert not writer.problem
    assert len(files(folder)) == 1


def test_a_folder_that_cannot_be_made_at_the_start_loses_no_row(tmp_path: Path) -> None:
    """A disk that is read-only, full or not mounted yet takes the log down, not the node's telemetry."""
    (tmp_path / "disk").touch()
    log = TelemetryLog(str(tmp_path / "disk"), "n", "r")
    for t in range(30):
        log.append(row(float(t)), START_S + t)
    with pytest.raises(OSError, match="disk"):
        log.flush(START_S + 30)
    (tmp_path / "disk").unlink()
    log.flush(START_S + 60)
    (series,) = read_folder(tmp_path)
    assert (series.machine, series.recording, len(series.values)) == ("n", "r", 30)


def test_one_nodes_bounds_never_touch_another_nodes_files(tmp_path: Path) -> None:
    other = TelemetryLog(str(tmp_path), "other", "r")
    other.append(row(0.0), START_S)
    other.flush(START_S)
    log = TelemetryLog(str(tmp_path), "n", "r", LogLimits(max_age_s=60.0, max_bytes=1024))
    log.append(row(0.0), START_S + 100 * HOUR_S)
    log.flush(START_S + 100 * HOUR_S)
    assert len(files(tmp_path / "node=other")) == 1


def test_a_filesystem_uri_works_as_a_folder_does(tmp_path: Path) -> None:
    log = TelemetryLog(f"file://{tmp_path}/log", "n", "r")
    log.append(row(0.0), START_S)
    log.flush(START_S)
    assert len(files(tmp_path / "log")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"uri": "nosuch://x"}, "telemetry_log.uri"),
        ({"machine": "../up"}, "telemetry_log.machine"),
        ({"recording": ".hidden"}, "telemetry_log.recording"),
    ],
)
def test_a_bad_setting_is_one_clear_line(tmp_path: Path, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        TelemetryLog(**{"uri": str(tmp_path), "machine": "n", "recording": "r", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limits", [{"flush_s": 0.0}, {"max_bytes": 10}, {"max_age_s": float("nan")}])
def test_limits_out_of_bounds_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="telemetry_log"):
        LogLimits(**limits)
