"""The router behind Serve's own routing code: tables, fall-backs, sessions, counts that return to zero, settings.

Numbered claims that hold at the end of every scenario: (1) no call is open, (2) no replica is counted as busy,
(3) nothing is pending. `serving` checks them.
"""

import asyncio
import gc
import logging
import math
import pickle
import time
import weakref
from collections import Counter

import pytest
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve._private.common import RequestProtocol

from serve_app.router import ObservingRouter, PredictiveRouter
from shadecast.pick import load_cost
from shadecast.types import RoutingTable, State, TableRow
from tests.serve_app.routing.serve import (
    Log,
    Replica,
    Serve,
    in_virtual_time,
    metadata,
    request,
    serving,
    settle,
    table,
)


class Noting(PredictiveRouter):
    """Notes whom it chose at once (None: nobody), and the ranks that it offered otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.at_once, self.offers = [], []

    def choose_at_once(self, pending_request):
        chosen = super().choose_at_once(pending_request)
        self.at_once.append(chosen and chosen.replica_id.unique_id)
        return chosen

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        self.offers.append(names(ranks))
        return ranks


def replicas(letters, **more):
    return [Replica(name, **more) for name in letters]


def names(ranks):
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def offered(serve, pending=None):
    """What the router would offer to Serve."""
    router = serve.router
    if pending is not None:
        return names(await router.choose_replicas(list(router.curr_replicas.values()), pending))
    router.asked(pending := request())
    try:
        return names(await router.choose_replicas(list(router.curr_replicas.values()), pending))
    finally:
        router.given_up(pending)


async def ask(serve, **labels):
    """One request from its beginning to its end: which replica has answered."""
    result = await serve.send(1, **labels)
    result.end()
    await settle()
    return result.replica.name


async def hold(serve, count=1, **labels):
    """Requests that stay on their replicas."""
    return [await serve.send(1, **labels) for _ in range(count)]


def end(results):
    for result in results:
        result.end()


def in_flight(serve):
    picks = serve.router.calls.routes.picks
    return dict(zip(picks.ids, picks.in_flight, strict=True))


def views(serve):
    return {view.replica_id: view for view in serve.report().replicas}


# ------------------------------------------------------------------ tables and fall-backs


@in_virtual_time
async def test_without_a_table_two_replicas_are_offered_as_serve_does():
    async with serving(*replicas("abc")) as serve:
        assert serve.router.level == "power_of_two"
        seen = Counter()
        for _ in range(200):
            (rank,) = await offered(serve)
            assert len(set(rank)) == 2
            seen.update(rank)
        assert set(seen) == set("abc")
        assert {await ask(serve) for _ in range(100)} == set("abc")


@in_virtual_time
async def test_without_a_table_a_replica_of_unknown_queue_does_not_wait_for_ever_beside_a_known_one():
    known, unknown = Replica("known"), Replica("unknown")
    async with serving(known, unknown) as serve:
        serve.router.replica_queue_len_cache.invalidate_key(unknown.replica_id)
        serve.router.on_new_queue_len_info(known.replica_id, 0)
        first, second = await offered(serve)
        assert first == ["unknown"]
        assert set(second) == {"known", "unknown"}
        assert await ask(serve) == "unknown"


@in_virtual_time
async def test_a_table_decides_who_is_eligible():
    async with serving(*(Replica(n, max_ongoing_requests=200) for n in ("a", "b", "new"))) as serve:
        serve.take(table(a=1.0, b=1.0, new=0.0))
        assert serve.router.level == "table"
        for _ in range(100):
            for rank in await offered(serve):
                assert set(rank) <= {"a", "b"}
        assert {await ask(serve) for _ in range(100)} == {"a", "b"}


@in_virtual_time
async def test_an_older_table_or_one_of_a_former_coordinator_is_ignored():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(version=5, epoch=2, a=1.0, b=0.0))
        serve.take(table(version=4, epoch=2, a=0.0, b=1.0))
        serve.take(table(version=9, epoch=1, a=0.0, b=1.0))
        assert await offered(serve) == [["a"]]
        assert await ask(serve) == "a"
        serve.take(table(version=1, epoch=3, a=0.0, b=1.0))
        assert await offered(serve) == [["b"]]
        assert await ask(serve) == "b"


@pytest.mark.parametrize(("age_s", "level"), [(0.0, "table"), (4.0, "stale_table"), (30.0, "power_of_two")])
@in_virtual_time
async def test_an_ageing_table_loses_its_say_step_by_step(age_s, level):
    async with serving(*(Replica(n, max_ongoing_requests=200) for n in ("a", "b", "bad"))) as serve:
        serve.take(table(age_s=age_s, a=1.0, b=1.0, bad=0.0))
        assert serve.router.level == level
        for _ in range(50):  # what it kept out stays out for a while
            for rank in await offered(serve):
                assert "bad" not in rank
            assert await ask(serve) != "bad"
        await asyncio.sleep(100.0)
        assert {name for _ in range(100) for rank in await offered(serve) for name in rank} == {"a", "b", "bad"}
        assert {await ask(serve) for _ in range(100)} == {"a", "b", "bad"}


@in_virtual_time
async def test_a_replica_set_that_the_table_does_not_know_is_used():
    async with serving(Replica("a")) as serve:
        serve.take(table(a=1.0))
        serve.scale(*replicas("xy", max_ongoing_requests=50))
        assert {name for _ in range(30) for rank in await offered(serve) for name in rank} == {"x", "y"}
        assert {await ask(serve) for _ in range(50)} == {"x", "y"}


@in_virtual_time
async def test_a_stale_table_is_read_without_its_forecast():
    async with serving(*replicas("ab")) as serve:
        rows = tuple(
            TableRow(name, "node", State.ACTIVE, 1.0, capacity, 0.0, live_capacity=live)
            for name, capacity, live in (("a", 1.0, 0.1), ("b", 0.1, 1.0))
        )
        serve.take(RoutingTable("app/model", 1, 1, 1, rows))
        assert await offered(serve) == [["a"]]
        assert await ask(serve) == "a"
        await asyncio.sleep(4.0)
        assert serve.router.level == "stale_table"
        assert await offered(serve) == [["b"]]
        assert await ask(serve) == "b"


@in_virtual_time
async def test_every_choice_asks_for_backoff():
    async with serving(Replica("a")) as serve:
        pending = request()
        await offered(serve, pending)
        assert pending.routing_context.should_backoff
        serve.take(table(a=1.0))
        at_once = request()
        assert serve.router.choose_at_once(at_once) is not None
        assert at_once.routing_context.should_backoff, "if it is refused, several are offered"
        serve.router.given_up(at_once)


# ------------------------------------------------------------------ replicas that die


@in_virtual_time
async def test_a_dead_replica_is_out_at_once():
    a = Replica("a")
    async with serving(a, Replica("b", max_ongoing_requests=50)) as serve:
        serve.take(table(a=1.0, b=1.0))
        serve.router.on_replica_actor_died(a.replica_id)
        for _ in range(20):
            assert await offered(serve) == [["b"]]
            assert await ask(serve) == "b"


@in_virtual_time
async def test_without_a_table_a_dead_replica_is_out_at_once():
    a = Replica("a")
    async with serving(a, Replica("b", max_ongoing_requests=50)) as serve:
        serve.router.on_replica_actor_died(a.replica_id)
        held = await hold(serve)  # b's queue is the longer one
        for _ in range(20):
            assert await offered(serve) == [["b"]]
            async with asyncio.timeout(1.0):
                assert await ask(serve) == "b"
        end(held)


@pytest.mark.parametrize("has_table", [True, False])
@in_virtual_time
async def test_a_session_leaves_a_replica_that_has_died_at_once(has_table):
    async with serving(*replicas("abc")) as serve:
        if has_table:
            serve.take(table(a=1.0, b=1.0, c=1.0))
        before = await ask(serve, session_id="s")
        serve.replicas[before].says = "dead"
        async with asyncio.timeout(1.0):
            after = await ask(serve, session_id="s")
            assert after != before
            assert {await ask(serve, session_id="s") for _ in range(5)} == {after}
        assert len(serve.replicas[before].sent) == 2, "it is found dead once"


@in_virtual_time
async def test_a_replica_that_is_found_dead_again_and_again_costs_no_new_layout_each_time():
    alive = [Replica(f"r{i}") for i in range(999)]
    dead = Replica("dead")
    async with serving(dead, *alive) as serve:
        serve.take(table(dead=1.0, **{replica.name: 1.0 for replica in alive}))
        serve.router.on_replica_actor_died(dead.replica_id)
        picks = serve.router.calls.routes.picks
        for _ in range(199):
            serve.router.on_replica_actor_died(dead.replica_id)
        assert serve.router.calls.routes.picks is picks
        assert {picks.ids[i] for i in picks.pool} == {replica.name for replica in alive}
        for _ in range(500):
            assert not any("dead" in rank for rank in await offered(serve))
        for _ in range(300):
            await ask(serve)
        assert dead.sent == []
        serve.take(table(2, dead=1.0, **{replica.name: 1.0 for replica in alive}))
        assert "dead" not in serve.router.calls.routes.picks.index


@in_virtual_time
async def test_what_a_replica_did_is_not_told_twice_if_it_was_taken_for_dead_and_is_listed_again():
    """Serve takes a replica for dead whose request failed by the death of another actor, if it cannot tell."""
    a, b = replicas("ab")
    async with serving(a, b) as serve:
        serve.take(table(1, a=1.0, b=0.0))
        for _ in range(4):
            await ask(serve)
        held = await hold(serve)
        assert [(view.started, view.finished) for view in serve.report().replicas if view.replica_id == "a"] == [(5, 4)]
        serve.router.on_replica_actor_died(a.replica_id)
        serve.take(table(2, a=1.0, b=1.0))
        assert "a" in serve.report().gone
        serve.scale(a, b)
        serve.take(table(3, a=1.0, b=1.0))
        assert [(view.started, view.finished) for view in serve.report().replicas if view.replica_id == "a"] == [(0, 0)]
        end(held)
        await settle()
        assert [(view.started, view.finished) for view in serve.report().replicas if view.replica_id == "a"] == [(0, 1)]


@in_virtual_time
async def test_when_all_replicas_have_died_requests_wait_for_new_ones():
    async with serving(*replicas("ab", says="dead")) as serve:
        serve.take(table(a=1.0, b=1.0))
        waiting = serve.start(1)
        await asyncio.sleep(2.0)
        assert not waiting.done()
        serve.scale(Replica("c"))
        async with asyncio.timeout(1.0):
            result = await waiting
        assert result.replica.name == "c"
        result.end()


# ------------------------------------------------------------------ what becomes of calls


@in_virtual_time
async def test_an_outcome_is_counted_once_with_its_error():
    a = Replica("a", says="nothing")
    async with serving(a) as serve:
        serve.take(table(a=1.0))
        for i in range(3):
            call = serve.start(1, request_id=f"r{i}")
            await settle()
            a.sent[-1].accept(3)
            result = await call
            result.end(raised=None if i else ValueError("user code"))
            serve.router.on_request_completed(a.replica_id, f"r{i}")
            result.end()
            await settle()
        (view,) = serve.report().replicas
        assert (view.started, view.finished, view.failed, view.in_flight) == (3, 3, 1, 0)
        assert [outcome.ok for outcome in view.outcomes] == [False, True, True]
        assert {outcome.in_flight_at_start for outcome in view.outcomes} == {2.0}
        assert in_flight(serve) == {"a": 0}
        assert serve.report().replicas == (), "nothing is told twice"


@pytest.mark.parametrize("who", ["the caller", "the replica says so"])
@in_virtual_time
async def test_a_cancelled_request_is_no_failure(who):
    async with serving(Replica("a")) as serve:
        serve.take(table(a=1.0))
        (result,) = await hold(serve)
        if who == "the caller":
            result.cancel()
        else:
            result.end(TaskCancelledError())
        await settle()
        (view,) = serve.report().replicas
        assert (view.started, view.finished, view.failed, view.in_flight) == (1, 0, 0, 0)
        assert view.outcomes == ()


@in_virtual_time
async def test_counts_return_to_zero_after_rejections_failed_sends_and_cancelled_choices():
    a, b = replicas("ab", says="no")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        rejected = serve.start(1)
        await settle(100)
        assert len(a.sent) + len(b.sent) >= 3
        rejected.cancel()
        await settle()
        assert in_flight(serve) == {"a": 0, "b": 0}
        a.says = b.says = "error"
        with pytest.raises(RuntimeError, match="no way there"):
            await serve.send(1)
        assert in_flight(serve) == {"a": 0, "b": 0}
        a.says = b.says = "nothing"
        given_up = serve.start(1)
        await settle()
        assert sum(in_flight(serve).values()) == 1
        given_up.cancel()
        await settle()
        assert in_flight(serve) == {"a": 0, "b": 0}
        a.says = b.says = "yes"
        held = await hold(serve, 10)
        serve.scale(b)
        assert sum(in_flight(serve).values()) < 10
        end(held)
        await settle()
        serve.report()
        assert in_flight(serve) == {"b": 0}
        assert serve.router.calls.book.all_in_flight() == {}


@in_virtual_time
async def test_calls_that_share_serves_request_id_are_told_apart():
    """All handle calls that one request of a composition makes carry the same internal id in Ray 2.60."""
    new = Replica("new")
    async with serving(*replicas("ab"), new, trial={"copy_methods": ["*"]}) as serve:
        serve.take(table(a=1.0, b=1.0, new=(0.0, 1.0, 1.0)))
        results = await asyncio.gather(*(serve.start(1, request_id="same") for _ in range(3)))
        await settle()
        assert sum(serve.router.calls.book.all_in_flight().values()) == 3
        end(new.copies)
        end(results)
        await settle()
        report = serve.report()
        assert sum(view.finished for view in report.replicas) == 3
        assert len(report.pairs) == 3
        assert set(in_flight(serve).values()) == {0}


@pytest.mark.parametrize("has_table", [True, False])
@in_virtual_time
async def test_calls_that_share_serves_request_id_all_get_a_replica(has_table):
    async with serving(*replicas("ab")) as serve:
        if has_table:
            serve.take(table(a=1.0, b=1.0))
        for each in serve.replicas.values():  # so that all of them wait
            serve.router.replica_queue_len_cache.invalidate_key(each.replica_id)
        async with asyncio.timeout(1.0):
            results = await asyncio.gather(*(serve.start(1, request_id="same") for _ in range(6)))
        assert {result.replica.name for result in results} <= {"a", "b"}
        assert serve.router.calls.book.waiting == 0
        end(results)


@in_virtual_time
async def test_of_two_calls_with_one_id_the_one_that_is_given_up_takes_nothing_of_the_other_along():
    a = Replica("a", says="nothing")
    async with serving(a) as serve:
        serve.take(table(a=1.0))
        first, second = (serve.start(1, request_id="same") for _ in range(2))
        await settle()
        a.sent[0].accept(1)
        second.cancel()
        result = await first
        await settle()
        assert a.sent[1].cancelled
        view = views(serve)["a"]
        assert (view.in_flight, view.started, view.finished) == (1, 1, 0)
        assert len(view.unfinished) == 1, "the first one"
        await asyncio.sleep(5.0)
        result.end("answer")
        assert await result.get_async() == "answer"
        await settle()
        view = views(serve)["a"]
        assert (view.in_flight, view.finished, view.failed, view.unfinished) == (0, 1, 0, ())
        assert serve.router.calls.book.open_calls == 0


@in_virtual_time
async def test_a_call_that_is_given_up_while_it_waits_leaves_nothing():
    async with serving() as serve:
        waiting = serve.start(1)
        await settle()
        assert serve.router.calls.book.waiting == 1
        assert serve.report().waiting == 1
        waiting.cancel()
        await settle()
        assert serve.router.calls.book.open_calls == 0
        report = serve.report()
        assert report.waiting == 0
        assert report.refused == {"cancelled": 1}


@in_virtual_time
async def test_a_call_given_up_just_when_it_was_chosen_for_leaves_no_count():
    a = Replica("a")
    async with serving(a) as serve:
        serve.take(table(a=1.0))
        serve.router.replica_queue_len_cache.invalidate_key(a.replica_id)
        pending = request()
        choosing = asyncio.create_task(serve.route_and_send_request(pending, "response"))
        pending.future.add_done_callback(lambda _: choosing.cancel())  # chosen, not yet sent
        await asyncio.wait([choosing])
        assert choosing.cancelled()
        assert a.sent == []
        assert serve.router.calls.book.open_calls == 0
        assert in_flight(serve) == {"a": 0}


@in_virtual_time
async def test_own_choices_spread_before_any_table_says_so():
    async with serving(*replicas("abcd", max_ongoing_requests=20)) as serve:
        serve.take(table(**dict.fromkeys("abcd", 1.0)))
        held = await hold(serve, 40)
        assert min(in_flight(serve).values()) >= 8, "equal but for ties, which fall at random within a tenth"
        end(held)


@in_virtual_time
async def test_reports_hold_no_impossible_numbers():
    async with serving(Replica("a")) as serve:
        await ask(serve)
        ((outcome,),) = (view.outcomes for view in serve.report().replicas)
        assert math.isfinite(outcome.duration_s)
        assert outcome.duration_s >= 0.0


@in_virtual_time
async def test_a_router_that_nobody_holds_is_freed():
    serve = Serve(Replica("a"))
    await settle()
    await ask(serve)
    gone = weakref.ref(serve.router)
    del serve
    await asyncio.sleep(2.0)
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------ copies


@in_virtual_time
async def test_copies_go_to_the_replica_on_trial_and_become_pairs():
    a, new = Replica("a", says="nothing"), Replica("new")
    async with serving(a, new, trial={"copy_methods": ["infer"]}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        call = serve.start(1, request_id="r")
        await settle()
        assert new.sent == [], "never before its primary is accepted"
        a.sent[0].accept(2)
        result = await call
        await settle()
        (copy,) = new.sent
        labels = copy.request.metadata
        assert labels.request_id == "r-shadow"
        assert labels.internal_request_id.startswith("r/")
        assert labels.internal_request_id.endswith("-shadow")
        assert copy.request.args == [1]
        copy.end()
        await settle()
        result.end()
        await settle()
        report = serve.report()
        (pair,) = report.pairs
        assert (pair.candidate_id, pair.primary_id) == ("new", "a")
        assert (pair.primary_in_flight, pair.shadow_in_flight) == (1.0, 0.0)
        assert pair.primary_ok
        assert pair.shadow_ok
        assert report.mirrored == 1
        (new_view,) = (view for view in report.replicas if view.replica_id == "new")
        assert (new_view.started, new_view.in_flight) == (0, 0), "a copy is no live request"


@pytest.mark.parametrize("how", ["raises", "breaks", "fails"])
@in_virtual_time
async def test_whatever_a_copy_does_the_primary_goes_on(how):
    new = Replica("new", says={"raises": "error", "breaks": "nothing", "fails": "yes"}[how])
    async with serving(Replica("a"), new, trial={"copy_methods": ["*"]}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        (result,) = await hold(serve)
        await settle()
        for copy in new.copies:
            if how == "breaks":
                copy.end(RuntimeError("gone"))
            else:
                copy.end(raised=ValueError("no"))
        result.end("answer")
        assert await result.get_async() == "answer"
        await settle()
        report = serve.report()
        (view,) = (view for view in report.replicas if view.replica_id == "a")
        assert (view.finished, view.failed) == (1, 0)
        assert [(pair.primary_ok, pair.shadow_ok) for pair in report.pairs] == [(True, False)]
        assert serve.router.calls.mirror.under_way == 0


@in_virtual_time
async def test_a_hung_replica_holds_no_more_than_its_cap_of_copies_and_drops_are_counted():
    new = Replica("new")
    async with serving(Replica("a"), new, trial={"copy_methods": ["*"], "mirror_concurrency": 3}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        for _ in range(20):
            await ask(serve)
        report = serve.report()
        assert len(new.sent) == 3
        assert (report.mirrored, report.mirror_dropped) == (3, 17)
        (view,) = (view for view in report.replicas if view.replica_id == "a")
        assert (view.finished, view.failed) == (20, 0)
        end(new.copies)


@in_virtual_time
async def test_a_copy_past_its_deadline_is_cancelled_and_counts_against_the_candidate():
    new = Replica("new")
    async with serving(Replica("a"), new, trial={"copy_methods": ["*"], "mirror_deadline_s": 0.1}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        await ask(serve)
        await asyncio.sleep(0.2)
        (pair,) = serve.report().pairs
        assert pair.primary_ok
        assert not pair.shadow_ok
        assert pair.shadow_s == pytest.approx(0.1)
        assert new.copies[0].cancelled


@pytest.mark.parametrize(
    ("method", "declared", "labels"),
    [
        ("buy", ["infer"], {}),
        ("infer", [], {}),
        ("__call__", ["*"], {"http": True}),
        ("__call__", ["*"], {"_request_protocol": RequestProtocol.GRPC}),
    ],
)
@in_virtual_time
async def test_what_is_not_safe_to_copy_is_not_copied_but_counted(method, declared, labels):
    new = Replica("new")
    async with serving(Replica("a"), new, trial={"copy_methods": declared}) as serve:
        serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
        (result,) = await hold(serve, method=method, **labels)
        await settle()
        assert new.sent == []
        report = serve.report()
        assert (report.mirrored, report.uncopyable) == (0, 1)
        result.end()
        await settle()
        del result


# ------------------------------------------------------------------ Serve's own preferences


@in_virtual_time
async def test_a_preference_for_the_own_node_is_kept_among_eligible_replicas():
    far, near, new = Replica("far", node_id="other"), Replica("near", max_ongoing_requests=50), Replica("new")
    async with serving(far, near, new, options={"prefer_local_node_routing": True}) as serve:
        serve.take(table(far=1.0, near=1.0, new=0.0))
        for _ in range(20):
            assert await offered(serve) == [["near"]]
            assert await ask(serve) == "near"


@in_virtual_time
async def test_a_multiplexed_model_goes_where_it_is_loaded():
    b = Replica("b", multiplexed_model_ids={"m"}, max_ongoing_requests=50)
    async with serving(Replica("a"), b, Replica("c")) as serve:
        serve.take(table(a=1.0, b=1.0, c=1.0))
        for _ in range(20):
            assert await offered(serve, request(multiplexed_model_id="m")) == [["b"]]
            assert await ask(serve, multiplexed_model_id="m") == "b"


@in_virtual_time
async def test_a_multiplexed_model_leaves_a_replica_that_has_collapsed():
    b = Replica("b", multiplexed_model_ids={"m"})
    a, c = (Replica(name, max_ongoing_requests=50) for name in "ac")
    async with serving(a, b, c) as serve:
        serve.take(table(a=1.0, b=(1.0, 0.02, 0.0), c=1.0))
        chosen = {await ask(serve, multiplexed_model_id="m") for _ in range(40)}
    assert chosen == {"a", "c"}


@pytest.mark.parametrize("way", ["no table", "multiplexed", "observing"])
@in_virtual_time
async def test_serves_own_preferences_go_serves_way(way):
    kind = ObservingRouter if way == "observing" else PredictiveRouter
    labels = {"multiplexed_model_id": "m"} if way == "multiplexed" else {}
    async with serving(*replicas("ab"), kind=kind) as serve:
        if way != "no table":
            serve.take(table(a=1.0, b=1.0))
        assert serve.router.choose_at_once(request(**labels)) is None
        async with asyncio.timeout(5.0):
            assert await ask(serve, **labels) in "ab"


@pytest.mark.parametrize("prefers", ["node", "zone"])
@in_virtual_time
async def test_a_near_replica_is_chosen_at_once_and_the_next_one_if_it_is_full(prefers):
    near = Replica("near", availability_zone="here")
    others = replicas("ab", node_id="other", availability_zone="there")
    options = {"prefer_local_node_routing": prefers == "node", "prefer_local_az_routing": prefers == "zone"}
    options["self_availability_zone"] = "here"
    async with serving(near, *others, kind=Noting, options=options) as serve:
        serve.take(table(near=1.0, a=1.0, b=1.0))
        held = await hold(serve, 8)
        assert serve.router.at_once == ["near"] * 8
        async with asyncio.timeout(5.0):
            held += await hold(serve)
        assert serve.router.at_once[8:] == [None]
        assert held[8].replica.name in "ab"
        end(held)


@in_virtual_time
async def test_a_preference_that_nothing_meets_costs_nothing():
    """Serve's default prefers the own zone, which most clusters do not know."""
    async with serving(*replicas("ab"), kind=Noting, options={"prefer_local_az_routing": True}) as serve:
        serve.take(table(a=1.0, b=1.0))
        assert not serve.router.calls.routes.has_near
        assert await ask(serve) in "ab"
        assert serve.router.at_once != [None]


