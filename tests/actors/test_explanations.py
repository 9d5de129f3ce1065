"""The coordinator's explanations: what routers are asked, and why replicas and nodes stand where they do."""

from __future__ import annotations

import asyncio
import json

import pytest

from actors.explanations import MOST
from shadecast.decisions import QUESTIONS, Decision, Question, Ring, answer
from tests.actors.test_coordinator import APP, Router, run
from tests.serve_app.page.page_scene import DIGITS, NODES, Scene, make_scene


class Explaining(Router):
    """A router that has kept decisions, and answers what it is asked."""

    def __init__(self, coordinator, clock, *request_ids, **more):
        super().__init__(coordinator, clock, **more)
        self.ring = Ring()
        for request_id in request_ids:
            self.decide(request_id)
        self.answer = {}

    def decide(self, request_id):
        self.ring.add(Decision(request_id, "predict", self.clock.now_s, "table", "a", eligible=2, alive=2))

    def report(self):
        asked = [Question(**each) for each in self.answer.get("questions", ())]
        made = super().report()
        if asked:
            made["explained"] = [answer(self.ring, question, self.clock.now_s) for question in asked]
        return made


def scene_at(second: int) -> Scene:
    scene = make_scene()

    async def play():
        while scene.second < second:
            await scene.play()

    asyncio.run(play())
    return scene


def explain(scene: Scene, what: str, target: str):
    told = asyncio.run(scene.coordinator.explain({"what": what, "target": target}))
    json.dumps(told, default=lambda value: pytest.fail(f"{value!r} is no plain value"))
    return told


# ---------------------------------------------------------------- what routers know


def test_routers_are_asked_only_while_somebody_asks_and_all_answers_come_together():
    async def scenario(coordinator, clock):
        first, second = Explaining(coordinator, clock, "q1", "q2"), Explaining(coordinator, clock, "q3", name="other")
        for router in (first, second):
            await router.exchange()
            assert "questions" not in router.answer
        asking = asyncio.create_task(coordinator.explain({"what": "last", "most": 2}))
        await asyncio.sleep(0)
        for router in (first, second):
            await router.exchange()  # it hears of the question
            await router.exchange()  # and answers
        told = await asking
        assert (told["routers"], told["answered"]) == (2, 2)
        assert len(told["decisions"]) == 2
        assert {d["deployment"] for d in told["decisions"]} == {APP}
        assert all(d["sentences"] for d in told["decisions"])
        await first.exchange()
        assert "questions" not in first.answer

    run(scenario)


def test_one_request_is_found_whichever_router_had_it():
    async def scenario(coordinator, clock):
        routers = [Explaining(coordinator, clock, f"q{i}", name=f"router-{i}") for i in range(3)]
        for router in routers:
            await router.exchange()
        asking = asyncio.create_task(coordinator.explain({"what": "request", "target": "q1"}))
        await asyncio.sleep(0)
        for router in routers:
            await router.exchange()
            await router.exchange()
        told = await asking
        assert [(d["request_id"], d["router_id"]) for d in told["decisions"]] == [("q1", "router-1")]

    run(scenario)


def test_a_request_that_is_still_to_come_is_waited_for():
    async def scenario(coordinator, clock):
        router = Explaining(coordinator, clock)
        await router.exchange()
        asking = asyncio.create_task(coordinator.explain({"what": "request", "target": "later", "wait_s": 60}))
        await asyncio.sleep(0)
        for _ in range(3):
            await router.exchange()
        assert not asking.done(), "that it is not there yet is no answer"
        assert router.answer["questions"][0]["request_id"] == "later", "routers watch for it meanwhile"
        router.decide("later")
        await router.exchange()
        assert [d["request_id"] for d in (await asking)["decisions"]] == ["later"]

    run(scenario)


def test_without_a_wait_a_request_that_nobody_kept_is_answered_once_all_have_said_so():
    async def scenario(coordinator, clock):
        router = Explaining(coordinator, clock, "q")
        await router.exchange()
        asking = asyncio.create_task(coordinator.explain({"what": "request", "target": "unknown"}))
        await asyncio.sleep(0)
        await router.exchange()
        await router.exchange()
        told = await asyncio.wait_for(asking, 2.0)
        assert (told["decisions"], told["routers"], told["answered"]) == ([], 1, 1)

    run(scenario)


