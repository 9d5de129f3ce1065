"""How tokens travel when a control plane starts: no output, log, actor, argument or child process ever has one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.launch import control_plane, tokens
from serve_app.page.rights import Rights, digest
from tests.serve_app.launch.plane_scene import PlaneScene, run

OPERATE, LOOK = "operate-token-of-this-test", "look-token-of-this-test"


class Answering:
    """An actor's handle that answers what it is told to."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=lambda *_, answer=answer: answer))


class Recording:
    """Stands in for `ray`: everything that is given to it is kept; `page` is the one that runs already."""

    def __init__(self, real: Any, page: Any = None) -> None:
        self.exceptions, self.page = real.exceptions, page
        self.given: list[Any] = []
        self.started: list[str] = []

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._starter(kind, options)))

    def _starter(self, kind: type, options: dict[str, Any]) -> Any:
        def start(*arguments: Any, **more: Any) -> Any:
            self.given.append((options, arguments, more))
            self.started.append(kind.__name__)
            return Answering(status={}, start="http://127.0.0.1:8266")

        return start

    def get(self, answer: Any, timeout: float | None = None) -> Any:
        return answer

    def get_actor(self, name: str, namespace: str) -> Any:
        if self.page is None:
            raise ValueError(name)
        return self.page

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        self.page = None

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "a1" * 28)


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Recording:
    caplog.set_level("DEBUG")
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in tokens.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    PlaneScene(1).put_in_place(monkeypatch)
    found = Recording(control_plane.ray)
    monkeypatch.setattr(control_plane, "ray", found)
    return found


def token_file(folder: Path, name: str, token: str) -> str:
    path = folder / name
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


def page_of(recording: Recording) -> Rights:
    (rights,) = [given[1][2] for given in recording.given if given[0]["name"] == control_plane.PAGE]
    return Rights.of(rights)


@pytest.mark.parametrize("json", [[], ["--json"]])
@pytest.mark.parametrize("by_file", [True, False])
def test_no_token_is_in_output_logs_actors_arguments_or_the_environment(
    recording: Recording, tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any, json: list[str], by_file: bool
) -> None:
    arguments = ["up", "--page-host", "0.0.0.0", *json]
    if by_file:
        arguments += ["--token-file", token_file(tmp_path, "operate", OPERATE)]
        arguments += ["--look-token-file", token_file(tmp_path, "look", LOOK)]
    else:
        monkeypatch.setenv("SHADECAST_TOKEN", OPERATE)
        monkeypatch.setenv("SHADECAST_LOOK_TOKEN", LOOK)
    assert run(monkeypatch, *arguments) == 0
    assert page_of(recording) == Rights(digest(OPERATE), digest(LOOK))
    captured = capsys.readouterr()
    shown = captured.out + captured.err + caplog.text + repr(recording.given) + repr(dict(os.environ))
    for secret in (OPERATE, LOOK):
        assert secret not in shown
    assert ("operate" if by_file else "SHADECAST_TOKEN") in captured.out, "where the token is"


def test_a_token_that_is_made_is_not_shown_and_its_file_is_named(
    recording: Recording, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    assert run(monkeypatch, "up") == 0
    made = tokens.kept()
    assert made is not None
    assert page_of(recording) == Rights(digest(made.value))
    captured = capsys.readouterr()
    assert str(tokens.operate_token_file()) in captured.out
    assert made.value not in captured.out + captured.err + caplog.text + repr(recording.given)


def test_wrong_tokens_are_refused_before_anything_is_started(
    recording: Recording, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    public = tmp_path / "public"
    public.write_text(OPERATE)
    public.chmod(0o644)
    assert run(monkeypatch, "up", "--token-file", str(public)) == 2
    assert f"chmod 600 {public}" in capsys.readouterr().err
    same = token_file(tmp_path, "same", OPERATE)
    assert run(monkeypatch, "up", "--token-file", same, "--look-token-file", same) == 2
    err = capsys.readouterr().err
    assert "the token for looking is the one for operating" in err
    assert OPERATE not in err
    assert recording.started == []


@pytest.mark.parametrize(
    ("given", "restarted", "rights"),
    [
        ([], False, Rights(digest("was-operate-token"), "")),
        (["--token-file", OPERATE], True, Rights(digest(OPERATE), "")),
        (["--look-token-file", LOOK], True, Rights(digest("was-operate-token"), digest(LOOK))),
    ],
)
def test_a_token_that_is_given_changes_a_page_that_runs_and_what_is_not_given_stays(
    recording: Recording, tmp_path: Path, monkeypatch: Any, given: list[str], restarted: bool, rights: Rights
) -> None:
    recording.page = Answering(
        rights=Rights(digest("was-operate-token")).plain(), address=("127.0.0.1", 8266, ()), stop=None
    )
    stopped = []
    monkeypatch.setattr(control_plane, "_stop_page", stopped.append)
    monkeypatch.setattr(control_plane.Address, "check", lambda *_: None)
    arguments = [token_file(tmp_path, "t", each) if not each.startswith("--") else each for each in given]
    assert run(monkeypatch, "up", *arguments) == 0
    assert page_of(recording) == rights
    assert bool(stopped) is restarted


def test_a_page_of_version_0_2_keeps_its_token_and_its_text_goes_no_further(
    recording: Recording, monkeypatch: Any, capsys: Any
) -> None:
    recording.page = Answering(token=OPERATE, address=("127.0.0.1", 8266, ()))
    assert run(monkeypatch, "up") == 0
    assert page_of(recording) == Rights(digest(OPERATE))
    assert OPERATE not in capsys.readouterr().out + repr(recording.given)


def test_where_no_token_can_be_kept_the_page_starts_and_takes_no_orders(
    recording: Recording, tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert run(monkeypatch, "up") == 0
    assert page_of(recording) == Rights()
    assert "takes no orders" in capsys.readouterr().out
    assert "give one with --token-file" in caplog.text