# ------------------------------------------------------------------ choices at once


@in_virtual_time
async def test_a_usual_choice_needs_no_task_of_serves_and_is_accounted_for():
    async with serving(*replicas("abcd", max_ongoing_requests=20)) as serve:
        serve.take(table(**dict.fromkeys("abcd", 1.0)))
        held = []
        for _ in range(40):
            sending = serve.send(1)
            with pytest.raises(StopIteration) as done:
                sending.send(None)  # comes to its end without waiting for anything
            held.append(done.value.value)
            assert serve.router.curr_num_routing_tasks == 0
        assert {result.replica.name for result in held} == set("abcd")
        assert sum(in_flight(serve).values()) == 40
        book = serve.router.calls.book
        assert (book.open_calls, book.waiting) == (40, 0)
        assert sum(book.on_the_way(name) for name in "abcd") == 0
        end(held)


@pytest.mark.parametrize("why", ["unknown queue", "full"])
@in_virtual_time
async def test_where_there_is_something_to_compare_serve_chooses(why):
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        for each in serve.replicas.values():
            if why == "unknown queue":
                serve.router.replica_queue_len_cache.invalidate_key(each.replica_id)
            else:
                serve.router.on_new_queue_len_info(each.replica_id, 8)
        assert serve.router.choose_at_once(request()) is None
        assert serve.router.calls.book.open_calls == 0
        assert in_flight(serve) == {"a": 0, "b": 0}
        assert await ask(serve) in "ab"


