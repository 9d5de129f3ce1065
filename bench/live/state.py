"""What a lab has made, in a file that outlives it: written before a thing is made, so that all of it can be removed.

One file a lab, locked by the process that runs the lab; the lock goes with that process, however it ends. A file
that nobody locks is a lab whose driver is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from bench.live.cgroups import ROOT, Group, LabError

FOLDER = Path("/run/shadecast-lab")
PREFIX = "shadecastlab"
"""Of cgroups and folders; links have room for fewer letters."""
LINK_PREFIX = "shlab"
LABS = 16


@dataclass(slots=True)
class Made:
    """Names of what a lab made."""

    slot: int
    version: int
    links: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    processes: dict[str, int] = field(default_factory=dict)
    """Host -> process id of its namespaces' holder; with `born`, because ids are used again."""
    born: dict[str, str] = field(default_factory=dict)


class StateFile:
    """A lab's file, locked as long as this object (or its process) lives."""

    def __init__(self, path: Path, lock: IO[str], made: Made) -> None:
        self.path, self._lock, self.made = path, lock, made

    def save(self) -> None:
        """Write it down, replacing the text in place (the lock belongs to this very file)."""
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(asdict(self.made)))
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def close(self, *, remove: bool) -> None:
        """Give the slot back."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._lock.close()


def claim(version: int, folder: Path = FOLDER) -> StateFile:
    """A free slot; leftovers of a dead driver in it are removed first. Raises LabError if all are in use."""
    folder.mkdir(parents=True, exist_ok=True)
    for slot in range(LABS):
        held = _lock(folder / f"{slot}.json")
        if held is None:
            continue
        old = _parse(held)
        if old is not None:
            remove_all(old)
        state = StateFile(folder / f"{slot}.json", held, Made(slot, version))
        state.save()
        return state
    raise LabError(f"{LABS} labs run already (locked files in {folder}): end one first")


def clean(folder: Path = FOLDER) -> list[int]:
    """Remove what labs without a living driver left behind; their slots."""
    cleaned = []
    for path in sorted(folder.glob("*.json")):
        held = _lock(path)
        if held is None:
            continue
        made = _parse(held)
        if made is not None:
            remove_all(made)
            cleaned.append(made.slot)
        path.unlink(missing_ok=True)
        held.close()
    return cleaned


def _lock(path: Path) -> IO[str] | None:
    held = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - lives as long as the lab
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    if not path.exists() or path.stat().st_ino != os.fstat(held.fileno()).st_ino:  # removed while we waited for it
        held.close()
        return None
    return held


def _parse(held: IO[str]) -> Made | None:
    held.seek(0)
    try:
        made = Made(**json.loads(held.read()))
    except (ValueError, TypeError):
        return None
    return made


def birth(pid: int) -> str:
    """When a process was started, in clock ticks since boot; "" if there is none. Distinguishes reused ids."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def remove_all(made: Made, root: Path = ROOT) -> None:
    """Remove everything of a lab: processes, links, groups, folders. What is gone already is no error."""
    for host, pid in made.processes.items():
        if made.born.get(host) and birth(pid) == made.born[host]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for name in _own(made.groups):
        Group(made.version, name, root).remove()
    for link in made.links:
        if link.startswith(LINK_PREFIX):
            remove_link(link)
    for folder in _own(made.folders):
        _remove_folder(Path(folder))


def leftovers(made: Made, root: Path = ROOT) -> list[str]:
    """What of a lab is still there: empty after `remove_all`."""
    groups = [str(folder) for name in made.groups for folder in Group(made.version, name, root).folders]
    links = [f"/sys/class/net/{link}" for link in made.links]
    processes = [f"/proc/{pid}" for host, pid in made.processes.items() if birth(pid) == made.born.get(host)]
    return [path for path in (*groups, *links, *made.folders, *processes) if Path(path).exists()]


def _own(names: list[str]) -> Iterator[str]:
    """Longest first, and only what bears our prefix: a damaged file must not remove anything else."""
    for name in sorted(names, key=len, reverse=True):
        if Path(name).parts and any(part.startswith(PREFIX) for part in Path(name).parts) and ".." not in name:
            yield name


def remove_link(link: str) -> None:
    """Remove a network link if it is there."""
    if Path(f"/sys/class/net/{link}").exists():
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)


def _remove_folder(folder: Path, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > deadline_s:
            raise LabError(f"{folder} cannot be removed: something still writes there")
        time.sleep(0.01)
