"""Virtual environments that checks make for themselves, one after the other, with a line of progress for each step.

They lie in `.venvs/`, which git ignores, and stay: the next run only asks pip whether anything is missing. Packages
come from the registry that pip is set up for. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
FOLDER = ROOT / ".venvs"


class FailedError(Exception):
    """A step has failed; the message is for people."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own; what its commands print goes to `log`."""

    path: Path
    log: Path

    @classmethod
    def made(cls, name: str, *, anew: bool) -> Environment:
        """The one of that name; `anew`: without what an earlier run has left in it."""
        path = FOLDER / name
        if anew or not (path / "bin" / "python").exists():
            venv.create(path, with_pip=True, clear=True)
        log = path / "check.log"
        log.write_text("")
        return cls(path, log)

    def program(self, name: str) -> str:
        """Path of a program in it."""
        return str(self.path / "bin" / name)

    def install(self, *what: str, without_pins: Sequence[str] = ()) -> None:
        """Install with the project's constraints, but for those of some distributions. Raises FailedError."""
        lines = CONSTRAINTS.read_text().splitlines()
        kept = [line for line in lines if line.partition("==")[0] not in without_pins]
        constraints = self.path / "constraints.txt"
        constraints.write_text("\n".join(kept) + "\n")
        self.run([self.program("python"), "-m", "pip", "install", "-q", "-c", str(constraints), *what])

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path = ROOT,
        more: Mapping[str, str] | None = None,
        expects: int = 0,
        timeout_s: float = 1800.0,
    ) -> str:
        """What a command prints. Raises FailedError where it ends with another code than is expected.

        Nothing of the caller's import path or cluster gets in.
        """
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")}
        path = os.pathsep.join((str(self.path / "bin"), kept.get("PATH", "")))
        environment = {**kept, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **(more or {})}
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
        try:
            ran = subprocess.run(  # noqa: S603 - our own commands
                command,
                cwd=cwd,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{' '.join(command)}: not done after {timeout_s:g} s") from error
        with self.log.open("a") as log:
            log.write(ran.stdout)
        if ran.returncode != expects:
            last = "\n".join(ran.stdout.strip().splitlines()[-15:])
            raise FailedError(f"{' '.join(command)}: ended with {ran.returncode}\n{last}\nAll of it: {self.log}")
        return ran.stdout


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"{what} ...", end=" ", flush=True)
    started_s = time.monotonic()
    try:
        yield
    except FailedError:
        print(f"FAILED ({time.monotonic() - started_s:.0f} s)", flush=True)
        raise
    print(f"({time.monotonic() - started_s:.0f} s)", flush=True)


def python_version() -> str:
    """Of the interpreter that the environments are made of."""
    return ".".join(map(str, sys.version_info[:2]))
