"""A pytest plugin that records every test immediately, and ends the process if the device is lost or a test hangs.

A kernel that traps or faults destroys the CUDA context of its process, and a kernel that hangs never returns. The record
names the failing test, and the next process continues after it (testing.py).
"""

import faulthandler
import json
import sys
from pathlib import Path

import pytest
import torch

DEVICE_LOST = 70  # exit code


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="file of JSON lines; recorded tests are not run again")
    parser.addoption("--hang-seconds", type=float, default=20.0, help="a test that takes longer ends the process")


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config.getoption("--record"), config.getoption("--hang-seconds")))


class Recorder:
    def __init__(self, path, hang_seconds):
        self.path, self.hang_seconds = path, hang_seconds
        lines = path.read_text().splitlines() if path.exists() else []
        self.begun = {event["test"] for event in map(json.loads, lines) if event["event"] == "begin"}

    def write(self, event, **values):
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def pytest_collection_modifyitems(self, config, items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.begun])
        items[:] = [item for item in items if item.nodeid not in self.begun]

    def pytest_runtest_logstart(self, nodeid):
        self.write("begin", test=nodeid)
        faulthandler.dump_traceback_later(self.hang_seconds, exit=True, file=sys.__stderr__)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            notes = [f"{name}: {value}" for name, value in report.user_properties]
            self.write("outcome", test=report.nodeid, outcome=report.outcome, reason=reason, notes=notes)

    def pytest_runtest_logfinish(self, nodeid):
        faulthandler.cancel_dump_traceback_later()
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            self.write("outcome", test=nodeid, outcome="failed", reason=f"device lost: {reason}", notes=[])
            pytest.exit(f"device lost in {nodeid}: {reason}", returncode=DEVICE_LOST)

    def pytest_sessionfinish(self, exitstatus):
        finished = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if exitstatus in finished:
            self.write("end")
