"""Self-retraining at work: looks at the clock, has trainings run elsewhere, watches what was promoted.

A plain object with every border injected; decisions are those of `shadecast.retraining`. Whatever fails leaves the
forecasters with the version that they have.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from actors.orders import Kept
from shadecast.retraining import (
    Live,
    LiveBook,
    LiveErrors,
    Past,
    Probation,
    RetrainPlan,
    after_failure,
    after_look,
    after_probation,
    after_training,
    due_in_s,
    paired,
    past_of,
    plain,
    rule_live,
)

logger = logging.getLogger(__name__)

_FOLLOWED_S = 60.0
"""By then every node runs what was promoted, or an operator has chosen something else."""


class Work(Protocol):
    """Where the work is done, in processes of their own. Blocks; answers `failed` or raises where it has failed."""

    def __call__(self, what: str, **values: Any) -> Mapping[str, Any]:
        """`train.retrain.carry_out`."""


class Retrainer:
    """`look` is called every `plan.look_s` by one thread, `view` by any."""

    def __init__(
        self,
        plan: RetrainPlan,
        work: Work,
        live: Callable[[], Iterable[LiveErrors]],
        kept: Kept,
        write_down: Callable[[dict[str, Any]], None],
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`live` asks the forecasters, `kept` outlives this object, `write_down` is the audit log. All may raise."""
        self._plan, self._work, self._live, self._kept, self._audit = plan, work, live, kept, write_down
        self._wall = wall
        found = kept.load()
        self._past = past_of(found[0]) if found else Past()
        self._began = False
        self._book: LiveBook | None = None
        self._lock = threading.Lock()
        self._said: dict[str, Any] = {"state": "waiting", "since_wall_s": wall(), "reason": "", "last": None}

    def look(self) -> None:
        """One round. Raises nothing."""
        try:
            if not self._began:
                self._begin()
            elif self._past.probation is not None:
                self._watch(self._past.probation)
            elif due_in_s(self._plan, self._past, self._wall()) <= 0.0:
                self._train()
        except Exception as error:
            logger.exception("self-retraining: a round failed, the forecasters go on as they are")
            self._say("waiting", reason=f"failed: {error!r}")

    def view(self) -> dict[str, Any]:
        """How it stands, as plain values."""
        with self._lock:
            past, said = self._past, dict(self._said)
        now_wall_s = self._wall()
        due_s = due_in_s(self._plan, past, now_wall_s)
        probation = past.probation
        return {
            "every_s": self._plan.every_s,
            "state": said["state"],
            "since_s": max(0.0, now_wall_s - said["since_wall_s"]),
            "reason": said["reason"],
            "last": said["last"],
            "next_in_s": due_s if math.isfinite(due_s) and said["state"] == "waiting" else None,
            "version": probation.version if probation is not None else None,
            "former": probation.former if probation is not None else None,
            "failures": past.failures,
            "rollbacks": past.rollbacks,
        }

    # ------------------------------------------------------------------ steps

    def _begin(self) -> None:
        """Forecasters of an empty registry have no version: they get the shipped one."""
        if self._past.failures and due_in_s(self._plan, self._past, self._wall()) > 0.0:
            return
        found = self._attempt("begin")
        self._began = "failed" not in found
        if not self._began:
            self._failed(after_failure(self._past, self._wall()), found["failed"])

    def _train(self) -> None:
        before, began_wall_s = self._past, self._wall()
        self._say("training", reason="looks at the log, and trains if it holds enough")
        # Until it has ended well it counts as failed: what ends this process, too, is not tried again at once.
        self._keep(after_failure(before, began_wall_s))
        trained_wall_s = None if math.isnan(before.trained_wall_s) else before.trained_wall_s
        found = self._attempt("retrain", trained_wall_s=trained_wall_s)
        now_wall_s = self._wall()
        if "failed" in found:
            self._failed(after_failure(before, now_wall_s), found["failed"])
            return
        if found["outcome"] == "small":
            self._keep(after_look(before, now_wall_s))
            self._say("waiting", reason=found["reason"])
            return
        version, promoted = str(found["version"]), found["outcome"] == "promoted"
        probation = Probation(version, str(found["former"]), now_wall_s) if promoted else None
        self._keep(after_training(before, began_wall_s, now_wall_s, probation))
        self._end(found["outcome"], version, found["reason"])
        self._say("probation" if promoted else "waiting", reason=found["reason"])

    def _watch(self, probation: Probation) -> None:
        if self._book is None or self._book.probation != probation:
            self._book = LiveBook(probation, self._plan.block_s)
        readings = list(self._live())
        self._book.take(readings)
        elapsed_s = self._wall() - probation.since_wall_s
        others = {r.champion_version for r in readings} - {""}
        if others and probation.version not in others and not 0.0 <= elapsed_s < _FOLLOWED_S:
            self._settle(probation, Live.KEEP, "left", f"the nodes run {', '.join(sorted(others))}")
            return
        becomes, reason = rule_live(self._plan, paired(self._book.blocks), elapsed_s)
        self._say("probation", reason=reason)
        if becomes is Live.ROLL_BACK:
            self._settle(probation, becomes, "rolled back", reason)
        elif becomes is Live.KEEP:
            self._settle(probation, becomes, "stays", reason)

    def _settle(self, probation: Probation, becomes: Live, outcome: str, reason: str) -> None:
        back = becomes is Live.ROLL_BACK
        found = self._attempt("settle", version=probation.version, former=probation.former, rolled_back=back)
        if "failed" in found:  # tried again at the next look
            self._say("probation", reason=f"{reason}; {outcome} failed: {found['failed']}")
            return
        self._keep(after_probation(self._past, self._wall(), rolled_back=outcome != "stays"))
        self._book = None
        self._end(outcome, probation.version, f"{found['done']}: {reason}")
        self._say("waiting", reason=reason)

    def _attempt(self, what: str, **values: Any) -> Mapping[str, Any]:
        try:
            return self._work(what, **values)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    def _failed(self, past: Past, reason: str) -> None:
        self._keep(past)
        logger.warning("self-retraining failed, the forecasters go on as they are: %s", reason)
        self._end("failed", "", reason)
        self._say("waiting", reason=reason)

    # ------------------------------------------------------------------ what is known of it

    def _keep(self, past: Past) -> None:
        with self._lock:
            self._past = past
        self._kept.save([plain(past)])

    def _say(self, state: str, reason: str) -> None:
        with self._lock:
            if state != self._said["state"]:
                self._said["since_wall_s"] = self._wall()
            self._said |= {"state": state, "reason": reason}

    def _end(self, outcome: str, version: str, reason: str) -> None:
        logger.info("self-retraining: %s %s: %s", version, outcome, reason)
        with self._lock:
            self._said["last"] = {
                "outcome": outcome,
                "version": version,
                "reason": reason,
                "ended_wall_s": self._wall(),
            }
        self._audit(
            {"order": "retrain", "target": version, "outcome": f"{outcome}: {reason}", "who": {"by": "self-retraining"}}
        )
