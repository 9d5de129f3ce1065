"""The router as a plain object: tables, fall-backs, counts that return to zero, copies."""

import asyncio
import gc
import math
import time
import weakref
from collections import Counter
from dataclasses import replace

import pytest
from ray.exceptions import TaskCancelledError
from ray.serve._private.common import RequestProtocol

from serve_app.router import ObservingRouter
from shadecast.types import RoutingTable, State, TableRow
from tests.serve_app.routing.router_fakes import FakeReplica, FakeResult, make_router, request, table


def run(coroutine):
    return asyncio.run(coroutine)


async def choose(router, pending=None):
    return await router.choose_replicas(router._replicas_list, pending or request())


async def send(router, name="r", others=0, method="infer"):
    """Choose and have the choice accept; its result."""
    pending = request(name, method)
    ranks = await choose(router, pending)
    replica = ranks[0][0]
    result = FakeResult(others=others)
    router.on_send_request(replica.replica_id)
    router.on_new_queue_len_info(replica.replica_id, others + 1)
    router.on_request_routed(pending, replica.replica_id, result)
    return replica, result


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_without_a_table_two_replicas_are_offered_as_serve_does():
    async def scenario():
        router = make_router(FakeReplica("a"), FakeReplica("b"), FakeReplica("c"))
        assert router.level == "power_of_two"
        offered = Counter()
        for _ in range(200):
            (rank,) = await choose(router)
            assert len({r.name for r in rank}) == 2
            offered.update(r.name for r in rank)
        assert set(offered) == {"a", "b", "c"}

    run(scenario())


def test_without_a_table_a_replica_of_unknown_queue_does_not_wait_for_ever_beside_a_known_one():
    async def scenario():
        known, unknown = FakeReplica("known"), FakeReplica("unknown")
        router = make_router(known, unknown)
        await settle()
        router._replica_queue_len_cache.invalidate_key(unknown.replica_id)
        router.on_new_queue_len_info(known.replica_id, 0)
        first, second = await choose(router)
        assert [r.name for r in first] == ["unknown"]
        assert {r.name for r in second} == {"known", "unknown"}

    run(scenario())


def test_a_table_decides_who_is_eligible():
    async def scenario():
        router = make_router(*(FakeReplica(n, max_ongoing_requests=100) for n in ("a", "b", "new")))
        router.take_table(table(a=1.0, b=1.0, new=0.0))
        assert router.level == "table"
        for i in range(100):
            for rank in await choose(router, request(str(i))):
                assert {r.name for r in rank} <= {"a", "b"}

    run(scenario())


def test_an_older_table_or_one_of_a_former_coordinator_is_ignored():
    async def scenario():
        router = make_router(FakeReplica("a"), FakeReplica("b"))
        router.take_table(table(version=5, epoch=2, a=1.0, b=0.0))
        router.take_table(table(version=4, epoch=2, a=0.0, b=1.0))
        router.take_table(table(version=9, epoch=1, a=0.0, b=1.0))
        assert (await choose(router))[0][0].name == "a"
        router.take_table(table(version=1, epoch=3, a=0.0, b=1.0))
        assert (await choose(router))[0][0].name == "b"

    run(scenario())


@pytest.mark.parametrize(("age_s", "level"), [(0.0, "table"), (4.0, "stale_table"), (30.0, "power_of_two")])
def test_an_ageing_table_loses_its_say_step_by_step(age_s, level):
    async def scenario():
        router = make_router(*(FakeReplica(n, max_ongoing_requests=200) for n in ("a", "b", "bad")))
        router.take_table(table(age_s=age_s, a=1.0, b=1.0, bad=0.0))
        assert router.level == level
        for i in range(50):  # what it kept out stays out for a while
            for rank in await choose(router, request(str(i))):
                assert "bad" not in {r.name for r in rank}
        router._table_s -= 100.0
        offered = set()
        for i in range(100):
            offered |= {r.name for rank in await choose(router, request(f"x{i}")) for r in rank}
        assert offered == {"a", "b", "bad"}

    run(scenario())


def test_a_replica_set_that_the_table_does_not_know_is_used():
    async def scenario():
        router = make_router(FakeReplica("a"))
        router.take_table(table(a=1.0))
        router.update_replicas([FakeReplica(n, max_ongoing_requests=50) for n in "xy"])
        offered = {(await choose(router, request(str(i))))[0][0].name for i in range(50)}
        assert offered == {"x", "y"}

    run(scenario())


def test_a_dead_replica_is_out_at_once():
    async def scenario():
        a = FakeReplica("a")
        router = make_router(a, FakeReplica("b", max_ongoing_requests=20))
        router.take_table(table(a=1.0, b=1.0))
        router.on_replica_actor_died(a.replica_id)
        for i in range(20):
            assert (await choose(router, request(str(i))))[0][0].name == "b"

    run(scenario())


def test_every_choice_asks_for_backoff():
    async def scenario():
        router = make_router(FakeReplica("a"))
        pending = request()
        await choose(router, pending)
        assert pending.routing_context.should_backoff

    run(scenario())


