"""Times and durations as people type them."""

from __future__ import annotations

import datetime

import pytest

from serve_app.launch.times import duration_s, from_now_s
from shadecast.errors import ConfigError

ZONE = datetime.timezone(datetime.timedelta(hours=2))
NOW = datetime.datetime(2030, 1, 31, 14, 0, tzinfo=ZONE)


@pytest.mark.parametrize(
    ("text", "expected_s"), [("90", 90), ("90s", 90), ("1.5 m", 90), ("10min", 600), ("2h", 7200), ("1d", 86_400)]
)
def test_a_duration_has_a_unit_or_is_in_seconds(text: str, expected_s: float) -> None:
    assert duration_s(text, "--for") == expected_s


@pytest.mark.parametrize("text", ["", "-5s", "5 weeks", "1e9", "nan", "inf", "s", "1m30s"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--for .*must be a duration such as"):
        duration_s(text, "--for")


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        ("now", 0),
        ("+10m", 600),
        ("14:30", 1800),
        ("14:30:10", 1810),
        ("13:00", 23 * 3600),  # tomorrow
        ("14:00", 24 * 3600),
        ("2030-01-31T15:00", 3600),
        ("2030-01-31 15:00", 3600),
        ("2030-01-31T12:30:00+00:00", 1800),
        ("2030-01-31T12:30:00Z", 1800),
        ("2030-01-30T14:00", -86_400),
    ],
)
def test_a_time_is_from_now_the_next_on_the_clock_or_a_date(text: str, expected_s: float) -> None:
    assert from_now_s(text, "--from", NOW) == expected_s


@pytest.mark.parametrize("text", ["", "soon", "25:00", "2030-13-01", "+", "+soon", "14h30"])
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--from"):
        from_now_s(text, "--from", NOW)