@pytest.mark.parametrize("why", ["another one waits", "backing off"])
@in_virtual_time
async def test_where_others_wait_a_request_takes_its_turn(why):
    a = Replica("a", queue=8) if why == "backing off" else Replica("a", tells_after_s=10.0)
    async with serving(a, kind=Noting) as serve:
        router = serve.router
        serve.take(table(a=1.0))
        # Serve routes two requests at a time with one replica: the third one is left in the line
        earlier = [serve.start(1) for _ in range(1 if why == "backing off" else 3)]
        await asyncio.sleep(0.2 if why == "backing off" else 0.02)
        assert not any(call.done() for call in earlier)
        assert router.num_routing_tasks_in_backoff == (1 if why == "backing off" else 0)
        router.on_new_queue_len_info(a.replica_id, 0)  # it is known to have a place
        a.queue, a.tells_after_s = 0, 0.0
        asked = len(router.at_once)
        late = serve.start(1)
        await settle()
        assert len(router.at_once) == asked
        async with asyncio.timeout(2.0):
            end(await asyncio.gather(*earlier, late))


@in_virtual_time
async def test_a_replica_whose_queue_is_unknown_keeps_its_turn():
    """Else every request would be Serve's to place, by the turn after, and the replica would never be asked."""
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        for _ in range(4):
            (next_one,) = {"a", "b"} - {await ask(serve)}
            serve.router.replica_queue_len_cache.invalidate_key(serve.replicas[next_one].replica_id)
            for _ in range(3):
                assert serve.router.choose_at_once(request()) is None
            assert await ask(serve) == next_one


