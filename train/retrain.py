"""One self-retraining, as `shadecast up --retrain daily` runs it: look at the log, train, compare, save, promote.

It has a process of its own, at the lowest priority and with one thread. The last quarter of the log's samples is held
out, of all machines, and a quarter of the machines is not trained on at any time. A champion that was made in this way
was trained on an earlier part, because a log's beginning and end only move on: it has not seen what is held out either.
"""

from __future__ import annotations

import math
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray

from models.grid import Array
from models.headroom import headroom_errors
from models.registry import Registry, RegistryError
from models.series import Series, TelemetryError, read_folder, telemetry_files
from shadecast.errors import ShadecastError
from shadecast.retraining import (
    Block,
    Comparison,
    LogContent,
    RetrainPlan,
    paired,
    rule_promotion,
    too_small,
)
from train.dataset import Split, parts, shuffled
from train.evaluate import Judged, judge, onset_metrics, onset_truth, places
from train.job import DEFAULTS, champion_of, make, parser, record_of, with_record
from train.onsets import onsets
from train.snapshot import snapshot

GROUPS = 20
"""Parts of the held-out blocks that are left out in turn, for the uncertainty of recalls."""
_CPU, _LAST_VALUE = 0, 0
LOWEST = 19


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a training takes; the defaults are those of `python -m train`."""

    made_up: int = 1500
    steps: int = DEFAULTS.steps
    epochs: int = DEFAULTS.epochs
    start: str = "champion"
    most_rows: int = 1_000_000
    """Of the log, the newest: about 8 minutes of one core (docs/retrain.md)."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folder of the log, folder or URI of the registry, folder for what is under way."""

    telemetry: str
    registry: str
    storage: str