def test_a_router_that_does_not_answer_is_not_waited_for_for_ever_and_is_counted(monkeypatch):
    monkeypatch.setattr("actors.explanations._ANSWERED_WITHIN_S", 0.05)

    async def scenario(coordinator, clock):
        former = Router(coordinator, clock)  # of a version that knows of no questions
        await former.exchange()
        told = await coordinator.explain({"what": "last", "most": 5})
        assert (told["decisions"], told["routers"], told["answered"]) == ([], 1, 0)

    run(scenario)


def test_without_any_router_the_answer_comes_at_once():
    async def scenario(coordinator, clock):
        told = await asyncio.wait_for(coordinator.explain({"what": "last", "most": 5}), 1.0)
        assert (told["routers"], told["decisions"]) == (0, [])

    run(scenario)


def test_too_many_questions_at_once_are_refused_and_those_that_are_over_make_room(monkeypatch):
    async def scenario(coordinator, clock):
        await Explaining(coordinator, clock).exchange()
        asking = [
            asyncio.create_task(coordinator.explain({"what": "request", "target": f"q{i}", "wait_s": 60}))
            for i in range(QUESTIONS)
        ]
        await asyncio.sleep(0)
        assert "ask again" in (await coordinator.explain({"what": "last", "most": 5}))["refused"]
        asking[-1].cancel()
        await asyncio.gather(asking.pop(), return_exceptions=True)
        asking.append(asyncio.create_task(coordinator.explain({"what": "request", "target": "q", "wait_s": 60})))
        await asyncio.sleep(0)
        assert not asking[-1].done()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    run(scenario)