@in_virtual_time
async def test_a_request_that_was_refused_is_offered_several_others():
    async with serving(*replicas("abcdef"), kind=Noting) as serve:
        serve.take(table(**dict.fromkeys("abcdef", 1.0)))
        picked = serve.router.choose_at_once(probe := request()).replica_id.unique_id
        serve.router.given_up(probe)
        for replica in serve.replicas.values():
            replica.says, replica.queue = "no", 8
        call = serve.start(1)
        await settle()
        first = serve.router.at_once[-1]
        assert picked in "abcdef"
        for name, replica in serve.replicas.items():
            if name != first:
                replica.says, replica.queue = "yes", None
        async with asyncio.timeout(5.0):
            result = await call
        assert result.replica.name != first
        assert len({name for rank in serve.router.offers[0] for name in rank} - {first}) >= 2
        assert sum(in_flight(serve).values()) == 1
        result.end()


@in_virtual_time
async def test_a_request_that_found_its_replicas_full_is_offered_the_others():
    async with serving(*replicas("abcdef", says="no", queue=8), kind=Noting) as serve:
        serve.take(table(**{name: (1.0, 9.0 if name in "ab" else 1.0, 0.0) for name in "abcdef"}))
        router = serve.router
        for replica in serve.replicas.values():
            router.on_new_queue_len_info(replica.replica_id, 0)
        call = serve.start(1)
        await asyncio.sleep(0.2)
        serve.replicas["f"].says, serve.replicas["f"].queue = "yes", None
        async with asyncio.timeout(5.0):
            result = await call
        assert result.replica.name == "f"
        (first,) = router.at_once
        assert first is not None
        assert router.offers[0][0][0] in {"a", "b"} - {first}, "the best of the others"
        result.end()
        await settle()
        assert sum(in_flight(serve).values()) == 0


