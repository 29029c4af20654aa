"""A pytest plugin that writes a line as each test begins and ends, and runs one share of them.

    pytest -p benchlib.gpu_check.pytest_plugin --case-log FILE --share 0/8

Tests that have begun in FILE are not run again. After an error that spoils the CUDA context the
process ends, so that later tests, which another process runs, fail for their own reasons.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from benchlib.case_log import CaseLog, spoils_device
from benchlib.flags import Share, share

_SPOILED_EXIT = 70
_WHY_LINES = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the plugin's flags."""
    parser.addoption("--case-log", type=Path, required=True, help="file of JSON Lines")
    parser.addoption("--share", type=share, default=Share(0, 1), help="I/N")


def pytest_configure(config: pytest.Config) -> None:
    """Open the log."""
    config.pluginmanager.register(_Reporter(CaseLog(config.getoption("--case-log"))))


class _Reporter:
    """Writes the lines of tests, and selects the tests of this share."""

    def __init__(self, log: CaseLog) -> None:
        self._log = log

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the tests of this share that have not begun."""
        ours = config.getoption("--share").of(items)
        items[:] = [item for item in ours if item.nodeid not in self._log.begun]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """An empty share is no error."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins."""
        self._log.begin(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Write the result of a test, or of its set-up or tear-down if that fails."""
        report = yield
        if report.when != "call" and report.passed:
            return report
        text = "" if report.passed else str(report.longrepr)
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else text
            self._log.skip(item.nodeid, reason)
            return report
        self._log.end(item.nodeid, _why(text), {"seconds": round(report.duration, 2)})
        if spoils_device(text):
            print(f"\n{text}\nthis error spoils the CUDA context: the process ends", flush=True)
            os._exit(_SPOILED_EXIT)
        return report


def _why(text: str) -> str:
    """Return the lines of a traceback that show the failure; the last lines if there are none."""
    lines = text.splitlines()
    shown = [line for line in lines if line.startswith(("E ", ">"))]
    spoiling = [line for line in lines if spoils_device(line)]
    return "\n".join((shown or lines)[-_WHY_LINES:] + [l for l in spoiling[-1:] if l not in shown])
