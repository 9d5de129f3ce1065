"""The request path on a real cluster: streams, copies, sessions, composition, full replicas, what may fail; soak."""

import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.schema import ServeDeploySchema

from shadecast.inbox import Inbox
from shadecast.types import RoutingTable, State, TableRow
from tests.cluster.conftest import deployment_status, status, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

APP = Path(__file__).parent / "request_path_app.py"


def deploy(folder, models, **model):
    """(Re)deploy the application with so many models; waits until they run."""
    shutil.copy(APP, folder / "request_path_app.py")
    config = {
        "applications": [
            {
                "name": "path",
                "route_prefix": None,
                "import_path": "request_path_app:app",
                "runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}},
                "deployments": [{"name": "Model", **({"num_replicas": models} if models else {}), **model}],
            }
        ]
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    if models:
        wait_for(lambda: running() == models, 90, f"{models} models run")


def running():
    app = serve.status().applications.get("path")
    if app is None or app.status != "RUNNING":
        assert app is None or app.status != "DEPLOY_FAILED", app.message
        return 0
    return app.deployments["Model"].replica_states.get("RUNNING", 0)


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    deploy(folder, 3)
    return folder


@pytest.fixture
def model(folder):
    handle = serve.get_deployment_handle("Model", "path")
    handle.who.remote().result(timeout_s=30)
    wait_for(lambda: len(replicas_of(handle)) >= 2, 20, "the router knows the replicas")
    return handle


def router_of(handle):
    return handle._router._asyncio_router.request_router


def on_loop(router, call):
    """Run `call()` where the router runs."""

    async def run():
        return call()

    return asyncio.run_coroutine_threadsafe(run(), router.loop).result(10)


@contextmanager
def table(handle, shares, mirrors=None):
    """Have the driver's router go by this table {replica_id: share}, whatever the coordinator says."""
    router = router_of(handle)
    rows = tuple(
        TableRow(r, "", State.ACTIVE if share else State.SHADOWING, share, 1.0, 0.0, (mirrors or {}).get(r, 0.0))
        for r, share in shares.items()
    )
    take, versions, done = router.take_table, itertools.count(1), threading.Event()

    def renew():
        held = router.table
        take(RoutingTable("path/Model", held.epoch if held is not None else 1, 10**9 + next(versions), 1, rows))

    def keep():
        while not done.wait(1.0):
            on_loop(router, renew)

    def release():
        router.calls.routes.table = None
        router.calls.routes.lay_out()
        del router.take_table

    router.take_table = lambda _: None
    on_loop(router, renew)
    keeping = threading.Thread(target=keep)
    keeping.start()
    try:
        yield router
    finally:
        done.set()
        keeping.join()
        on_loop(router, release)


def replicas_of(handle):
    return [r.replica_id.unique_id for r in router_of(handle).calls.routes.replicas]


def set_on(handle, replica, **values):
    with table(handle, {r: float(r == replica) for r in replicas_of(handle)}):
        handle.set.remote(**values).result(timeout_s=30)


def get_on(handle, replica, name):
    with table(handle, {r: float(r == replica) for r in replicas_of(handle)}):
        return handle.get.remote(name).result(timeout_s=30)


def assert_at_rest(router):
    """Nothing in flight in the driver's router and its mirror."""

    def busy():
        held = {
            "calls": router.calls.book.open_calls,
            "copies": router.calls.mirror.under_way,
            "picks": sum(router.calls.routes.picks.in_flight),
        }
        return {name: value for name, value in held.items() if value}

    deadline_s = time.monotonic() + 20
    while (left := on_loop(router, busy)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert left == {}, "the driver's router is at rest"


def assert_idle(handle):
    """Nothing in flight anywhere: driver's router, its mirror, and all routers' reports."""
    assert_at_rest(router_of(handle))
    wait_for(
        lambda: all(r["queue"] == 0 for d in status()["deployments"] for r in d["replicas"]), 15, "all queues are 0"
    )


@contextmanager
def recorded(router):
    """Everything that the router reports meanwhile, as the coordinator reads it; of calls that begin meanwhile."""
    assert_at_rest(router)
    seen, inbox = [], Inbox()
    make = router.make_report

    def keep():
        message = make()
        report, _ = inbox.take(message, 0.0)
        if report is not None:
            seen.append(report)
        return message

    def begin():
        router.reported(0, table_wanted=False)  # with a full one
        keep()
        seen.clear()
        router.make_report = keep

    on_loop(router, begin)
    try:
        yield seen
    finally:
        del router.make_report


async def load(handle, seconds, rate_per_s=40.0, method="predict", *arguments):
    """Open loop over a handle; what was answered or raised, and the latencies of what was answered."""
    seen, latencies = Counter(), []

    async def one(i):
        started_s = time.monotonic()
        try:
            await getattr(handle, method).remote(i, *arguments)
            seen["ok"] += 1
            latencies.append(time.monotonic() - started_s)
        except Exception as error:
            seen[type(error).__name__] += 1

    tasks = []
    for i in range(int(seconds * rate_per_s)):
        tasks.append(asyncio.create_task(one(i)))
        await asyncio.sleep(1 / rate_per_s)
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    return seen, latencies


# ---------------------------------------------------------------- streams and copies


def test_live_streams_count_once_with_their_items_errors_and_abandoned_ones(model):
    router = router_of(model)
    stream = model.options(stream=True).generate
    with recorded(router) as seen:
        assert list(stream.remote(40, gap_s=0.002)) == list(range(40))
        with pytest.raises(ValueError, match="user code"):
            list(stream.remote(5, fail_at=3))
        next(iter(stream.remote(30)))  # and dropped

        async def cancelled():
            response = stream.remote(1000)
            assert await response.__anext__() == 0
            response.cancel()
            with pytest.raises(RequestCancelledError):
                async for _ in response:
                    pass

        asyncio.run(cancelled())
        assert_idle(model)
        wait_for(lambda: sum(len(v.outcomes) for r in seen for v in r.replicas) >= 2, 10, "outcomes are reported")
    outcomes = [o for report in seen for view in report.replicas for o in view.outcomes if o.items]
    assert sorted((o.ok, o.items) for o in outcomes) == [(False, 3), (True, 40)]
    (whole,) = (o for o in outcomes if o.ok)
    assert 0.0 < whole.first_item_s < whole.duration_s
    assert whole.duration_s >= 40 * 0.002
    views = [v for r in seen for v in r.replicas]
    assert sum(v.started for v in views) >= 4
    assert sum(v.failed for v in views) == 1


def test_copies_are_marked_compared_and_only_of_methods_declared_safe(model):
    first, candidate, *_ = replicas_of(model)
    set_on(model, candidate, wrong=True, shadows=0)
    router = router_of(model)
    with table(model, {first: 1.0, candidate: 0.0}, {candidate: 1.0}), recorded(router) as seen:
        for i in range(5):
            assert model.predict.remote(i).result(timeout_s=30) == i
            assert model.buy.remote(i).result(timeout_s=30) == i
        with pytest.raises(ValueError, match="user code"):
            model.predict.remote("bad").result(timeout_s=30)
        big = bytes(5_000_000)
        assert model.predict.remote(big).result(timeout_s=30) == len(big)
        assert model.predict.remote(np.zeros(3)).result(timeout_s=30).shape == (3,)
        assert list(model.options(stream=True).generate.remote(100, gap_s=0.001)) == list(range(100))
        assert_idle(model)
        wait_for(lambda: sum(len(r.pairs) for r in seen) >= 9, 10, "pairs are reported")
    pairs = [p for r in seen for p in r.pairs]
    assert {(p.primary_id, p.candidate_id) for p in pairs} == {(first, candidate)}
    bad = [p for p in pairs if not p.primary_ok]
    assert [(p.shadow_ok, p.answers_equal) for p in bad] == [(False, None)]
    verdicts = Counter(p.answers_equal for p in pairs if p.primary_ok)
    assert verdicts == {False: 7, True: 1}, "only the stream is the same on both"
    assert sum(r.uncopyable for r in seen) >= 5
    assert get_on(model, candidate, "shadows") == 9
    assert get_on(model, first, "shadows") == 0
    set_on(model, candidate, wrong=False)


def test_a_hung_candidate_does_not_slow_the_primary(model):
    first, candidate, *_ = replicas_of(model)
    set_on(model, candidate, hung=True)
    without, mirrored = [], []
    shares = {first: 1.0, candidate: 0.0}
    for i in range(8):  # in turn, so that both see the same machine
        for mirror, times in ((0.0, without), (1.0, mirrored)) if i % 2 else ((1.0, mirrored), (0.0, without)):
            with table(model, shares, {candidate: mirror}):
                for _ in range(25):
                    started_s = time.monotonic()
                    assert model.predict.remote(1).result(timeout_s=30) == 1
                    times.append(time.monotonic() - started_s)
    router = router_of(model)
    assert on_loop(router, lambda: router.calls.mirror.under_way) <= 8
    ratio = statistics.median(mirrored) / statistics.median(without)
    print(f"primary with a mirror to a hung replica: {ratio:.2f} times the latency without")
    assert ratio < 1.3
    set_on(model, candidate, hung=False)
    assert_idle(model)


# ---------------------------------------------------------------- sessions, models, composition


def test_sessions_stay_on_one_replica_through_several_routers(model):
    caller = serve.get_app_handle("path")
    wait_for(lambda: router_of(model).level == "table", 15, "the driver's router has the coordinator's table")
    homes, routers = defaultdict(Counter), set()

    async def through_driver(session):
        return "driver", await model.options(session_id=session).who.remote(pause_s=0.02)

    async def run():
        rng = random.Random(1)
        sessions = [f"session-{i}" for i in range(30)] * 15
        rng.shuffle(sessions)
        for start in range(0, len(sessions), 8):  # no more at a time than one replica takes
            batch = sessions[start : start + 8]
            # two routers in the callers, a third one here
            calls = [caller.where.remote(s) if rng.random() < 0.67 else through_driver(s) for s in batch]
            for session, (router, home) in zip(batch, await asyncio.gather(*calls), strict=True):
                routers.add(router)
                homes[session][home] += 1

    asyncio.run(run())
    assert len(routers) == 3
    kept = sum(max(c.values()) for c in homes.values())
    print(f"kept: {kept / sum(c.total() for c in homes.values()):.4f}")
    strays = {session: dict(c) for session, c in homes.items() if len(c) > 1}
    assert kept >= 0.99 * sum(c.total() for c in homes.values()), strays
    assert len({home for c in homes.values() for home in c}) == 3


def test_a_multiplexed_model_stays_where_it_is_loaded(model):
    handle = model.options(multiplexed_model_id="m1")
    home = handle.which.remote().result(timeout_s=30)
    router = router_of(model)
    wait_for(
        lambda: any("m1" in r.multiplexed_model_ids for r in router.calls.routes.replicas),
        10,
        "Serve tells where the model is",
    )
    assert {handle.which.remote().result(timeout_s=30) for _ in range(20)} == {home}


def test_each_deployment_of_a_graph_has_its_own_table(model):
    caller = serve.get_app_handle("path")
    assert [caller.twice.remote(i).result(timeout_s=30) for i in range(10)] == [2 * i for i in range(10)]
    for name in ("path/Caller", "path/Model"):
        wait_for(lambda name=name: deployment_status(name).get("replicas"), 10, f"{name} has a table")
    ids = {d["deployment"]: {r["replica_id"] for r in d["replicas"]} for d in status()["deployments"]}
    assert ids["path/Caller"].isdisjoint(ids["path/Model"])


# ---------------------------------------------------------------- what may fail


def test_usual_requests_need_no_task_of_serves(model):
    replicas = replicas_of(model)
    with table(model, dict.fromkeys(replicas, 1.0)) as router:
        for i in range(4 * len(replicas)):  # until all queues are known
            assert model.predict.remote(i).result(timeout_s=30) == i
        started = []
        start = router._maybe_start_routing_tasks
        router._maybe_start_routing_tasks = lambda: (started.append(1), start())
        try:
            for i in range(20):
                assert model.predict.remote(i).result(timeout_s=30) == i
        finally:
            del router._maybe_start_routing_tasks
    assert len(started) <= 3, "one for a queue that has just expired, perhaps"
    assert_idle(model)


def test_serves_limit_of_waiting_requests_holds(model, folder):
    deploy(folder, 3, max_queued_requests=5)
    wait_for(lambda: replicas_of(model), 20, "the router knows the replicas")

    async def crowd():
        calls = []
        for i in range(60):
            calls.append(asyncio.ensure_future(ask(i)))
            await asyncio.sleep(0.005)  # of those that come in the same instant Serve rejects more than it must
        return await asyncio.gather(*calls, return_exceptions=True)

    async def ask(i):
        return await model.predict.remote(i, pause_s=2.0)

    answers = asyncio.run(crowd())
    rejected = [a for a in answers if isinstance(a, BackPressureError)]
    assert sorted(a for a in answers if isinstance(a, int)) == [i for i, a in enumerate(answers) if a == i]
    assert len(rejected) + sum(isinstance(a, int) for a in answers) == 60
    assert 25 <= len(rejected) <= 36, "three replicas of eight places, five that wait"
    deploy(folder, 3, max_queued_requests=-1)
    assert_idle(model)


def test_when_every_replica_is_full_requests_wait_without_spinning_and_none_fails(model):
    router = router_of(model)
    choices = Counter()
    choose = type(router).choose_replicas

    async def counted(*args, **kwargs):
        choices["made"] += 1
        return await choose(router, *args, **kwargs)

    async def flood():
        return await asyncio.gather(*(model.predict.remote(i, pause_s=0.3) for i in range(96)))

    router.choose_replicas = counted
    try:
        started_s = time.monotonic()
        assert asyncio.run(flood()) == list(range(96))
        taken_s = time.monotonic() - started_s
    finally:
        del router.choose_replicas
    assert taken_s < 15.0, "4 rounds of 24 places at 0.3 s"
    assert choices["made"] < 20 * 96
    assert_idle(model)


def test_a_coordinator_that_hangs_is_done_without_step_by_step(model):
    coordinator = ray.get_actor("shadecast-coordinator", namespace="shadecast")
    pid = ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid()))
    router = router_of(model)
    wait_for(lambda: router.level == "table", 10, "a table")
    os.kill(pid, signal.SIGSTOP)
    try:
        levels = []

        async def watch():
            task = asyncio.create_task(load(model, 7.0))
            while not task.done():
                if not levels or levels[-1] != router.level:
                    levels.append(router.level)
                await asyncio.sleep(0.1)
            return await task

        seen, _ = asyncio.run(watch())
        assert set(seen) == {"ok"}
        assert levels == ["table", "stale_table", "power_of_two"]
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: router.level == "table", 15, "the router has a table again")
    deadline_s = time.monotonic() + 15
    levels = []
    while time.monotonic() < deadline_s and set(levels) != {"table"}:
        levels = [r["level"] for r in deployment_status("path/Model")["routers"] if r["heard_s"] < 3]
        time.sleep(0.2)
    assert set(levels) == {"table"}, "the status shows every router's level"


