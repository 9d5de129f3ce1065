"""The command line as people and programs use it: what fits 80 columns, what `--json` holds, how commands end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import ray
import typer
from rich.cells import cell_len

from models.registry import SHIPPED, Registry
from serve_app.launch import commands, control_plane, ids, local
from serve_app.launch.ids import resolve, short_ids
from serve_app.launch.tables import Column, fit, node_rows, span, status_view
from serve_app.launch.watching import Watching
from serve_app.page.address import Address, PageError
from serve_app.page.rights import Rights
from shadecast.errors import AwayError, ConfigError, OrderError, ShadecastError
from tests.serve_app.launch.plane_scene import PlaneScene, run
from tests.serve_app.page.page_scene import DIGITS, NODES

SCHEMA = json.loads((Path(__file__).resolve().parents[3] / "docs/answers.schema.json").read_text())
RETRAIN = ["up", "--retrain", "daily", "--registry", "r"]
STATES = {"inactive", "shadowing", "shifting", "active", "draining"}


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> PlaneScene:
    """245 s into the scene: a trial is under way, node d is held, node b has a hog."""
    scene = PlaneScene(245)
    scene.put_in_place(monkeypatch)
    return scene


def answer(capsys: Any, name: str) -> dict[str, Any]:
    """What a command printed: one JSON object that the schema of `name` takes."""
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, lines
    found: dict[str, Any] = json.loads(lines[0])
    check(found, name)
    return found


def check(found: Any, name: str) -> None:
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})
    assert [f"{e.json_path}: {e.message[:300]}" for e in validator.iter_errors(found)] == []


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("command", ["status", "nodes"])
def test_at_80_columns_nothing_is_cut_and_every_column_has_a_name(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str
) -> None:
    assert run(monkeypatch, command) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 80
    assert "…" not in out
    headings = [
        re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.startswith(("node ", "replica "))
    ]
    needed = ["node", "state", "cpu free", "memory free", "network free", "hold", "replicas"]
    assert [heading for heading in headings[0] if heading not in ("host", "age")] == needed
    for node in NODES:
        assert node[:8] in out
    if command == "status":
        replicas = {"replica", "node", "state", "share", "capacity", "queue", "req/s", "mean", "errors"}
        assert set(headings[1]) == replicas
        for replica in plane.status()["deployments"][0]["replicas"]:
            row = next(line for line in out.splitlines() if line.startswith(replica["replica_id"][:8] + " "))
            assert set(row.split()) & STATES, "the whole name of the state"
        assert "left out: copies, note; --wide shows all" in out


def test_wider_terminals_show_more_and_wide_shows_all_with_whole_ids(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "status") == 0
    out = capsys.readouterr().out
    assert "copies" in out
    assert max(cell_len(line) for line in out.splitlines()) <= 160
    assert NODES[0] not in out
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "status", "--wide") == 0
    out = capsys.readouterr().out
    assert "left out" not in out
    for heading in ("host", "their states", "cpu used", "skill", "model", "copies", "note"):
        assert heading in out
    assert all(node in out for node in NODES)


def test_nodes_say_state_headroom_now_and_expected_age_hold_and_replicas(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "nodes", "--json") == 0
    rows = {row["node_id"]: row for row in answer(capsys, "nodes")["nodes"]}
    assert {row["state"] for row in rows.values()} == {"ok", "held"}
    held = rows[NODES[3]]
    assert (held["hold"], rows[NODES[0]]["hold"]) == ("operator", "-")
    assert held["expected_free"]["cpu"] is None, "it has no forecast yet"
    hog = rows[NODES[1]]
    assert hog["free"]["cpu"] < rows[NODES[0]]["free"]["cpu"] - 0.3
    load = plane.status()["nodes"][1]["predicted"]["cpu"]["5.0"]
    assert hog["expected_free"]["cpu"] == pytest.approx(1 - 0.3 * load[0] - 0.4 * load[1] - 0.3 * load[2])
    assert {r["deployment"] for r in rows[NODES[0]]["replicas"]} >= {DIGITS}


def test_a_node_that_has_never_reported_but_has_replicas_is_listed(plane: PlaneScene) -> None:
    status = plane.status()
    status["nodes"] = status["nodes"][1:]
    status["leaving"] = [NODES[1]]
    states = {row["node_id"]: row["state"] for row in node_rows(status)}
    assert states[NODES[0]] == "unheard"
    assert states[NODES[1]] == "leaving"
    status["unheard"] = ["e" * 56]
    assert {row["node_id"]: row["state"] for row in node_rows(status)}["e" * 56] == "unheard"


def test_a_status_with_nothing_in_it_says_what_to_do() -> None:
    empty = {"schema": 1, "nodes": [], "deployments": [], "transitions": []}
    assert "request_router_class" in "".join(str(part) for part in status_view(empty, 80))


def test_columns_are_left_out_by_rank_and_never_those_that_are_needed() -> None:
    columns = [Column("id", ["12345678"]), Column("host", ["x" * 20], 2), Column("age", ["1 s"], 1)]
    for width, kept in ((35, ["id", "host", "age"]), (34, ["id", "age"]), (12, ["id"]), (3, ["id"])):
        shown, left_out = fit(columns, width)
        assert [column.heading for column in shown] == kept
        assert [*shown, *left_out] == sorted(columns, key=lambda c: (c in left_out, columns.index(c)))


def test_short_ids_are_never_ambiguous() -> None:
    alike = ["a" * 20 + str(i) for i in range(3)]
    short = short_ids([*alike, "b" * 56, "c", ""])
    assert short["b" * 56] == "bbbbbbbb"
    assert len(set(short.values())) == 6
    for whole, brief in short.items():
        assert [each for each in short if each.startswith(brief)] == [whole] or whole in ("", "c")
    assert [short[each] for each in alike] == alike


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (99, "99 s"), (100, "2 min"), (6000, "2 h"), (200_000, "2 d"), (None, "-")],
)
def test_a_span_has_the_unit_that_fits(value_s: Any, text: str) -> None:
    assert span(value_s) == text


# ---------------------------------------------------------------- orders


def test_an_id_as_status_shows_it_or_a_host_name_is_enough_for_an_order(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for given, target in ((NODES[0][:8], NODES[0]), ("worker-1", NODES[1]), ("k3f9", "k3f9x2ab")):
        assert run(monkeypatch, "drain", given, "--json") == 0
        assert answer(capsys, "drain")["target"] == target
        assert target in plane.status()["holds"]
        assert run(monkeypatch, "release", given, "--json") == 0
        assert answer(capsys, "release")["concerned"] >= 1
        assert target not in plane.status()["holds"]
    (_, (order,)) = plane.asked[-1]
    assert order["who"]["by"] == "command line"
    assert order["who"]["host"]


def test_a_release_of_what_is_not_held_says_so_and_what_is(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given, held = NODES[0][:8], NODES[3][:8]
    assert run(monkeypatch, "release", given) == 0
    assert f"No order held {given} itself, so nothing changes. Held are: {held}." in capsys.readouterr().out
    assert run(monkeypatch, "release", held) == 0
    assert "Let back in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["drain", "nowhere"], 1, "no replica or node 'nowhere'"),
        (["drain", "worker-9"], 1, "`shadecast status` shows"),
        (["release", ""], 1, "no replica or node ''"),
        (["announce", "k3f9x2ab", "--for", "9m"], 1, "no node 'k3f9x2ab'"),
        (["announce", "worker-1"], 2, "give one of --to TIME and --for DURATION"),
        (["announce", "worker-1", "--for", "9m", "--to", "+9m"], 2, "give one of"),
        (["announce", "worker-1", "--for", "soon"], 2, "--for 'soon': must be a duration"),
        (["announce", "worker-1", "--from", "soon", "--for", "9m"], 2, "--from 'soon': must be a time"),
        (["announce", "worker-1", "--from", "2020-01-01T00:00", "--for", "9m"], 2, "lies"),
        (["announce", "worker-1", "--from", "+9m", "--to", "+8m"], 2, "--to '+8m': must be after --from '+9m'"),
        (["announce", "worker-1", "--for", "99d"], 1, "lasts_s"),
        (["announce", "worker-1", "--for", "9m", "--strength", "7"], 2, "strength"),
        (["drain"], 2, "Missing argument 'target'; see `shadecast drain --help`"),
        (["up", "--page-port"], 2, "--page-port"),
        (["status", "--colour"], 2, "--colour"),
        (["reboot"], 2, "reboot"),
        (["up", "--token-file", "nowhere"], 2, "--token-file nowhere: cannot be read"),
        (["up", "--page-host", "no such host"], 2, "--page-host"),
        (["forecaster", "promote", "nonsense"], 1, "nonsense"),
        (["explain", "--request", "r", "--wait", "9m"], 2, "--wait '9m': must be at most 300 s"),
        (["up", "--retrain", "often"], 2, "--retrain 'often': must be off, hourly, daily, weekly"),
        (["up", "--retrain", "daily"], 2, "--retrain daily: needs --telemetry-log and --registry"),
        (["up", "--retrain", "daily", "--telemetry-log", "log"], 2, "--retrain daily: needs --registry: it trains"),
        ([*RETRAIN, "--telemetry-log", "s3://bucket/log"], 2, "s3://bucket/log must be a folder"),
        ([*RETRAIN, "--telemetry-log", "log", "--retrain-onsets", "-1"], 2, "retrain.least_onsets = -1: must be"),
    ],
)
def test_what_is_wrong_or_refused_is_said_with_its_exit_code(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.setattr(control_plane, "_running_page", lambda: None)
    assert run(monkeypatch, *arguments) == code
    err = capsys.readouterr().err
    assert words in err
    assert re.fullmatch(r"shadecast: .+\n", err), "one line"
    assert run(monkeypatch, *arguments, "--json") == code
    assert words in answer(capsys, "error")["error"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "serve Start a local cluster, the control plane and an application. up Start"),
        (["simulate"], "--replicas <int range> [default: as many as the log has machines, else 4] [1<=x<=1000]"),
        (["up"], "--page-port <int range> Port of the live page; 0 turns it off. [default: 8266]"),
        (["up"], "--retrain-machine-hours <float>"),
    ],
)
def test_help_at_80_columns_lacks_no_default_and_no_end_of_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: list[str], words: str
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    out = capsys.readouterr().out
    assert words in " ".join(out.split())
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_without_a_command_the_help_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch) == 2
    assert "Usage: shadecast" in capsys.readouterr().err


def test_an_ambiguous_id_is_refused_with_those_that_it_fits() -> None:
    with pytest.raises(OrderError, match="'a' fits 2: a1a1a1a1, a2a2a2a2; give more"):
        resolve("a", ["a1" * 28, "a2" * 28, "b" * 56], {}, "node")


def test_an_announcement_reaches_the_coordinator_is_shown_and_can_be_cancelled(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert (
        run(monkeypatch, "announce", "worker-1", "--from", "+90s", "--for", "10m", "--strength", "0.5", "--json") == 0
    )
    told = answer(capsys, "announce")
    assert told["ends_wall_s"] - told["starts_wall_s"] == pytest.approx(600.0)
    assert run(monkeypatch, "nodes") == 0
    assert "announced for b2b2b2b2: 50 % of it taken, in 90 s" in capsys.readouterr().out
    assert run(monkeypatch, "announce", "worker-1", "--cancel", "--json") == 0
    assert answer(capsys, "announce")["cancelled"] == 1
    assert plane.status()["announced"] == []
    assert run(monkeypatch, "announce", "worker-1", "--to", "+1h") == 0
    assert "Announced for node b2b2b2b2" in capsys.readouterr().out
    assert run(monkeypatch, "status", "--json") == 0
    assert len(answer(capsys, "status")["announced"]) == 1


# ---------------------------------------------------------------- exit codes


def test_the_exit_code_says_of_which_kind_an_error_is() -> None:
    kinds = {ShadecastError: 1, OrderError: 1, ConfigError: 2, PageError: 2, AwayError: 3}
    kinds[control_plane.ControlPlaneError] = 3
    for kind, code in kinds.items():
        assert commands.exit_code(kind("x")) == code


@pytest.mark.parametrize("arguments", [["status"], ["nodes"], ["drain", "x"], ["announce", "x", "--for", "9m"]])
def test_without_a_cluster_or_control_plane_commands_end_with_3(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    plane.away = "no Shadecast control plane on this cluster"
    assert run(monkeypatch, *arguments) == 3
    assert "no Shadecast control plane" in capsys.readouterr().err
    plane.no_cluster = "no Ray cluster at 'auto'"
    assert run(monkeypatch, *arguments, "--json") == 3
    assert answer(capsys, "error") == {"schema": 1, "error": "no Ray cluster at 'auto'", "exit_code": 3}


def test_without_a_control_plane_there_are_no_forecasters_to_show(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(control_plane, "find_coordinator", lambda: None)
    assert run(monkeypatch, "forecaster", "live") == 3
    assert "no Shadecast control plane" in capsys.readouterr().err


def test_an_address_where_nobody_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    assert run(monkeypatch, "status", "--address", address, "--json") == 3
    assert answer(capsys, "error")["error"].startswith(f"no Ray cluster at '{address}': start one")
    assert run(monkeypatch, "status", "--address", "head", "--json") == 2
    assert "'head': must be HOST:PORT" in answer(capsys, "error")["error"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Version mismatch: this is\n  Ray: 2.57", "Version mismatch: this is Ray: 2.57"),
        ("Failed. Traceback:\n  File\nray.exceptions.AuthenticationError: bad", "AuthenticationError: bad"),
    ],
)
def test_a_cluster_that_does_not_take_us_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, reason: str
) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("Failed to connect") from RuntimeError(text)

    monkeypatch.setattr(ray, "init", init)
    assert run(monkeypatch, "status", "--address", "auto", "--json") == 3
    assert answer(capsys, "error")["error"] == f"the Ray cluster at 'auto' cannot be used: {reason}"


# ---------------------------------------------------------------- watching


def test_watch_shows_that_the_control_plane_is_away_and_back_and_ends_well_with_ctrl_c(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    steps = iter(["", "the coordinator is down or restarting", "", None])

    def pause(_: float) -> None:
        step = next(steps)
        if step is None:
            raise KeyboardInterrupt
        plane.away = step

    monkeypatch.setattr(time, "sleep", pause)
    assert run(monkeypatch, "status", "--watch") == 0
    out = capsys.readouterr().out
    assert out.count("every second; Ctrl-C ends") == 3
    away = " ".join(out.split())
    assert "CONTROL PLANE AWAY for 0.0 s: the coordinator is down or restarting; below is what it said" in away
    assert "control plane back, it was away for" in out
    assert out.count("Nodes: ") == 4, "what it said last stays"


def test_watch_as_json_is_one_object_a_line(plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plane.away = "restarting"

    def pause(_: float) -> None:
        if not plane.away:
            raise KeyboardInterrupt
        plane.away = ""

    monkeypatch.setattr(time, "sleep", pause)
    assert run(monkeypatch, "status", "--watch", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"schema": 1, "away": "restarting"}
    for each in (first, second):
        check(each, "status")


def test_watching_counts_the_time_away_from_its_beginning() -> None:
    clock = [0.0]
    watching = Watching(lambda: clock[0])
    watching.away("no control plane")
    assert watching.headline() == "CONTROL PLANE AWAY for 0.0 s: no control plane"
    clock[0] = 5.0
    watching.away("no control plane")
    assert "for 5.0 s" in watching.headline()
    watching.heard({"nodes": []})
    assert watching.headline().startswith("control plane back, it was away for 5.0 s")
    clock[0] = 30.0
    assert watching.headline() == "every second; Ctrl-C ends"
    clock[0] = 33.0
    watching.away("hangs")
    assert watching.headline() == "CONTROL PLANE AWAY for 0.0 s: hangs; below is what it said 28 s ago"


# ---------------------------------------------------------------- for programs


def test_the_status_for_programs_is_what_the_schema_says(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "status", "--json") == 0
    status = answer(capsys, "status")
    assert status["holds"] == [NODES[3]]
    assert {d["deployment"] for d in status["deployments"]} >= {DIGITS}


def retraining(**values: Any) -> dict[str, Any]:
    """What a retrainer tells the coordinator."""
    last = {"outcome": "rolled back", "version": "v1", "reason": "live headroom error +9.0 %", "ended_wall_s": 1.0}
    rest = {"reason": "the log is empty", "last": last, "failures": 0, "rollbacks": 1, "version": None, "former": None}
    return {"every_s": 86_400.0, "state": "waiting", "since_s": 60.0, "next_in_s": 3600.0, **rest, **values}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({}, ["retraining every 24 h: next look at the log in 60 min; the log is empty", "last: v1 rolled back: live"]),
        ({"state": "training", "next_in_s": None, "last": None}, ["retraining every 24 h: under way for 60 s"]),
        (
            {"state": "probation", "next_in_s": None, "version": "v2", "former": "v1", "reason": "2 of 10 blocks"},
            ["v2 on probation for 60 s, beside v1; 2 of 10 blocks"],
        ),
    ],
)
def test_the_status_says_how_self_retraining_stands(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, values: dict[str, Any], shown: list[str]
) -> None:
    assert run(monkeypatch, "status") == 0
    assert "retraining" not in capsys.readouterr().out, "it is off"
    asyncio.run(plane.scene.coordinator.retraining(retraining(**values)))
    assert run(monkeypatch, "status") == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in shown:
        assert words in out
    assert run(monkeypatch, "status", "--json") == 0
    told = answer(capsys, "status")["retraining"]
    assert told["state"] == retraining(**values)["state"]
    asyncio.run(plane.scene.coordinator.retraining(None))
    assert run(monkeypatch, "status", "--json") == 0
    assert answer(capsys, "status")["retraining"] is None


def test_starting_and_stopping_answer_as_the_schema_says(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    started = control_plane.ControlPlane(None, "http://127.0.0.1:8266", Address(), Rights("a", "b"), "the file x")
    monkeypatch.setattr(control_plane, "start_control_plane", lambda *_, **__: started)
    monkeypatch.setattr(control_plane, "stop_control_plane", lambda: 3)
    assert run(monkeypatch, "up", "--json") == 0
    assert answer(capsys, "up")["reading"] == "token"
    off = dataclasses.replace(started, page_url="", rights=Rights(), token_source="")
    monkeypatch.setattr(control_plane, "start_control_plane", lambda *_, **__: off)
    assert run(monkeypatch, "up", "--page-port", "0", "--json") == 0
    assert answer(capsys, "up")["page_url"] is None
    assert run(monkeypatch, "down", "--json") == 0
    assert answer(capsys, "down")["stopped"] == 3


def test_versions_answer_as_the_schema_says(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(SHIPPED, tmp_path / "registry")
    registry = str(tmp_path / "registry")
    champion = Registry(registry).champion()
    version = "newer"
    Registry(registry).save(dataclasses.replace(Registry(registry).load(champion), version=version), {"rows": 7})
    assert run(monkeypatch, "forecaster", "list", "--registry", registry, "--json") == 0
    assert version in {each["version"] for each in answer(capsys, "forecaster list")["versions"]}
    assert run(monkeypatch, "forecaster", "show", version, "--registry", registry, "--json") == 0
    answer(capsys, "forecaster show")
    assert run(monkeypatch, "forecaster", "shadow", version, "--registry", registry, "--json") == 0
    assert answer(capsys, "forecaster shadow")["in_shadow"] == version
    assert run(monkeypatch, "forecaster", "promote", version, "--registry", registry, "--json") == 0
    assert answer(capsys, "forecaster promote")["champion"] == version
    assert run(monkeypatch, "forecaster", "rollback", "--registry", registry, "--json") == 0
    assert answer(capsys, "forecaster rollback")["champion"] == champion
    state = {"versions": {"champion": {"version": version, "skill": {"cpu": float("nan")}}}, "failures": 0}
    states = {"a1a1": {**state, "problem": "", "pid": 7}}
    monkeypatch.setattr(control_plane, "forecaster_states", lambda: states)
    assert run(monkeypatch, "forecaster", "live", "--json") == 0
    answer(capsys, "forecaster live")


def test_every_command_has_json_and_a_schema() -> None:
    def named(app: typer.Typer, before: str = "") -> set[str]:
        own = {before + (c.name or str(c.callback and c.callback.__name__)) for c in app.registered_commands}
        return own.union(*(named(g.typer_instance, f"{g.name} ") for g in app.registered_groups if g.typer_instance))

    documented = set(SCHEMA["$defs"]) - {"error", "replica", "change", "interval", "observed side"}
    assert named(commands.cli) - {"train"} == documented, "train has the options of `python -m train`"
    for name in documented:
        with pytest.raises(AssertionError):
            check({"schema": 2}, name)


# ---------------------------------------------------------------- completion


def test_a_local_cluster_needs_no_home_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCluster:
        address, worker_nodes = "127.0.0.1:1", ()
        head_node = SimpleNamespace(node_id="h", all_processes={}, kill_all_processes=lambda **_: None)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(local, "Cluster", lambda **_: FakeCluster)
    with local.LocalCluster(workers=0) as cluster:
        assert cluster.address == "127.0.0.1:1"


def test_what_was_seen_last_completes(plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ids.complete_targets("") == [], "nothing was seen yet"
    assert run(monkeypatch, "nodes") == 0
    assert ids.complete_nodes("a1") == ["a1a1a1a1"]
    assert ids.complete_nodes("work") == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert "k3f9x2ab" in ids.complete_targets("k3")
    (Path(os.environ["XDG_CACHE_HOME"]) / "shadecast/ids.json").write_text("broken")
    assert ids.complete_targets("") == []


def test_the_shell_completes_without_loading_ray(
    plane: PlaneScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, "nodes") == 0
    code = (
        "import sys; sys.argv[0] = 'shadecast'\nfrom serve_app.launch.cli import main\n"
        "try: main()\nfinally: print('RAY' if 'ray' in sys.modules else 'light', file=sys.stderr)"
    )
    environment = {
        **os.environ,
        "_SHADECAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "shadecast drain k3f",
        "COMP_CWORD": "2",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.split() == ["k3f9x2ab"], ran.stderr
    assert ran.stderr.split()[-1] == "light"
