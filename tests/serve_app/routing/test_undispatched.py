"""Picks without a dispatch, as Ray LLM's direct streaming makes them: how long they count, and by what.

A proxy sends the requests: `Traffic` is what it does, and replicas tell how many they have when asked.
"""

import asyncio
from collections import Counter

import pytest

from tests.serve_app.routing.serve import Replica, in_virtual_time, metadata, serving, settle, table


class Traffic:
    """Picks, and requests that stay on their replicas for so long each."""

    def __init__(self, serve, stay_s):
        self.serve, self.stay_s = serve, stay_s
        self.at = Counter()
        self.tells = True
        self.peaks = Counter()
        for replica in serve.replicas.values():
            replica.queue = 0

    async def one(self):
        async with self.serve.choose_replica(metadata(), _reserve=False) as selection:
            name = selection.replica_id
        self.at[name] += 1
        self.peaks[name] = max(self.peaks[name], self.at[name])
        self._tell(name)
        asyncio.get_running_loop().call_later(self.stay_s(name), self._end, name)
        return name

    def _end(self, name):
        self.at[name] -= 1
        self._tell(name)

    def _tell(self, name):
        if self.tells:
            self.serve.replicas[name].queue = self.at[name]

    async def run(self, seconds, per_s):
        picked = Counter()
        for _ in range(int(seconds * per_s)):
            picked[await self.one()] += 1
            await asyncio.sleep(1.0 / per_s)
        return picked


def replicas(letters):
    return [Replica(name, max_ongoing_requests=1_000_000_000) for name in letters]


def in_flight(serve):
    picks = serve.router.calls.routes.picks
    return dict(zip(picks.ids, picks.in_flight, strict=True))


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("stay_s", [0.3, 4.0, 20.0])
@in_virtual_time
async def test_picks_count_as_long_as_requests_usually_stay(has_table, stay_s):
    async with serving(*replicas("ab")) as serve:
        if has_table:
            serve.take(table(a=1.0, b=1.0))
        traffic = Traffic(serve, lambda _: stay_s)
        await traffic.run(150, 5)
        counted = sum(in_flight(serve).values())
        assert counted == pytest.approx(5 * stay_s, rel=0.35, abs=1.0)
        assert serve.router.calls.book.open_calls == counted, "nothing is left behind"
        await asyncio.sleep(3 * stay_s + 1.0)
        assert sum(in_flight(serve).values()) == 0


@in_virtual_time
async def test_with_two_replicas_and_no_coordinator_both_get_their_part():
    async with serving(*replicas("ab")) as serve:
        traffic = Traffic(serve, lambda _: 2.0)
        picked = await traffic.run(60, 10)
        assert serve.router.level == "power_of_two"
        assert picked["a"] == pytest.approx(picked["b"], rel=0.1)
        await asyncio.sleep(10.0)


@pytest.mark.parametrize("has_table", [True, False])
@in_virtual_time
async def test_a_replica_that_tells_a_longer_queue_gets_fewer_picks(has_table):
    """It is three times as slow: by counts of equal duration both would look alike."""
    async with serving(*replicas("ab")) as serve:
        traffic, picked = Traffic(serve, lambda name: 1.0 if name == "a" else 3.0), Counter()
        for second in range(60):
            if has_table:
                serve.take(table(second + 1, a=1.0, b=1.0))
            picked += await traffic.run(1, 10)
        assert picked["a"] > 1.5 * picked["b"] > 0
        await asyncio.sleep(20.0)


@in_virtual_time
async def test_replicas_that_do_not_answer_leave_picks_to_count_by_the_usual_time():
    fleet = replicas("ab")
    async with serving(*fleet) as serve:
        serve.take(table(a=1.0, b=1.0, reference_s=2.5))
        for replica in fleet:
            replica.tells_after_s = 1e6
        traffic = Traffic(serve, lambda _: 2.5)
        await traffic.run(20, 4)
        assert sum(in_flight(serve).values()) == pytest.approx(10, abs=1)
        await asyncio.sleep(14.0)


@in_virtual_time
async def test_nobody_is_asked_any_more_once_there_are_no_picks():
    asked = Counter()

    class Counting(Replica):
        async def get_queue_len(self, *, deadline_s):
            asked[self.name] += 1
            return 0

    async with serving(Counting("a"), Counting("b")) as serve:
        serve.take(table(a=1.0, b=1.0))
        for _ in range(4):
            async with serve.choose_replica(metadata(), _reserve=False):
                pass
        await asyncio.sleep(30.0)
        before = asked.total()
        assert before <= 2 + 2 * 11
        await asyncio.sleep(100.0)
        assert asked.total() == before


@in_virtual_time
async def test_a_pick_is_no_outcome_and_no_evidence():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        traffic = Traffic(serve, lambda _: 30.0)
        await traffic.run(10, 5)
        seen = serve.report().replicas
        assert sum(view.in_flight for view in seen) > 5
        assert all(not view.unfinished and not view.outcomes and not view.started for view in seen)
        await asyncio.sleep(700.0)


@in_virtual_time
async def test_a_replica_that_goes_takes_its_picks_along():
    a, b = replicas("ab")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        traffic = Traffic(serve, lambda _: 5.0)
        await traffic.run(20, 5)
        serve.scale(b)
        await traffic.run(20, 5)
        assert set(in_flight(serve)) == {"b"}
        await asyncio.sleep(30.0)
        await settle()


@in_virtual_time
async def test_calls_of_ones_own_beside_picks_are_counted_once():
    """What a replica tells has both: picks are not added to it again."""
    async with serving(*replicas("a")) as serve:
        serve.take(table(a=1.0))
        traffic = Traffic(serve, lambda _: 10.0)
        await traffic.run(30, 2)
        serve.replicas["a"].says = "nothing"
        waiting = serve.start(1)
        await settle()
        serve.replicas["a"].sent[-1].accept(traffic.at["a"] + 1)
        result = await waiting
        picks = serve.router.calls.routes.picks
        assert picks.queue(0) == traffic.at["a"] + 1
        result.end()
        await asyncio.sleep(40.0)