def test_an_outcome_is_counted_once_with_its_error():
    async def scenario():
        router = make_router(FakeReplica("a"))
        router.take_table(table(a=1.0))
        for i in range(3):
            _, result = await send(router, f"r{i}", others=2)
            result.end(None if i else ValueError("user code"))
            router.on_request_completed(router._replicas_list[0].replica_id, f"r{i}")
            result.end()
            await settle()
        view = router.make_report().replicas[0]
        assert (view.started, view.finished, view.failed, view.in_flight) == (3, 3, 1, 0)
        assert {o.in_flight_at_start for o in view.outcomes} == {2.0}
        assert router._picks.in_flight == [0]

    run(scenario())


def test_a_cancelled_request_is_no_failure():
    async def scenario():
        router = make_router(FakeReplica("a"))
        router.take_table(table(a=1.0))
        _, result = await send(router)
        result.end(TaskCancelledError())
        await settle()
        view = router.make_report().replicas[0]
        assert (view.finished, view.failed, view.in_flight) == (0, 0, 0)

    run(scenario())


def test_counts_return_to_zero_after_rejections_failed_sends_and_cancelled_choices():
    async def scenario():
        a, b = FakeReplica("a"), FakeReplica("b")
        router = make_router(a, b)
        router.take_table(table(a=1.0, b=1.0))
        rejected = request("rejected")
        for _ in range(3):
            replica = (await choose(router, rejected))[0][0]
            router.on_send_request(replica.replica_id)
            router.on_request_completed(replica.replica_id, "rejected")
        failed = request("failed")
        replica = (await choose(router, failed))[0][0]
        router.on_request_completed(replica.replica_id, "failed")
        given_up = request("given up")
        await choose(router, given_up)
        given_up.future.cancel()
        ended = [await send(router, f"r{i}") for i in range(10)]
        router.update_replicas([b])
        for _, result in ended:
            result.end()
        await settle()
        router.make_report()
        assert router._picks.in_flight == [0]
        assert router._sending == {}
        assert router._ledger.all_in_flight() == {}

    run(scenario())


def test_calls_that_share_serves_request_id_are_told_apart():
    """All handle calls that one request of a composition makes carry the same internal id in Ray 2.60."""

    async def scenario():
        new = FakeReplica("new")
        router = make_router(FakeReplica("a"), FakeReplica("b"), new, trial={"copy_methods": ["*"]})
        router.take_table(table(a=1.0, b=1.0, new=(0.0, 1.0, 1.0)))
        pendings = [request("same") for _ in range(3)]
        chosen = [(await choose(router, pending))[0][0] for pending in pendings]
        results = [FakeResult() for _ in pendings]
        for pending, replica, result in zip(pendings, chosen, results, strict=True):
            router.on_request_routed(pending, replica.replica_id, result)
        await settle()
        assert sum(router._ledger.all_in_flight().values()) == 3
        for copy in new.results:
            copy.end()
        for replica, result in zip(chosen, results, strict=True):
            result.end()
            router.on_request_completed(replica.replica_id, "same")
        await settle()
        report = router.make_report()
        assert sum(r.finished for r in report.replicas) == 3
        assert len(report.pairs) == 3
        assert router._picks.in_flight == [0, 0, 0]
        assert router._sending == {}

    run(scenario())


def test_own_choices_spread_before_any_table_says_so():
    async def scenario():
        router = make_router(*(FakeReplica(n, max_ongoing_requests=20) for n in "abcd"))
        router.take_table(table(a=1.0, b=1.0, c=1.0, d=1.0))
        chosen = Counter()
        for i in range(40):
            pending = request(f"r{i}")
            replica = (await choose(router, pending))[0][0]
            router.on_new_queue_len_info(replica.replica_id, chosen[replica.name] + 1)
            router.on_request_routed(pending, replica.replica_id, FakeResult())
            chosen[replica.name] += 1
        assert min(chosen.values()) >= 8, "equal but for ties, which fall at random within a tenth"

    run(scenario())


def test_copies_go_to_the_replica_on_trial_and_become_pairs():
    async def scenario():
        new = FakeReplica("new")
        router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["infer"]})
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        replica, result = await send(router, others=1)
        assert replica.name == "a"
        await settle()
        (copy,) = new.sent
        assert copy.metadata.request_id == "r-shadow"
        assert copy.metadata.internal_request_id.startswith("r/")
        assert copy.metadata.internal_request_id.endswith("-shadow")
        assert copy.args == [1]
        new.results[0].end()
        await settle()
        result.end()
        await settle()
        report = router.make_report()
        (pair,) = report.pairs
        assert (pair.candidate_id, pair.primary_id) == ("new", "a")
        assert (pair.primary_in_flight, pair.shadow_in_flight) == (1.0, 0.0)
        assert pair.primary_ok
        assert pair.shadow_ok
        assert report.mirrored == 1
        new_view = next(r for r in report.replicas if r.replica_id == "new")
        assert new_view.started == 0, "a copy is not a live request"

    run(scenario())


