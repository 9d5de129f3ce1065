"""A recording is made of machines that rest and work, is the same by its seed, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from actors.procfs import NAN
from actors.telemetry import Sample
from models.schema import arrow_schema
from models.series import read_folder
from shadecast.types import NodeSnapshot
from train.cgroups import Group, version
from train.jobs import WORK, Worker, prepare
from train.loads import KINDS, SHORTEST_PAUSE_S, Job, jobs_of, kinds_of
from train.machine import Processes
from train.record import PREFIX, main, remove_left_behind, why_not_isolated

ROOT = Path(__file__).resolve().parents[2]


def first(seed: int, machine: int, count: int = 60) -> list[Job]:
    return list(itertools.islice(jobs_of(seed, machine), count))


def test_a_machine_does_the_same_by_its_seed_and_others_do_something_else() -> None:
    assert first(1, 0) == first(1, 0)
    assert kinds_of(1, 0) == kinds_of(1, 0)
    others = [first(seed, machine) for seed, machine in ((1, 0), (1, 1), (2, 0))]
    assert all(a != b for a, b in itertools.combinations(others, 2))
    assert {job.kind for job in first(1, 0, 300)} == set(kinds_of(1, 0))


def test_machines_have_kinds_and_habits_of_their_own_and_all_kinds_come() -> None:
    kinds = [kinds_of(1, machine) for machine in range(12)]
    assert set(itertools.chain(*kinds)) == set(KINDS)
    assert len(set(kinds)) > 6
    assert all(4 <= len(k) <= 7 for k in kinds)
    usual = [
        np.median([j.phases[0].seconds for j in first(1, m, 400) if j.kind == "backup"] or [0.0]) for m in range(12)
    ]
    assert len({round(float(u), 1) for u in usual if u}) > 2


@pytest.mark.parametrize("machine", range(6))
def test_a_machine_rests_for_about_half_of_the_time_and_long_enough_for_each_onset_to_count(machine: int) -> None:
    jobs = first(3, machine, 600)
    rest_s = sum(job.pause_s for job in jobs)
    busy_s = sum(phase.seconds for job in jobs for phase in job.phases)
    assert 0.4 < rest_s / (rest_s + busy_s) < 0.62
    assert min(job.pause_s for job in jobs) >= SHORTEST_PAUSE_S
    for job in jobs:
        for phase, law in zip(job.phases, KINDS[job.kind], strict=True):
            assert (phase.name, phase.seconds > 0) == (law.name, True)
            assert law.intensity[0] <= phase.intensity <= law.intensity[1]


def test_every_job_has_an_onset_before_which_something_small_happens_or_nothing() -> None:
    for kind, laws in KINDS.items():
        hard = [law.intensity[0] > 0.4 and law.seconds[0] >= 2.0 for law in laws]
        assert any(hard), kind
        assert all(law.intensity[1] < 0.4 for law in laws[: hard.index(True)] if law.name not in ("load",)), kind


def test_there_is_work_for_every_phase_and_it_can_be_done(tmp_path: Path) -> None:
    assert {law.name for laws in KINDS.values() for law in laws} == set(WORK)
    prepare(tmp_path, 1)
    worker = Worker(1, tmp_path, 64 << 20)
    before = psutil.Process().open_files()
    for name, work in WORK.items():
        unit = work(worker)
        unit()
        assert sum(len(b) for b in worker.held if isinstance(b, bytearray)) < 0.5 * (64 << 20), name
    assert len(psutil.Process().open_files()) <= len(before) + 2


def test_a_job_takes_what_its_phases_ask_for_and_tells_them(tmp_path: Path) -> None:
    prepare(tmp_path, 1)
    command = [
        sys.executable,
        "-I",
        "-S",
        str(ROOT / "train/jobs.py"),
        "training",
        "1",
        str(tmp_path),
        "0.5",
        str(1 << 28),
    ]
    done = subprocess.run(
        command,
        input=json.dumps([["load_data", 0.3, 0.2], ["steps", 0.6, 0.2]]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["load_data", "steps"]
    assert not list(tmp_path.glob("tmp*")), "what it wrote is gone"


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False])
def test_two_machines_are_recorded_each_in_its_folder_and_nothing_of_them_is_left(
    tmp_path: Path, plain: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not plain and (why := why_not_isolated()):
        pytest.skip(f"groups of their own: {why}")
    before = children()
    out = tmp_path / "log"
    arguments = ["--machines", "2", "--minutes", "0.2", "--cpus", "0.2", "--seed", "5", "--out", str(out)]
    assert main([*arguments, *(["--plain"] if plain else [])]) == 0
    assert children() == before
    series = read_folder(out)
    assert {s.machine for s in series} == {"own-5-0", "own-5-1"}
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "node=own-5-0", "node=own-5-1"]
    for one in series:
        assert one.period_s == 1.0
        assert 8 <= len(one.values) <= 14
        assert np.isfinite(one.values[2:, :2]).all(), "CPU and memory are known from the second reading on"
        assert one.extended is not None
        wanted = [0, 1, 2, 3, 5, 6]  # process starts, runnable, blocked, system, page faults, IO
        assert np.isfinite(one.extended[2:, wanted]).all()
    table = pq.read_table(next(out.rglob("node=own-5-0/*/*.parquet")), partitioning=None)
    assert table.schema.names == arrow_schema().names
    document = json.loads((out / "manifest.json").read_text())
    assert [m["seed"] for m in document["machines"]] == [[5, 0], [5, 1]]
    assert [m["kinds"] for m in document["machines"]] == [list(kinds_of(5, 0)), list(kinds_of(5, 1))]
    assert all(m["isolated"] != plain for m in document["machines"])
    planned = first(5, 0, 1)[0]
    told = document["machines"][0]["phases"]
    if planned.pause_s < 10.0:
        assert told[0]["kind"] == planned.kind
        assert told[0]["t_s"] == pytest.approx(planned.pause_s, abs=3.0)
    assert main([*arguments, "--plain"]) == 2, "a folder with a recording in it is not written to again"
    assert "has a recording in it already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_recording_that_is_ended_early_ends_its_machines_and_keeps_what_it_has(
    tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "log"
    command = [sys.executable, "-m", "train.record", "--machines", "1", "--minutes", "5", "--seed", "7", "--plain"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    )
    until_s = time.monotonic() + 120.0
    while not list(out.rglob("*.parquet")):
        assert time.monotonic() < until_s, "nothing was written"
        assert process.poll() is None
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(how)
    process.wait(60)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    assert not list(tmp_path.glob("shadecast-record-*")), "scratch folders are gone, too"
    assert len(read_folder(out)) == 1
    if how is signal.SIGINT:
        assert process.returncode == 0
        assert json.loads((out / "manifest.json").read_text())["machines"][0]["rows"] >= 10


@pytest.mark.parametrize(
    ("option", "words"), [("--minutes=0", "record.minutes = 0.0"), ("--machines=0", "record.machines = 0")]
)
def test_what_cannot_be_recorded_is_said_in_one_line(
    tmp_path: Path, option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def proc(folder: Path, pid: int, state: str, session: int, ticks: tuple[int, int, int, int], switches: int) -> None:
    words = [state, 1, session, session, 0, 0, 0, 10, 20, 0, 0, *ticks, 20, 0, 1, 0, 5, 0, 256]
    (folder / str(pid)).mkdir(parents=True, exist_ok=True)
    (folder / str(pid) / "stat").write_text(f"{pid} (a (b) c) " + " ".join(map(str, words)))
    (folder / str(pid) / "status").write_text(f"voluntary_ctxt_switches:\t{switches}\nnonvoluntary_ctxt_switches:\t1\n")
    (folder / str(pid) / "io").write_text(f"read_bytes: {1000 * switches}\nwrite_bytes: 0\n")


def test_what_a_process_used_is_its_parents_when_it_has_ended_and_counts_once(tmp_path: Path) -> None:
    own = os.getpid()
    unknown = Sample(NodeSnapshot(*[NAN] * 7), "host")
    processes = Processes(0.5, 1 << 24, isolated=False, proc=tmp_path)
    proc(tmp_path, own, "R", 3, (10, 0, 0, 0), 5)
    proc(tmp_path, 900_001, "R", 3, (20, 10, 0, 0), 7)
    proc(tmp_path, 900_002, "D", 4, (999, 999, 0, 0), 999)  # of another session
    sample = processes.complete(unknown, 100.0)
    assert math.isnan(sample.snapshot.cpu_fraction)
    assert (sample.runnable, sample.blocked) == (1.0, 0.0)
    proc(tmp_path, own, "R", 3, (11, 0, 28, 15), 6)  # its child used 13 ticks more and has ended
    for file in (tmp_path / "900001").iterdir():
        file.unlink()
    (tmp_path / "900001").rmdir()
    proc(tmp_path, 900_003, "D", 3, (0, 0, 0, 0), 2)
    sample = processes.complete(unknown, 101.0)
    ticks = 11 + 28 + 15 - 40
    assert sample.snapshot.cpu_background_fraction == pytest.approx(ticks / os.sysconf("SC_CLK_TCK") / 0.5)
    assert sample.process_starts_per_s == 1.0
    assert (sample.runnable, sample.blocked) == (0.0, 1.0)
    assert sample.context_switches_per_s == pytest.approx(1 + 3)
    isolated = replace(processes, isolated=True, _last=None)
    known = replace(unknown, system_fraction=0.3, io_bytes_per_s=77.0)
    for now_s in (102.0, 103.0):
        sample = isolated.complete(known, now_s)
    assert (sample.system_fraction, sample.io_bytes_per_s) == (0.3, 77.0), "what the group tells stands"


def test_groups_that_a_killed_recording_left_behind_go_with_the_next_and_those_of_a_running_one_stay() -> None:
    if why := why_not_isolated():
        pytest.skip(f"groups of their own: {why}")
    stale, running = (Group(version(), f"{PREFIX}{pid}") for pid in (2**22 + 1, os.getpid()))
    try:
        for group in (stale, running):
            group.make()
        remove_left_behind(version())
        assert not any(folder.exists() for folder in stale.folders)
        assert all(folder.exists() for folder in running.folders)
    finally:
        for group in (stale, running):
            group.remove()
