"""Whatever happens to a router's calls, in whatever order: its book stays true, and is empty in the end.

Invariants: (1) the picks count for each replica what the book does; (2) reports never tell of more than there was;
(3) nobody gets an error that is not the replica's own; (4) nothing is logged as an error, no callback raises. In the
end, with replicas that are well: (5) nobody waits any more; (6) no call is open, no copy under way, nothing pending;
(7) reports have told all; (8) each call that was accepted is recorded at most once, and exactly once if it ended, was
read to its end and was not cancelled.
"""

import asyncio
import contextlib
import gc
import logging
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from serve_app.router import PredictiveRouter
from shadecast.residence import LONGEST_S
from shadecast.types import RoutingTable, State, TableRow
from tests.serve_app.routing.serve import Log, Replica, Result, Serve, VirtualTime, metadata, settle

SETTINGS = {
    "trial": {"copy_methods": ["infer", "generate"], "mirror_deadline_s": 5.0},
    "balance": {"rescue_fraction": 0.2},
}
RESUMING = SETTINGS | {"balance": {"resume": "had", "rescue_fraction": 0.2}}
SOME = st.integers(0, 1000)
RUSH = st.sampled_from([False, False, True])
"""Whether the next event comes before everything has followed from this one."""
ALL = 100
KINDS = ["unary", "unary", "stream", "stream", "by value", "http"]
METHODS = ["infer", "generate", "generate", "buy"]
SESSIONS = ["", "", "s", "t"]
MOSTS = [ALL, ALL, ALL, 1, 0]
OTHER_CALLS = ["pick", "pick for a session", "pick for a model", "choose", "choose a stream", "broadcast"]
GOES_ON = ["go on", "dispatch", "dispatch", "give up"]
ANSWERS = ["accept", "accept", "accept", "reject", "answer", "answer", "raise", "give", "give"]
ROWS = ["well", "well", "well", "slow", "slow", "on trial", "draining", "unknown"]
WORDS = ["yes", "yes", "yes", "yes", "no", "nothing", "nothing", "error", "dead", "dies"]
TIMES_S = [0.01, 0.06, 0.1, 0.3, 0.3, 0.5, 1.1, 3.0, 6.0]
CALL = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "method": st.sampled_from(METHODS),
        "session": st.sampled_from(SESSIONS),
        "same_id": st.booleans(),
        "most": st.sampled_from(MOSTS),
    }
)
"""`most` is what its caller reads: an answer or not, so many items of a stream."""


class Watched(Result):
    """Notes what the router was told of it."""

    def __init__(self, replica, request, with_rejection):
        super().__init__(replica, request, with_rejection)
        self.told = not with_rejection
        self.read_to_the_end = self.asked_to_cancel = False

    async def get_rejection_response(self):
        info = await super().get_rejection_response()
        self.told = self.told or info.accepted
        return info

    async def get_async(self):
        try:
            answer = await super().get_async()
        except Exception:
            self.read_to_the_end = True
            raise
        self.read_to_the_end = True
        return answer

    async def __anext__(self):
        try:
            return await super().__anext__()
        except Exception:
            self.read_to_the_end = True
            raise

    def cancel(self):
        self.asked_to_cancel = True
        super().cancel()

    @property
    def may_be_recorded(self):
        return self.told and self.done and not isinstance(self.outcome, TaskCancelledError)

    @property
    def must_be_recorded(self):
        labels = self.request.metadata
        by_object = labels._by_reference and not labels.is_streaming
        return self.may_be_recorded and not self.asked_to_cancel and (by_object or self.read_to_the_end)