@pytest.mark.parametrize("how", ["raises", "breaks", "fails"])
def test_whatever_a_copy_does_the_primary_goes_on(how):
    async def scenario():
        new = FakeReplica("new")
        if how == "raises":
            new.make = lambda: RuntimeError("cannot be sent")
        elif how == "breaks":
            new.make = lambda: FakeResult(broken=RuntimeError("gone"))
        router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["*"]})
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        _, result = await send(router)
        await settle()
        if how == "fails":
            new.results[0].end(ValueError("no"))
        result.end()
        await settle()
        report = router.make_report()
        view = next(r for r in report.replicas if r.replica_id == "a")
        assert (view.finished, view.failed) == (1, 0)
        assert [(p.primary_ok, p.shadow_ok) for p in report.pairs] == [(True, False)]
        assert router._mirror.under_way == 0

    run(scenario())


def test_a_hung_replica_holds_no_more_than_its_cap_of_copies_and_drops_are_counted():
    async def scenario():
        new = FakeReplica("new")
        router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["*"], "mirror_concurrency": 3})
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        for i in range(20):
            _, result = await send(router, f"r{i}")
            await settle()
            result.end()
        await settle()
        report = router.make_report()
        assert len(new.sent) == 3
        assert (report.mirrored, report.mirror_dropped) == (3, 17)
        view = next(r for r in report.replicas if r.replica_id == "a")
        assert (view.finished, view.failed) == (20, 0)

    run(scenario())


def test_a_copy_past_its_deadline_is_cancelled_and_counts_against_the_candidate():
    async def scenario():
        new = FakeReplica("new")
        router = make_router(FakeReplica("a"), new, trial={"copy_methods": ["*"], "mirror_deadline_s": 0.1})
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        _, result = await send(router)
        result.end()
        async with asyncio.timeout(5):
            await settle()
            await asyncio.gather(*router._mirror._tasks)
        (pair,) = router.make_report().pairs
        assert not pair.shadow_ok
        assert pair.shadow_s > 0.05, "counted from its acceptance, the deadline from a moment before"
        assert new.results[0].cancelled

    run(scenario())


@pytest.mark.parametrize(
    ("method", "declared", "metadata"),
    [
        ("buy", ["infer"], {}),
        ("infer", [], {}),
        ("__call__", ["*"], {"_request_protocol": "HTTP"}),
    ],
)
def test_what_is_not_safe_to_copy_is_not_copied_but_counted(method, declared, metadata):
    async def scenario():
        new = FakeReplica("new")
        router = make_router(FakeReplica("a"), new, trial={"copy_methods": declared})
        router.take_table(table(a=1.0, new=(0.0, 1.0, 1.0)))
        protocol = {"_request_protocol": RequestProtocol.HTTP} if metadata else {}
        pending = request("r", method, **protocol)
        replica = (await choose(router, pending))[0][0]
        router.on_request_routed(pending, replica.replica_id, FakeResult())
        await settle()
        assert new.sent == []
        assert router.make_report().uncopyable == 1

    run(scenario())


def test_a_wrong_setting_leaves_the_defaults_in_force(caplog):
    async def scenario():
        router = make_router(FakeReplica("a"), trial={"mirror_fraction": 7})
        assert router._config.trial.mirror_fraction == 0.1
        assert (await choose(router))[0][0].name == "a"

    run(scenario())


def test_a_preference_for_the_own_node_is_kept_among_eligible_replicas():
    async def scenario():
        near = FakeReplica("near", max_ongoing_requests=20)
        router = make_router(FakeReplica("far", node_id="other"), near, FakeReplica("new"))
        router._prefer_local_node_routing = True
        router.take_table(table(far=1.0, near=1.0, new=0.0))
        assert {(await choose(router, request(str(i))))[0][0].name for i in range(20)} == {"near"}

    run(scenario())


def test_a_multiplexed_model_goes_where_it_is_loaded():
    async def scenario():
        b = FakeReplica("b", multiplexed_model_ids={"m"}, max_ongoing_requests=20)
        router = make_router(FakeReplica("a"), b, FakeReplica("c"))
        router.take_table(table(a=1.0, b=1.0, c=1.0))
        for i in range(20):
            assert (await choose(router, request(str(i), multiplexed_model_id="m")))[0][0].name == "b"

    run(scenario())


def test_sessions_stay_on_their_replica_and_all_routers_agree():
    async def scenario():
        names = "abcd"
        routers = [make_router(*(FakeReplica(n) for n in order)) for order in (names, names[::-1])]
        for router in routers:
            router.take_table(table(**dict.fromkeys(names, 1.0)))
        homes = {}
        for i in range(200):
            session = f"s{i % 40}"
            router = routers[i % 2]
            chosen = (await choose(router, request(f"r{i}", session_id=session)))[0][0].name
            assert homes.setdefault(session, chosen) == chosen
        assert len(set(homes.values())) == 4

    run(scenario())


def test_a_session_never_waits_for_a_full_replica_whose_pace_is_not_known():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "ab"))
        router.take_table(table(a=1.0, b=1.0))
        pending = request("r", session_id="s")
        home = (await choose(router, pending))[0][0]
        router.on_new_queue_len_info(home.replica_id, 8)
        second_try = await choose(router, pending)
        assert {r.name for rank in second_try for r in rank} == {"a", "b"}

    run(scenario())


