"""What `shadecast simulate` does: a user's own requests and machines, played again under each routing rule.

All arms see the same requests and the same machines; only where a request goes differs. Intervals come from half
minutes of arrivals that are drawn anew, for all arms the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.simulate.arms import BASELINES
from bench.simulate.arms.base import Arm
from bench.simulate.arms.product import Product
from bench.simulate.engine import Request
from bench.simulate.nodes import NodeTrace
from bench.simulate.own_machines import Machines
from bench.simulate.own_trace import OwnTrace
from bench.simulate.run import Played, play
from bench.simulate.scenario import Scenario, Work, World
from bench.simulate.workload import TOKEN_S, lognormal_median
from serve_app.launch.own_installation import put_first
from shadecast.blocks import BLOCK_S, draws, middle, ratio, too_little
from shadecast.config import Config
from shadecast.errors import ConfigError

LEAD_S = 30.0
"""So long machines and control plane run before the first request."""
DEFAULT_ARMS = ("round_robin", "serve_default", "live_capacity", "shadecast", "oracle")
BASE = "serve_default"
"""What savings are told against, where it is among the arms."""
_RENAMED = {"p2c_ray": BASE, "clairvoyant": "oracle"}
ARMS: dict[str, Callable[[], Arm]] = {
    **{_RENAMED.get(name, name): make for name, make in BASELINES.items()},
    "live_capacity": lambda: Product(None),
    "shadecast": lambda: Product("shipped"),
}
MEANING = {
    "round_robin": "each router takes turns",
    BASE: "Serve's default: the shorter of two cached queues",
    "live_capacity": "Shadecast by measured speed alone, without forecasts",
    "shadecast": "Shadecast with the shipped forecaster",
    "oracle": "a bound: knows all sizes, queues and what each machine will do",
}
_QUANTILES = {"p50_s": 0.5, "p99_s": 0.99, "p999_s": 0.999}
_POINTS = 120
"""Of a curve in the answer."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that is the same for all arms."""

    trace: OwnTrace
    machines: Machines | None
    """None: undisturbed machines."""
    replicas: int
    routers: int
    slots: int
    batch_half: float
    load_factor: float
    slo_s: float
    """0: by each request's own time alone."""

    def scenario(self) -> Scenario:
        """For the engine."""
        works = np.asarray(self.trace.works(0))
        mean_s = float(works.mean())
        sigma = math.sqrt(max(2.0 * math.log(mean_s / float(np.median(works))), 0.0))
        factor, medians = (4.0, 0.0) if self.trace.streams else (3.0, 5.0)
        if self.slo_s:
            factor, medians = 0.0, self.slo_s / lognormal_median(mean_s, sigma)
        work = Work(mean_s, sigma, self.slots, self.batch_half, factor, medians)
        return Scenario(
            self.trace.name, work, replicas=self.replicas, routers=self.routers, horizon_s=self.until_s, warmup_s=0.0
        )

    def slo(self) -> str:
        """In words."""
        if self.slo_s:
            return f"{self.slo_s:g} s"
        return (
            "4 x the request's own time alone" if self.trace.streams else "3 x the request's own time alone + 5 medians"
        )

    @property
    def until_s(self) -> float:
        """When the last request has come."""
        return LEAD_S + self.trace.length_s / self.load_factor + 1e-6

    def world(self, seed: int) -> World:
        """One seed: who routes each request, and sizes that are drawn."""
        nodes = (
            self.machines.nodes(self.until_s)
            if self.machines is not None
            else [NodeTrace() for _ in range(self.replicas)]
        )
        return World(self.scenario(), nodes, lambda: self._requests(seed), seed)

    def _requests(self, seed: int) -> Iterator[Request]:
        rng = np.random.default_rng([seed, 1])
        routers = rng.integers(self.routers, size=len(self.trace.at_s))
        works = zip(self.trace.at_s, self.trace.works(seed), routers, strict=True)
        for number, (at_s, work_s, router) in enumerate(works):
            request = Request(number, LEAD_S + at_s / self.load_factor, work_s, int(router))
            if self.trace.streams:
                request.items = max(round(work_s / TOKEN_S), 1)
            yield request

    def load(self) -> float:
        """Work that comes over what the replicas can do meanwhile."""
        from_s, nodes = LEAD_S, self.world(0).nodes
        speed = float(np.mean([node.mean_speed(from_s, self.until_s) for node in nodes]))
        offered = sum(self.trace.works(0)) / (self.until_s - from_s)
        return offered / (self.replicas * self.scenario().work.throughput() * speed)


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One arm of a comparison: a known one, or a policy, which is Shadecast with other settings."""

    name: str
    settings: Mapping[str, Any] | None = None

    def make(self) -> Arm:
        """A new one for a run."""
        return ARMS[self.name]() if self.settings is None else Product("shipped", self.settings)

    def meaning(self) -> str:
        """In words."""
        if self.settings is None:
            return MEANING.get(self.name, "")
        changed = [
            f"{section}.{key} = {value}" for section, each in self.settings.items() for key, value in each.items()
        ]
        return f"Shadecast with {', '.join(changed)}"


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What came of one arm, over all seeds. Bounds are of 95 % intervals, None where there is too little data."""

    arm: str
    meaning: str
    requests: int
    unfinished: int
    p50_s: float
    p99_s: float
    p999_s: float
    mean_s: float
    slo_miss_fraction: float
    slo_miss_bounds: tuple[float, float] | None
    p99_bounds_s: tuple[float, float] | None
    saved_fraction: float
    """Of the base's mean latency; below 0: it takes longer."""
    saved_bounds: tuple[float, float] | None
    tail: tuple[tuple[float, float], ...]
    """(latency, fraction of the requests that took longer)."""
    mean_by_block_s: tuple[float | None, ...]
    """Mean latency of the requests of each half minute; None where none came."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """The arm's own: copies, trials, second attempts."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms side by side."""

    base: str
    arms: tuple[ArmResult, ...]
    load: float
    too_little: str
    """Why there are no intervals; empty where there are."""
    rate_by_block: tuple[float, ...]
    """Requests a second in each half minute."""
    free_by_block: tuple[tuple[str, tuple[float, ...]], ...]
    """What others leave of each machine's CPU in each half minute."""