class NotesDeaths(PredictiveRouter):
    """What a replica did that dies before the next report is not told."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found_dead = set()

    def on_replica_actor_died(self, replica_id):
        self.found_dead.add(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)


class Caller:
    """One handle call, as far as its caller goes."""

    def __init__(self):
        self.task = self.result = None
        self.given_up = False
        self.go = asyncio.Event()
        self.dispatches = False


class RouterMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.clock = VirtualTime()
        self.loop = self.clock.loop()
        self.raised = []
        self.loop.set_exception_handler(lambda _, context: self.raised.append(context))
        self.log = Log().__enter__()
        self.callers, self.replicas, self.everybody = [], [], []
        self.serial = self.version = 0
        self.known, self.before, self.reported = Counter(), {}, Counter()

    def run(self, scenario):
        with self.clock.installed():
            return self.loop.run_until_complete(scenario)

    def happen(self, *events):
        """Events, each with whether the next one comes at once."""

        async def scenario():
            for rush, event, *args in events:
                event(*args)
                await settle(1 if rush else 60)

        self.run(scenario())
        self.count()

    @initialize(
        resumes=st.booleans(),
        says=st.lists(st.sampled_from(WORDS), min_size=2, max_size=5),
        rows=st.lists(st.sampled_from(ROWS), max_size=5),
    )
    def begin(self, resumes, says, rows):
        self.settings = RESUMING if resumes else SETTINGS

        async def scenario():
            self.replicas = [self.new_replica() for _ in says]
            self.serve = Serve(*self.replicas, kind=NotesDeaths, **self.settings)
            self.router, self.book = self.serve.router, self.serve.router.calls.book
            await settle()
            if rows:
                self.new_table(rows, 0.05)
            for replica, word in zip(self.replicas, says, strict=True):
                self.will_say(replica, word)

        self.run(scenario())

    def new_replica(self, most=3):
        self.serial += 1
        made = Replica(f"r{self.serial}", make=Watched, max_ongoing_requests=most)
        self.everybody.append(made)
        return made

    def results(self, want):
        return [result for replica in self.everybody for result in replica.sent if not result.done and want(result)]

    # ------------------------------------------------------------------ callers

    def start(self, scenario, *args):
        caller = Caller()

        async def call():
            with contextlib.suppress(ActorDiedError, DeploymentUnavailableError, ReplicaUnavailableError):
                try:
                    await scenario(caller, *args)
                except (ValueError, RuntimeError) as error:
                    # the last: Serve's own word, before Ray 2.60, for a pick that is made while there is no replica
                    if not str(error).startswith(("user code", "no way there", "no replicas available for ")):
                        raise

        caller.task = self.loop.create_task(call())
        self.callers.append(caller)

    async def read(self, result, most):
        if not result.request.metadata.is_streaming:
            if most:
                await result.get_async()
            return
        with contextlib.suppress(StopAsyncIteration):
            for _ in range(most):
                await anext(result)

    async def call(self, caller, asked):
        labels = {"method": asked["method"], "session_id": asked["session"]}
        labels |= {"request_id": "same"} if asked["same_id"] else {}
        kinds = {"stream": {"stream": True}, "by value": {"_by_reference": False}, "http": {"http": True}}
        caller.result = await self.serve.send(1, **labels, **kinds.get(asked["kind"], {}))
        await self.read(caller.result, asked["most"])
        if asked["most"] < ALL:
            await caller.go.wait()  # it holds on to the result
        caller.result = None

    async def other_call(self, caller, kind):
        labels = metadata(
            stream=kind == "choose a stream",
            session_id="s" if kind == "pick for a session" else "",
            multiplexed_model_id="m" if kind == "pick for a model" else "",
        )
        if kind == "broadcast":
            results = await self.serve.broadcast(labels, 1)
            await asyncio.gather(*(self.read(result, ALL) for result in results), return_exceptions=True)
            return
        async with self.serve.choose_replica(labels, _reserve=kind.startswith("choose")) as selection:
            if not kind.startswith("choose"):
                return
            await caller.go.wait()
            if not caller.dispatches:
                return
            caller.result = await self.serve.dispatch(selection, labels, 1)
        await self.read(caller.result, ALL)
        caller.result = None

    @rule(asked=st.lists(st.tuples(RUSH, st.one_of(CALL, CALL, st.sampled_from(OTHER_CALLS))), min_size=1, max_size=5))
    def calls_begin(self, asked):
        kinds = {True: self.call, False: self.other_call}
        self.happen(*((rush, self.start, kinds[isinstance(each, dict)], each) for rush, each in asked))

    @precondition(lambda self: self.callers)
    @rule(what=st.lists(st.tuples(RUSH, SOME, st.sampled_from(GOES_ON)), min_size=1, max_size=3))
    def callers_go_on(self, what):
        self.happen(*((rush, self.goes_on, i, how) for rush, i, how in what))

    def goes_on(self, i, how):
        waiting = [caller for caller in self.callers if not caller.task.done()]
        if waiting and how == "give up":
            self.give_up(waiting[i % len(waiting)])
        elif waiting:
            caller = waiting[i % len(waiting)]
            caller.dispatches = how == "dispatch"
            caller.go.set()

    def give_up(self, caller):
        caller.given_up = True
        caller.task.cancel()
        if caller.result is not None:
            caller.result.cancel()

    # ------------------------------------------------------------------ replicas

    @rule(
        what=st.lists(
            st.tuples(RUSH, SOME, st.sampled_from(ANSWERS)),
            min_size=1,
            max_size=5,
        ),
    )
    def replicas_answer(self, what):
        self.happen(*((rush, self.answers, i, how) for rush, i, how in what))

    def answers(self, i, how):
        if how in ("accept", "reject"):
            found = self.results(lambda result: not result.word.done())
        elif how == "give":
            found = self.results(lambda result: result.accepted and result.request.metadata.is_streaming)
        else:
            found = self.results(lambda result: result.accepted)
        if not found:
            return
        result = found[i % len(found)]
        match how:
            case "accept":
                result.replica.running.add(result)
                result.accept()
            case "reject":
                result.reject()
            case "answer":
                result.end("answer")
            case "raise":
                result.end(raised=ValueError("user code"))
            case "give":
                result.give(*range(3))

    @rule(what=st.lists(st.tuples(RUSH, SOME, st.sampled_from(WORDS)), min_size=1, max_size=3))
    def replicas_change(self, what):
        self.happen(*((rush, self.will_say, self.replicas[i % len(self.replicas)], how) for rush, i, how in what))

    def will_say(self, replica, how):
        replica.says = "dead" if how == "dies" else how
        replica.queue = replica.max_ongoing_requests if how == "no" else None
        if how == "dies":
            for result in self.results(lambda result: result.replica is replica):
                result.die()

    @rule(rush=RUSH, i=SOME, more=st.integers(0, 2), fewer=st.booleans())
    def membership_changes(self, rush, i, more, fewer):
        self.happen((rush, self.scale, i, more, fewer))

    def scale(self, i, more, fewer):
        self.replicas += [self.new_replica() for _ in range(more)]
        if fewer and len(self.replicas) > 1:
            del self.replicas[i % len(self.replicas)]
        self.replicas = self.replicas[-6:]
        self.serve.scale(*self.replicas)

    @rule(rush=RUSH, i=SOME)
    def one_is_taken_for_dead(self, rush, i):
        """Serve may be wrong about that; its controller still lists the replica then."""
        self.happen((rush, self.is_taken_for_dead, i))

    def is_taken_for_dead(self, i):
        self.router.on_replica_actor_died(self.replicas[i % len(self.replicas)].replica_id)

    # ------------------------------------------------------------------ the control plane and time

    @rule(
        rush=RUSH,
        rows=st.lists(st.sampled_from(ROWS), min_size=1, max_size=6),
        reference_s=st.sampled_from([0.05, 0.05, 0.0]),
    )
    def a_table_comes(self, rush, rows, reference_s):
        self.happen((rush, self.new_table, rows, reference_s))

    def new_table(self, kinds, reference_s):
        rows = []
        for replica, kind in zip(self.replicas, kinds, strict=False):
            row = TableRow(replica.name, "node", State.ACTIVE, 1.0, 1.0, float(len(replica.running)), 0.0, 1.0)
            match kind:
                case "slow":
                    row = replace(row, capacity=0.02)
                case "on trial":
                    row = replace(row, state=State.SHADOWING, share=0.0, mirror_fraction=1.0, session_weight=0.0)
                case "draining":
                    row = replace(row, state=State.DRAINING, share=0.0, session_weight=0.0)
            rows += [row] if kind != "unknown" else []
        self.version += 1
        self.serve.take(RoutingTable("app/model", 1, self.version, 2, tuple(rows), reference_s=reference_s))

    @rule(rush=RUSH, observing=st.booleans(), given=st.sampled_from(["right", "none", "wrong"]))
    def other_settings_come(self, rush, observing, given):
        self.nothing_has_raised()
        chosen = {"right": self.settings, "none": {}, "wrong": {"trial": 5}}[given]
        self.happen((rush, self.router.use_settings, observing, chosen))
        assert len(self.log.lines(logging.ERROR)) <= (given == "wrong")
        self.log.records.clear()

    @rule(seconds=st.sampled_from(TIMES_S), tells=st.booleans())
    def time_passes(self, seconds, tells):
        self.time_goes_on(seconds, tells)

    def time_goes_on(self, seconds, tells):
        self.run(asyncio.sleep(seconds))
        self.count()
        if tells:
            self.run(self.take_report())

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 60))
    def many_things_happen(self, seed, count):
        """Of all kinds: drawn evenly, where hypothesis likes to draw the simplest."""
        rng = random.Random(seed)

        def ask():
            asked = {"kind": rng.choice(KINDS), "method": rng.choice(METHODS), "session": rng.choice(SESSIONS)}
            return asked | {"same_id": rng.random() < 0.3, "most": rng.choice(MOSTS)}

        for _ in range(count):
            i = rng.randrange(1000)
            events = {
                "call": lambda: [(self.start, self.call, ask()) for _ in range(rng.randint(1, 3))],
                "other call": lambda: [(self.start, self.other_call, rng.choice(OTHER_CALLS))],
                "caller": lambda: [(self.goes_on, i, rng.choice(GOES_ON))],  # noqa: B023
                "answer": lambda: [(self.answers, rng.randrange(1000), rng.choice(ANSWERS)) for _ in range(2)],
                "word": lambda: [(self.will_say, self.replicas[i % len(self.replicas)], rng.choice(WORDS))],  # noqa: B023
                "table": lambda: [(self.new_table, rng.choices(ROWS, k=6), rng.choice([0.05, 0.05, 0.0]))],
                "settings": lambda: [(self.router.use_settings, rng.random() < 0.3, self.settings)],
                "dead": lambda: [(self.is_taken_for_dead, i)],  # noqa: B023
                "scale": lambda: [(self.scale, i, rng.randint(0, 1), rng.random() < 0.5)],  # noqa: B023
            }
            kind = rng.choices(list(events), (12, 4, 4, 10, 4, 4, 1, 1, 2))[0]
            self.happen(*((rng.random() < 0.3, *event) for event in events[kind]()))
            if rng.random() < 0.5:
                self.time_goes_on(rng.choice(TIMES_S), rng.random() < 0.5)
            self.the_picks_count_what_the_book_does()
            self.nothing_has_raised()

    async def take_report(self):
        self.router.calls.soon.catch_up()  # as a report does first
        self.count()
        for view in self.serve.report().replicas:
            self.reported["started", view.replica_id] += view.started
            self.reported["finished", view.replica_id] += view.finished
            self.reported["failed", view.replica_id] += view.failed
        self.before = {}
        self.count(fresh=True)
        for what, name in self.reported:
            assert self.reported[what, name] <= self.known[what, name], (what, name)

    # ------------------------------------------------------------------ what must be true

    def count(self, fresh=False):
        """Totals since the start: the book forgets replicas that are gone, at a report."""
        for replica in self.everybody:
            started, finished, failed = self.book.totals(replica.name)
            now = {"started": started, "finished": finished, "failed": failed}
            before = now if fresh else self.before.get(replica.name, dict.fromkeys(now, 0))
            for what, total in now.items():
                self.known[what, replica.name] += total - before[what]
            self.before[replica.name] = now

    @invariant()
    def the_picks_count_what_the_book_does(self):
        if not hasattr(self, "router"):
            return
        picks = self.router.calls.routes.picks
        for name, i in picks.index.items():
            assert picks.in_flight[i] == self.book.in_flight(name) >= 0

    @invariant()
    def nothing_has_raised(self):
        assert self.raised == []
        assert self.log.lines(logging.ERROR) == []
        for caller in self.callers:
            if caller.task.done():
                if caller.task.cancelled():
                    assert caller.given_up
                else:
                    assert caller.task.exception() is None

    # ------------------------------------------------------------------ the end

    def teardown(self):
        try:
            if hasattr(self, "router"):
                self.run(self.come_to_an_end())
                self.nothing_has_raised()
        finally:
            self.log.__exit__()
            self.loop.close()

    async def end_all(self):
        for caller in self.callers:
            caller.go.set()
        for result in self.results(lambda _: True):
            result.accept().end("answer")
        await asyncio.sleep(0.5)

    async def come_to_an_end(self):
        self.replicas.append(self.new_replica(most=1000))
        for replica in self.everybody:
            replica.says, replica.queue = ("yes" if replica in self.replicas else "dead"), None
        self.serve.scale(*self.replicas)
        if self.version:
            self.new_table(["well"] * len(self.replicas), 0.05)
        for _ in range(20):
            await self.end_all()
        assert all(caller.task.done() for caller in self.callers)
        self.nothing_has_raised()
        self.callers.clear()  # nobody holds a result any more
        await self.end_all()
        gc.collect()
        await asyncio.sleep(LONGEST_S + 1.0)  # so long at most a pick counts that nobody sends
        self.count()
        await self.take_report()
        for replica in self.replicas:
            if replica.name not in self.router.found_dead:
                for what in ("started", "finished", "failed"):
                    assert self.reported[what, replica.name] == self.known[what, replica.name]
        assert self.book.open_calls == 0
        assert self.router.calls.mirror.under_way == 0
        assert not any(self.router.calls.routes.picks.in_flight)
        for replica in self.everybody:
            least = sum(result.must_be_recorded for result in replica.live)
            most = sum(result.may_be_recorded for result in replica.live)
            assert least <= self.known["finished", replica.name] <= most
        self.serve.close()
        await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}


# where it fails, it looks for a short example
TestRouterMachine = pytest.mark.slow(pytest.mark.timeout(900)(RouterMachine.TestCase))
TestRouterMachine.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