def test_a_session_waits_for_its_full_replica_as_long_as_a_move_would_cost():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "ab"), session={"migration_cost": 0.5})
        router.take_table(replace(table(a=1.0, b=1.0), reference_s=0.4))
        pending = request("r", session_id="s")
        home = (await choose(router, pending))[0][0]
        await settle()
        router.on_new_queue_len_info(home.replica_id, 8)
        started_s = time.monotonic()
        assert await choose(router, pending) == [[home]], "asked again, after a pause"
        assert time.monotonic() - started_s >= 0.05
        router.on_new_queue_len_info(home.replica_id, 7)
        assert await choose(router, pending) == [[home]], "it has room"
        router.on_new_queue_len_info(home.replica_id, 8)
        tries = 0
        while await choose(router, pending) == [[home]]:
            tries += 1
        assert 1 <= tries <= 4
        assert 0.2 <= time.time() - pending.created_at < 0.4
        assert (await choose(router, request("q", session_id="s")))[0] == [home], "the session has not moved"

    run(scenario())


def test_a_session_makes_a_detour_around_a_replica_that_has_collapsed():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "abcd"))
        router.take_table(table(1, **dict.fromkeys("abcd", 1.0)))
        home = (await choose(router, request("r", session_id="s")))[0][0].name
        rows = {name: (1.0, 0.02 if name == home else 1.0, 0.0) for name in "abcd"}
        router.take_table(table(2, **rows))
        around = {(await choose(router, request(f"q{i}", session_id="s")))[0][0].name for i in range(5)}
        assert len(around) == 1
        assert around != {home}
        router.take_table(table(3, **dict.fromkeys("abcd", 1.0)))
        assert (await choose(router, request("t", session_id="s")))[0][0].name == home

    run(scenario())


def test_a_session_makes_a_detour_around_a_replica_that_does_not_accept():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "abcd"))
        router.take_table(table(1, **dict.fromkeys("abcd", 1.0)))
        home = (await choose(router, request("r", session_id="s")))[0][0].name
        router._shun(router._picks.index[home], time.monotonic())
        around = {(await choose(router, request(f"q{i}", session_id="s")))[0][0].name for i in range(5)}
        assert len(around) == 1
        assert around != {home}

    run(scenario())


def test_requests_that_wait_for_their_sessions_replica_leave_room_for_others_to_be_routed():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "ab"))
        router.take_table(replace(table(a=1.0, b=1.0), reference_s=20.0))
        waiting = [request(f"r{i}", session_id="s") for i in range(4)]
        homes = [(await choose(router, pending))[0][0] for pending in waiting]
        await settle()
        router.on_new_queue_len_info(homes[0].replica_id, 8)
        tries = [asyncio.ensure_future(choose(router, pending)) for pending in waiting]
        done, late = await asyncio.wait(tries, timeout=0.05)
        assert (len(done), len(late)) == (2, 2), "Serve routes four at a time with two replicas"
        await asyncio.gather(*late)

    run(scenario())


def test_sessions_are_never_placed_on_a_replica_on_trial_and_leave_one_that_is_gone():
    async def scenario():
        replicas = [FakeReplica(n) for n in ("a", "b", "new")]
        router = make_router(*replicas)
        router.take_table(table(a=1.0, b=1.0, new=0.0))
        homes = {}
        for i in range(50):
            homes[i] = (await choose(router, request(f"r{i}", session_id=f"s{i}")))[0][0].name
        assert set(homes.values()) == {"a", "b"}
        router.update_replicas(replicas[1:])
        for i in range(50):
            assert (await choose(router, request(f"q{i}", session_id=f"s{i}")))[0][0].name == "b"

    run(scenario())


def test_a_session_that_is_to_move_has_requests_copied_to_its_new_replica_first():
    async def scene():
        replicas = {name: FakeReplica(name, max_ongoing_requests=60) for name in "abc"}
        router = make_router(*replicas.values(), trial={"copy_methods": ["infer"], "mirror_fraction": 0.5})
        router.take_table(table(1, a=1.0, b=1.0, c=1.0))
        homes = {s: (await choose(router, request(f"q{s}", session_id=s)))[0][0].name for s in map(str, range(30))}
        session = next(s for s, home in homes.items() if home == "a")
        rows = {name: (1.0, 0.05 if name == "a" else 1.0, 0.0) for name in "abc"}
        router.take_table(table(2, **rows))  # a is far slower than the others: its sessions leave one after the other
        for i in range(12):
            pending = request(f"r{i}", session_id=session)
            await choose(router, pending)
            router.on_request_routed(pending, replicas["a"].replica_id, FakeResult())
            await settle()
        copied = {name: len(replica.sent) for name, replica in replicas.items()}
        assert copied["a"] == 0
        assert sorted(copied[name] > 0 for name in "bc") == [False, True]

    run(scene())


def test_a_router_that_nobody_holds_is_freed():
    async def scenario():
        router = make_router(FakeReplica("a"))
        gone = weakref.ref(router)
        await asyncio.sleep(0.05)
        del router
        gc.collect()
        for _ in range(30):
            if gone() is None:
                return
            await asyncio.sleep(0.1)
            gc.collect()
        raise AssertionError("the control loop keeps the router alive")

    run(scenario())


def test_reports_hold_no_impossible_numbers():
    async def scenario():
        router = make_router(FakeReplica("a"))
        _, result = await send(router)
        result.end()
        await settle()
        (outcome,) = router.make_report().replicas[0].outcomes
        assert math.isfinite(outcome.duration_s)
        assert outcome.duration_s >= 0.0

    run(scenario())