def policies(given: Sequence[str]) -> list[ArmSpec]:
    """Arms from `NAME:section.key=value[,section.key=value]`. Raises ConfigError."""
    found: list[ArmSpec] = []
    for text in given:
        name, _, rest = text.partition(":")
        if not name.replace("_", "").replace("-", "").isalnum() or not rest:
            raise ConfigError(f"--policy {text!r}: must be NAME:section.key=value[,section.key=value]")
        if name in ARMS or name in [each.name for each in found]:
            raise ConfigError(f"--policy {text!r}: {name} is the name of another arm; give it one of its own")
        settings: dict[str, dict[str, Any]] = {}
        for one in rest.split(","):
            path, equals, value = one.partition("=")
            section, _, key = path.strip().partition(".")
            if not (equals and key):
                raise ConfigError(f"--policy {text!r}: {one!r} must be section.key=value")
            settings.setdefault(section, {})[key] = _value(value.strip())
        try:
            Config.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(f"--policy {name}: {error}") from None
        found.append(ArmSpec(name, settings))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def arms(names: Sequence[str], more: Sequence[ArmSpec]) -> list[ArmSpec]:
    """The arms of these names, and the policies. Raises ConfigError."""
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"--arms {name!r}: unknown; known are {', '.join(ARMS)}")
    return [*(ArmSpec(name) for name in dict.fromkeys(names)), *more]


