"""`python -m train`: from a folder of telemetry to a version that forecasters run, or to one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.grid import CHANNELS, EXTENDED
from models.registry import Registry
from models.schema import COMMON_COLUMNS
from models.series import read_folder
from tests.models.conftest import wave
from train.backtest import backtest, mean_of
from train.dataset import split_machines
from train.job import OWN_DATA, main, verdict
from train.loop import Progress


def telemetry(folder: Path, machines: int = 3, length: int = 240) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for i in range(machines):
        v = wave(length, seed=i)[0]
        gap = np.full(length, np.nan)
        rest = [np.arange(length, dtype=float), v[:, 0], v[:, 1], v[:, 2], v[:, 2], gap, v[:, 4], v[:, 3]]
        columns = dict(zip(COMMON_COLUMNS[2:], rest, strict=True))
        tables.append(pd.DataFrame({"machine": f"m{i}", "recording": "r", **columns}))
    pd.concat(tables).to_parquet(folder / "waves_1s.parquet")
    return folder


def arguments(tmp_path: Path, *more: str) -> list[str]:
    base = ["--local", "--telemetry", str(telemetry(tmp_path / "t")), "--registry", str(tmp_path / "r")]
    return [*base, "--storage", str(tmp_path / "s"), "--made-up", "0", "--epochs", "2", "--hidden", "8", *more]


def test_a_first_training_saves_a_version_with_card_backtest_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--version", "one", "--promote", "always")) == 0
    registry = Registry(str(tmp_path / "r"))
    assert registry.champion() == "one"
    card = registry.card("one")
    assert card["rows"] == 720
    assert len(card["held_out"]) == 1
    models = {r["model"] for r in card["backtest"]}
    assert {"challenger", "challenger_gated", "last_value", "ridge60", "dlinear", "nlinear", "ewma", "mean10"} <= models
    assert {r["target"] for r in card["backtest"]} == {"cpu", "memory", "network"}
    assert (tmp_path / "r" / "one" / "backtest.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 2/2" in capsys.readouterr().out
    assert not list((tmp_path / "s").iterdir()), "nothing is left behind to resume from"


def test_a_net_of_extended_channels_is_trained_saved_and_judged_beside_a_champion_without_them(tmp_path: Path) -> None:
    assert main(arguments(tmp_path, "--version", "usual", "--promote", "always")) == 0
    assert main(arguments(tmp_path, "--version", "wide", "--channels", "extended", "--promote", "always")) == 0
    registry = Registry(str(tmp_path / "r"))
    card = registry.card("wide")
    assert card["channels"] == [*CHANNELS, *EXTENDED]
    assert card["started_from"] is None, "weights of other inputs are nothing to go on from"
    assert {"challenger", "champion"} <= {r["model"] for r in card["backtest"]}
    assert registry.load("wide").net.config.extended


def test_a_device_that_is_not_there_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(arguments(tmp_path, "--device", "cuda")) == 2
    assert "train.device = 'cuda': torch finds no CUDA device" in capsys.readouterr().err


def test_a_killed_training_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Progress.save

    def save_and_die(self: Progress, path: Path) -> None:
        real(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(tmp_path, "--version", "one"))
    assert main(arguments(tmp_path, "--version", "one")) == 0
    out = capsys.readouterr().out
    assert "going on after epoch 1" in out
    assert "epoch 1/2" not in out
    assert "epoch 2/2" in out


def rows(challenger: float, champion: float | None) -> list[dict[str, Any]]:
    key = {"source": "s", "target": "cpu", "metric": "pinball_skill_ridge"}
    out = [{**key, "horizon_s": h, "model": "challenger", "value": challenger} for h in (1.0, 5.0, 10.0)]
    if champion is not None:
        out += [{**key, "horizon_s": h, "model": "champion", "value": champion} for h in (1.0, 5.0, 10.0)]
    return out


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted", "words"),
    [
        (0.2, 0.1, True, "had"),
        (0.2, 0.199, False, "against the champion"),
        (0.1, 0.2, False, "against the champion"),
        (-0.1, -0.5, False, "does not beat ridge"),
        (0.1, None, True, "no champion"),
        (-0.1, None, False, "does not beat ridge"),
    ],
)
def test_a_challenger_is_promoted_only_where_it_beats_champion_and_ridge(
    challenger: float, champion: float | None, promoted: bool, words: str
) -> None:
    decision = verdict(rows(challenger, champion), "old" if champion is not None else "")
    assert decision.promote is promoted
    assert words in decision.reason


def test_without_anything_to_judge_on_nothing_is_promoted() -> None:
    assert not verdict([], "").promote


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: (t / "waves_1s.parquet").unlink(), "no *.parquet"),
        (lambda t: (t / "waves_1s.parquet").write_text("x"), "cannot be read"),
        (lambda t: pd.DataFrame({"machine": ["m"]}).to_parquet(t / "waves_1s.parquet"), "no column"),
    ],
)
def test_bad_telemetry_is_one_clear_line(
    tmp_path: Path, damage: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path)
    damage(tmp_path / "t")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("train: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_retraining_goes_on_from_the_champion_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--version", "one", "--promote", "always")) == 0
    assert main([*arguments(tmp_path, "--version", "two"), "--promote", "never"]) == 0
    assert main([*arguments(tmp_path, "--version", "three"), "--promote", "never", "--start", "nothing"]) == 0
    registry = Registry(str(tmp_path / "r"))
    assert [registry.card(v)["started_from"] for v in ("one", "two", "three")] == [None, "one", None]
    assert not set(registry.card("two")["trained_on"]) & set(registry.card("two")["held_out"])
    out = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in out if line.startswith("epoch 1/2")]
    assert losses[1] < losses[0], "it starts where the champion ended"


def test_the_shipped_model_beats_every_simple_model_on_a_recorded_machine_it_never_saw() -> None:
    registry = Registry()
    trained_on = registry.card(registry.champion())["trained_on"]
    split = split_machines(read_folder(OWN_DATA), 0.25, seed=1)
    assert not {f"{s.source}/{s.machine}" for s in split.held} & set(trained_on)
    table = backtest(split.train, split.held, {"lstm": registry.load(registry.champion())})
    skill = {m: mean_of(table, m, "pinball_skill_last_value") for m in ("last_value", "ewma", "mean10", "ridge60")}
    for model in ("lstm", "lstm_gated"):
        assert mean_of(table, model, "pinball_skill_last_value") > max(skill.values()) + 0.02
    assert skill["last_value"] == pytest.approx(0.0)


def test_the_shipped_model_foresees_a_rhythm_that_simple_models_miss(tmp_path: Path) -> None:
    series = read_folder(telemetry(tmp_path / "t", machines=2, length=400))
    registry = Registry()
    table = backtest(series[:1], series[1:], {"lstm": registry.load(registry.champion())})
    cpu = [r for r in table if r["target"] == "cpu"]
    simple = [mean_of(cpu, m, "pinball_skill_last_value") for m in ("last_value", "ewma", "mean10")]
    assert mean_of(cpu, "lstm", "pinball_skill_last_value") > max(simple) + 0.3
