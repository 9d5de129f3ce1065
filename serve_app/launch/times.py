"""Times and durations as people type them."""

from __future__ import annotations

import datetime
import re

from shadecast.errors import ConfigError

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|)")


def duration_s(text: str, option: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `1.5h`. Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} {text!r}: must be a duration such as 90s, 10m or 1.5h")
    return float(found[1]) * _UNITS_S[found[2]]


def from_now_s(text: str, option: str, now: datetime.datetime) -> float:
    """Seconds from `now` (with a time zone) to `now`, `+10m`, `14:30`, or an ISO 8601 time. Raises ConfigError.

    A time without a date is the next one; a time without a zone is of this machine's zone.
    """
    text = text.strip()
    if text == "now":
        return 0.0
    if text.startswith("+"):
        return duration_s(text[1:], option)
    try:
        clock = datetime.time.fromisoformat(text)
    except ValueError:
        return (_moment(text, option, now) - now).total_seconds()
    then = datetime.datetime.combine(now.date(), clock, clock.tzinfo or now.tzinfo)
    while then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


def _moment(text: str, option: str, now: datetime.datetime) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: must be a time such as now, +10m, 14:30 or 2030-01-31T14:30") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=now.tzinfo)
