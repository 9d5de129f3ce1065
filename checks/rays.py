"""`make test-rays`: the router's and the adoption tests with every Ray that is supported, each in its own environment.

`python -m checks.rays [2.57 ...]`. About 1.3 GB of disk and 6 minutes a version on two idle cores; progress line by
line, all output in `.venvs/ray-VERSION/check.log`. Ends with a table, and with 1 where a version fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from checks.environments import Environment, FailedError, python_version, step

VERSIONS = ("2.57.1", "2.58.1", "2.59.0", "2.60.0")
"""The newest of each minor version in pyproject.toml's range."""
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "httpx")
TESTS = {
    "private names": ("tests/serve_app/test_ray_api.py",),
    "router": ("tests/serve_app/routing",),
    "one node": ("tests/cluster/test_ray_versions.py",),
    "adoption": ("tests/cluster/test_adoption.py",),
    "request path": ("tests/cluster/test_request_path.py",),
}


def check(version: str) -> dict[str, str]:
    """What pytest says at the end of each group of tests."""
    minor = version.rpartition(".")[0]
    with step(f"Ray {version}: installing"):
        environment = Environment.made(f"ray-{minor}", anew=False)
        environment.install(f"ray[serve]=={version}", "-e", ".[control,gateway]", *TOOLS, without_pins=("ray",))
    found = {}
    for what, paths in TESTS.items():
        try:
            with step(f"Ray {version}: {what}"):
                told = environment.run(
                    [environment.program("python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
                )
                found[what] = _summary(told)
                print(found[what], end=" ")
        except FailedError as error:
            print(error)
            found[what] = f"FAILED: {_summary(str(error))}"
    return found


def _summary(told: str) -> str:
    """ "12 passed, 1 skipped" of what pytest printed."""
    lines = re.findall(r"^.*\d+ (?:passed|failed|errors?).*$", told, re.MULTILINE)
    return re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ") if lines else "no result"


def main(asked: Sequence[str]) -> int:
    """Check the versions that are asked for, all without."""
    unknown = [each for each in asked if not any(known.startswith(each) for known in VERSIONS)]
    if unknown:
        print(f"rays: {', '.join(unknown)}: known are {', '.join(VERSIONS)}", file=sys.stderr)
        return 2
    results = {v: check(v) for v in VERSIONS if not asked or any(v.startswith(each) for each in asked)}
    print(f"\nPython {python_version()}\n| Ray | {' | '.join(TESTS)} |\n|---|{'---|' * len(TESTS)}")
    for version, found in results.items():
        print(f"| {version} | {' | '.join(found.values())} |")
    return int(any(told.startswith("FAILED") for found in results.values() for told in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
