"""What people order: done or refused, written down either way, and told to the node's forecaster while it counts."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.audit_log import AuditLog
from actors.orders import Orders
from shadecast.announcements import LONGEST_S, MOST, Announcements

WHO = {"role": "operate", "by": "page", "token": "ab12cd34", "client": "10.0.0.5"}
NODE = "a1" * 28


class Kept:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def load(self) -> list[Any]:
        return self.items

    def save(self, items: list[Any]) -> None:
        self.items = list(items)


class Forecasters:
    """What they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.away = False

    def announce(self, *arguments: Any) -> None:
        if self.away:
            raise RuntimeError("restarting")
        self.told.append(arguments)

    def cancel(self, node_id: str) -> None:
        self.told.append(("cancel", node_id))


class Rig:
    def __init__(self, kept: Kept | None = None) -> None:
        self.wall_s = 1000.0
        self.kept, self.forecasters = kept or Kept(), Forecasters()
        self.held: list[tuple[str, bool]] = []
        self.written: list[dict[str, Any]] = []
        self.orders = Orders(
            self.hold,
            lambda node_id: node_id == NODE,
            forecasters=self.forecasters,
            kept=self.kept,
            audit=self.written.append,
            wall=lambda: self.wall_s,
        )

    async def hold(self, target: str, out: bool) -> int:
        self.held.append((target, out))
        return 2 if target == NODE else 0

    def order(self, what: str, target: Any = NODE, **values: Any) -> dict[str, Any]:
        return asyncio.run(self.orders.carry_out({"order": what, "target": target, "who": WHO, **values}))


@pytest.mark.parametrize(("what", "out"), [("drain", True), ("release", False)])
def test_an_order_is_carried_out_and_written_down_with_who_what_when_and_outcome(what: str, out: bool) -> None:
    rig = Rig()
    assert rig.order(what) == {"order": what, "target": NODE, "concerned": 2}
    assert rig.held == [(NODE, out)]
    assert rig.written == [{"wall_s": 1000.0, "order": what, "target": NODE, "outcome": "done", "who": WHO}]


