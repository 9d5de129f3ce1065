"""Telemetry tables become series that never cross a gap, a recording or a machine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.grid import CHANNELS, EXTENDED
from models.schema import COMMON_COLUMNS, NEW_COLUMNS, REQUIRED_COLUMNS, VERSION_KEY, arrow_schema
from models.series import TelemetryError, read_folder, series_of, source_of


def frame(t_s: list[float], machine: str = "m", recording: str = "r", **columns: object) -> pd.DataFrame:
    base = dict.fromkeys(REQUIRED_COLUMNS[3:], 0.25)
    return pd.DataFrame({"machine": machine, "recording": recording, "t_s": t_s, **base, **columns})


def test_a_gap_ends_a_series_and_a_small_hole_is_missing_samples() -> None:
    t_s = [float(t) for t in [*range(10), *range(12, 20), *range(100, 110)]]
    first, second = series_of(frame(t_s), "s")
    assert len(first.values) == 20
    assert np.isnan(first.values[10:12, 0]).all()
    assert len(second.values) == 10


def test_recordings_and_machines_never_share_a_series() -> None:
    table = pd.concat([frame([0.0, 1.0, 2.0], recording=r, machine=m) for r in "ab" for m in "xy"])
    found = list(series_of(table, "s"))
    assert {(s.machine, s.recording, len(s.values)) for s in found} == {(m, r, 3) for m in "xy" for r in "ab"}


def test_rows_out_of_order_twice_or_without_time_are_put_right() -> None:
    (one,) = series_of(frame([3.0, 1.0, 2.0, 2.0, 0.0, np.nan]), "s")
    assert len(one.values) == 4
    assert np.isfinite(one.values[:, :3]).all()


def test_a_clock_faster_than_a_second_keeps_every_sample() -> None:
    fast = pd.DataFrame({"machine": "m", "recording": "r", "t_s": np.arange(50) * 0.1})
    for name in COMMON_COLUMNS[3:]:
        fast[name] = 0.5
    (one,) = series_of(fast, "s")
    assert (one.period_s, len(one.values)) == (0.1, 50)


def test_a_slower_clock_keeps_its_own_period() -> None:
    (one,) = series_of(frame([6.35, 11.36, 16.37, 21.37, 26.38]), "s")
    assert (one.period_s, len(one.values)) == (5.0, 5)


def test_jitter_does_not_shift_samples() -> None:
    rng = np.random.default_rng(0)
    t_s = np.arange(500) + rng.uniform(-0.05, 0.05, 500)
    (one,) = series_of(frame(list(t_s)), "s")
    assert len(one.values) == 500
    assert np.isfinite(one.values[:, 0]).all()


def test_exogenous_columns_win_over_totals_and_network_is_the_greater_direction() -> None:
    own = frame([0.0, 1.0], cpu_background_fraction=0.1, net_rx_bytes_per_s=5.0, net_tx_bytes_per_s=9.0)
    (one,) = series_of(own, "s")
    assert one.values[:, 0] == pytest.approx(0.1)
    assert one.values[:, 2] == pytest.approx(9.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 7.0])
def test_impossible_fractions_never_leave_the_bounds(bad: float) -> None:
    (one,) = series_of(frame([0.0, 1.0], cpu_fraction=bad), "s")
    cpu = one.values[:, 0]
    assert np.isnan(cpu).all() or ((cpu >= 0) & (cpu <= 1)).all()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    frame([0.0, 1.0]).drop(columns=["memory_fraction"]).to_parquet(tmp_path / "x_1s.parquet")
    with pytest.raises(TelemetryError, match="no column memory_fraction"):
        read_folder(tmp_path)


def test_an_empty_folder_says_how_to_record(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match=r"shadecast up --telemetry-log FOLDER"):
        read_folder(tmp_path)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(TelemetryError, match=r"x\.parquet: cannot be read"):
        read_folder(tmp_path)


def test_a_source_is_the_first_part_of_the_file_name_and_a_log_is_own() -> None:
    root = Path("/data")
    assert source_of(root / "lumos_1s.parquet", root) == "lumos"
    assert source_of(root / "node=a" / "hour=20250101T00" / "r.parquet", root) == "own"


def test_a_log_of_version_1_has_no_further_channels_and_one_of_version_2_has(tmp_path: Path) -> None:
    """A log that was written before the further columns were there is read as ever."""
    old = pa.schema([f for f in arrow_schema() if f.name not in NEW_COLUMNS], {VERSION_KEY: b"1"})
    new = arrow_schema()
    for name, schema in (("old", old), ("new", new)):
        rows = {
            f.name: [name] * 20 if pa.types.is_string(f.type) else [0.25 + (f.name == "t_s") * t for t in range(20)]
            for f in schema
        }
        if name == "old":
            rows["runnable"] = [math.nan] * 20
        pq.write_table(pa.table(rows, schema=schema), tmp_path / f"{name}_1s.parquet")
    first, second = sorted(read_folder(tmp_path), key=lambda s: s.machine, reverse=True)
    assert first.extended is None
    assert np.isnan(first.all_values[:, len(CHANNELS) :]).all()
    assert second.extended is not None
    assert second.extended == pytest.approx(np.full((20, len(EXTENDED)), 0.25))
    assert np.array_equal(first.values, second.values)
