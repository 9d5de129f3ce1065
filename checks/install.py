"""`make test-install`: a wheel from a clean clone works from another folder, with each extra alone.

`python -m checks.install [base control gateway train gpu all]`. What is committed is cloned and built; each extra gets
an environment of its own, made anew, in which `checks/trials.py` tries what the extra is for. About 6 GB of disk and
12 minutes on two idle cores; all output in `.venvs/install-EXTRA/check.log`. Ends with 1 where one fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checks.environments import ROOT, Environment, FailedError, step

EXTRAS = ("base", "control", "gateway", "train", "gpu", "all")
WITHOUT = {
    "base": ("torch", "pandas", "pyarrow", "typer", "rich", "sklearn", "safetensors", "pynvml"),
    "control": ("sklearn", "matplotlib", "tensorboardX", "pynvml"),
    "gateway": ("torch", "pandas", "pyarrow", "sklearn", "pynvml"),
    "train": ("pynvml",),
    "gpu": ("torch", "pandas", "pyarrow", "sklearn"),
    "all": (),
}
"""What an extra must not bring; psutil cannot be told, because Ray has one of its own on the import path."""


def wheel(folder: Path) -> Path:
    """Built from a clone of what is committed."""
    clone, built = folder / "clone", folder / "built"
    with step("Cloning and building a wheel"):
        for command in (
            ["git", "clone", "-q", str(ROOT), str(clone)],
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(built), str(clone)],
        ):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
            if ran.returncode != 0:
                raise FailedError(f"{' '.join(command)}: {ran.stderr}")
    (found,) = built.glob("shadecast-*.whl")
    return found


def check(extra: str, built: Path, folder: Path) -> None:
    """Install it and try what it is for. Raises FailedError."""
    with step(f"{extra}: installing"):
        environment = Environment.made(f"install-{extra}", anew=True)
        environment.install(str(built) if extra == "base" else f"{built}[{extra}]")
    elsewhere = folder / extra
    elsewhere.mkdir()
    trials = shutil.copy(Path(__file__).with_name("trials.py"), elsewhere)
    state = {name: str(elsewhere / "state") for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    without = ",".join(WITHOUT[extra])
    with step(f"{extra}: trying"):
        environment.run(
            [environment.program("python"), str(trials), extra, without], cwd=elsewhere, more=state, timeout_s=900.0
        )


def main(asked: Sequence[str]) -> int:
    """Check the extras that are asked for, all without."""
    if unknown := set(asked) - set(EXTRAS):
        print(f"install: {', '.join(sorted(unknown))}: known are {', '.join(EXTRAS)}", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            built = wheel(folder)
        except FailedError as error:
            print(error)
            return 1
        for extra in asked or EXTRAS:
            try:
                check(extra, built, folder)
            except FailedError as error:
                print(error)
                failed.append(extra)
    print(f"FAILED: {', '.join(failed)}" if failed else "Every extra works alone, from another folder.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
