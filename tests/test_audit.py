"""`make check` fails for a known vulnerability, and says that it was skipped where nobody can be asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checks.audit import IGNORED, PROBE, check, ignored

CLEAN = {"name": "requests", "version": "2.0", "vulns": []}
BAD = {"name": "idna", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"]}]}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found on PyPI and could not be audited: ours (1)"}


class PipAudit:
    """Answers the probe, then the audit."""

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        self.answers, self.asked = list(answers), list[Sequence[str]]()

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        self.asked.append(arguments)
        return self.answers.pop(0)


def found(*dependencies: Any) -> tuple[int, str, str]:
    return int(any(d.get("vulns") for d in dependencies)), json.dumps({"dependencies": dependencies}), "some summary"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "constraints.txt").write_text(f"idna==1.0\n{PROBE}==2.0\n")
    (tmp_path / "ignored.txt").write_text("# none\n")
    return tmp_path / "constraints.txt", tmp_path / "ignored.txt"


def test_a_finding_fails_and_is_named_with_the_version_that_mends_it(files: Any, capsys: Any) -> None:
    assert check(*files, PipAudit(found(CLEAN), found(CLEAN, BAD))) == 1
    assert "idna 1.0: PYSEC-1, fixed in 1.1" in capsys.readouterr().err


def test_nothing_found_passes_and_says_how_many_were_looked_at(files: Any, capsys: Any) -> None:
    assert check(*files, PipAudit(found(CLEAN), found(CLEAN, CLEAN, UNKNOWN))) == 0
    out = capsys.readouterr().out
    assert "2 dependencies" in out
    assert "not known to the service: ours" in out


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((1, "", "/usr/bin/python: No module named pip_audit"), "not installed"),
        ((1, "", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\nERROR: Tip: network"), "Tip"),
        ((1, "", "Traceback\nrequests.exceptions.ConnectionError: Max retries exceeded"), "Max retries"),
        ((1, "", "timeout after 300 s"), "timeout"),
        (found({"name": PROBE, "skip_reason": "Dependency not found on PyPI"}), "no vulnerability service"),
    ],
)
def test_where_nobody_can_be_asked_it_is_skipped_and_says_why(
    files: Any, capsys: Any, answer: Any, reason: str
) -> None:
    pip_audit = PipAudit(answer)
    assert check(*files, pip_audit) == 0
    out = capsys.readouterr().out
    assert "SKIPPED" in out
    assert reason in out
    assert len(pip_audit.asked) == 1, "the service is not asked about all the others"


def test_constraints_that_cannot_be_read_are_no_reason_to_skip(files: Any, capsys: Any) -> None:
    assert check(*files, PipAudit(found(CLEAN), (1, "", "ERROR: requirement 3x is not pinned"))) == 1
    assert "not pinned" in capsys.readouterr().err


def test_what_is_ignored_is_passed_on_and_needs_a_reason(files: Any) -> None:
    constraints, path = files
    path.write_text("PYSEC-1 only on Windows # seen\n\n# a comment\nCVE-2 not called\n")
    pip_audit = PipAudit(found(CLEAN), found(CLEAN))
    assert check(constraints, path, pip_audit) == 0
    assert [w for w in pip_audit.asked[1] if w in ("PYSEC-1", "CVE-2")] == ["PYSEC-1", "CVE-2"]
    path.write_text("PYSEC-1\n")
    with pytest.raises(ValueError, match="has no reason"):
        ignored(path)
    assert check(constraints, path, pip_audit) == 1


def test_the_project_s_own_list_and_pins_can_be_read() -> None:
    assert isinstance(ignored(IGNORED), list)
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    assert len([pin for pin in pins if pin.startswith(f"{PROBE}==")]) == 1
