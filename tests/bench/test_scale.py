"""The coordinator's benchmark, small: it measures the real actor, and its routers are kept up to date."""

import json

import pytest

from bench import scale

pytestmark = pytest.mark.cluster


def test_a_small_size_is_measured_and_written(tmp_path, capsys):
    file = tmp_path / "scale.json"
    scale.main(json_file=file, rate=2.0, seconds=4.0, sizes="16x4", seed=3)
    (row,) = json.loads(file.read_text())
    assert (row["replicas"], row["routers"], row["nodes"]) == (16, 4, 2)
    assert row["kept_up"] > 0.7
    assert 1.0 < row["tables_per_s"] < 3.0
    assert 0.0 < row["cpu"] < 1.0
    assert 0.0 < row["tick_cpu_p99_s"] <= row["tick_p99_s"] < 1.0
    assert 0 < row["report_bytes"] < 20_000
    assert 0 < row["table_rows"] <= 16
    assert "16" in capsys.readouterr().out


def test_a_size_that_is_none_is_one_line():
    with pytest.raises(SystemExit, match="16y4: a size is replicas x routers"):
        scale.main(sizes="16y4")