@in_virtual_time
async def test_a_request_that_keeps_coming_back_is_offered_every_replica():
    async with serving(*replicas("abcdef", says="no", queue=8), kind=Noting) as serve:
        serve.take(table(**dict.fromkeys("abcdef", 1.0)))
        call = serve.start(1)
        await asyncio.sleep(10.0)
        assert {name for ranks in serve.router.offers for rank in ranks for name in rank} == set("abcdef")
        call.cancel()


@in_virtual_time
async def test_the_only_free_replica_is_found_although_it_is_slower_than_many_that_are_full():
    """Other routers' requests fill those, which no table has told yet."""
    full, free = replicas("abcdefgh", says="no", queue=8), Replica("free")
    async with serving(*full, free) as serve:
        serve.take(table(free=1.0, **dict.fromkeys("abcdefgh", (1.0, 2.0, 0.0))))
        async with asyncio.timeout(1.0):
            assert await ask(serve) == "free"


@pytest.mark.parametrize("why", ["ejected", "slow"])
@in_virtual_time
async def test_a_request_that_comes_back_goes_to_a_replica_that_is_well(why):
    first = Replica("first", says="no", queue=8)  # it is near, so that all go there first
    bad, *others = replicas(("bad", "x", "y", "z"), node_id="other")
    bad.says = "nothing"
    near = {"prefer_local_node_routing": True}
    async with serving(first, bad, *others, options=near, trial={"copy_methods": ["*"]}) as serve:
        if why == "ejected":
            serve.take(table(1, bad=1.0))
            call = serve.start(1)
            await settle()
            serve.take(table(2, bad=1.0, x=1.0, y=1.0, z=1.0))
            await asyncio.sleep(0.4)
            (await call).end()
            bad.says = "yes"
        capacity = 1.0 if why == "ejected" else 0.01
        serve.take(table(3, first=1.0, bad=(1.0, capacity, 0.0), x=1.0, y=1.0, z=1.0))
        asked = len(bad.sent)
        went, started_s = Counter(), time.monotonic()
        for i in range(20):
            serve.router.on_new_queue_len_info(first.replica_id, 0)
            went[await ask(serve)] += 1
            assert len(first.sent) == i + 1, "it has come back from there"
        assert set(went) <= set("xyz")
        assert went.total() == 20
        assert len(bad.sent) == asked
        assert time.monotonic() == started_s, "without a pause"


# ------------------------------------------------------------------ sessions


@in_virtual_time
async def test_sessions_stay_on_their_replica_and_all_routers_agree():
    async with serving(*replicas("abcd")) as one, serving(*replicas("dcba")) as other:
        for serve in (one, other):
            serve.take(table(**dict.fromkeys("abcd", 1.0)))
        places = {}
        for i in range(200):
            session = f"s{i % 40}"
            chosen = await ask((one, other)[i % 2], session_id=session)
            assert places.setdefault(session, chosen) == chosen
        assert len(set(places.values())) == 4


@in_virtual_time
async def test_sessions_placed_before_the_first_table_move_to_where_all_routers_place_them():
    async with serving(*replicas("ab")) as early, serving(*replicas("ab")) as late:
        sessions = [f"s{i}" for i in range(60)]
        for session in sessions:
            await ask(early, session_id=session)
        for serve in (early, late):
            serve.take(table(a=(1.0, 4.0, 0.0), b=(1.0, 1.0, 0.0)))
        for session in sessions:
            assert await ask(early, session_id=session) == await ask(late, session_id=session)


@in_virtual_time
async def test_a_session_is_at_its_replica_at_once_and_waits_there_if_it_is_full():
    async with serving(*replicas("abcd"), kind=Noting) as serve:
        serve.take(table(reference_s=20.0, **dict.fromkeys("abcd", 1.0)))
        own = await ask(serve, session_id="s")
        for _ in range(5):
            assert await ask(serve, session_id="s") == own
        assert set(serve.router.at_once) == {own}
        held = await hold(serve, 8, session_id="s")
        late = serve.start(1, session_id="s")
        await asyncio.sleep(0.05)
        assert serve.router.at_once[-1] is None
        assert not late.done()
        end(held[:5])
        async with asyncio.timeout(5.0):
            held.append(await late)
        assert held[-1].replica.name == own
        end(held)


@in_virtual_time
async def test_a_session_never_waits_for_a_full_replica_whose_pace_is_not_known():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        own = await ask(serve, session_id="s")
        held = await hold(serve, 8, session_id="s")
        started_s = time.monotonic()
        held += await hold(serve, session_id="s")
        assert time.monotonic() == started_s
        assert [result.replica.name for result in held] == [own] * 8 + list({"a", "b"} - {own})
        end(held)


@in_virtual_time
async def test_a_session_waits_for_its_full_replica_as_long_as_a_move_would_cost():
    async with serving(*replicas("ab"), session={"migration_cost": 0.5}) as serve:
        serve.take(table(a=1.0, b=1.0, reference_s=0.4))
        own = await ask(serve, session_id="s")
        held = await hold(serve, 8, session_id="s")
        lucky = serve.start(1, session_id="s")
        await asyncio.sleep(0.12)
        assert not lucky.done(), "it asks again, after a pause"
        held.pop().end()
        async with asyncio.timeout(0.2):
            held.append(await lucky)
        assert held[-1].replica.name == own, "it has room"
        started_s = time.monotonic()
        moved = await serve.send(1, session_id="s")
        assert 0.2 <= time.monotonic() - started_s < 0.4
        assert moved.replica.name != own
        end([*held, moved])
        await settle()
        assert await ask(serve, session_id="s") == own, "the session has not moved"


@in_virtual_time
async def test_requests_that_wait_for_their_sessions_replica_leave_room_for_others_to_be_routed():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0, reference_s=20.0))
        held = await hold(serve, 8, session_id="s")
        calls = [serve.start(1, session_id="s") for _ in range(4)]
        done, late = await asyncio.wait(calls, timeout=0.05)
        assert (len(done), len(late)) == (2, 2), "Serve routes four at a time with two replicas"
        async with asyncio.timeout(2.0):
            end([*held, *await asyncio.gather(*calls)])


@in_virtual_time
async def test_a_session_waits_once_for_a_replica_that_is_slow_to_tell_its_queue():
    async with serving(*replicas("ab"), kind=Noting) as serve:
        serve.take(table(a=1.0, b=1.0))
        own = serve.replicas[await ask(serve, session_id="s")]
        serve.router.replica_queue_len_cache.invalidate_key(own.replica_id)
        own.tells_after_s = 60.0
        unlucky = await serve.send(1, session_id="s")
        assert unlucky.replica is not own
        (other,) = {"a", "b"} - {own.name}
        assert serve.router.offers == [[[own.name]], [[own.name]], [[other]]]
        await asyncio.sleep(2.0)  # in which it is left out
        own.tells_after_s = 0.15  # too late for Serve's first deadline
        luckier = await serve.send(1, session_id="s")
        assert luckier.replica is own
        assert serve.router.offers[3:] == [[[own.name]], [[own.name]]]
        end([unlucky, luckier])
        await settle()
        assert sum(in_flight(serve).values()) == 0


