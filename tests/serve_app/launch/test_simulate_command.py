"""`shadecast simulate`: the user's own trace and telemetry; what it answers and refuses, and that it is installed."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

from tests.serve_app.launch.plane_scene import run
from tests.serve_app.launch.test_commands import answer

ROOT = Path(__file__).resolve().parents[3]
BEGAN_S = 1_790_000_000.0
QUICK = ["--arms", "round_robin,serve_default,live_capacity,oracle"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def csv(
    path: str = "t.csv", seconds: int = 720, every_s: float = 0.2, began_s: float = 0.0, took_s: float = 0.1
) -> str:
    """Requests at a steady rate."""
    lines = [f"{began_s + k * every_s:.3f},{took_s}" for k in range(int(seconds / every_s))]
    Path(path).write_text("\n".join(["timestamp,duration_s", *lines]) + "\n")
    return path


def log(path: str = "log.parquet", seconds: int = 800, hogged: tuple[int, ...] = (0,), wall_s: float = BEGAN_S) -> str:
    """Telemetry of machines m0 to m2: others take nine tenths of those that are hogged, from 300 to 500 s."""
    at = np.arange(seconds, dtype=float)
    frames = []
    for number in range(3):
        cpu = np.where((at >= 300) & (at < 500) & (number in hogged), 0.9, 0.05)
        frames.append(
            pd.DataFrame(
                {
                    "machine": f"m{number}", "recording": "r", "t_s": at, "wall_s": wall_s + at, "cpu_fraction": cpu,
                    "cpu_background_fraction": cpu, "memory_fraction": 0.4, "net_rx_bytes_per_s": 0.0,
                    "net_tx_bytes_per_s": 0.0,
                }
            )
        )  # fmt: skip
    pd.concat(frames).to_parquet(path)
    return path


def simulated(monkeypatch: pytest.MonkeyPatch, capsys: Any, *options: str) -> dict[str, Any]:
    assert run(monkeypatch, "simulate", *options, "--json") == 0
    return answer(capsys, "simulate")


def by_arm(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["arm"]: arm for arm in found["arms"]}


# ---------------------------------------------------------------- what it answers


def test_a_machine_that_others_slow_down_costs_the_default_and_less_whoever_measures_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = simulated(
        monkeypatch, capsys, "--trace", csv(seconds=630, every_s=0.03), "--telemetry", log(), *QUICK, "--slots", "2",
        "--policy", "no_rescue:balance.rescue_fraction=0",
    )  # fmt: skip
    arms = by_arm(found)
    assert list(arms) == ["round_robin", "serve_default", "live_capacity", "oracle", "no_rescue"]
    assert {arm["requests"] for arm in arms.values()} == {21_000}
    assert found["base"] == "serve_default"
    assert found["machines"] == ["m0", "m1", "m2"]
    assert found["load"] == pytest.approx(0.1 / 0.03 / (3 * 2 * (0.95 - 0.85 * 200 / 630 / 3)), rel=0.05)
    assert arms["round_robin"]["p99_s"] > 10 * arms["live_capacity"]["p99_s"]
    assert arms["live_capacity"]["slo_miss_fraction"] < 0.5 * arms["serve_default"]["slo_miss_fraction"]
    assert arms["oracle"]["slo_miss_fraction"] <= arms["live_capacity"]["slo_miss_fraction"]
    low, high = arms["live_capacity"]["saved_bounds"]
    assert 0.0 < low < arms["live_capacity"]["saved_fraction"] < high
    assert arms["serve_default"]["saved_fraction"] == 0.0
    assert found["too_little"] is None


def test_the_table_fits_80_columns_and_the_page_needs_nothing_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    evil = csv("<script>alert(1).csv")
    assert run(monkeypatch, "simulate", "--trace", evil, "--telemetry", log()) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 80
    for arm in ("round_robin", "serve_default", "live_capacity", "shadecast", "oracle"):
        assert re.search(rf"^{arm} .* %", out, re.MULTILINE)
    assert "Wrote shadecast-simulate.html" in out
    page = Path("shadecast-simulate.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6
    assert all(len(ElementTree.fromstring(drawing)) > 3 for drawing in drawings)
    assert "m0" in page
    assert "<script" not in page
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)


def test_no_page_is_written_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    found = simulated(monkeypatch, capsys, "--trace", csv(seconds=60), "--arms", "oracle", "--html", "")
    assert found["html"] is None
    assert not list(Path().glob("*.html"))
    assert found["too_little"] == "not enough data: requests in 2 half-minutes, 20 are needed (10 minutes)"
    assert by_arm(found)["oracle"]["slo_miss_bounds"] is None
    assert found["machines"] is None
    assert found["replicas"] == 4


def test_with_both_in_calendar_time_the_log_is_played_as_it_was_then(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    began = datetime.fromtimestamp(BEGAN_S + 240, UTC)
    rows = [f"{began.isoformat()},0.1", f"{datetime.fromtimestamp(BEGAN_S + 539, UTC).isoformat()},0.1"]
    Path("t.csv").write_text("\n".join(["Timestamp,Duration", *rows]) + "\n")
    found = simulated(monkeypatch, capsys, "--trace", "t.csv", "--telemetry", log(), "--arms", "oracle")
    free = {each["machine"]: each["free"] for each in found["free_by_block"]}
    assert [round(each, 2) for each in free["m0"]] == [0.95] * 2 + [0.1] * 6 + [pytest.approx(0.38, abs=0.02), 0.95]
    assert all(each == pytest.approx(0.95) for each in free["m1"])
    assert any("as it was at the time" in note for note in found["notes"])


def test_with_no_common_time_both_begin_together_and_a_shorter_log_begins_again(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = simulated(
        monkeypatch,
        capsys,
        "--trace",
        csv(seconds=1200),
        "--telemetry",
        log(),
        "--arms",
        "oracle",
        "--machines",
        "m2,m0",
    )
    free = {each["machine"]: each["free"] for each in found["free_by_block"]}
    assert list(free) == ["m2", "m0"]
    hogged = [30 * k for k, each in enumerate(free["m0"]) if each < 0.2]
    assert hogged == [*range(270, 450, 30), *range(1080, 1200, 30)]
    assert any("begins again" in note for note in found["notes"])


def test_published_formats_are_read_and_only_the_part_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    azure = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    azure += [f"2023-11-16 18:{17 + k // 60:02}:{k % 60:02}.9799600,1000,50" for k in range(300)]
    with gzip.open("a.csv.gz", "wt") as file:
        file.write("\n".join(azure))
    lines = [json.dumps({"timestamp": 3000 * (k // 3), "input_length": 1000, "output_length": 50}) for k in range(300)]
    Path("m.jsonl").write_text("\n".join(lines))
    for trace in ("a.csv.gz", "m.jsonl"):
        found = simulated(monkeypatch, capsys, "--trace", trace, "--for", "100s", "--arms", "oracle")
        assert found["trace"]["sizes"] == "tokens"
        assert found["trace"]["mean_work_s"] == pytest.approx(1.1)
        assert found["trace"]["requests"] == pytest.approx(100, abs=4)
        assert (found["slots"], found["batch_half"]) == (32, 16.0)
    twice = simulated(monkeypatch, capsys, "--trace", "a.csv.gz", "--load-factor", "2", "--arms", "oracle")
    once = simulated(monkeypatch, capsys, "--trace", "a.csv.gz", "--arms", "oracle")
    assert twice["load"] == pytest.approx(2 * once["load"])
    assert sum(twice["rate_by_block"][:4]) == pytest.approx(2 * sum(once["rate_by_block"][:4]), rel=0.02)


def test_sizes_come_from_a_column_or_are_drawn_and_the_answer_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("s.csv").write_text("when,rows\n" + "".join(f"{k},{k % 3}\n" for k in range(60)))
    sized = simulated(
        monkeypatch, capsys, "--trace", "s.csv", "--time-column", "when", "--size-column", "rows", "--mean-s", ".3",
        "--arms", "oracle",
    )  # fmt: skip
    assert (sized["trace"]["sizes"], sized["trace"]["mean_work_s"]) == ("sizes", pytest.approx(0.3, rel=0.01))
    drawn = simulated(monkeypatch, capsys, "--trace", "s.csv", "--time-column", "when", "--arms", "oracle")
    assert (drawn["trace"]["sizes"], drawn["trace"]["mean_work_s"]) == ("drawn", 0.1)
    assert any("tells no sizes" in note for note in drawn["notes"])


def test_several_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = ["--trace", csv(seconds=120), "--telemetry", log(), "--arms", "round_robin,live_capacity", "--seeds", "2"]
    one = simulated(monkeypatch, capsys, *options)
    assert simulated(monkeypatch, capsys, *options, "--jobs", "2")["arms"] == one["arms"]
    assert one["arms"][0]["requests"] == 2 * 600


# ---------------------------------------------------------------- what it refuses


def rows(*lines: str) -> str:
    return "\n".join(lines) + "\n"


HEAD = "timestamp,duration_s"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.csv", None, "no such file"),
        ("t.txt", "x", "must end with .csv"),
        ("t.csv", "", "no column of times; it has none"),
        ("t.csv", rows("a,b", "1,2"), "no column of times; it has a, b: name one by --time-column"),
        ("t.csv", rows(HEAD), "has 0 requests, at least 2"),
        ("t.csv", rows(HEAD, "1,2"), "has 1 requests, at least 2"),
        ("t.csv", rows(HEAD, "5,1", "4,1"), "request 2: comes 1 s before the one above it; sort"),
        ("t.csv", rows(HEAD, "5,1", "5,1"), "all requests come at once"),
        ("t.csv", rows(HEAD, "5,1", "soon,1"), "time 'soon': must be seconds or ISO 8601"),
        ("t.csv", rows(HEAD, "5,1", ",1"), "time '': must be seconds or ISO 8601"),
        ("t.csv", rows(HEAD, "-5,1", "4,1"), "time '-5': must be seconds from 0"),
        ("t.csv", rows(HEAD, "nan,1", "4,1"), "time 'nan': must be seconds from 0"),
        ("t.csv", rows(HEAD, "1700000000000,1", "1700000001000,1"), "(the year 2100); no ms"),
        ("t.csv", rows(HEAD, "1,1", "1700000000,1"), "19676 days lie between first and last request"),
        ("t.csv", rows(HEAD, "1,1", "2,-1"), "request 2: duration_s = '-1': must be a number of at least 0"),
        ("t.csv", rows(HEAD, "1,1", "2,inf"), "must be a number of at least 0"),
        ("t.csv", rows(HEAD, "1,1", "2"), "request 2: duration_s = None"),
        ("t.csv", rows(HEAD, "1,1", "2,100000"), "more than a day; give seconds"),
        ("t.csv", rows("timestamp,size", "1,0", "2,0"), "size is 0 in every request"),
        ("t.csv", rows(AZURE, "2023-11-16 18:17:03.9,5,5", "2023-11-16 18:17:01.9,5,5"), "comes 2 s before"),
        (
            "t.csv",
            rows(AZURE, "2023-11-16 18:17:03.9,5,5", "2023-11-16 18:17:04.9,5,-5"),
            "a negative number of tokens",
        ),
        ("t.csv", rows(AZURE, "2023-11-16 18:17:03.9,many,5"), "line 2: TIMESTAMP must be ISO 8601, ContextTokens"),
        ("t.csv.gz", "not gzip", "cannot be read"),
        ("t.jsonl", "{}\n", "line 1: must be JSON with timestamp (ms), input_length, output_length"),
        ("t.jsonl", "", "has 0 requests"),
    ],
)
def test_a_trace_that_cannot_be_played_is_refused_in_one_line_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        Path(name).write_text(text)
    before = sorted(Path().rglob("*"))
    assert run(monkeypatch, "simulate", "--trace", name) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert message in told.err
    assert name in told.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--telemetry", "absent"], "--telemetry absent: no such file or folder"),
        (["--telemetry", "empty"], "no *.parquet telemetry here"),
        (["--telemetry", "t.csv"], "--telemetry t.csv"),
        (["--telemetry", "bare.parquet"], "no column machine, recording"),
        (["--telemetry", "log.parquet", "--replicas", "4"], "the telemetry has 3 machines"),
        (["--telemetry", "log.parquet", "--replicas", "2", "--machines", "m1"], "--machines names 1 machines"),
        (["--telemetry", "log.parquet", "--machines", "m9"], "--machines 'm9': not in the log; it has m0, m1, m2"),
        (["--machines", "m1"], "give --telemetry, too"),
        (["--arms", "best"], "--arms 'best': unknown; known are random, round_robin"),
        (["--policy", "fast"], "must be NAME:section.key=value"),
        (["--policy", "shadecast:balance.slots=2"], "shadecast is the name of another arm"),
        (["--policy", "x:balance.speed=2"], "--policy x: balance.speed = 2: unknown setting"),
        (["--policy", "x:balance.rescue_fraction=7"], "must be a number from 0 to 0.2"),
        (["--policy", "x:speed=7"], "'speed=7' must be section.key=value"),
        (["--for", "soon"], "--for 'soon'"),
        (["--for", "0s"], "give more"),
        (["--time-column", "when"], "--time-column 'when'"),
        (["--html", "nowhere/x.html"], "--html nowhere/x.html: there is no folder"),
        (["--html", "empty"], "is a folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str
) -> None:
    csv(seconds=60)
    log()
    Path("empty").mkdir()
    pd.DataFrame({"cpu_fraction": [0.1]}).to_parquet("bare.parquet")
    before = sorted(Path().rglob("*"))
    assert run(monkeypatch, "simulate", "--trace", "t.csv", *options, "--json") == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1
    assert json.loads(told.out)["exit_code"] == 2
    assert sorted(Path().rglob("*")) == before


# ---------------------------------------------------------------- installed


def test_all_that_the_command_imports_of_ours_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in ROOT.glob("[a-z]*/**/__init__.py")}
    installed = {name for name in folders if any(fnmatchcase(name, pattern) for pattern in include)}
    code = (
        "import sys, bench.simulate.what_if, bench.simulate.own_machines, bench.simulate.shipped\n"
        "print(*(m for m in sys.modules if m.split('.')[0] in ('bench', 'models', 'actors', 'train', 'shadecast')))\n"
        "print(*(m for m in ('scipy.stats', 'matplotlib') if m in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    ours, extras = ran.stdout.splitlines()
    assert "bench.simulate.arms.product" in ours
    for module in ours.split():
        assert module in installed or module.rpartition(".")[0] in installed, module
    assert extras == "", "the extra `bench` is not needed"