@pytest.mark.parametrize(
    ("what", "target", "values", "reason"),
    [
        ("drain", "nobody", {}, "no replica or node has the id 'nobody'"),
        ("announce", "nobody", {"lasts_s": 5.0}, "no node with the id 'nobody' has reported"),
        ("reboot", NODE, {}, "order = 'reboot': must be drain"),
        ("drain", "", {}, "target = ''"),
        ("drain", None, {}, "target = 'None'"),
        ("drain", "x" * 600, {}, "must be the id"),
        ("announce", NODE, {}, "lasts_s = nan: must be a number from 1 to 604800"),
        ("announce", NODE, {"lasts_s": True}, "lasts_s = True"),
        ("announce", NODE, {"lasts_s": "9"}, "lasts_s = '9'"),
        ("announce", NODE, {"lasts_s": LONGEST_S + 1}, "lasts_s"),
        ("announce", NODE, {"lasts_s": 9.0, "starts_in_s": -1.0}, "starts_in_s = -1.0: must be a number from 0"),
        ("announce", NODE, {"lasts_s": 9.0, "strength": 0.0}, "strength = 0.0: must be a number from 0.01 to 1"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason_and_written_down(
    what: str, target: Any, values: dict[str, Any], reason: str
) -> None:
    rig = Rig()
    assert reason in rig.order(what, target, **values)["refused"]
    (entry,) = rig.written
    assert entry["outcome"].startswith("refused: ")
    assert entry["who"] == WHO
    assert rig.kept.items == rig.forecasters.told == []


@pytest.mark.parametrize("received", [None, 5, [], {}, {"order": {"a": 1}, "who": "me"}])
def test_nonsense_is_refused_and_written_down_as_of_nobody(received: Any) -> None:
    rig = Rig()
    assert "refused" in asyncio.run(rig.orders.carry_out(received))
    assert rig.written[0]["who"] == {"by": "unknown"}
    json.dumps(rig.written)


def test_an_announcement_is_told_kept_and_shown_until_it_is_over() -> None:
    rig = Rig()
    answer = rig.order("announce", starts_in_s=60.0, lasts_s=30.0, strength=0.5)
    assert answer["told"] is True
    assert (answer["starts_wall_s"], answer["ends_wall_s"]) == (1060.0, 1090.0)
    assert rig.forecasters.told == [(NODE, 60.0, 30.0, 0.5)]
    assert rig.orders.view() == [{"node_id": NODE, "starts_in_s": 60.0, "ends_in_s": 90.0, "strength": 0.5}]
    rig.wall_s = 1070.0
    assert rig.orders.view()[0]["starts_in_s"] == -10.0
    rig.wall_s = 1091.0
    assert rig.orders.view() == []


def test_a_forecaster_or_coordinator_that_starts_again_loses_no_announcement() -> None:
    kept = Kept()
    Rig(kept).order("announce", starts_in_s=60.0, lasts_s=30.0)
    again = Rig(kept)
    again.wall_s = 1070.0

    async def began() -> None:
        again.orders.forecaster_began(NODE)
        again.orders.forecaster_began("another")
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(began())
    assert again.forecasters.told == [(NODE, 0.0, 20.0, 1.0)], "what is left of it"
    again.wall_s = 1091.0
    asyncio.run(began())
    assert len(again.forecasters.told) == 1, "it is over"


def test_a_forecaster_that_is_away_is_no_error_and_the_answer_says_so() -> None:
    rig = Rig()
    rig.forecasters.away = True
    assert rig.order("announce", lasts_s=30.0)["told"] is False
    assert len(rig.kept.items) == 1, "it is told when it reports again"


def test_cancelled_announcements_are_gone_everywhere() -> None:
    rig = Rig()
    for _ in range(2):
        rig.order("announce", lasts_s=30.0)
    assert rig.order("cancel")["cancelled"] == 2
    assert rig.forecasters.told[-1] == ("cancel", NODE)
    assert rig.kept.items == rig.orders.view() == []


def test_the_number_of_announcements_is_bounded_and_those_that_are_over_do_not_count() -> None:
    rig = Rig()
    for _ in range(MOST):
        assert "told" in rig.order("announce", lasts_s=30.0)
    assert f"{MOST} announcements" in rig.order("announce", lasts_s=30.0)["refused"]
    rig.wall_s += 31.0
    assert "told" in rig.order("announce", lasts_s=30.0)


@pytest.mark.parametrize(
    "kept", [[None], [{}], [{"node_id": NODE}], ["x"], [5], [{"node_id": NODE, "starts_wall_s": "x"}]]
)
def test_what_was_kept_and_cannot_be_read_is_left_out(kept: list[Any]) -> None:
    assert Announcements(kept).plain() == []


def test_an_order_that_fails_is_written_down_as_failed() -> None:
    rig = Rig()

    async def broken(target: str, out: bool) -> int:
        raise RuntimeError("the store is gone")

    orders = Orders(broken, lambda _: True, audit=rig.written.append)
    with pytest.raises(RuntimeError):
        asyncio.run(orders.carry_out({"order": "drain", "target": NODE, "who": WHO}))
    assert rig.written[0]["outcome"] == "failed: RuntimeError('the store is gone')"


def test_an_order_does_not_wait_for_a_disk_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.orders._WRITE_S", 0.01)
    goes_on = threading.Event()
    orders = Orders(Rig().hold, lambda _: True, audit=lambda _: goes_on.wait(30) and None)

    async def run() -> None:
        for _ in range(3):
            assert (await orders.carry_out({"order": "drain", "target": NODE}))["concerned"] == 2
        goes_on.set()

    asyncio.run(run())


# ---------------------------------------------------------------- the file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_is_one_json_line_an_order_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    log = AuditLog(str(path))
    log({"order": "drain", "target": "a\nb"})
    log({"order": "release"})
    log.close()
    assert lines(path) == [{"order": "drain", "target": "a\nb"}, {"order": "release"}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_audit_log_is_rotated_by_size_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.audit_log.MAX_BYTES", 1000)
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    for number in range(400):
        log({"order": "drain", "number": number})
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    assert all(each.stat().st_size <= 1000 and stat.S_IMODE(each.stat().st_mode) == 0o600 for each in files)
    assert lines(path)[-1]["number"] == 399


def test_an_audit_log_that_cannot_be_written_is_said_once_and_stops_no_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "audit.jsonl", tmp_path):
        caplog.clear()
        log = AuditLog(str(path))
        orders = Orders(Rig().hold, lambda _: True, audit=log)
        for _ in range(3):
            assert asyncio.run(orders.carry_out({"order": "drain", "target": NODE}))["concerned"] == 2
        (said,) = [record.getMessage() for record in caplog.records]
        assert str(path) in said
        assert "Orders are carried out, and not written down" in said
