"""What people have said in advance of nodes: from when to when something will take a part of one, or all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shadecast.errors import OrderError

LONGEST_S = 7 * 86_400.0
"""Nothing is announced for later than this, or for longer."""
MOST = 100
"""That are kept at one time."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """One node, from and to (calendar time), and the part of the node that will be taken (1: as if it were away)."""

    node_id: str
    starts_wall_s: float
    ends_wall_s: float
    strength: float = 1.0

    def left(self, wall_s: float) -> tuple[float, float]:
        """In how many seconds it starts, and how long it lasts from then on."""
        starts_in_s = max(self.starts_wall_s - wall_s, 0.0)
        return starts_in_s, self.ends_wall_s - wall_s - starts_in_s


class Announcements:
    """Those that are not over. Immutable items, newest last."""

    def __init__(self, kept: Iterable[Any] = ()) -> None:
        """From what `plain` gave; what cannot be read is left out."""
        self._all: list[Announcement] = []
        for item in kept:
            try:
                node_id, numbers = str(item["node_id"]), [float(item[name]) for name in _NUMBERS]
            except (KeyError, TypeError, ValueError):
                continue
            if all(map(math.isfinite, numbers)):
                self._all.append(Announcement(node_id, *numbers))

    def add(self, node_id: str, values: Mapping[str, Any], wall_s: float) -> Announcement:
        """One that is ordered by `starts_in_s`, `lasts_s` and `strength`. Raises OrderError."""
        starts_in_s = _number(values, "starts_in_s", 0.0, 0.0, LONGEST_S)
        lasts_s = _number(values, "lasts_s", math.nan, 1.0, LONGEST_S)
        strength = _number(values, "strength", 1.0, 0.01, 1.0)
        self.of("", wall_s)
        if len(self._all) >= MOST:
            raise OrderError(f"{MOST} announcements are kept already: cancel some, or wait until they are over")
        new = Announcement(node_id, wall_s + starts_in_s, wall_s + starts_in_s + lasts_s, strength)
        self._all.append(new)
        return new

    def cancel(self, node_id: str, wall_s: float) -> int:
        """Forget a node's; how many there were."""
        gone = self.of(node_id, wall_s)
        self._all = [each for each in self._all if each.node_id != node_id]
        return len(gone)

    def of(self, node_id: str, wall_s: float) -> list[Announcement]:
        """A node's that are not over."""
        self._all = [each for each in self._all if each.ends_wall_s > wall_s]
        return [each for each in self._all if each.node_id == node_id]

    def plain(self) -> list[dict[str, Any]]:
        """As plain values, to be kept."""
        return [asdict(each) for each in self._all]

    def view(self, wall_s: float) -> list[dict[str, Any]]:
        """As people see them: seconds from now, `starts_in_s` below 0 where it has begun."""
        return [
            {
                "node_id": each.node_id,
                "starts_in_s": each.starts_wall_s - wall_s,
                "ends_in_s": each.ends_wall_s - wall_s,
                "strength": each.strength,
            }
            for each in self._all
            if each.ends_wall_s > wall_s
        ]


_NUMBERS = ("starts_wall_s", "ends_wall_s", "strength")


def _number(values: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise OrderError(f"{name} = {value!r}: must be a number from {low:g} to {high:g}")
    return float(value)
