"""Known vulnerabilities of the pinned dependencies, by pip-audit: `python checks/audit.py constraints.txt`.

A finding fails. Where the vulnerability service cannot be asked, as in a network without it, the check is skipped and
says why: a check that needs somebody else's service must not stop work. Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

IGNORED = Path(__file__).with_name("audit_ignored.txt")
PROBE = "requests"
"""Asked about first: a registry that stands in for PyPI has the packages, but may not have what is known of them."""
_TIMEOUT_S = 300
_UNREACHED = ("connect", "timeout", "timed out", "serviceerror", "service error", "httperror", "max retries", "ssl")

Run = Callable[[Sequence[str]], tuple[int, str, str]]
"""Runs pip-audit with these arguments: exit code, stdout, stderr."""


class UnreachedError(Exception):
    """The vulnerability service cannot be asked."""


def run_pip_audit(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Runs it with this interpreter."""
    command = [sys.executable, "-m", "pip_audit", *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return 1, "", f"timeout after {_TIMEOUT_S} s"
    return ran.returncode, ran.stdout, ran.stderr


def ignored(path: Path) -> list[str]:
    """Ids in a list of `ID reason` lines. Raises ValueError for one without a reason."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split(maxsplit=1)
        if len(words) == 1:
            raise ValueError(f"{path}:{number}: {words[0]} has no reason: write why it does not concern us")
        found += words[:1]
    return found


def audit(constraints: Path, ignore: Sequence[str], run: Run) -> list[dict[str, object]]:
    """What is known of each dependency, as pip-audit tells it. Raises UnreachedError, RuntimeError."""
    arguments = ["--requirement", str(constraints), "--no-deps", "--disable-pip", "--format", "json"]
    arguments += ["--progress-spinner", "off", "--timeout", "15"]
    for each in ignore:
        arguments += ["--ignore-vuln", each]
    code, out, problems = run(arguments)
    try:
        dependencies: list[dict[str, object]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = problems.strip().splitlines()[-1] if problems.strip() else f"pip-audit ended with {code}"
        if "No module named pip_audit" in problems:
            raise UnreachedError("pip-audit is not installed; `make setup` installs it") from None
        if any(word in problems.lower() for word in _UNREACHED):
            raise UnreachedError(reason) from None
        raise RuntimeError(reason) from None
    return dependencies


def check(constraints: Path, ignored_path: Path = IGNORED, run: Run = run_pip_audit) -> int:
    """Print what was found; 1 for a finding."""
    try:
        ignore = ignored(ignored_path)
        _ask_the_service(constraints, run)
        dependencies = audit(constraints, ignore, run)
    except UnreachedError as error:
        print(f"pip-audit: SKIPPED, nothing was audited: {error}")
        return 0
    except (RuntimeError, ValueError) as error:
        print(f"pip-audit: {error}", file=sys.stderr)
        return 1
    unknown = [each["name"] for each in dependencies if "skip_reason" in each]
    findings = [(each, found) for each in dependencies for found in each.get("vulns", ())]  # type: ignore[attr-defined]
    for each, found in findings:
        fixed = ", ".join(found["fix_versions"]) or "no version yet"
        print(f"pip-audit: {each['name']} {each['version']}: {found['id']}, fixed in {fixed}", file=sys.stderr)
    if findings:
        print(f"pip-audit: raise the pins, or say in {ignored_path.name} why it does not concern us", file=sys.stderr)
        return 1
    print(f"pip-audit: {len(dependencies) - len(unknown)} dependencies, nothing known against them")
    if unknown:
        print(f"pip-audit: not known to the service: {', '.join(map(str, unknown))}")
    return 0


def _ask_the_service(constraints: Path, run: Run) -> None:
    """Raises UnreachedError where what stands for PyPI here knows nothing of a package that PyPI knows."""
    (line,) = [each for each in constraints.read_text().splitlines() if each.startswith(f"{PROBE}==")]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.txt"
        probe.write_text(line + "\n")
        for each in audit(probe, (), run):
            if "skip_reason" in each:
                raise UnreachedError(f"there is no vulnerability service in this network ({each['skip_reason']})")


if __name__ == "__main__":
    sys.exit(check(Path(sys.argv[1])))
