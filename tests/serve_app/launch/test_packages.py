"""Packages of others that hide ours are found before anything starts."""

import subprocess
import sys

import pytest

from serve_app.launch.packages import ShadowedPackageError, check_packages


def test_our_own_packages_pass():
    check_packages()


def test_a_hidden_package_is_named_with_both_paths(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    code = "from serve_app.launch.packages import check_packages; check_packages()"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert "'models'" in last
    assert str(tmp_path / "models") in last
    assert last.count("models") >= 4


def test_a_missing_package_is_an_error_too(tmp_path):
    with pytest.raises(ShadowedPackageError, match="shadecast"):
        check_packages(tmp_path)
