"""Runs scenarios: all arms in turn on one cluster with the same arrivals, the order rotated by seed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench.live import state
from bench.live.arms import Arm
from bench.live.cgroups import LabError
from bench.live.cluster import IsolatedWorld, UnisolatedWorld, Worker, World
from bench.live.driver_process import DriverError
from bench.live.faults import FAULTS, Scene
from bench.live.journal import read_journal
from bench.live.metrics import Span, cpu_fractions, measure
from bench.live.scenario import Fault, Scenario, requests
from bench.live.soak import Watch
from bench.live.workload import exchange_folder
from bench.results import Row, code_version, is_older

WORKERS = 4
_ATTEMPTS = 2
_CONTROL_PLANE = {"coordinator": "CoordinatorProcess", "forecasters": "ForecasterProcess"}


class Rows:
    """The file of results, rewritten whole after every run, so that a killed benchmark loses only the run under way."""

    def __init__(self, path: Path | None, *, resume: bool, renew: bool = False) -> None:
        self._path, self._renew = path, renew
        self._code = code_version()  # now: processes that are started later run what was there at the start
        self.rows: list[Row] = []
        if path is not None and resume and path.exists():
            self.rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def done(self, scenario: str, arm: str, seed: int) -> bool:
        """Whether that run is in the file; if older code is to be run again, of newer code."""
        same = [row for row in self.rows if (row.scenario, row.arm, row.seed) == (scenario, arm, seed)]
        return bool(same) and not (self._renew and is_older(same[0].code))

    def add(self, rows: Iterable[Row]) -> None:
        """Append and save, with the code that was measured; rows of the same run that were there go."""
        new = [replace(row, code=row.code or self._code) for row in rows]
        runs = {(row.scenario, row.arm, row.seed) for row in new}
        self.rows = [row for row in self.rows if (row.scenario, row.arm, row.seed) not in runs] + new
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".new")
            lines = ",\n".join(json.dumps(row.as_dict()) for row in self.rows)
            written.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            written.replace(self._path)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a benchmark tells how far it is."""

    say: Callable[[str], None]
    advance: Callable[[int, int], None]
    """Requests answered, of how many."""


class _Timeline(threading.Thread):
    """Carries out a scenario's faults at their times, and ends them; also when the run is given up."""

    def __init__(self, scene: Scene, zero_s: float, oracle: Callable[[bool], None]) -> None:
        super().__init__(daemon=True)
        self.spans: list[Span] = []
        self.error: BaseException | None = None
        self._scene, self._zero_s, self._oracle = scene, zero_s, oracle
        self._ended = threading.Event()

    def run(self) -> None:
        """Faults in order; they do not overlap."""
        try:
            for fault in sorted(self._scene.scenario.faults, key=lambda f: f.start):
                if fault.start >= 0.0:
                    self._one(fault)
        except BaseException as error:
            self.error = error

    def _wait(self, at: float) -> None:
        self._ended.wait(max(self._zero_s + at * self._scene.scenario.length_s - time.monotonic(), 0.0))

    def _one(self, fault: Fault) -> None:
        self._wait(fault.start)
        if self._ended.is_set():
            return
        if fault.bad:
            self._oracle(True)
        start_s = time.monotonic() - self._zero_s
        scene = self._scene
        if fault.node:
            workers = scene.world.workers
            other = workers[(workers.index(scene.node) + fault.node) % len(workers)]
            scene = replace(scene, node=other)
        end = FAULTS[fault.kind](scene, fault)
        try:
            self._wait(fault.end)
        finally:
            end()
            end_s = time.monotonic() - self._zero_s
            if fault.bad and fault.kind != "kill":
                self._oracle(False)
            self.spans.append(Span(fault.kind, start_s, end_s, scene.node.node_id, fault.bad))

    def finish(self) -> list[Span]:
        """End what is still there; what was when."""
        self._ended.set()
        self.join(timeout=210.0)
        if self.error is not None:
            raise self.error
        return self.spans