@in_virtual_time
async def test_sessions_of_a_replica_that_tells_its_queue_no_more_wait_for_it_once():
    async with serving(*replicas("abcd")) as serve:
        serve.take(table(1, **dict.fromkeys("abcd", 1.0)))
        homes = {s: await ask(serve, session_id=s) for s in map(str, range(40))}
        own = serve.replicas[homes["0"]]
        its = [s for s, home in homes.items() if home == own.name]
        own.tells_after_s = 60.0
        serve.router.replica_queue_len_cache.invalidate_key(own.replica_id)
        first = await ask(serve, session_id="0")
        began_s = asyncio.get_running_loop().time()
        fallbacks = {s: [await ask(serve, session_id=s) for _ in range(3)] for s in its}
        assert asyncio.get_running_loop().time() - began_s < 0.1, "nobody waits for it again"
        assert {first} == set(fallbacks["0"])
        assert all(len(set(went)) == 1 and own.name not in went for went in fallbacks.values())
        await asyncio.sleep(2.0)
        own.tells_after_s = 0.0
        assert [await ask(serve, session_id=s) for s in its] == [own.name] * len(its)


@in_virtual_time
async def test_a_session_falls_back_to_one_other_replica_while_its_own_is_very_slow():
    async with serving(*replicas("abcd")) as serve:
        serve.take(table(1, **dict.fromkeys("abcd", 1.0)))
        own = await ask(serve, session_id="s")
        serve.take(table(2, **{name: (1.0, 0.02 if name == own else 1.0, 0.0) for name in "abcd"}))
        fallback = {await ask(serve, session_id="s") for _ in range(5)}
        assert len(fallback) == 1
        assert fallback != {own}
        serve.take(table(3, **dict.fromkeys("abcd", 1.0)))
        assert await ask(serve, session_id="s") == own


@in_virtual_time
async def test_a_session_falls_back_to_one_other_replica_while_its_own_is_ejected():
    async with serving(*replicas("abcd"), trial={"copy_methods": ["*"]}) as serve:
        serve.take(table(1, **dict.fromkeys("abcd", 1.0)))
        own = await ask(serve, session_id="s")
        serve.replicas[own].says = "nothing"
        async with asyncio.timeout(1.0):
            first = await ask(serve, session_id="s")
        fallback = {await ask(serve, session_id="s") for _ in range(5)}
        assert fallback == {first}
        assert first != own
        serve.replicas[own].says = "yes"
        await asyncio.sleep(2.0)
        assert await ask(serve, session_id="s") == own


@in_virtual_time
async def test_sessions_are_never_placed_on_a_replica_on_trial_and_leave_one_that_is_gone():
    a, b, new = replicas(("a", "b", "new"))
    async with serving(a, b, new) as serve:
        serve.take(table(a=1.0, b=1.0, new=0.0))
        assert {await ask(serve, session_id=f"s{i}") for i in range(50)} == {"a", "b"}
        serve.scale(b, new)
        assert {await ask(serve, session_id=f"s{i}") for i in range(50)} == {"b"}


# ------------------------------------------------------------------ places


async def crowd(serve):
    """Own requests fill all replicas, although these have accepted none: Serve takes them for idle."""
    count = sum(replica.max_ongoing_requests for replica in serve.replicas.values())
    calls = [serve.start(i) for i in range(count)]
    await settle()
    for replica in serve.replicas.values():
        assert len(replica.sent) == replica.max_ongoing_requests
        serve.router.on_new_queue_len_info(replica.replica_id, 0)
    return calls


async def accept_all(serve, calls):
    """Replicas answer whatever they were asked, and will be."""
    for replica in serve.replicas.values():
        replica.says = "yes"
        end([sent.accept() for sent in replica.sent])
    await settle()
    end([await call for call in calls if not call.cancelled()])


@in_virtual_time
async def test_where_its_own_requests_fill_all_replicas_the_next_one_waits_until_one_of_them_has_ended():
    a, b = replicas("ab", says="nothing")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        calls = await crowd(serve)
        assert serve.router.choose_at_once(request()) is None
        late = serve.start("late")
        await asyncio.sleep(0.05)
        assert (len(a.sent), len(b.sent)) == (8, 8)
        held = a.sent[5].accept(1)  # it is still there
        await asyncio.sleep(0.05)
        assert (len(a.sent), len(b.sent)) == (8, 8)
        held.end()
        await asyncio.sleep(0.05)
        assert (len(a.sent), len(b.sent)) == (9, 8)
        assert a.sent[8].request.args == ["late"]
        assert not serve.router.calls.waiting.line
        await accept_all(serve, [*calls, late])


@in_virtual_time
async def test_those_that_wait_for_a_place_are_served_in_their_order_and_nobody_overtakes_them():
    a, b = replicas("ab", says="nothing")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        calls = await crowd(serve)
        waiting = [serve.start(f"w{i}") for i in range(3)]
        await settle()
        for i in range(3):
            assert serve.router.choose_at_once(request()) is None
            waiting.append(serve.start(f"late{i}"))
            freed = (a, b)[i % 2]
            freed.sent[i].accept(1).end()
            await settle()
            assert freed.sent[-1].request.args == [f"w{i}"]
            assert len(a.sent) + len(b.sent) == 16 + i + 1
        await accept_all(serve, [*calls, *waiting])


@in_virtual_time
async def test_where_no_place_comes_free_a_request_is_delayed_and_never_blocked():
    """Should a count ever be wrong, Serve asks the replicas itself."""
    a, b = replicas("ab", says="nothing", queue=0)
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        calls = await crowd(serve)
        late = serve.start("late")
        await asyncio.sleep(0.9)
        assert len(a.sent) + len(b.sent) == 16
        await asyncio.sleep(0.6)
        assert len(a.sent) + len(b.sent) == 17
        await accept_all(serve, [*calls, late])


@pytest.mark.parametrize("steps", range(0, 24, 2))
@in_virtual_time
async def test_one_that_is_cancelled_while_it_waits_for_a_place_passes_its_turn_on(steps):
    a, b = replicas("ab", says="nothing")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        calls = await crowd(serve)
        first, second = serve.start("w0"), serve.start("w1")
        await settle()
        assert len(serve.router.calls.waiting.line) == 2
        a.sent[0].accept(1).end()
        await settle(steps)
        first.cancel()  # before it is its turn, just when it is, or once it was sent
        await asyncio.sleep(0.5)
        assert first.cancelled()
        assert not serve.router.calls.waiting.line
        assert a.sent[-1].request.args == ["w1"]
        await accept_all(serve, [*calls, second])


@in_virtual_time
async def test_a_new_replica_takes_those_that_wait():
    a, b = replicas("ab", says="nothing")
    async with serving(a, b) as serve:
        serve.take(table(a=1.0, b=1.0))
        calls = await crowd(serve)
        late = serve.start("late")
        await settle()
        serve.scale(a, b, Replica("c"))
        serve.take(table(2, a=1.0, b=1.0, c=1.0))
        async with asyncio.timeout(2.0):
            assert (await late).replica.name == "c"
        await accept_all(serve, [*calls, late])


@in_virtual_time
async def test_what_a_replica_tells_of_its_queue_is_completed_by_what_is_on_its_way():
    a = Replica("a", says="nothing", max_ongoing_requests=100)
    async with serving(a) as serve:
        serve.take(table(a=1.0))
        calls = [serve.start(i) for i in range(8)]
        await settle()
        a.sent[0].accept(1)  # one accepted, seven on their way
        await settle()
        assert serve.router.calls.book.on_the_way("a") == 7
        assert serve.router.calls.routes.picks.scores == [load_cost(8 + 1, 1.0, 0.0)]
        await accept_all(serve, calls)


