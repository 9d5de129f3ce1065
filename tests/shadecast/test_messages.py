"""Messages by name: what other versions send is understood, or refused with a line that names both versions."""

from __future__ import annotations

import contextlib
import math
import pickle
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast import former
from shadecast.errors import MessageError
from shadecast.histogram import Durations
from shadecast.inbox import Inbox, node_message, read_node
from shadecast.messages import SCHEMA, check, from_columns, message, to_columns
from shadecast.tables import Publisher, read_table, table_message
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
    Unfinished,
)
from shadecast.version import VERSION

ROWS = tuple(
    TableRow(f"r{i}", f"n{i % 3}", State.ACTIVE, 1.0, 0.5 + i / 10, float(i % 4), 0.0, 1.0, True, 0, 0.5)
    for i in range(10)
)
TABLE = RoutingTable("app/d", 7, 3, 2, ROWS, 4.0, 0.0, 0.25)


REPORTED = ("replicas", "outcomes", "unfinished", "pairs", "totals", "gone", "seq", "base", "waiting", "refused")
REPORTED += ("ejected", "durations", "first_items")


def report(**more):
    columns = {"replica_id": ["a", "b"], "node_id": ["n", "m"], "in_flight": [1, 0], "started": [5, 3]}
    values = {"router_id": "r", "deployment": "app/d", "seq": 1, "base": 0, "interval_s": 1.0, "replicas": columns}
    return message("report", **values | more)


# ---------------------------------------------------------------- other versions


def test_what_a_newer_version_has_added_is_ignored():
    newer = report(colour="red", replicas={"replica_id": ["a"], "temperature": [80.0]})
    newer |= {"schema": SCHEMA + 5, "version": "9.0"}
    read, acknowledged = Inbox().take(newer, 0.0)
    assert [view.replica_id for view in read.replicas] == ["a"]
    assert acknowledged == 1
    table = table_message(TABLE, ROWS) | {"schema": SCHEMA + 5, "shape": "round"}
    table["rows"]["flavour"] = ["sour"] * len(ROWS)
    assert read_table(table, None) == TABLE


def test_what_is_missing_has_its_default():
    read, _ = Inbox().take(report(replicas={"replica_id": ["a"]}), 0.0)
    assert read.replicas == (ReplicaReport("a", "", 1, 0),)
    bare = message("table", deployment="app/d", epoch=1, table_version=1, rows={"replica_id": ["a"]})
    assert read_table(bare, None).rows == (TableRow("a"),)
    node = read_node(message("node", node_id="n", seq=1, snapshot={"cpu_fraction": 0.5}))
    assert (node.node_id, node.snapshot.cpu_fraction, node.forecast) == ("n", 0.5, None)
    assert math.isnan(node.snapshot.memory_fraction), "unknown, not guessed"


def test_durations_by_bounds_that_we_do_not_know_are_not_counted():
    odd = {"scheme": 2, "limits": [1.0], "counts": [5, 5], "sum_s": 3.0}
    read, _ = Inbox().take(report(durations=odd, first_items={}), 0.0)
    assert (read.durations, read.first_items) == (Durations(), Durations())


def test_reasons_of_refusals_that_we_do_not_know_are_taken_as_they_come_and_stay_few():
    many = {f"reason_{i}": 1 for i in range(50)}
    read, _ = Inbox().take(report(refused={"late": 2, 'x"} 1\n': 3, **many}), 0.0)
    assert read.refused["late"] == 2
    assert len(read.refused) <= 13
    assert all(reason.isidentifier() for reason in read.refused)
    assert sum(read.refused.values()) == 55


def test_a_state_that_we_do_not_know_takes_traffic_by_its_share():
    odd = table_message(TABLE, ROWS)
    odd["rows"]["state"][0] = "resting"
    read = read_table(odd, None)
    assert (read.rows[0].state, read.rows[0].share) == (State.INACTIVE, 1.0)