class AwaitedResult(FakeResult):
    """A result that a caller really awaits."""

    def __init__(self, answer=None, **kwargs):
        super().__init__(**kwargs)
        self.answer = answer
        self.done = asyncio.Event()

    async def get_async(self):
        await self.done.wait()
        return self.answer


async def stuck_request(router, collapsed_table, age_s=5.0):
    """A request that waits on replica "a" for long, then the table that shows the collapse."""
    pending = request("stuck")
    a = next(r for r in router._replicas_list if r.name == "a")
    result = AwaitedResult("first")
    router.on_request_routed(pending, a.replica_id, result)
    caller = asyncio.create_task(result.get_async())
    await settle()
    for _ in range(200):
        router._rescue_budget.earn()
    router._ledger.open_on("a")[0][1].started_s -= age_s
    router.take_table(collapsed_table)
    await settle()
    return result, caller


def collapse(version=2, reference_s=0.1, **rows):
    return replace(table(version=version, **rows), reference_s=reference_s)


def test_a_request_stuck_on_a_collapsed_replica_is_answered_by_another_one():
    async def scenario():
        b = FakeReplica("b", make=lambda: AwaitedResult("second"))
        router = make_router(FakeReplica("a"), b, FakeReplica("c", make=b.make), trial={"copy_methods": ["*"]})
        result, caller = await stuck_request(router, collapse(a=(1.0, 0.02, 0.0), b=1.0, c=1.0))
        assert result.cancelled, "the first attempt is cancelled"
        (second,) = [r for replica in router._replicas_list for r in replica.results]
        second.done.set()
        assert await caller == "second"
        result.end(TaskCancelledError())
        second.end()
        await settle()
        report = router.make_report()
        assert report.rescued == 1
        assert sum(r.finished for r in report.replicas) == 1
        assert router._picks.in_flight == [0, 0, 0]
        assert router._rescuable == {}

    run(scenario())


@pytest.mark.parametrize(
    ("settings", "rows", "age_s"),
    [
        ({"trial": {"copy_methods": []}}, {"a": (1.0, 0.02, 0.0), "b": 1.0, "c": 1.0}, 5.0),
        ({"trial": {"copy_methods": ["*"]}}, {"a": (1.0, 0.5, 0.0), "b": 1.0, "c": 1.0}, 5.0),
        ({"trial": {"copy_methods": ["*"]}}, {"a": (1.0, 0.02, 0.0), "b": 1.0, "c": 1.0}, 0.0),
        (
            {"trial": {"copy_methods": ["*"]}, "balance": {"rescue_fraction": 0.0}},
            {"a": (1.0, 0.02, 0.0), "b": 1.0},
            5.0,
        ),
    ],
    ids=["not idempotent", "not collapsed", "young", "switched off"],
)
def test_nothing_else_is_rescued(settings, rows, age_s):
    async def scenario():
        others = [FakeReplica(n) for n in "bc"]
        router = make_router(FakeReplica("a"), *others, **settings)
        result, caller = await stuck_request(router, collapse(**rows), age_s)
        assert [r.sent for r in others] == [[], []]
        result.done.set()
        assert await caller == "first"

    run(scenario())


def test_a_rescue_that_finds_no_place_leaves_the_first_attempt_alone():
    async def scenario():
        full = [FakeReplica(n, make=lambda: AwaitedResult(accepted=False)) for n in "bc"]
        router = make_router(FakeReplica("a"), *full, trial={"copy_methods": ["*"]})
        result, caller = await stuck_request(router, collapse(a=(1.0, 0.02, 0.0), b=1.0, c=1.0))
        assert not result.cancelled
        result.done.set()
        assert await caller == "first"

    run(scenario())


def test_a_caller_that_gives_up_after_a_rescue_is_cancelled_and_so_are_both_attempts():
    async def scenario():
        b = FakeReplica("b", make=lambda: AwaitedResult("second"))
        router = make_router(FakeReplica("a"), b, FakeReplica("c", make=b.make), trial={"copy_methods": ["*"]})
        result, caller = await stuck_request(router, collapse(a=(1.0, 0.02, 0.0), b=1.0, c=1.0))
        (second,) = [r for replica in router._replicas_list for r in replica.results]
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        result.cancel()
        assert second.cancelled

    run(scenario())


def test_rescues_stay_within_their_budget():
    async def scenario():
        replicas = [FakeReplica(n, make=lambda: AwaitedResult("second")) for n in "abc"]
        router = make_router(*replicas, trial={"copy_methods": ["*"]}, balance={"rescue_fraction": 0.01})
        a = next(r for r in router._replicas_list if r.name == "a")
        results, callers = [], []
        for i in range(200):
            results.append(result := AwaitedResult("first"))  # as a caller's response holds it
            router.on_request_routed(request(f"r{i}"), a.replica_id, result)
            callers.append(asyncio.create_task(result.get_async()))
        await settle()
        for _, entry in router._ledger.open_on("a"):
            entry.started_s -= 5.0
        for version in range(2, 12):
            router.take_table(collapse(version, a=(1.0, 0.02, 0.0), b=1.0, c=1.0))
            await settle()
        assert router.make_report().rescued == 8, "what may be saved up, with 200 requests stuck"
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    run(scenario())


