"""The forecast benchmark judges on machines not trained on, and its page shows what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.forecast import main
from bench.forecast_cost import jitter
from bench.forecast_page import compact, page
from models.registry import Registry
from models.schema import COMMON_COLUMNS
from tests.models.conftest import small_model, wave

METRICS = {"mae", "rmse", "pinball", "pinball_skill_last_value", "pinball_skill_ridge", "coverage_80"}
MODELS = {"last_value", "ewma", "mean10", "ridge60", "dlinear", "lstm", "lstm_gated"}


def telemetry(folder: Path, name: str, machines: int, first: int = 0, length: int = 200) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for i in range(first, first + machines):
        v = wave(length, seed=i)[0]
        rest = [np.arange(length, dtype=float), v[:, 0], v[:, 1], v[:, 2], v[:, 2], v[:, 5], v[:, 4], v[:, 3]]
        columns = dict(zip(COMMON_COLUMNS[2:], rest, strict=True))
        tables.append(pd.DataFrame({"machine": f"m{i}", "recording": "r", **columns}))
    pd.concat(tables).to_parquet(folder / f"{name}_1s.parquet")
    return folder


def run(tmp_path: Path, *arguments: str) -> dict[str, object]:
    out = tmp_path / "out.json"
    assert main(["--epochs", "1", "--json", str(out), *arguments]) == 0
    document: dict[str, object] = json.loads(out.read_text())
    return document


def test_it_trains_on_some_machines_and_judges_on_the_others(tmp_path: Path) -> None:
    folder = telemetry(tmp_path / "t", "waves", 4)
    document = run(tmp_path, "--telemetry", str(folder), "--start", "nothing", "--made-up", "4")
    assert not set(document["trained_machines"]) & set(document["judged_machines"])  # type: ignore[call-overload]
    rows = document["rows"]
    assert isinstance(rows, list)
    assert {r["model"] for r in rows} == MODELS | {"nlinear"}
    assert {r["metric"] for r in rows} >= METRICS
    assert {(r["source"], r["horizon_s"]) for r in rows} == {("waves", float(h)) for h in (1, 2, 3, 5, 8, 10)}
    assert {tuple(r) for r in rows} == {("source", "target", "horizon_s", "model", "metric", "value")}
    zero = [r["value"] for r in rows if r["model"] == "last_value" and r["metric"] == "pinball_skill_last_value"]
    assert zero == pytest.approx([0.0] * len(zero))


def test_all_of_the_judge_folder_is_judged_and_the_champion_is_not_trained(tmp_path: Path) -> None:
    train, held = telemetry(tmp_path / "t", "waves", 2), telemetry(tmp_path / "j", "waves", 2, first=5)
    document = run(tmp_path, "--telemetry", str(train), "--judge", str(held), "--champion")
    assert document["judged_machines"] == ["waves/m5", "waves/m6"]
    assert document["train"] is None
    assert document["model_version"] == Registry().champion()


def test_onsets_and_headroom_are_told_for_every_model_also_a_version_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(str(tmp_path / "r"))
    registry.save(small_model("mine"), {"trained_on": ["waves/m5"]})
    registry.promote("mine")
    train, held = telemetry(tmp_path / "t", "waves", 2), telemetry(tmp_path / "j", "waves", 2, first=5)
    folders = ["--telemetry", str(train), "--judge", str(held), "--champion"]
    for weights in (tmp_path / "r", tmp_path / "r" / "mine"):
        document = run(tmp_path, *folders, "--weights", str(weights))
        assert "mine was trained on waves/m5" in capsys.readouterr().err
        rows: list[dict[str, object]] = document["rows"]  # type: ignore[assignment]
        for metric in ("onset_recall_p70", "headroom_error"):
            cpu = [r for r in rows if r["metric"] == metric and r["target"] == "cpu"]
            assert {r["model"] for r in cpu} == MODELS | {"nlinear", "retrained", "retrained_gated"}
            assert {r["horizon_s"] for r in cpu} == {1.0, 2.0, 3.0, 5.0, 8.0, 10.0}
            assert all(0.0 <= float(str(r["value"])) <= 1.0 for r in cpu)
    counts = document["onsets"]["waves"]  # type: ignore[index, call-overload]
    assert counts["onsets"] > 5
    assert 0.0 < counts["share"]["1"] < counts["share"]["10"] <= 1.0
    flat = [r["value"] for r in rows if r["metric"] == "onset_recall_p70" and r["model"] == "mean10"]
    assert len(flat) == 6


def test_a_version_that_is_not_there_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = telemetry(tmp_path / "t", "waves", 2)
    arguments = ["--telemetry", str(folder), "--champion", "--json", str(tmp_path / "x.json")]
    assert main([*arguments, "--weights", str(tmp_path / "r/none")]) == 2
    assert "no version 'none'" in capsys.readouterr().err


def test_training_never_goes_on_from_a_version_that_saw_a_judged_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(str(tmp_path / "r"))
    registry.save(small_model("leaky"), {"trained_on": ["waves/m5"]})
    registry.promote("leaky")
    train, held = telemetry(tmp_path / "t", "waves", 1), telemetry(tmp_path / "j", "waves", 1, first=5)
    folders = ["--telemetry", str(train), "--judge", str(held), "--registry", registry.uri]
    document = run(tmp_path, *folders)
    assert "was trained on waves/m5" in capsys.readouterr().err
    assert "shipped" not in {r["model"] for r in document["rows"]}  # type: ignore[attr-defined]


def test_missing_telemetry_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--telemetry", str(tmp_path), "--json", str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.forecast: ")
    assert err.count("\n") == 1


def document() -> dict[str, object]:
    rows = []
    for model, skill in (("last_value", 0.0), ("lstm", 0.4), ("lstm_gated", 0.3)):
        for metric in ("pinball_skill_last_value", "pinball_skill_ridge", "coverage_80", "overload_recall"):
            value = -0.125 if (model, metric) == ("lstm", "pinball_skill_ridge") else skill
            key = {"source": "s", "target": "cpu", "horizon_s": 5.0, "model": model, "metric": metric}
            rows.append({**key, "value": value})
    gate = {"source": "s", "target": "cpu", "horizon_s": 5.0, "model": "lstm_gated", "metric": "gate_open"}
    return {
        "command": "python -m bench.forecast",
        "train_s": 1.0,
        "wall_s": 2.0,
        "seed": 1,
        "machine": {"cpus": 2, "python": "3"},
        "versions": {"torch": "2"},
        "judged_machines": ["s/m"],
        "rows": [*rows, {**gate, "value": 0.75}],
    }


def test_the_page_names_what_the_model_loses_and_how_often_the_gate_was_open() -> None:
    text = page(document(), ["forecast-s.png"])
    assert "- `lstm`: s cpu 5 s, -0.125" in text
    assert "| `lstm_gated` | s | 75% | +0.300 |" in text
    assert "![forecast-s.png](forecast-s.png)" in text


def test_the_compact_file_is_the_same_document() -> None:
    assert json.loads(compact(document())) == document()


def test_jitter_counts_intervals_that_are_off_by_more_than_a_twentieth() -> None:
    found = jitter([0.0, 1.0, 2.04, 3.0, 4.2])
    assert found["samples"] == 5
    assert found["within_5_percent"] == pytest.approx(0.75)
    assert found["max_s"] == pytest.approx(0.2)