def carry_out(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A step in a process of its own, which ends with it: begin, retrain, settle. Plain values in and out.

    `failed` holds the reason where it has failed; the asking process need not know the errors of this one.
    """
    os.nice(LOWEST)
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    where = Places(**values["where"])
    try:
        match what:
            case "begin":
                shutil.rmtree(where.storage, ignore_errors=True)  # of a training that was killed
                return {"champion": begin(where.registry)}
            case "retrain":
                plan, effort = RetrainPlan.from_mapping(values["plan"]), Effort(**values["effort"])
                trained_wall_s = values["trained_wall_s"]
                return retrain(where, plan, effort, math.nan if trained_wall_s is None else trained_wall_s)
            case _:
                return {"done": settle(where.registry, values["version"], values["former"], values["rolled_back"])}
    except ShadecastError as error:
        return {"failed": str(error)}
    except Exception as error:  # whatever it is, the cluster goes on as it was
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def begin(registry_uri: str) -> str:
    """The champion; that of an empty registry is the shipped version, which is put into it."""
    registry, shipped = Registry(registry_uri), Registry()
    with suppress(RegistryError):
        return registry.champion()
    version = shipped.champion()
    if version not in registry.versions():
        registry.save(shipped.load(version), shipped.card(version))
    registry.promote(version)
    return version


def retrain(where: Places, plan: RetrainPlan, effort: Effort, trained_wall_s: float) -> dict[str, Any]:
    """What came of it, as plain values; `outcome` is small, kept or promoted.

    `trained_wall_s`: when the last training began, NaN where there was none. Raises ShadecastError, OSError; then
    nothing has changed.
    """
    folder = Path(where.telemetry).expanduser().absolute()
    if not telemetry_files(folder):
        return {"outcome": "small", "reason": "the log is empty", "log": asdict(LogContent(0.0, 0, 0.0, 0))}
    storage = Path(where.storage).expanduser().absolute()
    with snapshot(folder, storage, effort.most_rows) as still:
        series = [s for s in read_folder(still) if math.isfinite(s.began_wall_s)]
        log = content(series, trained_wall_s)
        if reason := too_small(plan, log):
            return {"outcome": "small", "reason": reason, "log": asdict(log)}
        return _train(where, plan, effort, still, series, log)


def _train(  # noqa: PLR0917 - what a training consists of
    where: Places, plan: RetrainPlan, effort: Effort, still: Path, series: list[Series], log: LogContent
) -> dict[str, Any]:
    registry = Registry(where.registry)
    champion = champion_of(registry)
    if champion is None:
        raise RegistryError(f"{where.registry}: no champion that loads to compare with; `shadecast forecaster promote`")
    options = ["--local", "--device", "cpu", "--storage", where.storage, "--start", effort.start]
    options += ["--channels", "extended"] if champion.net.config.extended else []
    options += ["--hidden", str(champion.net.config.hidden), "--made-up", str(effort.made_up)]
    options += ["--steps", str(effort.steps), "--epochs", str(effort.epochs)]
    arguments = parser().parse_args(options)
    split, cut_wall_s = split_fleet(series, arguments.hold_out, arguments.seed)
    made = make(arguments, still, series, split, champion)
    candidate, judged = with_record(made.model, split)
    unseen = {s.machine for s in split.held} - {s.machine for s in split.train}
    table = Table.of(split.held, judged, judge(champion, split.held), plan.block_s)
    whole = table.compare()
    ruling = rule_promotion(plan, whole)
    is_unseen = np.array([s.machine in unseen for s in split.held], bool)[table.which]
    of_machines = {"unseen": table.of_rows(is_unseen), "known": table.of_rows(~is_unseen)}
    found = {
        "promoted": ruling.yes,
        "reason": ruling.reason,
        "against": champion.version,
        "log": asdict(log),
        "held_out_from_wall_s": cut_wall_s,
        "held_out": table.numbers(whole),
        **{f"held_out_{name}_machines": part.numbers(part.compare()) for name, part in of_machines.items()},
    }
    card = {
        **made.card,
        **record_of(candidate),
        "command": "shadecast up --retrain",
        "judged_against": champion.version,
        "verdict": ruling.reason,
        "backtest": [],
        "retrain": found,
    }
    registry.save(candidate, card)
    if ruling.yes:
        registry.promote(candidate.version)
        with suppress(RegistryError):  # an operator's own trial in shadow goes on
            if not registry.challenger():
                registry.challenge(champion.version)
    outcome = "promoted" if ruling.yes else "kept"
    return {"outcome": outcome, "version": candidate.version, "former": champion.version, **found}


def settle(registry_uri: str, version: str, former: str, rolled_back: bool) -> str:
    """End a probation: go back to the former champion, or end its trial in shadow. What was done, in words.

    Where an operator has chosen another champion meanwhile, that stays.
    """
    registry = Registry(registry_uri)
    champion, history = registry.champion(), registry.history()
    if champion != version or (rolled_back and history[-1:] != [former]):
        return f"left as it is: {champion} was made the champion meanwhile"
    if rolled_back:
        return f"rolled back to {registry.rollback()}"
    if registry.challenger() == former:
        registry.challenge("")
    return f"{version} stays"


# ---------------------------------------------------------------- the log


def content(series: Sequence[Series], since_wall_s: float) -> LogContent:
    """What there is to learn from, and how much of it is later than `since_wall_s` (NaN: all)."""
    hours = new_hours = 0.0
    count = new_count = 0
    for s in series:
        load = s.values[:, _CPU]
        known, begins = np.isfinite(load), onsets(load)
        new = ~(_at_wall_s(s) < since_wall_s)
        hours += float(known.sum()) * s.period_s / 3600.0
        new_hours += float((known & new).sum()) * s.period_s / 3600.0
        count += int(begins.sum())
        new_count += int((begins & new).sum())
    return LogContent(hours, count, new_hours, new_count)


def split_fleet(series: Sequence[Series], fraction: float, seed: int) -> tuple[Split, float]:
    """Train on the first `1 - fraction` of samples, of all but about `fraction` of the machines; hold out all later.

    The second value is the calendar time between them. A machine alone is held out in time only.
    """
    if not series:
        raise TelemetryError("the log does not tell calendar times: it was not written by node forecasters")
    cut_wall_s = float(np.quantile(np.concatenate([_at_wall_s(s) for s in series]), 1.0 - fraction))
    machines = sorted({s.machine for s in series}, key=lambda m: shuffled(m, seed))
    out = set(machines[: min(max(1, round(fraction * len(machines))), len(machines) - 1)])
    known = [s for s in series if s.machine not in out]
    return Split(parts(known, -math.inf, cut_wall_s), parts(series, cut_wall_s, math.inf)), cut_wall_s


def _at_wall_s(s: Series) -> NDArray[np.float64]:
    return s.began_wall_s + s.period_s * np.arange(len(s.values), dtype=np.float64)


# ---------------------------------------------------------------- two versions side by side


@dataclass(frozen=True, slots=True)
class Table:
    """Candidate and champion at the same instants: `which` series [n], its `block` [n]; squared errors of the log
    headroom [n, horizon], the last value's too; quantiles of CPU [n, horizon, quantile]; onsets as in `onset_truth`.
    """

    which: NDArray[np.int64]
    block: NDArray[np.int64]
    candidate: Array
    champion: Array
    last_value: Array
    candidate_quantiles: Array
    champion_quantiles: Array
    calm: Array
    came: Array

    @classmethod
    def of(cls, held: Sequence[Series], candidate: Judged, champion: Judged, block_s: float) -> Table:
        """Of what `judge` found for each on `held`."""
        which, sample = places(held)
        calm, came = onset_truth(held)
        period_s = np.array([s.period_s for s in held])[which]
        number = which * 2**32 + np.floor(sample * period_s / block_s).astype(np.int64)
        truth = candidate.truth[:, _CPU]
        mine, others = candidate.quantiles[:, _CPU], champion.quantiles[:, _CPU]
        last = np.repeat(candidate.points[:, _CPU, _LAST_VALUE, :, None], mine.shape[-1], axis=-1)
        errors = np.stack([headroom_errors(each, truth) ** 2 for each in (mine, others, last)])
        errors[:, ~np.isfinite(errors).all(axis=0)] = np.nan
        block = np.unique(number, return_inverse=True)[1]
        return cls(which, block, errors[0], errors[1], errors[2], mine, others, calm, came)

    def of_rows(self, rows: Array) -> Table:
        """Only these rows."""
        taken: dict[str, Any] = {f.name: getattr(self, f.name)[rows] for f in fields(self)}
        return replace(self, **taken)

    def blocks(self) -> list[Block]:
        """Sums of errors by block; `reference` is the champion's."""
        samples, ours, others = (
            np.bincount(self.block, np.nansum(each, axis=1)) if len(self.block) else np.zeros(0)
            for each in (np.isfinite(self.champion), self.candidate, self.champion)
        )
        return [Block(float(n), float(r), float(o)) for n, o, r in zip(samples, ours, others, strict=True) if n > 0]

    def compare(self) -> Comparison:
        """The difference and how sure it is."""
        ours, others = self._recalls()
        return Comparison(paired(self.blocks()), ours, others, self._recall_error())

    def _recalls(self) -> tuple[float, float]:
        both = (self.candidate_quantiles, self.champion_quantiles)
        ours, others = (_mean(onset_metrics(each, self.calm, self.came)) for each in both)
        return ours, others

    def _recall_error(self) -> float:
        """Standard error of the recalls' difference: jackknife over groups of neighbouring blocks (Efron, 1982)."""
        blocks = np.unique(self.block)
        groups = min(GROUPS, len(blocks))
        if groups < 2:
            return math.inf
        left_out = (np.searchsorted(blocks, self.block) * groups) // len(blocks)
        found = np.array([np.subtract(*self.of_rows(left_out != g)._recalls()) for g in range(groups)])
        if not np.isfinite(found).all():
            return math.inf
        return float(np.sqrt((groups - 1) / groups * ((found - found.mean()) ** 2).sum()))

    def numbers(self, found: Comparison) -> dict[str, Any]:
        """What a card says of a comparison of these rows."""
        errors = {"candidate": self.candidate, "champion": self.champion, "last_value": self.last_value}
        return {
            "samples": len(self.block),
            "blocks": found.headroom.blocks,
            "headroom_gain": _plain(found.headroom.gain),
            "headroom_gain_error": _plain(found.headroom.error),
            "headroom_squared_error": {name: _plain(_mean(each)) for name, each in errors.items()},
            "onset_recall_p70": {
                "candidate": _plain(found.candidate_recall),
                "champion": _plain(found.champion_recall),
            },
            "onset_recall_error": _plain(found.recall_error),
        }


def _mean(values: Any) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else math.nan


def _plain(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
