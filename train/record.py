"""`python -m train.record`: telemetry of machines side by side that rest for half of the time and run jobs in phases.

Each machine is a group with a CPU quota and a memory limit, with process table and network of its own, where the system
allows it (root, cgroups, `unshare`); else a session of processes whose use is summed up. It has a seed and habits of
its own (`train.loads`), runs real work (`train.jobs`), and reads its telemetry with the reader that forecasters have,
once a second (`train.machine`). OUT becomes a telemetry log, one folder a machine, with `manifest.json`: what each
machine ran and when, and how many onsets it had. Ctrl-C ends it early and keeps what is there. Everything that it
started ends with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from models.series import read_folder
from shadecast.errors import ConfigError, ShadecastError
from train.cgroups import Group, GroupError, version
from train.loads import kinds_of
from train.machine import Spec
from train.onsets import cold, onsets

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "shadecast-record-"
START_S = 180.0
"""Many machines that start on few cores take their time."""
END_S = 20.0
CORES_USED = 0.9
"""Of the cores, that all machines together may take by default: the rest reads telemetry and records."""
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 97; shift; done; shift; exec "$@"'
_SEPARATE = ("unshare", "--net", "--pid", "--ipc", "--mount-proc", "--fork", "--kill-child")


@dataclass(slots=True)
class Machine:
    """One machine that runs: its process, its group where it has one, and what it has told."""

    spec: Spec
    group: Group | None
    process: subprocess.Popen[str]
    ready: threading.Event = field(default_factory=threading.Event)
    told: list[dict[str, Any]] = field(default_factory=list)

    def listen(self) -> None:
        """Take in what it tells, until it ends."""
        assert self.process.stdout is not None  # noqa: S101 - a pipe
        for line in self.process.stdout:
            with suppress(ValueError):
                words = json.loads(line)
                if words.get("event") in ("phase", "end"):
                    self.told.append(words)
                self.ready.set()
        self.ready.set()

    def tell(self, line: str) -> None:
        """One line to its input; a machine that is gone hears nothing."""
        with suppress(OSError):
            assert self.process.stdin is not None  # noqa: S101 - a pipe
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def end(self, until_s: float) -> None:
        """Let it end, or end it; remove its group with all that is in it."""
        with suppress(OSError):
            assert self.process.stdin is not None  # noqa: S101 - a pipe
            self.process.stdin.close()
        try:
            self.process.wait(max(0.1, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.group is not None:
            self.group.remove()


def why_not_isolated() -> str:
    """What keeps machines from having groups and namespaces of their own here; "" where nothing does."""
    if os.geteuid() != 0:
        return "it takes root"
    try:
        version()
        probe = Group(version(), f"shadecast-probe-{os.getpid()}")
        probe.make()
        probe.remove()
        subprocess.run([*_SEPARATE, "true"], check=True, capture_output=True, timeout=20)  # noqa: S603 - a constant
    except (GroupError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


@contextmanager
def machines(specs: Sequence[Spec]) -> Iterator[list[Machine]]:
    """Started machines, ready and limited; all of them are gone after."""
    running: list[Machine] = []
    top = Group(version(), f"{PREFIX}{os.getpid()}") if specs[0].isolated else None
    try:
        if top is not None:
            remove_left_behind(top.version)
            top.make()
        for spec in specs:
            running.append(_start(spec, top))
        for machine in running:
            if not machine.ready.wait(START_S) or machine.process.poll() is not None:
                raise GroupError(f"machine {machine.spec.name} did not start (exit status {machine.process.poll()})")
            if machine.group is not None:  # only now: with a small quota it takes long to start
                machine.group.set_cpu_quota(machine.spec.cpus)
        yield running
    finally:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is impatient must not leave groups behind
        until_s = time.monotonic() + END_S
        for machine in running:
            with suppress(OSError):
                assert machine.process.stdin is not None  # noqa: S101 - a pipe
                machine.process.stdin.close()
        for machine in running:
            machine.end(until_s)
        if top is not None:
            top.remove()
        signal.signal(signal.SIGINT, heard)


def remove_left_behind(cgroups: int) -> None:
    """Groups of recordings that were killed; their machines have ended by themselves."""
    folders = Group(cgroups, "").folders
    for name in {path.name for folder in folders for path in folder.glob(f"{PREFIX}*")}:
        pid = name.removeprefix(PREFIX)
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            Group(cgroups, name).remove()


def _start(spec: Spec, top: Group | None) -> Machine:
    command, group = [sys.executable, "-m", "train.machine"], None
    if top is not None:
        group = Group(top.version, f"{top.name}/m{spec.index}")
        group.make()
        group.set_memory_limit(spec.memory_bytes)
        command = ["/bin/sh", "-c", _ENTER, "sh", *map(str, group.folders), "--", *_SEPARATE, *command]
    process = subprocess.Popen(  # noqa: S603 - our own module
        command,
        cwd=spec.scratch,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours to handle
    )
    machine = Machine(spec, group, process)
    threading.Thread(target=machine.listen, daemon=True).start()
    machine.tell(json.dumps(asdict(spec)))
    return machine


def record(specs: Sequence[Spec], minutes: float, console: Console) -> list[dict[str, Any]]:
    """Let the machines live for so long, or until Ctrl-C; what each has told."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with machines(specs) as running:
        began_s = time.monotonic()
        for machine in running:
            machine.tell("go")
        try:
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("recording", total=60.0 * minutes, said="")
                while (passed_s := time.monotonic() - began_s) < 60.0 * minutes:
                    alive = sum(m.process.poll() is None for m in running)
                    jobs = sum(t["event"] == "end" for m in running for t in list(m.told))
                    bar.update(task, completed=passed_s, said=f"{alive} machines, {jobs} jobs done")
                    if not alive:
                        console.print("[red]no machine is left[/]")
                        break
                    time.sleep(0.5)
        except KeyboardInterrupt:
            console.print("ended early; what was recorded is kept")
    return [
        {"machine": m.spec.name, "kinds": kinds_of(m.spec.seed, m.spec.index), "told": m.told, "spec": asdict(m.spec)}
        for m in running
    ]


