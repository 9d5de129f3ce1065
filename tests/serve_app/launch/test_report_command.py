"""`shadecast report`: what an observing deployment would have gained, from a real coordinator's answers."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from serve_app.launch.processes import CoordinatorProcess
from shadecast.types import Outcome, ReplicaReport, RouterReport
from tests.serve_app.launch.plane_scene import PlaneScene, run
from tests.serve_app.launch.test_commands import answer

SHOP = "shop/<script>alert(1)</script>"


class ObservedScene(PlaneScene):
    """Beside the deployments that Shadecast routes, one that only observes: replica b is five times as slow."""

    def __init__(self, seconds: int, *, newcomer_fails: bool = False) -> None:
        super().__init__(5)
        rng = random.Random(3)

        async def play() -> None:
            for second in range(1, seconds + 1):
                self.scene.now_s += 1.0
                views = []
                for name, slow in (("a", 1.0), ("b", 5.0), ("c", 1.0)):
                    refused = newcomer_fails and name == "c"
                    outcomes = tuple(
                        Outcome(0.1 * slow * rng.lognormvariate(0, 0.3), 1.0, not refused or rng.random() < 0.5,
                                predicted=slow, predicted_ours=1.0, refused=refused)
                        for _ in range(2)
                    )  # fmt: skip
                    failed = sum(not outcome.ok for outcome in outcomes)
                    views.append(ReplicaReport(name * 16, "n", 8, 1, 2, 2, failed, outcomes))
                made = RouterReport("r" * 8, SHOP, second, 1.0, tuple(views), level="observing")
                await self.scene.coordinator.report_router(made, {})
                self.scene.coordinator.tick(SHOP, self.scene.now_s)

        asyncio.run(play())


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "own" / variable))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def reported(monkeypatch: pytest.MonkeyPatch, capsys: Any, scene: PlaneScene, *options: str) -> dict[str, Any]:
    scene.put_in_place(monkeypatch)
    assert run(monkeypatch, "report", *options, "--json") == 0
    found = answer(capsys, "report")
    assert len(found["deployments"]) == 1, "those that Shadecast routes have nothing to compare"
    told: dict[str, Any] = found["deployments"][0]
    return told


def test_the_report_says_what_serve_did_what_ours_would_have_done_and_how_sure_that_is(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    told = reported(monkeypatch, capsys, ObservedScene(900), "--slo", "0.3")
    assert told["deployment"] == SHOP
    assert told["observing"]
    assert told["requests"] == 5400
    assert told["trust"] == pytest.approx(1.0, abs=0.03)
    assert told["saved_fraction"] == pytest.approx(1 - 3 / 7, abs=0.02)
    low, high = told["saved_bounds"]
    assert low < told["saved_fraction"] < high
    assert told["serve"]["miss_fraction"] == pytest.approx(0.318, abs=0.02), "nearly all of the third on b"
    assert told["ours"]["miss_fraction"] < 0.01
    assert told["avoided_fraction"] == pytest.approx(told["serve"]["miss_fraction"] - told["ours"]["miss_fraction"])
    assert told["verdict"].startswith("Shadecast would have saved about 5")
    assert told["refused"] == 0


def test_requests_to_a_replica_that_ours_would_have_kept_out_are_counted_right_where_they_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    told = reported(monkeypatch, capsys, ObservedScene(900, newcomer_fails=True), "--slo", "2")
    assert told["refused"] == 1800
    assert told["refused_right"] == pytest.approx(900, abs=80)
    low, high = told["refused_right_bounds"]
    assert low < 0.5 < high
    assert told["others_missed_fraction"] == 0.0
    assert told["serve"]["failed_fraction"] == pytest.approx(1 / 6, abs=0.02)
    assert told["ours"]["failed_fraction"] == 0.0


def test_it_fits_80_columns_says_how_it_is_estimated_and_writes_one_page_that_needs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ObservedScene(700).put_in_place(monkeypatch)
    assert run(monkeypatch, "report") == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 80
    assert re.search(r"^Serve's, measured +\d", out, re.MULTILINE)
    assert re.search(r"^Shadecast, estimated +\d", out, re.MULTILINE)
    assert "How this is estimated" in out
    assert "because no --slo was given" in " ".join(out.split())
    page = Path("shadecast-report.html").read_text()
    assert "predictions that say nothing claim nothing" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 4
    assert all(len(ElementTree.fromstring(drawing)) > 3 for drawing in drawings)
    assert "<script" not in page
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)


def test_too_little_data_is_said_and_nothing_is_estimated(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    told = reported(monkeypatch, capsys, ObservedScene(300))
    assert told["ours"] is told["saved_fraction"] is told["saved_bounds"] is told["trust"] is None
    assert told["too_little"].startswith("not enough data: requests in 1")
    assert told["verdict"] == f"{told['too_little']}: nothing is estimated yet"
    assert told["serve"]["p50_s"] > 0


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ([], "no deployment observes: set request_router_class to serve_app.router:ObservingRouter", 1),
        (["--deployment", "vision/digits"], "vision/digits does not observe: set request_router_class", 1),
        (["--deployment", "vision/other"], "no deployment of that name routes by Shadecast", 1),
        (["--html", "nowhere/x.html"], "there is no folder", 2),
    ],
)
def test_with_nothing_observed_one_line_says_what_to_do_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str, code: int
) -> None:
    PlaneScene(5).put_in_place(monkeypatch)
    assert run(monkeypatch, "report", *options) == code
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""
    assert not list(Path().glob("*.html"))


def test_the_coordinators_process_answers_it() -> None:
    assert hasattr(CoordinatorProcess, "observed")
