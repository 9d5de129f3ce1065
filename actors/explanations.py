"""Why a replica or node stands where it does, and why routers sent requests where they did.

What routers know has to be asked for: the coordinator's answers carry the open questions, reports what was found. A
question is open for seconds. Routers answer it with each report while it is, so a report that is lost costs nothing
but time; where nobody asks, nothing of this travels.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import asdict
from typing import Any

from actors.deployment import Deployment
from shadecast.decisions import QUESTIONS, Question, check
from shadecast.errors import MessageError, OrderError
from shadecast.explain import explain_decision, explain_node
from shadecast.messages import numbers
from shadecast.types import NodeReport, Transition

_CHANGES = 8
"""Last changes of state that an explanation shows."""
LONGEST_WAIT_S = 300.0
MOST = 50
"""Decisions that are told of."""
_ANSWERED_WITHIN_S = 5.0
"""Routers report once a second; one that takes longer is not waited for."""


class _Asked:
    """One question, and what has come."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.answers: dict[tuple[str, str], tuple[float, list[dict[str, Any]]]] = {}
        """By deployment and router: when it came, and the decisions."""
        self.news = asyncio.Event()


class Explanations:
    """Answers whoever asks. Everything on the coordinator's event loop, whose own collections these are."""

    def __init__(
        self,
        now_s: Callable[[], float],
        deployments: Mapping[str, Deployment],
        nodes: Mapping[str, tuple[float, NodeReport]],
        transitions: Collection[tuple[float, Transition]],
        *,
        kept_out: Callable[[], tuple[Set[str], Set[str]]],
        announced: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """`kept_out` are what operators hold, and the nodes that Ray is about to take away."""
        self._now_s = now_s
        self._deployments, self._nodes, self._transitions = deployments, nodes, transitions
        self._kept_out, self._announced = kept_out, announced
        self._open: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------ for people

    async def explain(self, received: Any) -> dict[str, Any]:
        """Why requests, a replica or a node went, or stand, where they do; `{"refused": why}` if that cannot be told.

        `received`: `what` ("last", "request", "replica" or "node"), `target` (an id, but for "last"), and for requests
        `most` decisions and `wait_s` for one that is still to come.
        """
        found = received if isinstance(received, Mapping) else {}
        what, target = str(found.get("what", "")), str(found.get("target", ""))
        try:
            match what:
                case "last" | "request":
                    most, wait_s = numbers(found, ("most", "wait_s"))
                    told: dict[str, Any] | None = await self._ask_routers(what, target, int(most), float(wait_s))
                case "replica":
                    told = self._replica(target)
                case "node":
                    told = self._node(target)
                case _:
                    return {"refused": f"what = {what[:20]!r}: must be last, request, replica or node"}
        except (OrderError, MessageError) as error:
            return {"refused": str(error)}
        if told is None:
            shown = "`shadecast status --wide` shows those that exist"
            return {"refused": f"no {what} has the id {target[:100]!r}: {shown}", "unknown": True}
        return {"what": what, **told}

    async def _ask_routers(self, what: str, target: str, most: int, wait_s: float) -> dict[str, Any]:
        if what == "request" and not target:
            raise OrderError("target: must be the id of a request, as its answer's header x-request-id has it")
        most, wait_s = min(most, MOST) if most > 0 else MOST, min(max(wait_s, 0.0), LONGEST_WAIT_S)

        def routers() -> set[tuple[str, str]]:
            now_s = self._now_s()
            return {each for known in self._deployments.values() for each in known.routers_heard(now_s)}

        request_id = target if what == "request" else ""
        return await self._ask(routers, request_id=request_id, most=most, wait_s=wait_s)

    def _replica(self, replica_id: str) -> dict[str, Any] | None:
        now_s = self._now_s()
        changes = [(at_s, t) for at_s, t in self._transitions if t.replica_id == replica_id]
        why = changes[-1][1].reason if changes else ""
        for known in self._deployments.values():
            told = known.explain(replica_id, why)
            if told is not None:
                return {**told, "changes": [_change(t, now_s - at_s) for at_s, t in changes[-_CHANGES:]]}
        return None

    def _node(self, node_id: str) -> dict[str, Any] | None:
        now_s = self._now_s()
        holds, leaving = self._kept_out()
        heard_s, report = self._nodes.get(node_id, (now_s, None))
        ids = [replica_id for known in self._deployments.values() for replica_id in known.replicas_on(node_id)]
        if report is None and not ids and node_id not in holds | leaving:
            return None
        changes = [(at_s, t) for at_s, t in self._transitions if t.node_id == node_id]
        told = explain_node(
            node_id,
            report,
            now_s - heard_s,
            held=node_id in holds,
            leaving=node_id in leaving,
            announced=[each for each in self._announced() if each["node_id"] == node_id],
            replicas=[each for replica_id in ids if (each := self._replica(replica_id)) is not None],
        )
        return {**told, "changes": [_change(t, now_s - at_s) for at_s, t in changes[-_CHANGES:]]}

    # ------------------------------------------------------------------ for routers

    def questions(self) -> list[dict[str, Any]]:
        """As answers to routers have them."""
        return [asdict(asked.question) for asked in self._open.values()]

    def take(self, deployment: str, received: Any) -> None:
        """What a router's report says; what cannot be read of it is left out."""
        if not self._open or not isinstance(received, Mapping):
            return
        explained, router_id = received.get("explained"), received.get("router_id")
        if not isinstance(explained, (list, tuple)) or not isinstance(router_id, str):
            return
        for each in explained[:QUESTIONS]:
            number = each.get("number") if isinstance(each, Mapping) else None
            asked = self._open.get(number) if isinstance(number, int) else None
            if asked is not None:
                asked.answers[deployment, router_id] = (self._now_s(), check(each))
                asked.news.set()

    async def _ask(
        self,
        routers: Callable[[], Collection[tuple[str, str]]],
        *,
        request_id: str = "",
        most: int,
        wait_s: float = 0.0,
    ) -> dict[str, Any]:
        """What all `routers` know of a request, or of the last ones; with `wait_s` of one that is still to come.

        Raises OrderError where too many ask already.
        """
        if len(self._open) >= QUESTIONS:
            raise OrderError(f"{QUESTIONS} questions are open already: ask again in some seconds")
        number = next(self._numbers)
        asked = self._open[number] = _Asked(Question(number, request_id, most))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            while True:
                here = set(routers())
                found = any(decisions for _, decisions in asked.answers.values())
                all_said = here <= asked.answers.keys()
                left_s = began_s + (_ANSWERED_WITHIN_S if found or not wait_s else wait_s) - loop.time()
                if (all_said and (found or not wait_s)) or left_s <= 0.0:
                    return self._answer(asked, here)
                asked.news.clear()
                try:
                    await asyncio.wait_for(asked.news.wait(), left_s)
                except TimeoutError:
                    continue
        finally:
            del self._open[number]

    def _answer(self, asked: _Asked, here: Collection[tuple[str, str]]) -> dict[str, Any]:
        now_s = self._now_s()
        decisions = [
            {
                "deployment": deployment,
                "router_id": router_id,
                **each,
                "ago_s": (each["ago_s"] or 0.0) + now_s - at_s,
                "sentences": explain_decision(each),
            }
            for (deployment, router_id), (at_s, found) in asked.answers.items()
            for each in found
        ]
        decisions.sort(key=lambda each: each["ago_s"])
        return {
            "request_id": asked.question.request_id,
            "routers": len(here),
            "answered": len(asked.answers),
            "decisions": decisions[: asked.question.most],
        }


def _change(t: Transition, ago_s: float) -> dict[str, Any]:
    return {
        "ago_s": ago_s,
        "replica_id": t.replica_id,
        "before": t.before.value,
        "after": t.after.value,
        "event": t.event,
        "reason": t.reason,
    }
