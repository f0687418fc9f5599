"""A line per test file as it ends, with the time that the rest will take: a pytest plugin, in one process or several.

The forecast goes by `tests/seconds.json`, what each file took on two cores; `--remember-seconds` writes it anew.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SECONDS = Path(__file__).parent / "seconds.json"
UNKNOWN_S = 5.0  # a file that was never measured
SURE_S = 30.0  # so long a machine counts as usual, until its own pace says more
FEW = 3  # files: a run of fewer needs no forecast


class Progress:
    """Counts the tests of each file, and says what is done and what is left."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began = time.monotonic()
        self._of: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._took_s: defaultdict[str, float] = defaultdict(float)
        self._usual_s: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """One process: knows what it will run."""
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Several: each has collected the same."""
        self._expect(ids)

    def _expect(self, ids: Iterable[str]) -> None:
        self._of = Counter(name.partition("::")[0] for name in ids)

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """No dots: the lines say it."""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds a phase of a test; after a file's last one it is told."""
        file = report.nodeid.partition("::")[0]
        self._took_s[file] += report.duration
        self._failed[file] += report.failed
        if report.when != "teardown":
            return
        self._done[file] += 1
        if self._done[file] == self._of[file]:
            self._tell(file)

    def _tell(self, file: str) -> None:
        usual_s = {name: self._usual_s.get(name, UNKNOWN_S) for name in self._of}
        done_s = sum(usual_s[name] * self._done[name] / self._of[name] for name in self._of)
        elapsed_s = time.monotonic() - self._began
        line = f"{file:<42} {self._done[file]:>4} tests {self._took_s[file]:>6.1f} s"
        if self._failed[file]:
            line += f", {self._failed[file]} FAILED"
        if len(self._of) >= FEW:
            pace = (elapsed_s + SURE_S) / (done_s + SURE_S)
            total_s = elapsed_s + pace * (sum(usual_s.values()) - done_s)
            line += f"   {_clock(elapsed_s)} of about {_clock(total_s)}"
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line, red=bool(self._failed[file]))

    def pytest_sessionfinish(self) -> None:
        """Writes what the files took, where that was asked for."""
        if self._config.getoption("--remember-seconds"):
            whole = {file: round(self._took_s[file], 1) for file in self._of if self._done[file] == self._of[file]}
            SECONDS.write_text(json.dumps(dict(sorted((self._usual_s | whole).items())), indent=1) + "\n")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