# ------------------------------------------------------------------ chosen for another way, reserved, broadcast


@pytest.mark.parametrize("has_table", [True, False])
@in_virtual_time
async def test_picks_that_nobody_sends_are_quick_spread_and_count_for_a_second(has_table):
    """28 of them where there are 24 places: the one who picks sends on a way of its own, or not at all."""
    async with serving(*replicas("abc")) as serve:
        if has_table:
            serve.take(table(a=1.0, b=1.0, c=1.0))
        picked, started_s = Counter(), time.monotonic()
        for _ in range(28):
            began_s = time.perf_counter()
            async with serve.choose_replica(metadata(), _reserve=False) as selection:
                picked[selection.replica_id] += 1
            assert time.perf_counter() - began_s < 0.2
        assert time.monotonic() == started_s, "nobody waits"
        assert set(picked) == set("abc")
        if has_table:
            assert min(picked.values()) >= 5
            assert in_flight(serve) == picked
            assert serve.router.calls.book.open_calls == 28
        await asyncio.sleep(1.01)
        assert serve.router.calls.book.open_calls == 0
        assert set(in_flight(serve).values()) == {0}
        assert sum(view.started for view in serve.report().replicas) == 0


@in_virtual_time
async def test_a_session_is_picked_for_where_it_lives():
    async with serving(*replicas("abcd")) as serve:
        serve.take(table(**dict.fromkeys("abcd", 1.0)))
        own = await ask(serve, session_id="s")
        for _ in range(20):
            async with serve.choose_replica(metadata(session_id="s"), _reserve=False) as selection:
                assert selection.replica_id == own


@in_virtual_time
async def test_calls_that_are_dispatched_to_a_reserved_place_are_counted_like_others():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        for i in range(5):
            labels = metadata()
            async with serve.choose_replica(labels) as selection:
                assert sum(in_flight(serve).values()) == 1, "from the reservation on"
                result = await serve.dispatch(selection, labels, i)
                assert sum(in_flight(serve).values()) == 1
            await asyncio.sleep(0.25)
            if i:
                result.end(i)
                assert await result.get_async() == i
            else:
                result.end(raised=ValueError("user code"))
                with pytest.raises(ValueError, match="user code"):
                    await result.get_async()
            await settle()
            assert sum(in_flight(serve).values()) == 0
        seen = serve.report().replicas
        assert sum(view.started for view in seen) == 5
        assert sum(view.finished for view in seen) == 5
        assert sum(view.failed for view in seen) == 1
        assert [outcome.duration_s for view in seen for outcome in view.outcomes] == pytest.approx([0.25] * 5)


@pytest.mark.parametrize("how", ["left", "an error inside", "cancelled inside", "the replica is gone"])
@in_virtual_time
async def test_a_reserved_place_that_is_not_used_is_given_back(how):
    a = Replica("a")
    async with serving(a) as serve:
        serve.take(table(a=1.0))

        async def use():
            labels = metadata()
            async with serve.choose_replica(labels) as selection:
                assert serve.router.calls.book.in_flight("a") == 1
                assert len(a.reserved) == 1
                if how == "an error inside":
                    raise ValueError
                if how == "cancelled inside":
                    await asyncio.sleep(60.0)
                if how == "the replica is gone":
                    serve.router.on_replica_actor_died(a.replica_id)
                    await serve.dispatch(selection, labels, 1)

        using = asyncio.create_task(use())
        await settle()
        if how == "cancelled inside":
            using.cancel()
        await asyncio.wait([using])
        assert (using.cancelled() or using.exception() is not None) is (how != "left")
        assert a.reserved == set()
        assert serve.router.calls.book.open_calls == 0
        assert [(view.started, view.finished) for view in serve.report().replicas] in ([(0, 0)], [])


@in_virtual_time
async def test_a_dispatched_call_that_is_cancelled_is_no_outcome():
    async with serving(Replica("a")) as serve:
        serve.take(table(a=1.0))
        labels = metadata()
        async with serve.choose_replica(labels) as selection:
            result = await serve.dispatch(selection, labels, 1)
        result.cancel()
        await settle()
        view = views(serve)["a"]
        assert (view.started, view.finished, view.in_flight) == (1, 0, 0)


@pytest.mark.parametrize("says", ["no", "dead"])
@in_virtual_time
async def test_a_reservation_that_is_refused_goes_to_another_replica(says):
    a = Replica("a", says=says, queue=8)
    async with serving(a, Replica("b")) as serve:
        serve.take(table(a=(1.0, 9.0, 0.0), b=1.0))
        labels = metadata()
        async with asyncio.timeout(1.0), serve.choose_replica(labels) as selection:
            assert selection.replica_id == "b"
            assert serve.router.calls.book.all_in_flight() == {"b": 1}
            result = await serve.dispatch(selection, labels, 1)
        result.end()
        await settle()
        assert views(serve)["b"].finished == 1


@pytest.mark.parametrize("way", ["dispatched", "broadcast"])
@in_virtual_time
async def test_a_call_meant_for_one_replica_is_never_copied_moved_or_retried_elsewhere(way):
    a, b, new = Replica("a"), Replica("b"), Replica("new")
    settings = {"trial": {"copy_methods": ["*"]}, "balance": {"resume": "had"}}
    async with serving(a, b, new, **settings) as serve:
        serve.take(table(a=1.0, b=0.0, new=(0.0, 1.0, 1.0), reference_s=0.1))
        results = []
        for stream in (False, True):
            labels = metadata(stream=stream)
            if way == "broadcast":
                results += await serve.broadcast(labels, 1)
            else:
                async with serve.choose_replica(labels) as selection:
                    assert selection.replica_id == "a"
                    results.append(await serve.dispatch(selection, labels, 1))
        counts = [len(replica.sent) for replica in (a, b, new)]
        assert counts == ([2, 2, 2] if way == "broadcast" else [2, 0, 0])
        results_of_a = a.sent[:]
        readers = [
            asyncio.create_task(anext(result) if result.request.metadata.is_streaming else result.get_async())
            for result in results
        ]
        for version in range(2, 12):
            await asyncio.sleep(1.0)
            serve.take(table(version, a=(1.0, 0.02, 0.0), b=1.0, new=(0.0, 1.0, 1.0), reference_s=0.1))
            await settle()
        assert [len(replica.sent) for replica in (a, b, new)] == counts
        assert not any(result.cancelled for result in results_of_a)
        for result in results:
            result.die()
        outcomes = await asyncio.gather(*readers, return_exceptions=True)
        assert all(isinstance(outcome, ActorDiedError) for outcome in outcomes), "nor does it go on elsewhere"
        assert [len(replica.sent) for replica in (a, b, new)] == counts
        report = serve.report()
        assert (report.rescued, report.mirrored, report.uncopyable) == (0, 0, 0)
        del results, results_of_a, readers, result


# ------------------------------------------------------------------ answers through Serve's proxy


def messages(status):
    start = {"type": "http.response.start", "status": status, "headers": []}
    return pickle.dumps([start, {"type": "http.response.body", "body": b"{}", "more_body": False}])