def test_a_slow_gcs_delays_no_request(model, cluster):
    (gcs,) = cluster._cluster.head_node.all_processes["gcs_server"]
    os.kill(gcs.process.pid, signal.SIGSTOP)
    try:
        seen, latencies = asyncio.run(load(model, 3.0))
    finally:
        os.kill(gcs.process.pid, signal.SIGCONT)
    assert set(seen) == {"ok"}
    assert statistics.median(latencies) < 0.5


async def read_streams(model, count, items, gap_s, while_they_run=None):
    """So many streams at once, each read to its end."""

    async def one():
        return [item async for item in model.options(stream=True).generate.remote(items, gap_s=gap_s)]

    reading = [asyncio.create_task(one()) for _ in range(count)]
    if while_they_run is not None:
        await asyncio.sleep(1.0)
        while_they_run()
    return await asyncio.wait_for(asyncio.gather(*reading), 60)


def test_streams_that_a_stopped_replica_holds_up_go_on_elsewhere(model):
    pid = get_on(model, replicas_of(model)[0], "pid")
    router = router_of(model)
    wait_for(lambda: router.level == "table", 15, "the driver's router has the coordinator's table")
    for _ in range(3):  # what streams usually take
        assert asyncio.run(read_streams(model, 9, 40, 0.05)) == [list(range(40))] * 9
    try:
        with recorded(router) as seen:
            stop = lambda: os.kill(pid, signal.SIGSTOP)  # noqa: E731
            assert asyncio.run(read_streams(model, 9, 100, 0.05, stop)) == [list(range(100))] * 9
    finally:
        os.kill(pid, signal.SIGCONT)
    assert 1 <= sum(report.rescued for report in seen) <= 9
    assert sum(view.failed for report in seen for view in report.replicas) == 0
    assert_idle(model)


