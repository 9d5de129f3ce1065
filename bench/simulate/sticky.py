"""Sessions for arms that know none: stay where the last request went, move when that is much worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.simulate.arms.base import Arm
    from bench.simulate.engine import Request

REPIN_RATIO = 2.0
REPIN_COST = 0.5


def pick_sticky(arm: Arm, request: Request) -> int:
    """A session's replica: the last one, unless it is gone or its score exceeds twice that of the arm's choice + 0.5.

    The same re-pin rule that the product uses, with the arm's own score, so that peers are not handicapped.
    """
    session = request.session
    if session is None or session.replica < 0 or not arm.sim.replicas[session.replica].alive:
        return arm.pick(request)
    other = arm.pick(request)
    if other < 0 or other == session.replica:
        return session.replica
    if arm.score(request, session.replica) > REPIN_RATIO * arm.score(request, other) + REPIN_COST:
        return other
    return session.replica
