"""Commands taken by the parsers that would run them: typer, click, argparse, make. Nothing is run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import warnings
from functools import cache
from typing import Any

import pytest
import typer

from tests.docs.blocks import ROOT


class WrongCommandError(AssertionError):
    """The parser refuses it."""


class _FoundError(Exception):
    def __init__(self, parser: Any) -> None:
        super().__init__()
        self.parser = parser


def check(words: list[str], *, strictly: bool) -> None:
    """Raises WrongCommandError. `strictly`: all of it is parsed; else its commands and options are looked up."""
    match words:
        case ["shadecast", "train", *rest]:
            _arguments(_module("train"), rest, strictly)
        case ["shadecast", *rest]:
            _command(_shadecast(), rest, strictly)
        case ["python", "-m", module, *_] if not module.startswith(("bench", "train")):
            _exists(module)  # what has no parser would run
        case ["python", "-m", module, *rest]:
            _arguments(_module(module), rest, strictly)
        case ["ray", "job", *rest]:
            _command(_ray_job(), _until_dashes(rest), strictly)
            if "--" in rest:
                check(rest[rest.index("--") + 1 :], strictly=strictly)
        case ["ray" | "serve" as tool, *rest]:
            _command(_ray(tool), rest, strictly)
        case ["make", *rest]:
            _make(tuple(rest))


def _until_dashes(words: list[str]) -> list[str]:
    return [*words[: words.index("--")], "true"] if "--" in words else words


@cache
def _shadecast() -> Any:
    from serve_app.launch.commands import cli  # noqa: PLC0415 - half a second that collection need not take

    return typer.main.get_command(cli)


@cache
def _ray(tool: str) -> Any:
    from ray.scripts.scripts import cli as ray_cli  # noqa: PLC0415 - as above
    from ray.serve.scripts import cli as serve_cli  # noqa: PLC0415

    return ray_cli if tool == "ray" else serve_cli


@cache
def _ray_job() -> Any:
    from ray.dashboard.modules.job.cli import job_cli_group  # noqa: PLC0415 - as above

    return job_cli_group


def _exists(module: str) -> None:
    if not module.rpartition(".")[2].isupper() and importlib.util.find_spec(module) is None:  # NAME stands for any
        raise WrongCommandError(f"python -m {module}: there is no such module")


@cache
def _module(name: str) -> Any:
    """The parser that `python -m NAME` makes."""
    _exists(name)

    def found(parser: Any, *_: Any, **__: Any) -> None:
        raise _FoundError(parser)

    path, handler = list(sys.path), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was imported before
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        patch.setattr(typer.Typer, "__call__", lambda app, *_, **__: found(typer.main.get_command(app)))
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except _FoundError as seen:
            return seen.parser
        finally:
            sys.path[:] = path
            signal.signal(signal.SIGTERM, handler)
    raise WrongCommandError(f"python -m {name}: it makes no parser")


def _arguments(parser: Any, words: list[str], strictly: bool) -> None:
    if not isinstance(parser, argparse.ArgumentParser):
        _command(parser, words, strictly)
        return
    _known(words, set(parser._option_string_actions), parser.prog)  # argparse tells its options nowhere else
    if strictly:
        try:
            parser.parse_args(words)
        except SystemExit:
            raise WrongCommandError(f"{parser.prog} {' '.join(words)}: {parser.format_usage()}") from None


def _command(command: Any, words: list[str], strictly: bool) -> None:
    """Of typer, which has a click of its own, or of click."""
    name = command.name or ""
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        inner = command.commands.get(words[0]) or _by_any_name(command, words[0])
        if inner is None:
            if not strictly and words[0].isupper():  # COMMAND stands for any
                return
            raise WrongCommandError(f"{name}: there is no command {words[0]!r}")
        command, name, words = inner, f"{name} {words[0]}", words[1:]
    options = {each for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)}
    if not command.ignore_unknown_options if hasattr(command, "ignore_unknown_options") else True:
        _known(words, options | {"--help", "--install-completion", "--show-completion"}, name)
    if strictly:
        try:
            command.make_context(name, list(words))
        except Exception as error:
            raise WrongCommandError(f"{name} {' '.join(words)}: {error}") from error


def _by_any_name(group: Any, name: str) -> Any:
    """Ray names commands by their functions, with an underscore here and a dash there."""
    return next((each for known, each in group.commands.items() if known.replace("_", "-") == name), None)


def _known(words: list[str], options: set[str], of: str) -> None:
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in options:
            raise WrongCommandError(f"{of}: there is no option {word!r}")


@cache
def _make(words: tuple[str, ...]) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test` has its own
    command = ["make", "-n", *words]
    ran = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=30, check=False)
    if ran.returncode != 0:
        raise WrongCommandError(f"make {' '.join(words)}: {ran.stderr}")
