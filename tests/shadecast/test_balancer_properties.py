"""The balancer under random histories: replicas that join, leave, slow down, fail, fall silent and recover.

Invariants, checked after every tick:

1. Shares and mirrored fractions are in [0, 1]; capacities are positive and finite.
2. An INACTIVE or SHADOWING replica has no live traffic, except in panic; a DRAINING one gets no new.
3. One tick moves a capacity by at most the rate limit.
4. Every recorded transition is in the table, and each begins in the state in which the last one ended.
5. Copies go only to replicas on trial, and to ACTIVE ones that are slower than others; at most the configured
   number enter a trial at once.
6. No replica takes live traffic before its trial unless at the first start, in panic, for urgent load, or on a machine
   that served well, was away and is back.
7. A rejected replica is not tried again before its back-off is over.
8. Versions rise; no report, however broken, raises.
9. Whatever happened: when all are well again, all become ACTIVE (no starvation).
"""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from shadecast.balancer import TickInput
from shadecast.capacity import FALL_PER_S, RISE_PER_S
from shadecast.config import Config
from shadecast.connection import TRANSITIONS, Event, backoff_s
from shadecast.types import NodeReport, NodeSnapshot, Outcome, PairedSample, ReplicaReport, RouterReport, State
from tests.shadecast.world import DEPLOYMENT, World

CONFIG = Config()
NAMES = [f"r{i}" for i in range(6)]
NAME = st.sampled_from(NAMES)
_ODD = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])


class History(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(rate_per_tick=6)
        for name in NAMES[:3]:
            self.world.add(name)
        self.capacity: dict[str, float] = {}
        self.states: dict[str, State] = {}
        self.rejected: dict[str, tuple[float, int]] = {}
        self.version = 0
        self._tick()

    # -------------------------------------------------------------- what happens

    @rule(ticks=st.integers(1, 40))
    def time_passes(self, ticks):
        for _ in range(ticks):
            self._tick()

    @rule(name=NAME)
    def join(self, name):
        if name not in self.world.machines:
            self.world.add(name)

    @rule(name=NAME)
    def leave(self, name):
        if len(self.world.machines) > 1:
            self.world.machines.pop(name, None)

    @rule(name=NAME, speed=st.sampled_from([0.05, 0.3, 1.0]), failing=st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    def change(self, name, speed, failing):
        if name in self.world.machines:
            self.world.machines[name].speed = speed
            self.world.machines[name].failing = failing

    @rule(name=NAME, silent=st.booleans(), memory=st.sampled_from([0.3, 0.97]), background=st.floats(0.0, 1.0))
    def node(self, name, silent, memory, background):
        machine = self.world.machines.get(name)
        if machine is not None:
            machine.silent, machine.memory, machine.background = silent, memory, background

    @rule(name=NAME, drain=st.booleans())
    def command(self, name, drain):
        (self.world.holds.add if drain else self.world.holds.discard)(name)
        self._tick()

    @rule(name=NAME, odd=_ODD, other=_ODD, jump_s=st.floats(-50.0, 5.0))
    def broken_reports(self, name, odd, other, jump_s):
        self.world.seq += 1
        outcome = Outcome(odd, other, True, other)
        pair = PairedSample(name, "r0", odd, other, odd, other, age_s=odd)
        replicas = tuple(ReplicaReport(n, m.node_id, 8, 0, 1, 5, 9, (outcome,)) for n, m in self.world.machines.items())
        report = RouterReport("router", DEPLOYMENT, self.world.seq, odd, replicas, (pair,))
        node = NodeReport(f"node-{name}", 1, NodeSnapshot(odd, other, odd, other, odd, other, odd), None, age_s=odd)
        tick = TickInput(self.world.now_s + jump_s, (report,), (node,))
        self.world.now_s = max(self.world.now_s, tick.now_s)
        self.world.output = self.world.balancer.on_tick(tick)
        self._check()

    # -------------------------------------------------------------- what must hold

    def _tick(self) -> None:
        self.world.tick()
        self._check()

    def _check(self) -> None:
        table, transitions = self.world.output.table, self.world.output.transitions
        assert table.version > self.version
        self.version = table.version
        for t in transitions:
            assert TRANSITIONS[t.before, Event(t.event)] is t.after
            assert t.before is self.states.get(t.replica_id, State.INACTIVE)
            self.states[t.replica_id] = t.after
            self._check_entry(t)
        rows = {row.replica_id: row for row in table.rows}
        self.states = {name: self.states.get(name, State.INACTIVE) for name in rows}
        self.rejected = {name: r for name, r in self.rejected.items() if name in rows}
        for name, row in rows.items():
            assert row.state is self.states[name]
            assert 0.0 <= row.share <= 1.0
            assert 0.0 <= row.mirror_fraction <= 1.0
            assert 0.0 < row.capacity < math.inf
            if row.state in (State.INACTIVE, State.SHADOWING):
                assert row.share == 0.0 or table.panic
            if row.state is State.DRAINING:
                assert row.share == 0.0
            copied = row.state in (State.SHADOWING, State.SHIFTING)
            slow = row.state is State.ACTIVE and row.capacity < max(r.capacity for r in rows.values())
            assert not row.mirror_fraction or copied or slow
        if any(t.event == Event.ADMIT for t in transitions):
            trial = CONFIG.trial
            allowed = max(
                int(trial.mirror_budget / trial.mirror_fraction), math.ceil(trial.candidate_budget * len(rows))
            )
            assert sum(row.state is State.SHADOWING for row in rows.values()) <= max(allowed, 1)
        self._check_rates(rows)

    def _check_entry(self, t) -> None:
        if t.event in (Event.TRIAL_FAILED, Event.GUARD_TRIPPED):
            self.rejected[t.replica_id] = (t.at_s, self.rejected.get(t.replica_id, (0.0, 0))[1] + 1)
        elif t.event == Event.ADMIT and t.replica_id in self.rejected:
            at_s, times = self.rejected[t.replica_id]
            assert t.at_s >= at_s + backoff_s(times, CONFIG.trial)
        elif t.event in (Event.LOST, Event.RAMP_DONE, Event.ADMIT_UNTRIED):
            self.rejected.pop(t.replica_id, None)
        if t.before is State.INACTIVE and t.after in (State.SHIFTING, State.ACTIVE):
            assert any(
                word in t.reason
                for word in (
                    "first start",
                    "panic",
                    "nothing else serves",
                    "no time for a trial",
                    "was away and is back",
                )
            )

    def _check_rates(self, rows) -> None:
        elapsed_s = self.world.now_s - getattr(self, "at_s", self.world.now_s)
        self.at_s = self.world.now_s
        for name, row in rows.items():
            change = row.capacity - self.capacity.get(name, row.capacity)
            assert change <= RISE_PER_S * elapsed_s + 1e-9
            assert -change <= FALL_PER_S * elapsed_s + 1e-9
        self.capacity = {name: row.capacity for name, row in rows.items()}

    def teardown(self) -> None:
        for machine in self.world.machines.values():
            machine.speed, machine.failing, machine.silent = 1.0, 0.0, False
            machine.memory, machine.background = 0.3, 0.0
        self.world.holds.clear()
        self._tick()
        for _ in range(60):
            for _ in range(60):
                self._tick()
            if all(row.state is State.ACTIVE for row in self.world.output.table.rows):
                break
        states = {row.replica_id: row.state for row in self.world.output.table.rows}
        assert set(states) == set(self.world.machines)
        assert set(states.values()) == {State.ACTIVE}


History.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestHistory = History.TestCase
