"""One self-retraining on a log as forecasters write it: looked at, trained on, compared, promoted or not, settled."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.telemetry_log import TelemetryLog
from models.grid import Array
from models.lstm import ForecastNet, LstmConfig
from models.registry import Registry, RegistryError
from models.series import Series, read_folder
from shadecast.retraining import LogContent, RetrainPlan
from tests.models.conftest import small_model
from train.evaluate import judge, onset_truth, places
from train.onsets import onsets
from train.retrain import Effort, Places, Table, begin, content, retrain, settle, split_fleet
from train.snapshot import newest

START_S = 1_700_000_000.0
QUICK = Effort(made_up=0, steps=60, epochs=30)
PLAN = RetrainPlan(least_machine_hours=1.0, least_onsets=20, block_s=60.0)


def jobs(length: int, seed: int) -> Array:
    """CPU of others: quiet, a rise that begins low, a job of a third of a minute, quiet again."""
    rng = np.random.default_rng(seed)
    load = np.full(length, 0.1)
    at = 40
    while at + 60 < length:
        load[at : at + 4] = 0.3
        load[at + 4 : at + 24] = 0.8
        at += int(rng.integers(50, 90))
    return np.clip(load + 0.02 * rng.standard_normal(length), 0.0, 1.0)


def record(log: Path, machines: int = 3, length: int = 1500) -> Path:
    for m in range(machines):
        writer = TelemetryLog(str(log), f"m{m}", "r")
        for t, cpu in enumerate(jobs(length, m)):
            row = {"t_s": float(t), "cpu_fraction": cpu, "cpu_background_fraction": cpu, "memory_fraction": 0.3}
            writer.append(row, START_S + t)
        writer.flush(START_S + length)
    return log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("fleet") / "log")


@pytest.fixture
def places_of(tmp_path: Path, log: Path) -> Places:
    """With a registry whose champion was never trained."""
    torch.manual_seed(0)
    registry = Registry(str(tmp_path / "registry"))
    registry.save(replace(small_model("first"), net=ForecastNet(LstmConfig(hidden=8)).eval()), {})
    registry.promote("first")
    return Places(str(log), registry.uri, str(tmp_path / "runs"))


def test_a_candidate_that_is_better_on_held_out_times_and_machines_is_promoted_with_its_numbers_in_the_card(
    places_of: Places,
) -> None:
    found = retrain(places_of, PLAN, QUICK, math.nan)
    registry = Registry(places_of.registry)
    assert found["outcome"] == "promoted", found
    version = found["version"]
    assert (registry.champion(), registry.history()) == (version, ["first"]), "the former champion stays"
    assert registry.challenger() == "first", "and is judged on the same live samples"
    card = registry.card(version)["retrain"]
    held = card["held_out"]
    assert held["headroom_gain"] > 2 * held["headroom_gain_error"] > 0
    errors = held["headroom_squared_error"]
    assert held["headroom_gain"] == pytest.approx(1 - errors["candidate"] / errors["champion"], abs=1e-3)
    assert set(held["onset_recall_p70"]) == {"candidate", "champion"}
    seen, unseen = card["held_out_known_machines"], card["held_out_unseen_machines"]
    assert held["samples"] == seen["samples"] + unseen["samples"]
    assert unseen["blocks"] > 0
    assert card["log"]["machine_hours"] == pytest.approx(3 * 1500 / 3600)
    assert not list(Path(places_of.storage).iterdir()), "nothing is left behind"

    again = settle(places_of.registry, version, "first", rolled_back=True)
    assert again == "rolled back to first"
    assert (registry.champion(), registry.challenger()) == ("first", "")
    assert version in registry.versions()
    assert settle(places_of.registry, version, "first", rolled_back=True).startswith("left as it is: first")


def test_a_candidate_that_is_no_better_is_kept_out_and_nothing_changes(places_of: Places, tmp_path: Path) -> None:
    where = replace(places_of, registry=str(tmp_path / "begun"))
    shipped = begin(where.registry)
    registry = Registry(where.registry)
    untrained = Effort(made_up=0, steps=1, epochs=1, start="nothing")
    found = retrain(where, PLAN, untrained, math.nan)
    assert found["outcome"] == "kept", found
    assert "not by more than the uncertainty" in registry.card(found["version"])["verdict"]
    assert (registry.champion(), registry.history(), registry.challenger()) == (shipped, [], "")
    assert found["held_out"]["headroom_gain"] < 0


def test_the_shipped_version_learns_the_onsets_of_a_fleets_own_jobs(places_of: Places, tmp_path: Path) -> None:
    where = replace(places_of, registry=str(tmp_path / "begun"))
    shipped = begin(where.registry)
    found = retrain(where, PLAN, Effort(made_up=0, steps=150, epochs=75), math.nan)
    held = found["held_out"]
    print(found["reason"], held, found["held_out_unseen_machines"])
    assert (found["outcome"], found["former"]) == ("promoted", shipped)
    assert held["headroom_gain"] > 0.3
    recall = held["onset_recall_p70"]
    assert recall["candidate"] > recall["champion"] + 0.3
    assert found["held_out_unseen_machines"]["headroom_gain"] > 0.2, "also on a machine that was never trained on"


def test_an_operators_choice_during_a_probation_stays(places_of: Places) -> None:
    registry = Registry(places_of.registry)
    for version in ("second", "operators"):
        registry.save(small_model(version), {})
        registry.promote(version)
    for back in (True, False):
        words = settle(places_of.registry, "second", "first", rolled_back=back)
        assert words == "left as it is: operators was made the champion meanwhile"
    assert registry.champion() == "operators"


def test_a_version_that_stays_ends_the_trial_of_the_former_one(places_of: Places) -> None:
    registry = Registry(places_of.registry)
    registry.save(small_model("second"), {})
    registry.promote("second")
    registry.challenge("first")
    assert settle(registry.uri, "second", "first", rolled_back=False) == "second stays"
    assert (registry.champion(), registry.challenger()) == ("second", "")


def test_a_small_or_empty_log_is_said_and_nothing_is_written(places_of: Places, tmp_path: Path) -> None:
    found = retrain(places_of, RetrainPlan(), QUICK, math.nan)
    assert found["outcome"] == "small"
    assert "machine hours with" in found["reason"]
    nothing = retrain(replace(places_of, telemetry=str(tmp_path / "none")), PLAN, QUICK, math.nan)
    assert (nothing["outcome"], nothing["reason"]) == ("small", "the log is empty")
    newer = retrain(places_of, PLAN, QUICK, START_S + 1e6)
    assert newer["reason"].startswith("since the last training came 0 machine hours with 0 onsets")
    assert Registry(places_of.registry).versions() == ["first"]


def test_without_a_champion_that_loads_a_training_ends_with_a_reason(places_of: Places) -> None:
    (Path(places_of.registry) / "first" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(RegistryError, match="no champion that loads"):
        retrain(places_of, PLAN, QUICK, math.nan)


def test_an_empty_registry_begins_with_the_shipped_version(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "r"))
    assert begin(registry.uri) == Registry().champion() == registry.champion()
    registry.save(small_model("mine"), {})
    registry.promote("mine")
    assert begin(registry.uri) == "mine"
    assert registry.load(registry.history()[0]).version == Registry().champion()


def test_a_step_in_a_process_of_its_own_is_humble_and_tells_a_failure_as_a_value(places_of: Places) -> None:
    """In a process of its own here, too: its priority cannot be raised again."""
    registry = Path(places_of.registry)
    before = (registry / "champion.json").read_bytes()
    (registry / "first" / "weights.safetensors").write_bytes(b"x")
    values = {"where": asdict(places_of), "plan": asdict(PLAN), "effort": asdict(QUICK), "trained_wall_s": None}
    code = (
        "import json, os, sys; from train.retrain import carry_out; values = json.loads(sys.argv[1]); "
        "found = [carry_out('retrain', values), carry_out('begin', {**values, 'effort': {}})]; "
        "import torch; print(json.dumps([*found, os.nice(0), torch.get_num_threads()]))"
    )
    ran = subprocess.run([sys.executable, "-c", code, json.dumps(values)], capture_output=True, text=True, check=True)
    failed, begun, nice, threads = json.loads(ran.stdout.splitlines()[-1])
    assert set(failed) == {"failed"}
    assert "no champion that loads" in failed["failed"]
    assert begun == {"champion": "first"}
    assert (nice, threads) == (19, 1)
    assert (registry / "champion.json").read_bytes() == before


def test_all_that_is_held_out_is_later_than_what_is_trained_on_and_one_machine_is_never_trained_on(log: Path) -> None:
    series = read_folder(log)
    split, cut_wall_s = split_fleet(series, 0.25, seed=1)
    assert max(s.ended_wall_s for s in split.train) < cut_wall_s <= min(s.began_wall_s for s in split.held)
    assert {s.machine for s in split.held} == {"m0", "m1", "m2"}
    assert len({s.machine for s in split.train}) == 2
    rows = sum(len(s.values) for s in split.held)
    assert rows == pytest.approx(0.25 * 4500, abs=3)
    alone, _ = split_fleet(series[:1], 0.25, seed=1)
    assert {s.machine for s in alone.train} == {s.machine for s in alone.held}, "one machine: held out in time only"


def test_a_later_log_has_a_later_cut_so_that_the_champion_has_not_seen_what_it_is_judged_on(tmp_path: Path) -> None:
    earlier = read_folder(record(tmp_path / "a", machines=2, length=400))
    later = read_folder(record(tmp_path / "b", machines=2, length=500))
    assert split_fleet(later, 0.25, 1)[1] > split_fleet(earlier, 0.25, 1)[1]
    without_beginning = [replace(s, values=s.values[100:], began_wall_s=s.began_wall_s + 100) for s in later]
    assert split_fleet(without_beginning, 0.25, 1)[1] > split_fleet(later, 0.25, 1)[1], (
        "also where age has deleted some"
    )


def test_a_log_is_counted_in_known_samples_and_onsets_and_what_is_new_of_them(log: Path) -> None:
    series = read_folder(log)
    count = sum(int(onsets(s.values[:, 0]).sum()) for s in series)
    assert count > 40
    assert content(series, math.nan) == LogContent(pytest.approx(1.25), count, pytest.approx(1.25), count)
    half = content(series, START_S + 750)
    assert (half.machine_hours, half.onsets) == (pytest.approx(1.25), count)
    assert half.new_machine_hours == pytest.approx(0.625)
    assert 0 < half.new_onsets < count
    blind = [replace(s, values=np.full_like(s.values, np.nan)) for s in series]
    assert content(blind, math.nan) == LogContent(0.0, 0, 0.0, 0)


def test_places_say_row_for_row_what_the_judged_instants_are() -> None:
    long, short = jobs(200, 1), jobs(130, 2)
    series = [
        Series("own", name, "r", 1.0, np.stack([load] * 6, axis=1).astype(np.float32), START_S)
        for name, load in (("long", long), ("short", short), ("tiny", long[:50]))
    ]
    which, sample = places(series)
    judged = judge(small_model(), series)
    assert len(which) == len(sample) == len(judged.truth) == len(onset_truth(series)[0])
    assert set(which) == {0, 1}
    truth = np.array(
        [series[w].values[t + 1, 0] for w, t in zip(which, sample, strict=True) if t + 1 < len(series[w].values)]
    )
    assert np.allclose(truth, judged.truth[np.isfinite(judged.truth[:, 0, 0]), 0, 0])


def test_blocks_are_of_one_series_and_add_up_to_the_mean_error() -> None:
    series = [
        Series("own", name, "r", 1.0, np.stack([jobs(400, i)] * 6, axis=1).astype(np.float32), START_S)
        for i, name in enumerate(("a", "b"))
    ]
    candidate, champion = judge(small_model(seed=1), series), judge(small_model(seed=2), series)
    table = Table.of(series, candidate, champion, block_s=100.0)
    blocks = table.blocks()
    assert len(blocks) == 2 * 4, "samples 59 to 99 are the first"
    for mean, total in (
        (table.candidate, sum(b.other for b in blocks)),
        (table.champion, sum(b.reference for b in blocks)),
    ):
        assert np.nansum(mean) == pytest.approx(total)
    same = Table.of(series, champion, champion, block_s=100.0).compare()
    assert same.headroom.gain == 0.0
    assert same.recall_error == 0.0
    assert same.candidate_recall == same.champion_recall


def test_of_a_large_log_the_newest_hours_of_all_nodes_are_read(tmp_path: Path) -> None:
    for machine in ("a", "b"):
        writer = TelemetryLog(str(tmp_path), machine, "r")
        for hour in range(3):
            for t in range(100):
                writer.append({"t_s": 3600.0 * hour + t}, START_S + 3600.0 * hour + t)
        writer.flush(START_S + 3 * 3600.0)
    files = sorted(tmp_path.rglob("*.parquet"))

    def hours(most_rows: int) -> list[int]:
        return sorted({len([f for f in newest(files, most_rows) if f"node={m}" in str(f)]) for m in ("a", "b")})

    assert hours(1_000_000) == [3]
    assert hours(400) == [2]
    assert hours(399) == [1]
    assert hours(1) == [1], "the last hour at least"