def test_calls_that_share_serves_request_id_all_get_a_replica():
    async def scenario():
        router = make_router(FakeReplica("a"), FakeReplica("b"))
        router.take_table(table(a=1.0, b=1.0))
        calls = [request("same") for _ in range(6)]
        async with asyncio.timeout(10):
            replicas = await asyncio.gather(*(router._choose_replica_for_request(call) for call in calls))
        assert {r.name for r in replicas} <= {"a", "b"}
        assert router._pending_calls == {}

    run(scenario())


def test_a_call_that_is_given_up_while_it_waits_leaves_nothing():
    async def scenario():
        router = make_router()
        waiting = asyncio.create_task(router._choose_replica_for_request(request("early")))
        await settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert router._pending_calls == {}

    run(scenario())


def test_a_request_that_found_its_replicas_full_is_offered_the_others():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "abcdef"))
        router.take_table(table(**{n: (1.0, 9.0 if n in "ab" else 1.0, 0.0) for n in "abcdef"}))
        pending = request("r")
        first, second = await choose(router, pending)
        assert first[0].name != second[0].name
        offered = set()
        for _ in range(20):
            offered |= {r.name for rank in await choose(router, pending) for r in rank}
        assert offered == set("abcdef")
        router.on_request_completed(first[0].replica_id, "r")
        assert sum(router._picks.in_flight) == 0

    run(scenario())


def test_a_stale_table_is_read_without_its_forecast():
    async def scenario():
        router = make_router(FakeReplica("a"), FakeReplica("b"))
        rows = tuple(
            TableRow(name, "node", State.ACTIVE, 1.0, capacity, 0.0, live_capacity=live)
            for name, capacity, live in (("a", 1.0, 0.1), ("b", 0.1, 1.0))
        )
        router.take_table(RoutingTable("app/model", 1, 1, 1, rows))
        assert (await choose(router, request("fresh")))[0][0].name == "a"
        router._table_s -= 4.0
        assert router.level == "stale_table"
        assert (await choose(router, request("stale")))[0][0].name == "b"

    run(scenario())


def test_a_session_waits_once_for_a_replica_that_is_slow_to_tell_its_queue():
    async def scenario():
        router = make_router(*(FakeReplica(n) for n in "ab"))
        router.take_table(table(a=1.0, b=1.0))
        pending, luckier = request("r", session_id="s"), request("l", session_id="s")
        home = (await choose(router, pending))[0][0]
        assert (await choose(router, pending))[0][0] is home
        assert (await choose(router, luckier))[0][0] is home
        (third_try,) = await choose(router, pending)
        assert {r.name for r in third_try} == {"a", "b"}
        router.on_new_queue_len_info(home.replica_id, 0)
        assert (await choose(router, luckier))[0][0] is home
        router.on_request_completed(home.replica_id, "l")
        router.on_request_completed(home.replica_id, "r")
        assert sum(router._picks.in_flight) == 0

    run(scenario())


def test_sessions_placed_before_the_first_table_move_to_where_all_routers_place_them():
    async def scenario():
        early, late = (make_router(*(FakeReplica(n) for n in "ab")) for _ in range(2))
        sessions = [f"s{i}" for i in range(60)]
        for router in (early, late):
            if router is early:
                for s in sessions:
                    await choose(router, request(f"e{s}", session_id=s))
            router.take_table(table(a=(1.0, 4.0, 0.0), b=(1.0, 1.0, 0.0)))
        for s in sessions:
            homes = {(await choose(r, request(s, session_id=s)))[0][0].name for r in (early, late)}
            assert len(homes) == 1

    run(scenario())


def test_a_call_given_up_just_when_it_was_chosen_for_leaves_no_count():
    async def scenario():
        router = make_router(FakeReplica("a"))
        router.take_table(table(a=1.0))
        pending = request("r")
        choosing = asyncio.create_task(router._choose_replica_for_request(pending))
        pending.future.add_done_callback(lambda _: choosing.cancel())  # chosen, not yet sent
        await asyncio.gather(choosing, return_exceptions=True)
        assert choosing.cancelled()
        assert (router._sending, router._unsent, sum(router._picks.in_flight)) == ({}, {}, 0)

    run(scenario())


def test_an_observing_router_routes_as_serve_does_and_tells_what_would_have_been_gained():
    async def scenario():
        replicas = {name: FakeReplica(name) for name in "abc"}
        router = make_router(*replicas.values(), kind=ObservingRouter, trial={"copy_methods": ["infer"]})
        router.take_table(table(1, a=(1.0, 0.1, 0.0), b=1.0, c=(0.0, 1.0, 0.5)))  # a is slow, c on trial
        offered = set()
        for i in range(60):
            (ranks,) = await choose(router, request(f"r{i}"))
            assert len(ranks) == 2, "two random ones, whatever the table says"
            offered |= {replica.name for replica in ranks}
        assert offered == {"a", "b", "c"}
        pending, result = request("slow"), FakeResult()
        router.on_request_routed(pending, replicas["a"].replica_id, result)
        result.end()
        await settle()
        assert all(replica.sent == [] for replica in replicas.values()), "nothing is copied"
        report = router.make_report()
        assert report.level == "observing"
        assert report.observed.requests == 1
        assert report.observed.time_ours == pytest.approx(0.1 * report.observed.time_taken)
        assert router.make_report().observed.requests == 0
        assert [view.finished for view in report.replicas] == [1, 0, 0]

    run(scenario())


