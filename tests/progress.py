"""`pytest -p tests.progress`: one line for each file that is done, instead of a dot for each test."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

import pytest


class _Progress:
    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal
        self._left: Counter[str] = Counter()
        """Tests of each file that are not over."""
        self._files = 0
        self._outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._took_s: Counter[str] = Counter()
        self._began_s = time.monotonic()

    def _collected(self, ids: list[str]) -> None:
        if not self._left:  # each process of pytest-xdist has collected the same
            self._left = Counter(test.partition("::")[0] for test in ids)
            self._files = len(self._left)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected([item.nodeid for item in session.items])

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (report.outcome, "", report.outcome.upper()) if report.when == "call" or not report.passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self._took_s[file] += report.duration
        if report.when == "call" or not report.passed:
            self._outcomes[file][report.outcome] += 1
        if report.failed:
            self._terminal.write_line(f"{'':>12}FAILED {report.nodeid} ({report.when})", red=True)
        if report.when == "teardown":
            self._left[file] -= 1
            if self._left[file] == 0:
                self._say(file)

    def _say(self, file: str) -> None:
        done = self._files - sum(count > 0 for count in self._left.values())
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self._outcomes[file].items()))
        elapsed_s = time.monotonic() - self._began_s
        at = f"{int(elapsed_s) // 60:>3}:{int(elapsed_s) % 60:02}"
        self._terminal.write_line(f"{at} {done:>4}/{self._files}  {file}: {outcomes}, {self._took_s[file]:.0f} s")


@pytest.hookimpl(trylast=True)  # the terminal comes first
def pytest_configure(config: pytest.Config) -> None:
    """Where there is a terminal: not in the processes of pytest-xdist."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Progress(terminal), "progress-by-file")