def compare(
    setup: Setup,
    specs: Sequence[ArmSpec],
    seeds: int,
    jobs: int = 1,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Comparison:
    """Run every arm on every seed; `on_progress` hears how many runs are over."""
    todo = [(spec, seed) for seed in range(seeds) for spec in specs]
    played: dict[tuple[str, int], Played] = {}
    if jobs > 1:
        spawned = get_context("spawn")  # torch and pyarrow have threads, which a fork would lose
        with ProcessPoolExecutor(jobs, mp_context=spawned, initializer=put_first) as pool:
            running = {pool.submit(_run, setup, spec, seed): (spec.name, seed) for spec, seed in todo}
            for done, each in enumerate(as_completed(running), 1):
                played[running[each]] = each.result()
                on_progress(done)
    else:
        for before, (spec, seed) in enumerate(todo):
            told = lambda part, before=before: on_progress(before + part)  # noqa: E731 - one line with its loop
            played[spec.name, seed] = play(setup.world(seed), spec.make(), told)
            on_progress(before + 1)
    return summed_up(setup, specs, [{spec.name: played[spec.name, seed] for spec in specs} for seed in range(seeds)])


def _run(setup: Setup, spec: ArmSpec, seed: int) -> Played:
    return play(setup.world(seed), spec.make())


def summed_up(setup: Setup, specs: Sequence[ArmSpec], by_seed: Sequence[Mapping[str, Played]]) -> Comparison:
    """The comparison of what each arm did on each seed."""
    blocks = int((setup.until_s - LEAD_S) // BLOCK_S) + 1
    names = [spec.name for spec in specs]
    base = BASE if BASE in names else names[0]
    sides = {name: _Side([seed[name] for seed in by_seed], blocks) for name in names}
    used = np.flatnonzero(sides[base].requests)
    why_not = too_little(len(used), float(sides[base].requests.sum()))
    drawn = None if why_not else draws(len(used), np.random.default_rng(0))
    results = tuple(_result(spec, sides[spec.name], sides[base], used, drawn) for spec in specs)
    rate = sides[base].requests / len(by_seed) / np.minimum(BLOCK_S, _lengths(setup, blocks))
    nodes = setup.world(0).nodes if setup.machines is not None else []
    labels = [machine.name for machine in setup.machines.chosen] if setup.machines is not None else []
    free = tuple((name, _free(node, setup, blocks)) for name, node in zip(labels, nodes, strict=True))
    return Comparison(base, results, setup.load(), why_not, tuple(map(float, rate)), free)


class _Side:
    """One arm's requests of all seeds, by half minutes of arrival."""

    def __init__(self, played: Sequence[Played], blocks: int) -> None:
        self.latency_s = np.concatenate([each.latency_s for each in played])
        at = np.concatenate([each.arrived_s for each in played]) - LEAD_S
        self.block = np.clip((at / BLOCK_S).astype(int), 0, blocks - 1)
        late = self.latency_s > np.concatenate([each.slo_s for each in played])
        self.requests = np.bincount(self.block, minlength=blocks).astype(float)
        self.took_s = np.bincount(self.block, self.latency_s, blocks)
        self.late = np.bincount(self.block, late, blocks)
        names = ("mirrored_requests", "rescued_requests", "handed_over", "trials", "refused")
        self.counts = {name: sum(each.metrics[name] for each in played) for name in names if name in played[0].metrics}
        self.unfinished = int(sum(each.metrics["unfinished"] for each in played))


def _result(spec: ArmSpec, side: _Side, base: _Side, used: NDArray[Any], drawn: NDArray[Any] | None) -> ArmResult:
    latency = np.sort(side.latency_s)
    quantiles = {name: float(np.quantile(latency, q)) for name, q in _QUANTILES.items()}
    missed, missed_bounds = _ratio(side.late[used], side.requests[used], drawn)
    left, left_bounds = _ratio(side.took_s[used], base.took_s[used], drawn)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_by_block = side.took_s / side.requests
    fractions = np.geomspace(1.0, max(1.0 / len(latency), 1e-5), _POINTS)
    at = np.clip(((1.0 - fractions) * len(latency)).astype(int), 0, len(latency) - 1)
    return ArmResult(
        spec.name,
        spec.meaning(),
        len(latency),
        side.unfinished,
        **quantiles,
        mean_s=float(latency.mean()),
        slo_miss_fraction=missed,
        slo_miss_bounds=missed_bounds,
        p99_bounds_s=_p99_bounds(side, used, drawn),
        saved_fraction=1.0 - left,
        saved_bounds=None if left_bounds is None else (1.0 - left_bounds[1], 1.0 - left_bounds[0]),
        tail=tuple((float(latency[k]), float(f)) for k, f in zip(at, fractions, strict=True)),
        mean_by_block_s=tuple(float(m) if math.isfinite(m) else None for m in mean_by_block),
        counts=side.counts,
    )


def _ratio(
    above: NDArray[Any], below: NDArray[Any], drawn: NDArray[Any] | None
) -> tuple[float, tuple[float, float] | None]:
    return ratio(above, below, drawn) if drawn is not None else (float(above.sum() / below.sum()), None)


def _p99_bounds(side: _Side, used: NDArray[Any], drawn: NDArray[Any] | None) -> tuple[float, float] | None:
    """The 99th percentile of what was drawn: each request counts as often as its half minute."""
    if drawn is None:
        return None
    order = np.argsort(side.latency_s)
    latency, block = side.latency_s[order], np.searchsorted(used, side.block[order])
    found = []
    for times in drawn[:200]:
        below = np.cumsum(times[block])
        found.append(latency[np.searchsorted(below, 0.99 * below[-1])])
    return middle(np.asarray(found))


def _lengths(setup: Setup, blocks: int) -> NDArray[Any]:
    """Seconds of each half minute: the last one is shorter."""
    return np.asarray(np.clip(setup.until_s - LEAD_S - BLOCK_S * np.arange(blocks), 1.0, BLOCK_S))


def _free(node: NodeTrace, setup: Setup, blocks: int) -> tuple[float, ...]:
    starts = LEAD_S + BLOCK_S * np.arange(blocks)
    lengths = _lengths(setup, blocks)
    return tuple(node.mean_speed(float(s), float(s + n)) for s, n in zip(starts, lengths, strict=True))