async def at_once(*replicas, rows=None, **config):
    router = make_router(*replicas, **config)
    router.take_table(rows or table(**dict.fromkeys((r.name for r in replicas), 1.0)))
    await settle()  # the queues of new replicas are asked for
    return router


def test_a_usual_choice_needs_no_task_of_serves_and_is_accounted_for():
    async def scenario():
        router = await at_once(*(FakeReplica(n, max_ongoing_requests=20) for n in "abcd"))
        chosen = Counter()
        for i in range(40):
            pending = request(f"r{i}")
            choosing = router._choose_replica_for_request(pending)
            with pytest.raises(StopIteration) as done:
                choosing.send(None)  # comes to its end without waiting for anything
            replica = done.value.value
            assert pending.routing_context.should_backoff, "if it is refused, several are offered"
            router.on_send_request(replica.replica_id)
            router.on_new_queue_len_info(replica.replica_id, chosen[replica.name] % 5 + 1)
            router.on_request_routed(pending, replica.replica_id, FakeResult())
            chosen[replica.name] += 1
        assert set(chosen) == set("abcd")
        assert sum(router._picks.in_flight) == 40
        assert (router._sending, router._pending_calls) == ({}, {})
        assert router._routing_tasks == set()

    run(scenario())


@pytest.mark.parametrize("why", ["unknown queue", "full", "another one waits", "backing off"])
def test_where_there_is_something_to_compare_or_to_wait_for_serve_chooses(why):
    async def scenario():
        a, b = FakeReplica("a"), FakeReplica("b")
        router = await at_once(a, b)
        match why:
            case "unknown queue":
                for each in (a, b):
                    router._replica_queue_len_cache.invalidate_key(each.replica_id)
            case "full":
                for each in (a, b):
                    router.on_new_queue_len_info(each.replica_id, 8)
            case "another one waits":
                router._pending_requests_to_route.append(request("earlier"))
            case "backing off":
                router.num_routing_tasks_in_backoff = 1
        assert router._choose_at_once(request()) is None
        assert router._sending == {}
        assert sum(router._picks.in_flight) == 0

    run(scenario())


def test_a_replica_whose_queue_is_unknown_keeps_its_turn():
    """Else every request would be Serve's to place, by the turn after, and the replica would never be asked."""

    async def scenario():
        a, b = FakeReplica("a"), FakeReplica("b")
        router = await at_once(a, b)
        router._picks.turn = router._picks.index["a"]
        router._replica_queue_len_cache.invalidate_key(a.replica_id)
        assert router._choose_at_once(request("r")) is None
        assert (await choose(router, request("r")))[0] == [a]

    run(scenario())


@pytest.mark.parametrize("way", ["no table", "multiplexed", "observing"])
def test_serves_own_preferences_go_serves_way(way):
    async def scenario():
        kind = {"kind": ObservingRouter} if way == "observing" else {}
        router = make_router(*(FakeReplica(n) for n in "ab"), **kind)
        if way != "no table":
            router.take_table(table(a=1.0, b=1.0))
        await settle()
        pending = request(multiplexed_model_id="m") if way == "multiplexed" else request()
        assert router._choose_at_once(pending) is None
        async with asyncio.timeout(5):
            assert (await router._choose_replica_for_request(request("r"))).name in "ab"

    run(scenario())


@pytest.mark.parametrize("prefers", ["node", "zone"])
def test_a_near_replica_is_chosen_at_once_and_the_next_one_if_it_is_full(prefers):
    async def scenario():
        near = FakeReplica("near", availability_zone="here")
        router = make_router(near, *(FakeReplica(n, node_id="other", availability_zone="there") for n in "ab"))
        router._prefer_local_node_routing, router._prefer_local_az_routing = prefers == "node", prefers == "zone"
        router._self_availability_zone = "here"
        router.take_table(table(near=1.0, a=1.0, b=1.0))
        await settle()
        for i in range(8):
            assert router._choose_at_once(request(f"r{i}")) is near
        router.on_new_queue_len_info(near.replica_id, 8)
        near.queue_len = 8
        late = request("late")
        assert router._choose_at_once(late) is None
        async with asyncio.timeout(5):
            assert (await router._choose_replica_for_request(late)).name in "ab"

    run(scenario())


def test_a_preference_that_nothing_meets_costs_nothing():
    """Serve's default prefers the own zone, which most clusters do not know."""

    async def scenario():
        router = await at_once(*(FakeReplica(n) for n in "ab"))
        router._prefer_local_az_routing = True
        router.take_table(table(2, a=1.0, b=1.0))
        assert not router._has_near
        assert router._choose_at_once(request("r")) is not None

    run(scenario())


