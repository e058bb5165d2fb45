"""Runs commands one after another within a time limit, prints and logs their output, and records their outcomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LEAST_SECONDS = 10  # a step is not started with less time left
GRACE_SECONDS = 5  # from SIGTERM to SIGKILL
# A new group in the same session: ending the session of this process also ends the command.
NEW_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
PASSED, FAILED, TIMED_OUT, NOT_RUN, STOPPED = "passed", "FAILED", "TIMED OUT", "NOT RUN", "stopped"


@dataclass
class Step:
    name: str
    state: str
    seconds: float
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.state in (FAILED, TIMED_OUT, NOT_RUN)

    def __str__(self) -> str:
        return f"{self.state:10} {self.seconds:5.0f} s  {self.name}{self.detail and ': '}{self.detail}"


@dataclass
class Steps:
    """All steps of one run. The `limit` in seconds counts from the creation of this object."""

    limit: float
    log: Path
    root: Path
    environment: dict[str, str]
    done: list[Step] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> float:
        return self.limit - self.elapsed()

    def print(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")

    def finish(self, name: str, state: str, seconds: float, detail: str = "") -> Step:
        step = Step(name, state, seconds, detail)
        self.done.append(step)
        self.print(f"=== {self.elapsed():.0f} s: {step}")
        return step

    def run(
        self, name: str, seconds: float, command: Sequence[str], *, optional: bool = False, **environment: str
    ) -> Step:
        """Run a command for at most `seconds`, and at most until the limit of the run.

        An optional step that reaches its time limit does not count as failed.
        """
        budget = min(seconds, self.left())
        if budget < LEAST_SECONDS:
            return self.finish(name, STOPPED if optional else NOT_RUN, 0.0, "no time left")
        self.print(f"\n=== {self.elapsed():.0f} s: {name} (at most {budget:.0f} s): {' '.join(command):.300}")
        begin = time.monotonic()
        code = self._wait(command, budget, environment)
        took = time.monotonic() - begin
        if code is None:
            return self.finish(name, STOPPED if optional else TIMED_OUT, took, f"after {budget:.0f} s")
        return self.finish(name, PASSED if code == 0 else FAILED, took, "" if code == 0 else f"exit code {code}")

    def _wait(self, command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> int | None:
        """The exit code, or None at the time limit. Child processes of the command end with it."""
        process = subprocess.Popen(
            command, cwd=self.root, env={**os.environ, **self.environment, **environment}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **NEW_GROUP,
        )  # fmt: skip
        reader = threading.Thread(target=self._copy, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):  # remaining processes of the group
                try:
                    os.killpg(process.pid, sent)
                    process.wait(GRACE_SECONDS)
                except (ProcessLookupError, PermissionError):
                    break
                except subprocess.TimeoutExpired:
                    continue
            reader.join(GRACE_SECONDS)

    def _copy(self, lines) -> None:
        with self.log.open("a") as file:
            for line in lines:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
                file.flush()
