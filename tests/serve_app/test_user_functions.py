"""Functions that users name in settings: imported beside the router's loop, and never a request's trouble."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time

import pytest

from serve_app import user_functions as module
from serve_app.user_functions import UserFunction
from tests.serve_app.routing.serve import Log, Replica, Serve, run, serving, settle, table

GATES: dict[str, threading.Event] = {}
"""Modules of these tests wait for their gate while they are imported."""
BEGUN: list[str] = []
_HERE = __name__


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts a module on the path: `write(name, source)`; "GATE" in it stands for a wait until `GATES[name]` is set."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def put(name, source):
        names.append(name)
        GATES[name] = threading.Event()
        wait = f"import {_HERE} as t; t.BEGUN.append({name!r}); t.GATES[{name!r}].wait(30)"
        (tmp_path / f"{name}.py").write_text(source.replace("GATE", wait))
        return GATES[name]

    yield put
    for name in names:
        GATES.pop(name).set()
        sys.modules.pop(name, None)
    BEGUN.clear()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - another thread does it
            await asyncio.sleep(0.005)


async def cost_of_one(serve, *args):
    await serve.send(*(args or (1,)))
    serve.replicas["a"].sent[-1].end()
    await settle()
    (view,) = serve.report().replicas
    return view.outcomes[-1].cost


def test_requests_go_on_while_the_module_of_a_cost_is_imported_and_cost_what_it_says_from_then_on(write):
    gate = write("slow_cost", "GATE\ndef cost(args, kwargs):\n    return 7\n")

    async def scenario():
        began_s = time.monotonic()
        async with serving(Replica("a"), balance={"cost": "slow_cost:cost"}) as serve:
            serve.take(table(a=1.0))
            assert await cost_of_one(serve) == 1.0
            await until(lambda: BEGUN)
            assert await cost_of_one(serve) == 1.0
            assert time.monotonic() - began_s < 15.0
            gate.set()
            await until(lambda: serve.router.calls.cost_of)
            assert await cost_of_one(serve) == 7.0

    with Log() as log:
        run(scenario())
    assert not log.lines()


def test_a_module_that_is_there_already_counts_from_the_first_request_on():
    async def scenario():
        async with serving(Replica("a"), balance={"cost": f"{_HERE}:five"}) as serve:
            serve.take(table(a=1.0))
            assert await cost_of_one(serve) == 5.0

    run(scenario())


def five(args, kwargs):
    return 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('no licence')", "no licence"),
        ("import sys; sys.exit(3)", "SystemExit(3)"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("", "no attribute 'cost'"),
        ("cost = 3", "is not a function"),
        ("def __getattr__(name): raise AttributeError('lazy ' + name)", "lazy cost"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_of_once_with_what_to_do_and_each_request_costs_1(write, source, words):
    write("odd_cost", source)

    async def scenario():
        async with serving(Replica("a"), balance={"cost": "odd_cost:cost"}) as serve:
            serve.take(table(a=1.0))
            for _ in range(3):
                assert await cost_of_one(serve) == 1.0
                await asyncio.sleep(0.1)

    with Log() as log:
        run(scenario())
    (line,) = log.lines(logging.ERROR)
    assert "balance.cost = 'odd_cost:cost'" in line
    assert words in line
    assert "each request counts as 1" in line
    assert words == "is not a function" or "importable in each process that routes" in line


@pytest.mark.parametrize("how", ["raises", "exits", "text", "nothing", "coroutine"])
def test_a_function_that_fails_when_called_is_told_of_once_and_no_request_fails_with_it(how):
    async def scenario():
        async with serving(Replica("a"), balance={"cost": f"{_HERE}:{how}"}) as serve:
            serve.take(table(a=1.0))
            for _ in range(20):
                assert await cost_of_one(serve) == 1.0

    with Log() as log:
        run(scenario())
    (line,) = log.lines()
    assert f"balance.cost = '{_HERE}:{how}' failed" in line
    assert "further failures are not logged" in line


def raises(args, kwargs):
    raise KeyError("tokens")


def exits(args, kwargs):
    sys.exit(1)


def text(args, kwargs):
    return "many"


def nothing(args, kwargs):
    return None


class _Coroutine:
    """As what an `async def` gives: no number."""


def coroutine(args, kwargs):
    return _Coroutine()


def test_an_import_that_hangs_is_begun_once_however_often_settings_change_and_is_told_of(write, monkeypatch):
    write("hangs", "GATE\ndef cost(args, kwargs):\n    return 7\n")
    monkeypatch.setattr(module, "_SLOW_S", 0.0)

    async def scenario():
        async with serving(Replica("a"), balance={"cost": "hangs:cost"}) as serve:
            serve.take(table(a=1.0))
            await until(lambda: BEGUN)
            before = threading.active_count()
            for fraction in range(100):
                serve.router.use_settings(
                    False, {"balance": {"cost": "hangs:cost", "rescue_fraction": fraction / 1000.0}}
                )
            assert threading.active_count() == before
            assert len(BEGUN) == 1
            gc.collect()
            assert len(module._awaited["hangs:cost"]) == 1, "nobody waits for settings of before"
            for _ in range(3):
                assert await cost_of_one(serve) == 1.0

    with Log() as log:
        run(scenario())
    (line,) = log.lines()
    assert "still being imported" in line


def test_an_import_waits_for_nobody_at_the_end_of_the_process(write):
    write("hangs", "GATE")
    UserFunction("balance.cost", "hangs:cost", "each request counts as 1")
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "shadecast imports hangs:cost")
    assert thread.daemon


# ------------------------------------------------------------------ trial.compare


def on_trial(**trial):
    serve = Serve(Replica("a"), Replica("new"), trial={"copy_methods": ["*"], **trial})
    serve.take(table(a=1.0, new=(0.0, 1.0, 1.0)))
    return serve


async def pairs_of(serve, number):
    found = []
    async with asyncio.timeout(10):
        while len(found) < number:
            found += serve.report().pairs
            await asyncio.sleep(0.01)
    return found


async def send_pair(serve, *, between=lambda: None):
    await serve.send(1)
    await settle()
    between()
    for name in ("a", "new"):
        serve.replicas[name].sent[-1].end("answer")
        await settle()


def test_copies_that_began_before_the_comparison_was_there_are_not_compared(write):
    gate = write("slow_equal", "GATE\ndef equal(a, b):\n    return a == b\n")

    async def scenario():
        serve = on_trial(compare="slow_equal:equal")
        compared = serve.router.calls.mirror._compared

        def arrives():
            gate.set()
            while not compared:
                time.sleep(0.001)

        await until(lambda: BEGUN)
        await send_pair(serve, between=arrives)
        await send_pair(serve)
        assert sorted((pair.answers_equal for pair in await pairs_of(serve, 2)), key=str) == [None, True]
        serve.close()

    run(scenario())


def test_a_comparison_that_hangs_takes_some_threads_of_the_loop_and_not_all():
    async def scenario():
        serve = on_trial(compare=f"{_HERE}:never")
        for _ in range(40):
            await send_pair(serve)
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().run_in_executor(None, lambda: "a free thread") == "a free thread"
        ended = await pairs_of(serve, 36)
        assert {pair.answers_equal for pair in ended} == {None}
        NEVER.set()
        await pairs_of(serve, 4)
        serve.close()

    NEVER.clear()
    run(scenario())


NEVER = threading.Event()


def never(primary, copy):
    NEVER.wait(30)


def test_a_comparison_that_fails_is_told_of_once_and_answers_stay_uncompared():
    async def scenario():
        serve = on_trial(compare=f"{_HERE}:broken")
        for _ in range(5):
            await send_pair(serve)
        assert {pair.answers_equal for pair in await pairs_of(serve, 5)} == {None}
        serve.close()

    with Log() as log:
        run(scenario())
    (line,) = log.lines()
    assert "answers are not compared" in line


def broken(primary, copy):
    raise RuntimeError("shapes differ")