def test_streams_of_a_replica_that_dies_go_on_elsewhere(model):
    pid = get_on(model, replicas_of(model)[0], "pid")
    kill = lambda: os.kill(pid, signal.SIGKILL)  # noqa: E731
    assert asyncio.run(read_streams(model, 9, 60, 0.05, kill)) == [list(range(60))] * 9
    assert_idle(model)
    wait_for(lambda: len(replicas_of(model)) == 3, 60, "Serve has started another replica")


def test_without_forecasters_requests_go_on(model):
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == "shadecast" and "forecaster" in entry["name"]:
            ray.kill(ray.get_actor(entry["name"], namespace="shadecast"), no_restart=True)
    seen, _ = asyncio.run(load(model, 2.0))
    assert set(seen) == {"ok"}
    assert router_of(model).level == "table"


def test_picks_that_are_never_sent_take_no_place(model):
    # so does Ray's own ingress for language models, which sends the request itself
    async def picks(count):
        taken_s = []
        for _ in range(count):
            started_s = time.monotonic()
            async with model.predict.choose_replica(1, _reserve=False):
                taken_s.append(time.monotonic() - started_s)
        return taken_s

    shares = dict.fromkeys(replicas_of(model), 1.0)
    with table(model, shares) as router:
        taken_s = asyncio.run(picks(3 * 8 * 2))
        assert max(taken_s) < 0.5, "twice as many picks as there are places, and none has to wait for one"
        wait_for(lambda: not router.calls.book.all_in_flight(), 5, "nothing is left of them")
    assert_idle(model)