def test_a_session_is_at_home_at_once_and_waits_there_if_it_is_full():
    async def scenario():
        replicas = [FakeReplica(n) for n in "abcd"]
        rows = replace(table(**dict.fromkeys("abcd", 1.0)), reference_s=20.0)
        router = await at_once(*replicas, rows=rows)
        early = request("early", session_id="s")
        home = (await choose(router, early))[0][0]
        router.use_secret(None)
        for i in range(5):
            assert router._choose_at_once(request(f"r{i}", session_id="s")) is home
        home.queue_len = 8
        router.on_new_queue_len_info(home.replica_id, 8)
        late = request("late", session_id="s")
        assert router._choose_at_once(late) is None
        waiting = asyncio.create_task(router._choose_replica_for_request(late))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        home.queue_len = 3
        router.on_new_queue_len_info(home.replica_id, 3)
        async with asyncio.timeout(5):
            assert (await waiting).name == home.name

    run(scenario())


def test_a_request_that_was_refused_is_offered_several_others():
    async def scenario():
        router = await at_once(*(FakeReplica(n) for n in "abcdef"))
        pending = request("r")
        first = router._choose_at_once(pending)
        router.on_new_queue_len_info(first.replica_id, 8)
        router.on_request_completed(first.replica_id, "r")
        async with asyncio.timeout(5):
            second = await router._choose_replica_for_request(pending, is_retry=True)
        assert second.name != first.name
        router.on_request_completed(second.replica_id, "r")
        assert sum(router._picks.in_flight) == 0

    run(scenario())


async def crowded(*names):
    """A router whose own requests fill all replicas, although these have accepted none: Serve takes them for idle."""
    router = await at_once(*(FakeReplica(n) for n in names))
    sent = [request(f"r{i}") for i in range(8 * len(names))]
    chosen = [router._choose_at_once(pending) for pending in sent]
    assert Counter(r.name for r in chosen) == dict.fromkeys(names, 8)
    return router, list(zip(sent, chosen, strict=True))


def test_where_its_own_requests_fill_all_replicas_the_next_one_waits_until_one_of_them_has_ended():
    async def scenario():
        router, held = await crowded("a", "b")
        late = request("late")
        assert router._choose_at_once(late) is None
        waiting = asyncio.create_task(router._choose_replica_for_request(late))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pending, replica = held[5]
        result = FakeResult()
        router.on_request_routed(pending, replica.replica_id, result)  # accepted: it is still there
        await asyncio.sleep(0.05)
        assert not waiting.done()
        result.end()
        async with asyncio.timeout(0.5):
            assert (await waiting).name == replica.name
        assert not router._waiting

    run(scenario())


def test_those_that_wait_for_a_place_are_served_in_their_order_and_nobody_overtakes_them():
    async def scenario():
        router, held = await crowded("a", "b")
        order = []

        async def wait(name):
            await router._choose_replica_for_request(request(name))
            order.append(name)

        waiting = [asyncio.create_task(wait(f"w{i}")) for i in range(3)]
        await settle()
        for i, (pending, replica) in enumerate(held[:3]):
            assert router._choose_at_once(request(f"late{i}")) is None
            router.on_request_completed(replica.replica_id, pending.metadata.internal_request_id)
            await settle()
        await asyncio.gather(*waiting)
        assert order == ["w0", "w1", "w2"]

    run(scenario())


def test_a_count_that_is_wrong_delays_a_request_and_never_blocks_it(monkeypatch):
    async def scenario():
        monkeypatch.setattr("serve_app.router._LONGEST_WAIT_FOR_PLACE_S", 0.1)
        router, _ = await crowded("a", "b")
        async with asyncio.timeout(5):
            assert (await router._choose_replica_for_request(request("late"))).name in "ab"

    run(scenario())


def test_one_that_is_cancelled_while_it_waits_for_a_place_passes_its_turn_on():
    async def scenario():
        router, held = await crowded("a", "b")
        first, second = (asyncio.create_task(router._choose_replica_for_request(request(n))) for n in ("w0", "w1"))
        await settle()
        assert len(router._waiting) == 2
        pending, replica = held[0]
        router.on_request_completed(replica.replica_id, pending.metadata.internal_request_id)
        first.cancel()
        async with asyncio.timeout(0.8):
            assert (await second).name == replica.name
        await asyncio.gather(first, return_exceptions=True)
        assert not router._waiting

    run(scenario())


def test_a_new_replica_takes_those_that_wait():
    async def scenario():
        router, held = await crowded("a", "b")
        waiting = asyncio.create_task(router._choose_replica_for_request(request("late")))
        await settle()
        router.update_replicas([*{r.name: r for _, r in held}.values(), FakeReplica("c")])
        router.take_table(table(2, a=1.0, b=1.0, c=1.0))
        async with asyncio.timeout(2):
            assert (await waiting).name == "c"

    run(scenario())


def test_what_a_replica_tells_of_its_queue_is_completed_by_what_is_on_its_way():
    async def scenario():
        router, held = await crowded("a", "b")
        on_a = [pending for pending, replica in held if replica.name == "a"]
        a = next(replica for _, replica in held if replica.name == "a")
        router.on_new_queue_len_info(a.replica_id, 1)
        router.on_request_routed(on_a[0], a.replica_id, FakeResult())  # one accepted, seven on their way
        assert router._told["a"][0] == 8.0

    run(scenario())
