"""Self-retraining at work: what is started, kept, told and written down, and that failures change nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from actors.retrainer import Retrainer
from shadecast.retraining import LiveErrors, RetrainPlan

PLAN = RetrainPlan(block_s=100.0, least_blocks=3, least_live_s=0.0, probation_s=5000.0)
HOUR_S, DAY_S = 3600.0, 86_400.0
NODES = {"a": 1.0, "b": 1.02}
SMALL = {"outcome": "small", "reason": "the log holds 1 machine hours with 3 onsets, 2 with 50 are needed"}
KEPT = {"outcome": "kept", "version": "v1", "former": "v0", "reason": "not by more than the uncertainty"}
PROMOTED = {"outcome": "promoted", "version": "v1", "former": "v0", "reason": "headroom error lower by 10.0 % (+-2.0)"}


class Kept:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def load(self) -> list[Any]:
        return self.items

    def save(self, items: list[Any]) -> None:
        self.items = json.loads(json.dumps(items))


class Rig:
    """`answers`: what trainings answer in turn; an exception is raised."""

    def __init__(self, *answers: Any, kept: Kept | None = None) -> None:
        self.now_s = 1_800_000_000.0
        self.answers, self.asked, self.written = list(answers), [], []
        self.kept = kept or Kept()
        self.seconds, self.worse, self.champion = 0.0, 1.0, "v1"
        self.begins: Any = {"champion": "v0"}
        self.retrainer = Retrainer(PLAN, self.work, self.live, self.kept, self.written.append, wall=lambda: self.now_s)

    def work(self, what: str, **values: Any) -> Mapping[str, Any]:
        self.asked.append((what, values))
        if what == "settle":
            return {"done": "rolled back to v0" if values["rolled_back"] else "v1 stays"}
        found = self.begins if what == "begin" else self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def live(self) -> list[LiveErrors]:
        self.seconds += 100.0
        s, worse = self.seconds, self.worse
        return [LiveErrors(node, s, self.champion, "v0", s * worse * each, s, 2 * s) for node, each in NODES.items()]

    def looks(self, count: int = 1, every_s: float = 30.0) -> dict[str, Any]:
        for _ in range(count):
            self.now_s += every_s
            self.retrainer.look()
        return self.retrainer.view()

    def trainings(self) -> int:
        return sum(what == "retrain" for what, _ in self.asked)


def test_a_small_log_is_looked_at_again_an_hour_later_and_the_reason_is_told() -> None:
    rig = Rig(SMALL, SMALL)
    view = rig.looks(2)
    assert rig.asked == [("begin", {}), ("retrain", {"trained_wall_s": None})]
    assert (view["state"], view["reason"], view["next_in_s"]) == ("waiting", SMALL["reason"], HOUR_S)
    rig.looks(100)
    assert rig.trainings() == 1
    rig.looks(25)
    assert rig.trainings() == 2
    assert rig.written == [], "nothing came of it, nothing is written down"


def test_a_version_that_is_kept_out_is_written_down_and_the_next_training_is_a_day_later() -> None:
    rig = Rig(KEPT, KEPT)
    began_s = rig.now_s + 60.0
    view = rig.looks(2)
    assert view["next_in_s"] == DAY_S
    assert view["last"] == {"outcome": "kept", "version": "v1", "reason": KEPT["reason"], "ended_wall_s": began_s}
    assert [(w["order"], w["target"], w["who"]) for w in rig.written] == [("retrain", "v1", {"by": "self-retraining"})]
    rig.now_s += DAY_S
    rig.looks()
    assert rig.asked[-1] == ("retrain", {"trained_wall_s": began_s}), "what is later than its beginning is new"


@pytest.mark.parametrize("failure", [{"failed": "the log cannot be read"}, RuntimeError("the process was killed")])
def test_a_failure_changes_nothing_and_is_tried_again_later_and_later(failure: Any) -> None:
    rig = Rig(failure, failure, failure)
    view = rig.looks(2)
    assert (view["state"], view["failures"], view["next_in_s"]) == ("waiting", 1, HOUR_S)
    assert view["last"]["outcome"] == "failed"
    assert [what for what, _ in rig.asked] == ["begin", "retrain"]
    assert rig.looks(1, HOUR_S)["next_in_s"] == 2 * HOUR_S
    assert rig.looks(1, 2 * HOUR_S)["next_in_s"] == 4 * HOUR_S


def test_a_training_that_ends_its_own_retrainer_too_counts_as_failed() -> None:
    class Killed(BaseException):
        pass

    kept = Kept()
    rig = Rig(kept=kept)
    rig.answers = [Killed()]

    def killed(what: str, **_: Any) -> Mapping[str, Any]:
        if what == "begin":
            return {"champion": "v0"}
        raise Killed

    rig.retrainer = Retrainer(PLAN, killed, rig.live, kept, rig.written.append, wall=lambda: rig.now_s)
    with pytest.raises(Killed):
        rig.looks(2)
    again = Rig(KEPT, kept=kept)
    again.now_s = rig.now_s
    assert again.looks(5)["failures"] == 1
    assert again.asked == [], "it waits"
    again.looks(3, HOUR_S)
    assert again.trainings() == 1


def test_a_promoted_version_that_is_as_good_live_stays_and_the_next_training_is_a_day_after_this_one() -> None:
    rig = Rig(PROMOTED)
    view = rig.looks(2)
    assert (view["state"], view["version"], view["former"], view["next_in_s"]) == ("probation", "v1", "v0", None)
    trained_s = rig.now_s
    rig.looks(10)
    assert rig.trainings() == 1, "nothing is trained meanwhile"
    view = rig.looks(200)
    assert rig.asked[-1] == ("settle", {"version": "v1", "former": "v0", "rolled_back": False})
    assert (view["state"], view["last"]["outcome"], view["rollbacks"]) == ("waiting", "stays", 0)
    assert view["next_in_s"] == pytest.approx(DAY_S - (rig.now_s - trained_s))


def test_a_promoted_version_that_is_worse_live_is_rolled_back_and_none_follows_at_once() -> None:
    rig = Rig(PROMOTED)
    rig.worse = 1.5
    rig.looks(2)
    view = rig.looks(10)
    assert rig.asked[-1] == ("settle", {"version": "v1", "former": "v0", "rolled_back": True})
    assert (view["state"], view["version"], view["rollbacks"]) == ("waiting", None, 1)
    assert view["last"]["outcome"] == "rolled back"
    assert "rolled back to v0: live headroom error +5" in view["last"]["reason"]
    assert view["next_in_s"] > DAY_S
    assert [w["outcome"].split(":")[0] for w in rig.written] == ["promoted", "rolled back"]


def test_a_probation_outlives_the_process_that_watches_it() -> None:
    first = Rig(PROMOTED)
    first.looks(2)
    second = Rig(kept=first.kept)
    second.now_s, second.worse = first.now_s, 1.5
    assert second.looks(10)["last"]["outcome"] == "rolled back"
    assert second.trainings() == 0


def test_an_operator_who_goes_back_first_ends_the_probation_and_counts_as_a_rollback() -> None:
    rig = Rig(PROMOTED)
    rig.looks(2)
    rig.champion = "v0"
    assert rig.looks(1)["state"] == "probation", "nodes need a moment to follow"
    view = rig.looks(2)
    assert (view["state"], view["rollbacks"], view["last"]["outcome"]) == ("waiting", 1, "left")
    assert rig.asked[-1] == ("settle", {"version": "v1", "former": "v0", "rolled_back": False}), "their choice stays"


def test_a_rollback_that_fails_is_tried_again() -> None:
    rig = Rig(PROMOTED)
    rig.worse = 1.5
    rig.looks(2)
    real = rig.work
    rig.retrainer._work = lambda what, **values: (
        {"failed": "no space left"} if what == "settle" else real(what, **values)
    )
    view = rig.looks(10)
    assert view["state"] == "probation"
    assert "rolled back failed: no space left" in view["reason"]


def test_forecasters_that_cannot_be_asked_end_nothing() -> None:
    rig = Rig(PROMOTED)
    rig.looks(2)

    def away() -> list[LiveErrors]:
        raise RuntimeError("no control store")

    rig.retrainer._live = away
    assert rig.looks(3)["reason"] == "failed: RuntimeError('no control store')"
    rig.retrainer._live = rig.live
    assert "blocks" in rig.looks(1)["reason"]


def test_a_registry_that_cannot_be_begun_is_tried_again_later() -> None:
    rig = Rig(KEPT)
    rig.begins = {"failed": "the registry cannot be written"}
    view = rig.looks(20)
    assert [what for what, _ in rig.asked] == ["begin"]
    assert view["last"]["reason"] == "the registry cannot be written"
    rig.begins = {"champion": "v0"}
    rig.looks(2, HOUR_S)
    assert [what for what, _ in rig.asked] == ["begin", "begin", "retrain"]