def test_requests_that_are_dispatched_to_a_pick_count_like_others(model):
    # as Ray's servers do whose prefill and decode are apart
    async def both(x):
        async with model.predict.choose_replica(x) as selection:
            return await model.predict.dispatch(selection, x)

    async def all_of_them():
        assert [await both(i) for i in range(5)] == list(range(5))
        with pytest.raises(ValueError, match="user code"):
            await both("bad")

    with table(model, dict.fromkeys(replicas_of(model), 1.0)) as router, recorded(router) as seen:
        asyncio.run(all_of_them())
        wait_for(lambda: sum(v.finished for r in seen for v in r.replicas) >= 6, 10, "outcomes are reported")
    views = [v for r in seen for v in r.replicas]
    assert (sum(v.started for v in views), sum(v.finished for v in views), sum(v.failed for v in views)) == (6, 6, 1)
    assert sorted(o.ok for v in views for o in v.outcomes) == [False] + [True] * 5
    assert_idle(model)


# ---------------------------------------------------------------- changes under load, soak


@pytest.mark.timeout(400)
def test_a_rolling_update_under_load_fails_no_request(model, folder):
    async def change():
        done = asyncio.Event()
        seen = Counter()

        async def drive():
            while not done.is_set():
                found, _ = await load(model, 1.0, rate_per_s=30)
                seen.update(found)

        driving = asyncio.create_task(drive())
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            # a changed actor option replaces every replica, one after the other
            await in_thread(None, lambda: deploy(folder, 3, ray_actor_options={"num_cpus": 0.11}))
        finally:
            done.set()
            await driving
        return seen

    before = set(replicas_of(model))
    seen = asyncio.run(change())
    assert set(seen) == {"ok"}, seen
    assert seen["ok"] > 100
    wait_for(lambda: len(replicas_of(model)) == 3, 20, "three replicas")
    assert before.isdisjoint(replicas_of(model))
    assert_idle(model)