@pytest.mark.parametrize(
    ("received", "words"),
    [
        ({"schema": 9, "needs": 9, "version": "3.1", "kind": "report"}, ["3.1", "schema 9", VERSION, "upgrade"]),
        (RouterReport("r", "app/d", 1, 1.0, ()), ["RouterReport", VERSION, "another version"]),
        ("nonsense", ["str", VERSION]),
        (None, ["NoneType"]),
        (message("table"), ["'table'", "expects 'report'"]),
        (report(router_id=5), ["router_id"]),
        (report(seq="x"), ["seq", "'x'", "number"]),
        (report(replicas=[1, 2]), ["ReplicaTotals", "list"]),
        (report(replicas={"replica_id": ["a", "b"], "started": [1]}), ["columns of [1, 2]"]),
        (report(replicas={"started": [1]}), ["replica_id", "missing"]),
        (report(outcomes={"at": [7], "seq": [1], "duration_s": [1.0], "in_flight_at_start": [0.0]}), ["at = 7"]),
        (report(outcomes={"at": [0, 0], "seq": [1], "duration_s": [1.0], "in_flight_at_start": [0.0]}), ["2 places"]),
        (report(pairs=5), ["PairedSample", "int"]),
        (report(totals={"mirrored": "many"}), ["mirrored", "number"]),
        (report(gone=5), ["gone", "list"]),
        (report(totals=None), ["mirrored", "mapping"]),
        (report(refused=5), ["refused", "mapping"]),
        (report(refused={"late": "x"}), ["late", "number"]),
        (report(ejected="all"), ["ejected", "list"]),
        (report(durations=[1]), ["durations", "mapping"]),
        (report(durations={"scheme": 1, "counts": [1], "sum_s": 0.1}), ["durations", "counts", "18"]),
        (report(durations={"scheme": 1, "counts": [0] * 17 + [-1], "sum_s": 0.1}), ["durations", "counts"]),
        (report(first_items={"scheme": 1, "counts": [0] * 18, "sum_s": math.nan}), ["first_items", "sum_s"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_one_line_that_says_why(received, words):
    inbox = Inbox()
    with pytest.raises(MessageError) as caught:
        inbox.take(received, 0.0)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    read, _ = inbox.take(report(), 0.0)
    assert read is not None, "and nothing of it was kept"


@given(
    st.dictionaries(
        st.sampled_from(REPORTED),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_whatever_a_report_holds_it_is_read_or_refused(values):
    with contextlib.suppress(MessageError):
        Inbox().take(report(**values), 0.0)


def test_columns_of_defaults_are_left_out_and_come_back():
    outcomes = [Outcome(0.1, 2.0), Outcome(0.2, 3.0)]
    columns = to_columns(outcomes)
    assert set(columns) == {"duration_s", "in_flight_at_start", "first_item_s"}, "NaN is never equal to itself"
    back = from_columns(Outcome, columns)
    assert [(o.duration_s, o.in_flight_at_start, o.ok, o.cost, o.items) for o in back] == [
        (0.1, 2.0, True, 1.0, 0),
        (0.2, 3.0, True, 1.0, 0),
    ]
    assert (to_columns([]), from_columns(Outcome, {})) == ({}, [])


def test_messages_are_plain_values():
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(each) for key, each in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    rows = tuple((0.1, 0.2, 0.3) for _ in range(6))
    node = NodeReport("n", 1, NodeSnapshot(0.5), Forecast({"cpu": rows}, gate={"cpu": 1.0}), hostname="h")
    for made in (report(), table_message(TABLE, ROWS), node_message(node)):
        assert plain(made)
        assert check(made, made["kind"]) is made
    assert repr(read_node(node_message(node)).forecast) == repr(node.forecast)  # nan, too


# ---------------------------------------------------------------- Shadecast 0.1


@dataclass(frozen=True, slots=True)
class _FormerReplicaReport:
    """The class as 0.1 had it."""

    replica_id: str
    node_id: str
    max_ongoing: int
    in_flight: int
    started: int = 0
    finished: int = 0
    failed: int = 0
    outcomes: tuple = ()
    unfinished: tuple = ()
    items: int = 0
    stream_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _FormerRouterReport:
    router_id: str
    deployment: str
    seq: int
    interval_s: float
    replicas: tuple
    pairs: tuple = ()
    mirrored: int = 0
    mirror_dropped: int = 0
    uncopyable: int = 0
    rescued: int = 0
    table_epoch: int = 0
    level: str = ""
    observed: object = field(default=None)
    held_table: object = None


def as_sent_by_0_1(value, names):
    """Pickled by position under the names that 0.1's classes have, as Ray pickles them."""
    text = pickle.dumps(value, protocol=2)
    for ours, theirs in names.items():
        module, name = theirs.rsplit(".", 1)
        text = text.replace(f"c{__name__}\n{ours}\n".encode(), f"c{module}\n{name}\n".encode())
    return pickle.loads(text)


def test_a_report_of_0_1_is_read_as_one_that_holds_everything():
    view = _FormerReplicaReport(
        "a", "n", 8, 2, 5, 4, 1, (Outcome(0.1, 0.0, first_item_s=0.05),), (Unfinished(1.0, 0.0),), 3, 0.5
    )
    old = _FormerRouterReport("r", "app/d", 9, 1.0, (view,), table_epoch=3, level="table")
    names = {
        "_FormerReplicaReport": "shadecast.types.ReplicaReport",
        "_FormerRouterReport": "shadecast.types.RouterReport",
    }
    received = as_sent_by_0_1(old, names)
    assert type(received) is RouterReport
    with pytest.raises(AttributeError):
        _ = received.partial  # what unpickling by position leaves behind
    read = former.read_report(received)
    assert (read.partial, read.gone, read.waiting) == (False, (), 0)
    assert (read.router_id, read.seq, read.table_epoch, read.level) == ("r", 9, 3, "table")
    assert read.replicas == (ReplicaReport("a", "n", 8, 2, 5, 4, 1, view.outcomes, view.unfinished, 3, 0.5),)


def test_the_fields_that_0_1_knew_stand_where_they_stood():
    """0.1 reads our tables, and we read its reports, by position."""
    known = {
        RouterReport: list(_FormerRouterReport.__dataclass_fields__),
        ReplicaReport: list(_FormerReplicaReport.__dataclass_fields__),
        Outcome: ["duration_s", "in_flight_at_start", "ok", "cost", "first_item_s", "items"],
        Unfinished: ["age_s", "in_flight_at_start", "cost"],
        PairedSample: [
            *("candidate_id", "primary_id", "primary_s", "shadow_s", "primary_in_flight", "shadow_in_flight"),
            *("primary_ok", "shadow_ok", "answers_equal", "age_s"),
        ],
        TableRow: [
            *("replica_id", "node_id", "state", "share", "capacity", "queue", "mirror_fraction", "session_weight"),
            *("proven", "rejections", "live_capacity"),
        ],
        RoutingTable: [
            *("deployment", "epoch", "version", "routers", "rows", "slots", "batch_half", "reference_s", "panic"),
            "age_s",
        ],
        NodeReport: ["node_id", "seq", "snapshot", "forecast", "age_s", "hostname", "rss_bytes"],
        NodeSnapshot: [
            *("cpu_fraction", "cpu_background_fraction", "memory_fraction", "network_fraction"),
            *("network_background_fraction", "net_rx_bytes_per_s", "net_tx_bytes_per_s", "cpu_pressure_fraction"),
            *("memory_pressure_fraction", "gpu_fraction", "gpu_memory_fraction"),
        ],
        Forecast: ["quantiles", "slow_probability", "skill", "gate", "model_version", "veto_allowed"],
    }
    for kind, names in known.items():
        assert list(kind.__dataclass_fields__)[: len(names)] == names, f"{kind.__name__}: add fields at the end only"


@pytest.mark.parametrize("received", [None, {}, "x", NodeReport("n", 1, NodeSnapshot(), None)])
def test_what_0_1_never_sent_is_refused(received):
    with pytest.raises(MessageError, match="RouterReport"):
        former.read_report(received)


# ---------------------------------------------------------------- tables


def changed(row, **values):
    return replace(row, **values)


def test_a_table_is_sent_whole_once_and_then_as_far_as_it_has_changed():
    publisher = Publisher()
    publisher.publish(TABLE)
    first = publisher.message(0)
    held = read_table(first, None)
    assert held == TABLE
    rows = (changed(ROWS[0], queue=9.0), *ROWS[1:8], TableRow("new", "n", State.SHADOWING))  # r8 and r9 are gone
    newer = RoutingTable("app/d", 7, 4, 2, rows, 4.0, 0.0, 0.25)
    publisher.publish(newer)
    second = publisher.message(publisher.base((7, 3)))
    assert sorted(second["rows"]["replica_id"]) == ["new", "r0"]
    assert sorted(second["gone"]) == ["r8", "r9"]
    read = read_table(second, held)
    assert {row.replica_id: row for row in read.rows} == {row.replica_id: row for row in rows}
    assert (read.epoch, read.version) == (7, 4)
    assert read_table(second, None) is None, "builds on a table that is not held"
    assert read_table(second, replace(held, version=2)) is None
    assert read_table(publisher.message(0), held).rows == rows, "whoever asks gets all of it"
    former_life = publisher.message(publisher.base((6, 3)))
    assert read_table(former_life, held).rows == rows, "and whoever comes from a former life"


def test_a_difference_that_no_router_would_notice_is_not_sent():
    publisher = Publisher()
    publisher.publish(TABLE)
    rows = tuple(changed(row, capacity=row.capacity * 1.004) for row in ROWS)
    publisher.publish(replace(TABLE, version=4, rows=rows))
    assert publisher.message(3)["rows"] == {}
    drifting = [
        replace(TABLE, version=5 + i, rows=tuple(changed(row, capacity=row.capacity * 1.004**i) for row in ROWS))
        for i in range(12)
    ]
    held = TABLE
    for table in drifting:
        publisher.publish(table)
        held = read_table(publisher.message(publisher.base((held.epoch, held.version))), held)
        for row, true in zip(sorted(held.rows, key=lambda r: r.replica_id), table.rows, strict=True):
            assert row.capacity == pytest.approx(true.capacity, rel=0.011), "small steps do not add up unseen"


def test_a_router_that_was_away_for_long_gets_the_whole_table():
    publisher = Publisher()
    for version in range(1, 200):
        publisher.publish(replace(TABLE, version=version, rows=ROWS[: 1 + version % 10]))
    assert publisher.base((7, 1)) == 0
    assert publisher.base((7, 198)) == 198


@given(st.lists(st.tuples(st.sets(st.integers(0, 9), max_size=6), st.sets(st.integers(0, 9))), max_size=12), st.data())
def test_whatever_changes_and_whenever_a_router_asks_it_holds_the_same_as_one_that_has_just_come(steps, data):
    publisher, rows, held = Publisher(), dict(enumerate(ROWS)), None
    for version, (touched, alive) in enumerate(steps, start=1):
        for i in touched:
            rows[i] = changed(rows[i], queue=rows[i].queue + 1.0)
        publisher.publish(replace(TABLE, version=version, rows=tuple(rows[i] for i in sorted(alive))))
        if data.draw(st.booleans()):
            message_ = publisher.message(publisher.base((held.epoch, held.version)) if held is not None else 0)
            held = read_table(message_, held)
            whole = read_table(publisher.message(0), None)
            key = lambda row: row.replica_id  # noqa: E731
            assert sorted(held.rows, key=key) == sorted(whole.rows, key=key)