@pytest.mark.parametrize(
    ("parts", "failed"),
    [
        ([messages(503)], 1),
        ([messages(500)], 1),
        ([messages(200)], 0),
        ([messages(404)], 0),
        ([messages(200), messages(503)], 0),
        ([b"no message at all"], 0),
        ([pickle.dumps({"status": 503})], 0),
        ([pickle.dumps([{"type": "http.response.body", "status": 503}])], 0),
        ([messages(200).ljust(2_000_000, b"x")], 0),
        ([], 0),
    ],
    ids=["503", "500", "200", "404", "later 503", "bytes", "no list", "no start", "large", "empty"],
)
@in_virtual_time
async def test_an_answer_through_the_proxy_fails_by_its_status(parts, failed):
    async with serving(Replica("a")) as serve:
        serve.take(table(a=1.0))
        result = await serve.send(1, http=True)
        result.give(*parts).end()
        assert [part async for part in _read(result)] == parts
        await settle()
        view = views(serve)["a"]
        assert (view.started, view.finished, view.failed, view.in_flight) == (1, 1, failed, 0)
        assert [outcome.ok for outcome in view.outcomes] == [not failed]


async def _read(result):
    while True:
        try:
            yield await anext(result)
        except StopAsyncIteration:
            return


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": ["a"]}, "config = ['a']"),
        ({"config": 7}, "config = 7"),
        ({"config": {"trial": {"copy_methods": 5}}}, "trial.copy_methods = 5"),
        ({"config": {"trial": {"mirror_fraction": 7, "copy_methods": ["*"]}}}, "trial.mirror_fraction = 7"),
        ({"config": {"trial": 3}}, "trial = 3"),
        ({"unknown": 1}, "unknown = 1"),
        ({"config": None}, None),
        ({}, None),
    ],
)
@in_virtual_time
async def test_a_wrong_setting_leaves_the_defaults_in_force(given, said):
    with Log() as log:
        async with serving(Replica("a"), Replica("new"), router_kwargs=given) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            assert await ask(serve) == "a"
            assert serve.report().uncopyable == 1, "by default no method is safe to copy"
    if said is None:
        assert log.lines() == []
    else:
        (line,) = log.lines()
        assert said in line
        assert log.records[-1].levelno == logging.ERROR or len(log.lines(logging.ERROR)) == 1


@pytest.mark.parametrize("has_config", [True, False])
@in_virtual_time
async def test_retired_settings_are_left_out_and_the_others_taken(has_config):
    sections = {"balance": {"choices": 4.0}, "trial": {"copy_methods": ["*"]}}
    new = Replica("new")
    with Log() as log:
        given = {"config": sections} if has_config else sections
        async with serving(Replica("a"), new, router_kwargs=given) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            assert await ask(serve) == "a"
            end(new.copies)
            assert serve.report().mirrored == 1
    (line,) = log.lines()
    assert "balance.choices" in line
    assert log.lines(logging.ERROR) == []


@in_virtual_time
async def test_newer_settings_are_gone_by_at_once_and_calls_under_way_go_on():
    a, b, new = Replica("a"), Replica("b"), Replica("new")
    settings = {"trial": {"copy_methods": ["*"]}}
    async with serving(a, b, new, **settings) as serve:
        router = serve.router
        serve.take(table(a=1.0, b=0.0, new=(0.0, 1.0, 1.0)))
        held = await hold(serve, 2)
        await settle()
        assert len(new.copies) == 2
        before = in_flight(serve)
        assert before == {"a": 2, "b": 0, "new": 0}
        router.use_settings(True, settings)
        assert router.level == "observing"
        assert in_flight(serve) == before
        assert router.choose_at_once(request()) is None
        assert {await ask(serve) for _ in range(60)} >= {"b", "new"}, "as Serve does, whatever the table says"
        assert len(new.copies) == 2, "an observer copies nothing"
        await asyncio.sleep(0.05)
        assert in_flight(serve) == before
        router.use_settings(False, settings)
        assert router.level == "table"
        assert {await ask(serve) for _ in range(20)} == {"a"}
        await asyncio.sleep(0.05)
        assert in_flight(serve) == before
        end([*held, *new.copies])
        await settle()
        report = serve.report()
        assert sum(view.started for view in report.replicas) == 82
        assert sum(view.finished for view in report.replicas) == 82
        assert set(in_flight(serve).values()) == {0}


@pytest.mark.parametrize("wrong", [{"trial": {"copy_methods": 5}}, ["a"], 7, {"unknown": {}}])
@in_virtual_time
async def test_a_wrong_newer_setting_leaves_what_was_in_force(wrong):
    new = Replica("new")
    with Log() as log:
        async with serving(Replica("a"), new, trial={"copy_methods": ["*"]}) as serve:
            serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
            for _ in range(3):  # it comes with every table
                serve.router.use_settings(False, wrong)
                assert await ask(serve) == "a"
            assert len(new.copies) == 3, "still copied"
            end(new.copies)
            assert len(log.lines()) == 1
            serve.router.use_settings(False, {})
            await ask(serve)
            assert len(new.copies) == 3, "a right one is taken"
    assert len(log.lines()) == 1


# ------------------------------------------------------------------ observing


@in_virtual_time
async def test_an_observing_router_routes_as_serve_does_and_copies_nothing():
    async with serving(*replicas("abc"), kind=ObservingRouter, trial={"copy_methods": ["infer"]}) as serve:
        serve.take(table(a=(1.0, 0.1, 0.0), b=1.0, c=(0.0, 1.0, 0.5)))  # a is slow, c on trial
        seen = set()
        for _ in range(60):
            (rank,) = await offered(serve)
            assert len(rank) == 2, "two random ones, whatever the table says"
            seen |= set(rank)
        assert seen == {"a", "b", "c"}
        assert {await ask(serve) for _ in range(60)} == {"a", "b", "c"}
        assert all(replica.copies == [] for replica in serve.replicas.values())
        report = serve.report()
        assert report.level == "observing"
        assert sum(view.finished for view in report.replicas) == 60
        assert report.observed.requests == 60
        assert serve.report().observed.requests == 0


@pytest.mark.parametrize(("name", "times"), [("a", 10.0), ("b", 1.0), ("c", 1.0)])
@in_virtual_time
async def test_an_observing_router_tells_what_would_have_been_gained(name, times):
    """As it was just before the choice: two idle replicas are alike, a third one takes ten times as long."""
    async with serving(*replicas("abc"), kind=ObservingRouter) as serve:
        serve.take(table(a=(1.0, 0.1, 0.0), b=1.0, c=1.0))
        while await ask(serve) != name:
            serve.report()
        report = serve.report()
        assert report.observed.requests == 1
        assert report.observed.time_taken == pytest.approx(times * report.observed.time_ours)
        (outcome,) = [each for view in report.replicas for each in view.outcomes]
        assert outcome.predicted == pytest.approx(times * outcome.predicted_ours)
        assert not outcome.refused


@in_virtual_time
async def test_an_observing_router_tells_which_requests_it_would_have_kept_from_their_replica():
    async with serving(*replicas("ab"), kind=ObservingRouter) as serve:
        serve.take(table(a=(1.0, 1.0, 0.0), b=(0.0, 1.0, 0.0)))
        refused = {}
        for _ in range(30):
            name = await ask(serve)
            (outcome,) = [each for view in serve.report().replicas for each in view.outcomes]
            refused[name] = outcome.refused
        assert refused == {"a": False, "b": True}


@in_virtual_time
async def test_a_router_that_does_not_observe_predicts_nothing_in_its_outcomes():
    async with serving(*replicas("ab")) as serve:
        serve.take(table(a=1.0, b=1.0))
        await ask(serve)
        (outcome,) = [each for view in serve.report().replicas for each in view.outcomes]
        assert (outcome.predicted, outcome.predicted_ours, outcome.refused) == (0.0, 0.0, False)