@pytest.mark.timeout(400)
def test_replicas_come_and_go_with_the_load_and_no_request_fails(model, folder):
    async def scene():
        seen, busy, done = Counter(), asyncio.Event(), asyncio.Event()

        async def drive():
            while not done.is_set():
                rate_per_s, pause_s = (40, 0.2) if busy.is_set() else (5, 0.002)
                found, _ = await load(model, 0.5, rate_per_s, "predict", pause_s)
                seen.update(found)

        driving = asyncio.create_task(drive())
        in_thread = asyncio.get_running_loop().run_in_executor
        scaling = {"min_replicas": 1, "max_replicas": 4, "downscale_delay_s": 0.5, "upscale_delay_s": 0.5}
        scaling |= {"metrics_interval_s": 0.5, "look_back_period_s": 1.0, "target_ongoing_requests": 2}
        try:
            await in_thread(None, lambda: deploy(folder, 0, autoscaling_config=scaling))
            await in_thread(None, wait_for, lambda: running() == 1, 100, "one replica while there is little to do")
            busy.set()  # eight requests at a time
            await in_thread(None, wait_for, lambda: running() >= 3, 100, "replicas for the load")
            busy.clear()
            await in_thread(None, wait_for, lambda: running() == 1, 100, "one replica again")
            await in_thread(None, deploy, folder, 3)
        finally:
            done.set()
            await driving
        return seen

    seen = asyncio.run(scene())
    assert set(seen) == {"ok"}, seen
    assert_idle(model)