@pytest.mark.parametrize("nonsense", [7, "text", [7], [{"number": 1}], [{"number": "1", "decisions": []}], {"a": 1}])
def test_nonsense_from_a_router_is_no_answer_and_its_report_counts_all_the_same(nonsense, monkeypatch):
    monkeypatch.setattr("actors.explanations._ANSWERED_WITHIN_S", 0.05)

    async def scenario(coordinator, clock):
        router = Router(coordinator, clock)
        await router.exchange()
        asking = asyncio.create_task(coordinator.explain({"what": "last", "most": 5}))
        await asyncio.sleep(0)
        await router.exchange(report={**router.report(), "explained": nonsense})
        assert router.answer["acknowledged"] == 2
        assert (await asking)["decisions"] == []

    run(scenario)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "must be last, request, replica or node"),
        ("text", "must be last, request, replica or node"),
        ({"what": "request"}, "must be the id of a request"),
        ({"what": "last", "most": "many"}, "a number is expected"),
        ({"what": "replica", "target": "nobody"}, "no replica has the id 'nobody'"),
        ({"what": "node", "target": "nowhere"}, "no node has the id 'nowhere'"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_what_to_do(asked, said):
    async def scenario(coordinator, clock):
        assert said in (await coordinator.explain(asked))["refused"]

    run(scenario)


def test_no_more_is_told_than_anybody_reads():
    async def scenario(coordinator, clock):
        router = Explaining(coordinator, clock, *(f"q{i}" for i in range(120)))
        await router.exchange()
        asking = asyncio.create_task(coordinator.explain({"what": "last", "most": 10_000}))
        await asyncio.sleep(0)
        await router.exchange()
        await router.exchange()
        assert len((await asking)["decisions"]) == MOST

    run(scenario)


# ---------------------------------------------------------------- replicas


def test_a_replica_on_trial_says_what_has_been_found_and_what_is_missing():
    told = explain(scene_at(62), "replica", "n5newone")
    assert (told["state"], told["share"], told["why"]) == ("shadowing", 0.0, "alive and waiting")
    trial = told["trial"]
    assert trial["evidence"]["pairs"] > 0
    assert trial["missing"][0].startswith("proof that it does not fail more often than the others: evidence ")
    assert 0 < trial["left_s"] <= 30.0
    text = " ".join(told["sentences"])
    assert f"{trial['evidence']['pairs']:.0f} pairs of a request and its copy" in text
    assert "It gets no requests, only copies" in text
    assert [change["after"] for change in told["changes"]] == ["shadowing"]


def test_a_trial_ends_soon_after_nothing_is_missing():
    scene = scene_at(60)
    missing = []
    while (told := explain(scene, "replica", "n5newone"))["state"] != "shifting":
        missing.append(len(told["trial"]["missing"]) if told["trial"] else None)
        asyncio.run(scene.play())
        assert scene.second < 100
    found = [count for count in missing if count is not None]
    assert found == sorted(found, reverse=True), "evidence only grows in a sound trial"
    assert found[-1] <= 1


def test_a_replica_that_was_turned_away_says_why_how_often_and_until_when():
    told = explain(scene_at(205), "replica", "x9failing")
    assert told["state"] == "inactive"
    assert "requests failed" in told["why"]
    assert told["rejections"] == 3
    assert (
        f"It was turned away 3 times in a row: its next trial may begin in {told['retry_in_s']:.1f} s."
        in told["sentences"]
    )


def test_a_replica_of_a_held_node_says_so_and_names_no_other_reason():
    told = explain(scene_at(250), "replica", "n5newone")
    assert told["held"]
    assert "An operator, or Ray, keeps it or its node out of traffic." in told["sentences"]
    assert not any("trial" in sentence for sentence in told["sentences"])
    assert told["changes"][-1]["event"] in ("drain", "drained")


def test_a_replica_that_serves_says_where_its_capacity_and_score_come_from():
    scene = scene_at(230)  # a hog is on its node
    told = explain(scene, "replica", "p7qm41zz")
    rows = scene.coordinator._deployments[DIGITS].output.table.rows
    (row,) = (row for row in rows if row.replica_id == "p7qm41zz")
    assert told["capacity"]["capacity"] == row.capacity
    assert told["capacity"]["live_capacity"] == row.live_capacity
    assert told["capacity"]["by_telemetry"] < 0.6, "it is telemetry that says so"
    assert told["score"]["score"] == pytest.approx(told["score"]["cost"] / row.capacity)
    assert f"Its capacity is {row.capacity:.2f} of a usual replica's." in " ".join(told["sentences"])


def test_every_replica_can_be_explained_at_every_moment():
    scene = make_scene()

    async def scenario():
        for _ in range(280):
            await scene.play()
            if scene.second % 7:
                continue
            status = await scene.coordinator.status()
            for deployment in status["deployments"]:
                for view in deployment["replicas"]:
                    told = await scene.coordinator.explain({"what": "replica", "target": view["replica_id"]})
                    assert told["deployment"] == deployment["deployment"]
                    for name in ("state", "share", "held"):
                        assert told[name] == view[name]
                    assert all(0 < len(s) < 250 and s[-1] == "." and s[0].isalnum() for s in told["sentences"])

    asyncio.run(scenario())


# ---------------------------------------------------------------- nodes


def test_a_node_says_what_others_take_what_is_forecast_and_who_runs_there():
    told = explain(scene_at(230), "node", NODES[1])
    assert told["replicas"] == ["p7qm41zz"]
    assert told["forecast"]["known"]
    text = " ".join(told["sentences"])
    assert "It is worker-1 and reported" in text
    assert "of the cpu" in text
    assert f"p7qm41zz of {DIGITS} is active" in text


def test_a_held_node_without_a_forecast_says_both():
    told = explain(scene_at(250), "node", NODES[3])
    assert (told["held"], told["forecast"]["known"]) == (True, False)
    assert told["sentences"][0] == "An operator keeps it out of traffic."
    assert "It has no forecast yet: its replicas are scored on live capacity." in told["sentences"]


def test_a_node_that_has_never_reported_is_explained_by_its_replicas():
    scene = scene_at(100)
    del scene.coordinator._nodes[NODES[0]]
    told = explain(scene, "node", NODES[0])
    assert told["sentences"][0].startswith("It has never reported")
    assert "k3f9x2ab" in told["replicas"]
