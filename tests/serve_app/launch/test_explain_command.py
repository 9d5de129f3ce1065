"""`shadecast explain`: plain sentences in 80 columns, JSON as its schema says, and what docs/explain.md shows."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from actors.coordinator import Coordinator
from serve_app.launch.processes import CoordinatorProcess
from shadecast.decisions import Decision, Question, Ring, answer, candidates
from shadecast.pick import PickTable, cost_table
from tests.serve_app.launch.plane_scene import PlaneScene, run
from tests.serve_app.launch.test_commands import answer as printed
from tests.serve_app.page.page_scene import DIGITS, NODES

DOCS = Path(__file__).resolve().parents[3] / "docs"


class ExplainScene(PlaneScene):
    """A plane whose two routers of a deployment answer what they are asked; one of them has kept decisions."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.ring = Ring()
        self.silent = False
        table = self.scene.coordinator._deployments[DIGITS].output.table  # type: ignore[union-attr]
        ids = [row.replica_id for row in table.rows]
        picks = PickTable(ids, table, {}, {}, cost_table(table.slots, table.batch_half))
        now_s, best = self.scene.now_s, min(picks.pool, key=lambda i: picks.scores[i])
        seen = candidates(picks, table, picks.pool, ids[best], counted=False)
        for at_s, labels in (
            (9.0, {"request_id": "7f3a-1", "chosen": ids[best]}),
            (5.0, {"request_id": "7f3a-2", "chosen": ids[best], "special": "waited", "waited_s": 0.84,
                   "detail": "no replica was known to have a place when it came"}),
            (1.0, {"request_id": "7f3a-3", "chosen": "", "special": "refused", "waited_s": 2.0,
                   "detail": "its caller gave up, or its deadline passed, while it waited"}),
        ):  # fmt: skip
            kept: dict[str, Any] = {
                "method": "predict",
                "level": "table",
                "eligible": len(picks.pool),
                "alive": len(ids),
            }
            self.ring.add(Decision(at_s=now_s - at_s, candidates=seen, **{**kept, **labels}))

    def ask(self, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
        if method != "explain":
            return super().ask(method, *arguments, timeout_s=timeout_s)
        self.asked.append((method, arguments))
        return asyncio.run(self.explain(*arguments))

    async def explain(self, asked: Any) -> Any:
        coordinator = self.scene.coordinator
        asking = asyncio.create_task(coordinator.explain(asked))
        await asyncio.sleep(0)
        questions = [Question(**each) for each in coordinator._explanations.questions()]
        for known in coordinator._deployments.values():
            for deployment, router_id in known.routers_heard(self.scene.now_s) if not self.silent else ():
                ring = self.ring if (deployment, router_id[:7]) == (DIGITS, "router1") else Ring()
                told = [answer(ring, question, self.scene.now_s) for question in questions]
                coordinator._explanations.take(deployment, {"router_id": router_id, "explained": told})
        return await asking


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> ExplainScene:
    """210 s into the scene: a hog is on node b, a replica that fails was turned away."""
    scene = ExplainScene(210)
    scene.put_in_place(monkeypatch)
    return scene


ASKED = {
    "last": ["--last"],
    "request": ["--request", "7f3a-2"],
    "replica": ["--replica", "x9failing"],
    "node": ["--node", "worker-1"],
}


@pytest.mark.parametrize("what", ASKED)
def test_every_explanation_fits_80_columns_and_is_json_as_its_schema_says(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    assert run(monkeypatch, "explain", *ASKED[what]) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 80
    assert "…" not in out
    assert run(monkeypatch, "explain", *ASKED[what], "--json") == 0
    told = printed(capsys, "explain")
    assert told["what"] == what
    shown = " ".join(out.split())
    for sentence in told.get("sentences") or told["decisions"][0]["sentences"]:
        assert sentence.split(":")[0].split(" of ")[0].split(" for ")[0] in shown


def test_the_last_decisions_show_which_replicas_were_drawn_and_their_scores_parts(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "explain", "--last", "--json") == 0
    told = printed(capsys, "explain")
    assert [d["request_id"] for d in told["decisions"]] == ["7f3a-3", "7f3a-2", "7f3a-1"]
    assert (told["routers"], told["answered"]) == (4, 4)
    assert run(monkeypatch, "explain", "--last", "--most", "1") == 0
    out = capsys.readouterr().out
    assert "7f3a-2" not in out
    assert "It got no replica: its caller gave up" in " ".join(out.split())
    heading = next(line for line in out.splitlines() if "score" in line and "cost" in line)
    assert heading.split() == ["replica", "score", "cost", "queue", "capacity", "live", "forecast", "share", "state"]


def test_a_request_that_nobody_kept_says_so_and_how_to_have_it_kept(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "explain", "--request", "unknown") == 0
    out = capsys.readouterr().out
    assert "No router has kept a decision on unknown." in out
    assert "shadecast explain --request unknown --wait 60s" in out
    assert run(monkeypatch, "explain", "--request", "unknown", "--json") == 0
    assert printed(capsys, "explain")["decisions"] == []


def test_routers_that_did_not_answer_are_counted(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("actors.explanations._ANSWERED_WITHIN_S", 0.05)
    plane.silent = True
    assert run(monkeypatch, "explain", "--last") == 0
    assert "4 of 4 routers have not answered." in capsys.readouterr().out


def test_the_wait_goes_to_the_coordinator(plane: ExplainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "explain", "--request", "7f3a-1", "--wait", "2m") == 0
    assert plane.asked[-1] == ("explain", ({"what": "request", "target": "7f3a-1", "most": 50, "wait_s": 120.0},))


@pytest.mark.parametrize(
    ("given", "said", "code"),
    [
        ([], "give one of --last", 2),
        (["--last", "--node", "worker-1"], "give one of --last", 2),
        (["--last", "--wait", "5s"], "--wait is for --request", 2),
        (["--request", "q", "--wait", "soon"], "--wait", 2),
        (["--replica", "nobody"], "no replica 'nobody'", 1),
        (["--node", "nowhere"], "no node 'nowhere'", 1),
    ],
)
def test_wrong_use_is_one_line_and_its_exit_code(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, given: list[str], said: str, code: int
) -> None:
    assert run(monkeypatch, "explain", *given) == code
    assert said in capsys.readouterr().err


def test_beginnings_of_ids_and_host_names_are_enough(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for given in (NODES[1][:8], "worker-1"):
        assert run(monkeypatch, "explain", "--node", given, "--json") == 0
        assert printed(capsys, "explain")["node_id"] == NODES[1]


def test_the_coordinator_s_process_takes_every_call_that_the_coordinator_does() -> None:
    def calls(kind: type) -> set[str]:
        return {n for n, f in inspect.getmembers(kind, inspect.iscoroutinefunction) if not n.startswith("_")}

    assert calls(Coordinator) - {"close"} == calls(CoordinatorProcess)


# ---------------------------------------------------------------- the documentation


def test_what_the_documentation_shows_is_what_the_commands_say(
    plane: ExplainScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    blocks = re.findall(
        r"```console\n\$ shadecast (explain [^\n]*)\n(.*?)```", (DOCS / "explain.md").read_text(), re.DOTALL
    )
    assert {command.split()[1] for command, _ in blocks} == {"--request", "--replica", "--node"}
    for command, shown in blocks:
        assert run(monkeypatch, *command.split()) == 0
        out = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
        assert out.strip() == shown.strip(), command


def test_every_setting_of_the_ring_that_the_documentation_names_is_the_code_s() -> None:
    from shadecast import decisions  # noqa: PLC0415

    text = (DOCS / "explain.md").read_text()
    assert f"at most {decisions._SPECIAL_PER_S:g} a second" in " ".join(text.split())
    assert f"the last {decisions._KEPT} stay, of each kind of the latter {decisions._KEPT_SPECIAL}" in " ".join(
        text.split()
    )
    assert f"{decisions.MOST_BYTES // 1024} KiB" in text
    assert json.loads((DOCS / "answers.schema.json").read_text())["$defs"]["explain"]