def manifest(out: Path, told: Sequence[dict[str, Any]], minutes: float, seed: int) -> dict[str, Any]:
    """What was recorded: by machine its seed, kinds, phases with their times, and its onsets."""
    series = read_folder(out)
    found = []
    for one in told:
        mine = [s for s in series if s.machine == one["machine"]]
        loads = [s.values[:, 0] for s in mine]
        warned = [onsets(load)[1:] & cold(load, 1.0)[:-1] for load in loads]
        quiet = np.concatenate([load <= 0.1 for load in loads]) if loads else np.zeros(0, bool)
        spec = one["spec"]
        found.append(
            {
                "machine": one["machine"],
                "seed": [spec["seed"], spec["index"]],
                "cpus": spec["cpus"],
                "memory_bytes": spec["memory_bytes"],
                "isolated": spec["isolated"],
                "kinds": list(one["kinds"]),
                "rows": int(sum(map(len, loads))),
                "idle_share": round(float(quiet.mean()), 3) if len(quiet) else None,
                "onsets": int(sum(onsets(load).sum() for load in loads)),
                "onsets_after_quiet": int(sum(w.sum() for w in warned)),
                "jobs_failed": sum(t["event"] == "end" and t["code"] != 0 for t in one["told"]),
                "phases": [{k: t[k] for k in ("t_s", "kind", "phase")} for t in one["told"] if t["event"] == "phase"],
            }
        )
    total = sum(m["onsets"] for m in found)
    machine_minutes = sum(m["rows"] for m in found) / 60.0
    return {
        "schema": 1,
        "seed": seed,
        "minutes": minutes,
        "onsets": total,
        "onsets_after_quiet": sum(m["onsets_after_quiet"] for m in found),
        "onsets_per_minute": round(total * len(found) / machine_minutes, 2) if machine_minutes else None,
        "machines": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, record, write the manifest; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m train.record", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="another seed: other machines")
    parser.add_argument("--cpus", type=float, help="of each machine; default: its share of .9 of the cores")
    parser.add_argument("--memory-mib", type=int, default=512, help="of each machine")
    parser.add_argument("--out", type=Path, default=Path("telemetry"), help="a folder without a recording in it")
    parser.add_argument("--plain", action="store_true", help="sessions of processes even where groups could be had")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    heard = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(arguments, console)
    except ShadecastError as error:
        print(f"train.record: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.record: ended before anything was recorded", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, heard)


def _main(arguments: argparse.Namespace, console: Console) -> int:
    for name, low, high in (
        ("minutes", 0.05, 10_000),
        ("machines", 1, 1000),
        ("seed", 0, 2**31),
        ("memory_mib", 192, 2**20),
    ):
        if not low <= getattr(arguments, name) <= high:
            raise ConfigError(f"record.{name} = {getattr(arguments, name)!r}: must be from {low:g} to {high:g}")
    cpus = arguments.cpus or CORES_USED * (os.cpu_count() or 1) / arguments.machines
    if not 0.02 <= cpus <= (os.cpu_count() or 1):
        raise ConfigError(f"record.cpus = {cpus:g} of each machine: must be from .02 to the cores there are")
    out = arguments.out.absolute()
    if (out / "manifest.json").exists():
        raise ConfigError(f"record.out = {str(arguments.out)!r}: has a recording in it already; give another folder")
    why = "--plain was said" if arguments.plain else why_not_isolated()
    if why:
        console.print(f"machines share this one's cores without limits ({why}): their processes are summed up")
    scratch = Path(tempfile.mkdtemp(prefix="shadecast-record-"))
    try:
        specs = []
        for index in range(arguments.machines):
            (scratch / f"m{index}").mkdir()
            specs.append(
                Spec(
                    name=f"own-{arguments.seed}-{index}",
                    seed=arguments.seed,
                    index=index,
                    cpus=round(cpus, 4),
                    memory_bytes=arguments.memory_mib << 20,
                    isolated=not why,
                    out=str(out),
                    scratch=str(scratch / f"m{index}"),
                )
            )
        out.mkdir(parents=True, exist_ok=True)
        told = record(specs, arguments.minutes, console)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    document = manifest(out, told, arguments.minutes, arguments.seed)
    (out / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"{sum(m['rows'] for m in document['machines'])} rows of {len(told)} machines -> {out}: "
        f"{document['onsets']} onsets ({document['onsets_after_quiet']} after 5 s of quiet), "
        f"{document['onsets_per_minute']} a minute"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