class Bench:
    """Keeps one cluster for as long as scenarios can use it."""

    def __init__(self, rows: Rows, series: Path | None, progress: Progress, *, unisolated: bool = False) -> None:
        self._rows, self._series, self._progress, self._unisolated = rows, series, progress, unisolated
        self._world: World | None = None
        self._world_limit: int | None = None

    def scenario(self, scenario: Scenario, arms: Sequence[Arm], seeds: Sequence[int]) -> list[str]:
        """Run what is not in the rows yet; the failures, one line each."""
        failures = []
        arms = [arm for arm in arms if scenario.kind != "http" or arm.over_http]
        for seed in seeds:
            turn = [arms[(i + seed) % len(arms)] for i in range(len(arms))]
            for arm in turn:
                if self._rows.done(scenario.name, arm.name, seed):
                    continue
                for attempt in range(1, _ATTEMPTS + 1):
                    try:
                        self._rows.add(self._run(scenario, arm, seed))
                        break
                    except (LabError, DriverError, OSError, psutil.Error, ValueError) as error:
                        self.close()  # whatever state it is in, the next run gets a fresh one
                        line = f"{scenario.name}, {arm.name}, seed {seed}, attempt {attempt}: {error}"
                        self._progress.say(f"FAILED {line}")
                        if attempt == _ATTEMPTS:
                            failures.append(line)
        return failures

    def close(self) -> list[str]:
        """Remove the cluster; what is left of it all the same."""
        world, self._world = self._world, None
        if world is None:
            return []
        world.__exit__(None, None, None)
        return state.leftovers(world.lab.state.made) if isinstance(world, IsolatedWorld) else []

    def _get_world(self, scenario: Scenario) -> World:
        if self._world is not None and self._world_limit != scenario.memory_limit_bytes:
            self.close()
        if self._world is None:
            say = self._progress.say
            self._world = (
                UnisolatedWorld(WORKERS, say)
                if self._unisolated
                else IsolatedWorld(WORKERS, scenario.memory_limit_bytes, say)
            )
            self._world_limit = scenario.memory_limit_bytes
            try:
                self._world.__enter__()
            except BaseException:
                self._world = None
                raise
        return self._world

    def _run(self, scenario: Scenario, arm: Arm, seed: int) -> list[Row]:
        world = self._get_world(scenario)
        label = f"{scenario.name}, {arm.name}, seed {seed}"
        self._progress.say(f"{label}: deploying")
        world.repair()
        world.tell_oracle(set())
        for worker in world.workers:
            world.set_role(worker, {})
        if isinstance(world, IsolatedWorld):
            world.set_quota(None)  # starting under the quota takes long and shows nothing
        settings = {section: dict(values) for section, values in scenario.settings.items()}
        what: dict[str, Any] = {"arm": arm.name, "replicas": scenario.replicas, "settings": settings}
        if scenario.kind == "http":
            on = world.driver.call("deploy_http", 240.0, **what)["on"]
        else:
            on = world.driver.call("deploy", 240.0, **what, unisolated=self._unisolated)["on"]
        if isinstance(world, IsolatedWorld):
            world.set_quota(world.lab.cpu_quota)
        try:
            node = _which(world.workers, scenario, on, seed)
            return self._measure(Scene(world, scenario, node, seed), arm, seed, label)
        finally:
            with suppress(LabError):
                world.driver.call("undeploy", 60.0)

    def _measure(self, scene: Scene, arm: Arm, seed: int, label: str) -> list[Row]:
        world, scenario, node = scene.world, scene.scenario, scene.node
        undo = [FAULTS[f.kind](scene, f) for f in scenario.faults if f.start < 0.0]
        if undo:
            world.tell_oracle({node.node_id})
        try:
            path, sent = world.exchange / "result.jsonl", world.exchange / "requests.json"
            path.unlink(missing_ok=True)
            sent.write_text(json.dumps([asdict(r) for r in requests(scenario, seed)]))
            result, spans, used = self._drive(scene, label)
        finally:
            for end in undo:
                end()
        if undo:
            spans = [Span(f.kind, 0.0, scenario.length_s, node.node_id, f.bad) for f in scenario.faults]
        found = measure(scenario, result, spans) | used
        if self._series is not None:
            self._series.mkdir(parents=True, exist_ok=True)
            kept = {
                "spans": [asdict(span) for span in spans],
                "records": [[r["at_s"], r["latency_s"], r["node"], r["error"]] for r in result["records"]],
                "states": result["states"],
                "names": {worker.node_id: worker.name for worker in world.workers},
                "transitions": (result["after"] or {}).get("transitions", []),
                "deployment": (result["after"] or {}).get("deployment"),
                "length_s": scenario.length_s,
                "slo_s": scenario.slo_s,
                "observed": result.get("observed", []),
            }
            (self._series / f"{scenario.name}-{arm.name}-{seed}.json").write_text(json.dumps(kept))
        return [Row(scenario.name, arm.name, seed, metric, value) for metric, value in found.items()]

    def _drive(self, scene: Scene, label: str) -> tuple[dict[str, Any], list[Span], dict[str, float]]:
        """Send everything while the faults happen; what the driver and the timeline noted."""
        world, scenario, driver = scene.world, scene.scenario, scene.world.driver
        bad = scene.node.node_id
        inside = exchange_folder()
        while driver.event(0.0):
            pass
        box: dict[str, Any] = {}
        limit_s = scenario.length_s + scenario.warm_up_s + 240.0

        def call() -> None:
            try:
                box["answer"] = driver.call(
                    "run",
                    limit_s,
                    requests=f"{inside}/requests.json",
                    result=f"{inside}/result.jsonl",
                    scenario={
                        "kind": scenario.kind,
                        "batched": scenario.batched,
                        "payload_bytes": scenario.payload_bytes,
                        "item_gap_s": scenario.item_gap_s,
                        "soak": scenario.soak,
                    },
                )
            except LabError as error:
                box["error"] = error

        watch = Watch(world.processes) if scenario.soak else None
        if watch is not None:
            watch.start()
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        timeline: _Timeline | None = None
        used: dict[str, dict[int, float]] = {}
        self._progress.say(f"{label}: running")
        while caller.is_alive():
            event = driver.event(0.2)
            if "zero_s" in event:
                timeline = _Timeline(scene, event["zero_s"], lambda on: world.tell_oracle({bad} if on else set()))
                timeline.start()
                used = _cpu_s(world)
                begun_s = time.monotonic()
            if "progress" in event:
                self._progress.advance(event["progress"], event["of"])
        seconds = time.monotonic() - begun_s if used else 1.0
        spans = timeline.finish() if timeline is not None else []
        if "error" in box:
            raise box["error"]
        found = _rss_bytes(world) | cpu_fractions(used, _cpu_s(world), seconds)
        if watch is not None:
            found |= watch.finish()
        return read_journal(world.exchange / "result.jsonl"), spans, found


def _which(workers: Sequence[Worker], scenario: Scenario, on: Sequence[str], seed: int) -> Worker:
    """The node that turns bad: one with a replica, by seed; a newcomer's is one without."""
    newcomer = scenario.joins > 0
    fit = [worker for worker in workers if (worker.node_id in on) != newcomer]
    if not fit:
        raise LabError(f"{scenario.name}: no node {'without' if newcomer else 'with'} a replica")
    return fit[seed % len(fit)]


def _rss_bytes(world: World) -> dict[str, float]:
    """Memory of the control plane's processes, each kind's mean."""
    found: dict[str, float] = {}
    for what, part in _CONTROL_PLANE.items():
        processes = world.named(part)
        with suppress(psutil.Error):
            found[f"{what}_rss_bytes"] = sum(p.memory_info().rss for p in processes) / max(len(processes), 1)
    return found


def _cpu_s(world: World) -> dict[str, dict[int, float]]:
    """CPU that each process of the control plane has used so far, by kind and process id."""
    found: dict[str, dict[int, float]] = {}
    for what, part in _CONTROL_PLANE.items():
        with suppress(psutil.Error):
            found[what] = {p.pid: sum(p.cpu_times()[:2]) for p in world.named(part)}
    return found
