"""Tokens from files and the environment: who may read them, what they may be, and that no text ever shows one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from serve_app.launch import tokens
from serve_app.launch.tokens import Given, TokenError, given, kept_or_made, read

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in tokens.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def file_with(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [TOKEN, f"{TOKEN}\n", f"  \t{TOKEN}\r\n\n"])
def test_white_space_around_a_token_does_not_count(tmp_path: Path, content: str) -> None:
    assert read(file_with(tmp_path, content.encode()), "--token-file") == TOKEN


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o601, 0o777])
def test_a_file_that_others_can_use_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = file_with(tmp_path, TOKEN.encode(), mode)
    with pytest.raises(TokenError) as caught:
        read(path, "--token-file")
    assert str(caught.value).endswith(f"chmod 600 {path}")
    assert f"{mode:03o}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 characters, and must have 16"),
        (b" \n", "has 0 characters"),
        (b"short", "has 5 characters"),
        (b"two words in one token", "one word"),
        (b"a-token-with-\xc3\xa9-in-it-12", "one word"),
        (b"a-token-with-\x00-in-it-12", "one word"),
        (b"x" * 5000, "longer than 4096 bytes"),
    ],
)
def test_what_cannot_be_a_token_is_refused_without_being_shown(tmp_path: Path, content: bytes, words: str) -> None:
    path = file_with(tmp_path, content)
    with pytest.raises(TokenError, match=words) as caught:
        read(path, "--token-file")
    assert str(path) in str(caught.value)
    if len(content) > 4:
        assert content.decode("latin-1") not in str(caught.value)


def test_a_file_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match=r"--token-file .*nowhere: cannot be read \(No such file"):
        read(tmp_path / "nowhere", "--token-file")
    with pytest.raises(TokenError, match="--token-file"):
        read(tmp_path, "--token-file")


def test_the_environment_gives_a_token_once_and_child_processes_do_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADECAST_TOKEN", f" {TOKEN}\n")
    found = given().operate
    assert found is not None
    assert found.value == TOKEN
    assert "SHADECAST_TOKEN" not in os.environ
    assert given() == Given()


def test_a_file_counts_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADECAST_LOOK_TOKEN", "another-token-from-elsewhere")
    found = given(look_file=str(file_with(tmp_path, TOKEN.encode()))).look
    assert found is not None
    assert found.value == TOKEN
    assert "SHADECAST_LOOK_TOKEN" not in os.environ


def test_a_blank_variable_gives_nothing_and_a_short_one_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADECAST_TOKEN", "  ")
    assert given() == Given()
    monkeypatch.setenv("SHADECAST_TOKEN", "short-secret")
    with pytest.raises(TokenError, match="SHADECAST_TOKEN") as caught:
        given()
    assert "short-secret" not in str(caught.value)


def test_a_token_is_made_once_for_its_owner_alone_and_found_again() -> None:
    first = kept_or_made()
    path = tokens.operate_token_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kept_or_made().value == first.value
    assert len(first.value) >= 32
    assert str(path) in first.source


def test_a_token_shows_where_it_is_from_and_never_itself() -> None:
    made = kept_or_made()
    for text in (repr(made), str(made), f"{made}"):
        assert made.value not in text
        assert "operate-token" in text


def test_without_a_home_there_is_a_folder_for_this_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert str(os.getuid()) in str(tokens.operate_token_file())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = file_with(tmp_path, TOKEN.encode())
    os.chown(path, 12345, 12345)
    with pytest.raises(TokenError, match="belongs to another user"):
        read(path, "--token-file")