def test_a_soak_of_cancellations_exceptions_deaths_and_abandoned_streams_ends_at_zero(model):
    rng = random.Random(7)
    seen = Counter()
    until_s = time.monotonic() + 20.0
    next_death_s = time.monotonic() + 5.0

    async def one(i):
        kind = rng.choice(["predict", "predict", "bad", "cancel", "stream", "stream_bad", "abandon", "stream_cancel"])
        try:
            if kind == "predict":
                await model.predict.remote(i)
            elif kind == "bad":
                await model.predict.remote("bad")
            elif kind == "cancel":
                response = model.predict.remote(i, pause_s=0.5)
                await asyncio.sleep(rng.random() * 0.2)
                response.cancel()
                await response
            else:
                fail_at = 3 if kind == "stream_bad" else None
                response = model.options(stream=True).generate.remote(20, fail_at=fail_at)
                async for item in response:
                    if kind == "abandon" and item == 2:
                        break
                    if kind == "stream_cancel" and item == 2:
                        response.cancel()
            seen[kind, "ok"] += 1
        except (Exception, asyncio.CancelledError) as error:
            seen[kind, type(error).__name__] += 1

    async def soak():
        nonlocal next_death_s
        tasks, i = set(), 0
        while time.monotonic() < until_s:
            i += 1
            task = asyncio.create_task(one(i))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if time.monotonic() > next_death_s:
                next_death_s += 7.0
                with pytest.raises(ray.exceptions.RayActorError):
                    await model.die.remote()
            await asyncio.sleep(0.03)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    candidate = replicas_of(model)[-1]
    shares = {r: float(r != candidate) for r in replicas_of(model)}
    with table(model, shares, {candidate: 0.5}):
        asyncio.run(soak())
    print(dict(seen))
    for kind in ("predict", "stream", "abandon"):
        assert seen[kind, "ok"] > 20
    ends = {end for kind, end in seen if kind in ("stream", "abandon")}
    assert ends <= {"ok", "ActorDiedError"}, "streams that have begun die with their replica: nothing resumes them here"
    assert seen["bad", "RayTaskError(ValueError)"] > 20
    assert_idle(model)
