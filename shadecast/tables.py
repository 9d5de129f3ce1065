"""How a deployment's routing table reaches its routers: what has changed since the one that they hold.

A row counts as changed if it differs by more than routers could tell (a hundredth of a capacity, say). Whoever holds no
table, or one too old to build on, gets all rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shadecast.config import LOCAL_ONLY_AGE_S, TABLE_TTL_S
from shadecast.errors import MessageError
from shadecast.messages import as_list, check, from_columns, message, numbers, to_columns
from shadecast.types import RoutingTable, State, TableRow

_NOTICED = 0.01
"""Relative change of a capacity that is worth sending: scores that differ by less than a tenth are equal."""
_REMEMBERED = 64
"""Tables on which a router may build; half a minute of them."""
_STATES = {str(state): state for state in State}


class Publisher:
    """One deployment's tables, as the coordinator hands them out."""

    def __init__(self) -> None:
        self.table: RoutingTable | None = None
        self._rows: dict[str, TableRow] = {}
        self._changed: dict[str, int] = {}
        """The version in which each row has last changed."""
        self._gone: dict[str, int] = {}
        self._first = 0
        """The oldest version on which a message may build."""

    def publish(self, table: RoutingTable) -> None:
        """A newer table."""
        if self.table is None or self.table.epoch != table.epoch:
            self._rows, self._changed, self._gone, self._first = {}, {}, {}, table.version
        version, rows = table.version, {}
        for row in table.rows:
            before = self._rows.get(row.replica_id)
            if before is not None and _alike(before, row):
                rows[row.replica_id] = before
            else:
                rows[row.replica_id] = row
                self._changed[row.replica_id] = version
        for replica_id in self._rows.keys() - rows.keys():
            self._gone[replica_id] = version
            del self._changed[replica_id]
        self._first = max(self._first, version - _REMEMBERED)
        self._gone = {k: at for k, at in self._gone.items() if at > self._first and k not in rows}
        self.table, self._rows = table, rows

    def base(self, held: tuple[int, int]) -> int:
        """The version on which the next message to who holds (epoch, version) should build; 0 is none.

        Where most rows have changed since, all of them are sent: that message is the same for everybody.
        """
        table, base = self.table, held[1]
        if table is None or held[0] != table.epoch or not self._first <= base <= table.version:
            return 0
        changed = sum(at > base for at in self._changed.values())
        return base if 2 * changed <= len(self._rows) else 0

    def message(self, base: int) -> dict[str, Any]:
        """The present table for who holds its `base`."""
        if self.table is None:
            raise MessageError("no table was published yet")
        rows = [row for replica_id, row in self._rows.items() if self._changed[replica_id] > base]
        gone = [replica_id for replica_id, at in self._gone.items() if at > base] if base else []
        return table_message(self.table, rows, base, gone)


def table_message(
    table: RoutingTable, rows: list[TableRow] | tuple[TableRow, ...], base: int = 0, gone: list[str] | None = None
) -> dict[str, Any]:
    """A table with `rows` that are all, or with `base` those that have changed since that version of its epoch."""
    columns = to_columns(rows)
    if "state" in columns:
        columns["state"] = [str(state) for state in columns["state"]]
    return message(
        "table",
        deployment=table.deployment,
        epoch=table.epoch,
        table_version=table.version,
        base=base,
        routers=table.routers,
        rows=columns,
        gone=gone or [],
        slots=table.slots,
        batch_half=table.batch_half,
        reference_s=table.reference_s,
        panic=table.panic,
        age_s=table.age_s,
    )


def read_table(received: Any, held: RoutingTable | None) -> RoutingTable | None:
    """The table that a message makes of the one held; None if it builds on another one. Raises MessageError."""
    found = check(received, "table")
    epoch, version, base, routers, slots, batch_half, reference_s, age_s = numbers(
        found, ("epoch", "table_version", "base", "routers", "slots", "batch_half", "reference_s", "age_s")
    )
    deployment = found.get("deployment")
    if not isinstance(deployment, str):
        raise MessageError(f"table: deployment = {deployment!r}: must be text")
    columns = dict(found["rows"]) if isinstance(found.get("rows"), Mapping) else {}
    if "state" in columns:  # one that we do not know takes traffic by its share alone
        columns["state"] = [_STATES.get(str(state), State.INACTIVE) for state in as_list(columns["state"], "state")]
    rows = tuple(from_columns(TableRow, columns))
    if base:
        if held is None or (held.epoch, held.version) != (epoch, base):
            return None
        gone = set(as_list(found.get("gone", ()), "gone"))
        merged = {row.replica_id: row for row in held.rows if row.replica_id not in gone}
        merged.update((row.replica_id, row) for row in rows)
        rows = tuple(merged.values())
    panic = bool(found.get("panic", False))
    return RoutingTable(
        deployment, int(epoch), int(version), int(routers), rows, slots, batch_half, reference_s, panic, age_s
    )


def unpack_table(packed: bytes, held: RoutingTable | None) -> RoutingTable | None:
    """The table that a packed message makes of the one held; None if it builds on another one. Raises MessageError."""
    try:
        received = json.loads(packed)
    except (TypeError, ValueError) as error:
        raise MessageError(f"a table cannot be unpacked: {error!r}") from None
    return read_table(received, held)


def level(table: RoutingTable | None, age_s: float) -> str:
    """The rung of the fail-open ladder: "table", "stale_table" (live capacity only) or "power_of_two"."""
    if table is None or age_s > LOCAL_ONLY_AGE_S:
        return "power_of_two"
    return "table" if age_s <= TABLE_TTL_S else "stale_table"


def _alike(before: TableRow, now: TableRow) -> bool:
    """Whether a router would not notice the difference."""
    if before == now:
        return True
    for old, new in ((before.capacity, now.capacity), (before.live_capacity, now.live_capacity)):
        if abs(new - old) > _NOTICED * old:
            return False
    return replace(now, capacity=before.capacity, live_capacity=before.live_capacity) == before
