"""A training job reads the log of a running cluster: what it began with is what it goes on with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from actors.telemetry_log import TelemetryLog
from models.series import Series, read_folder, telemetry_files
from tests.train.test_job import arguments
from train import job
from train.dataset import data_hash
from train.snapshot import snapshot

START_S = 1_700_000_000.0


def write(log: TelemetryLog, first: int, last: int) -> None:
    for t in range(first, last):
        log.append({"t_s": float(t), "cpu_fraction": 0.01 * (t % 50)}, START_S + t)
    log.flush(START_S + last)


@pytest.mark.parametrize("links", [True, False])
def test_what_is_replaced_added_or_deleted_meanwhile_is_not_seen(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    live, storage = tmp_path / "live", tmp_path / "storage"
    a, b = TelemetryLog(str(live), "a", "r"), TelemetryLog(str(live), "b", "r")
    write(a, 0, 30)
    write(b, 0, 30)
    before = data_hash(read_folder(live))
    with snapshot(live, storage) as still:
        opened = pd.read_parquet(still / telemetry_files(live)[0].relative_to(live), partitioning=None)
        write(a, 30, 60)
        telemetry_files(live)[1].unlink()
        write(TelemetryLog(str(live), "c", "r"), 0, 30)
        assert data_hash(read_folder(still)) == before
        assert len(opened) == 30
        assert {s.source for s in read_folder(still)} == {"own"}
    assert {s.machine for s in read_folder(live)} == {"a", "c"}
    assert not list(storage.iterdir())


def test_a_file_deleted_between_listing_and_reading_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live"
    write(TelemetryLog(str(live), "a", "r"), 0, 30)
    gone = live / "node=a" / "hour=20231114T21" / "r.parquet"
    found = telemetry_files(live)
    monkeypatch.setattr("train.snapshot.telemetry_files", lambda _: [gone, *found])
    with snapshot(live, tmp_path / "storage") as still:
        assert len(read_folder(still)) == 1


def test_a_file_behind_a_symbolic_link_is_read(tmp_path: Path) -> None:
    real, live = tmp_path / "real", tmp_path / "live"
    write(TelemetryLog(str(real), "a", "r"), 0, 30)
    live.mkdir()
    (live / "a_1s.parquet").symlink_to(os.path.relpath(telemetry_files(real)[0], live))
    with snapshot(live, tmp_path / "storage") as still:
        assert len(read_folder(still)) == 1


def test_a_job_trains_on_what_its_card_says_while_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path, "--version", "one")
    seen: list[Series] = []

    def read_and_replace(folder: Path) -> list[Series]:
        seen.extend(read_folder(folder))
        longer = pd.read_parquet(tmp_path / "t" / "waves_1s.parquet")
        more = longer.assign(t_s=longer["t_s"] + 240.0)
        pd.concat([longer, more]).to_parquet(tmp_path / "t" / "new")
        (tmp_path / "t" / "new").replace(tmp_path / "t" / "waves_1s.parquet")
        assert data_hash(read_folder(folder)) == data_hash(seen)
        return seen

    monkeypatch.setattr(job, "read_folder", read_and_replace)
    assert job.main(command) == 0
    assert "720 rows" in capsys.readouterr().out
    assert sum(len(s.values) for s in read_folder(tmp_path / "t")) == 1440


def test_a_job_that_is_told_to_end_takes_its_snapshot_along(tmp_path: Path) -> None:
    live, storage = tmp_path / "live", tmp_path / "storage"
    write(TelemetryLog(str(live), "a", "r"), 0, 600)
    write(TelemetryLog(str(live), "b", "r"), 0, 600)
    command = [sys.executable, "-m", "train", "--local", "--telemetry", live, "--storage", storage]
    command += ["--registry", tmp_path / "registry", "--start", "nothing", "--hold-out", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        deadline_s = time.monotonic() + 60.0
        while not list(storage.glob("run-*")):  # it has read what it trains on
            assert running.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert list(storage.glob("telemetry-*"))
        running.terminate()
        assert running.wait(60.0) == 143
    assert not list(storage.glob("telemetry-*"))
