"""Outcomes of tests on a device, by group: each family of tensor-core kernels, the portable kernels, the search."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

FAMILIES = ("sm90", "sm80")
PORTABLE, SEARCH = "portable", "search"
SEARCH_TESTS = ("test_exact_search", "test_certified_refresh")
SELECTION = {  # expressions of pytest -k
    **{family: family for family in FAMILIES},
    SEARCH: " or ".join(SEARCH_TESTS),
    PORTABLE: "not " + " and not ".join((*FAMILIES, *SEARCH_TESTS)),
}
INCOMPLETE = "not all tests have run"  # the time limit was reached
WORST_FIRST = ("failed", "unfinished", "passed", "skipped")


@dataclass
class Outcomes:
    """Outcomes of the tests of one group; `complete` when all of them have run."""

    tests: dict[str, str] = field(default_factory=dict)  # node ID: outcome
    reasons: dict[str, str] = field(default_factory=dict)  # of skipped tests and lost devices
    notes: list[str] = field(default_factory=list)  # properties that tests recorded
    complete: bool = False

    @property
    def passed(self) -> bool:
        found = set(self.tests.values())
        return "passed" in found and not found & {"failed", "unfinished"}

    @property
    def failed_tests(self) -> list[str]:
        return [test for test, outcome in self.tests.items() if outcome in ("failed", "unfinished")]

    def add(self, other: Outcomes) -> None:
        """Merge; the worst outcome of a test counts."""
        for test, outcome in other.tests.items():
            self.tests[test] = min(outcome, self.tests.get(test, "skipped"), key=WORST_FIRST.index)
        self.reasons |= other.reasons
        self.notes += [note for note in other.notes if note not in self.notes]

    def drop_last(self) -> None:
        """Remove the test that was running when the time limit was reached."""
        if self.tests and list(self.tests.values())[-1] == "unfinished":
            del self.tests[list(self.tests)[-1]]

    def summary(self) -> dict:
        """The number of passed tests, and the names of the others."""
        named = {
            outcome: [self._described(test) for test, found in self.tests.items() if found == outcome]
            for outcome in ("failed", "skipped", "unfinished")
        }
        if not self.complete:
            named["unfinished"].append(INCOMPLETE)
        return {"passed": list(self.tests.values()).count("passed"), **named, "notes": self.notes}

    def _described(self, test: str) -> str:
        reason = self.reasons.get(test)
        return f"{test}: {reason}" if reason else test


def is_clean(summary: dict | None) -> bool:
    """Whether all tests of a summary ran and none failed."""
    return summary is not None and not summary.get("failed") and not summary.get("unfinished")


def read(path: Path) -> Outcomes:
    """Read the file of recorder.py. A test that began and has no outcome is unfinished."""
    result = Outcomes()
    for line in path.read_text().splitlines() if path.exists() else []:
        event = json.loads(line)
        if event["event"] == "end":
            result.complete = True
            continue
        test = event["test"]
        if event["event"] == "begin":
            result.tests[test] = "unfinished"
            continue
        before, outcome = result.tests[test], event["outcome"]
        result.tests[test] = outcome if before == "unfinished" else min(before, outcome, key=WORST_FIRST.index)
        if event["reason"]:
            result.reasons[test] = event["reason"]
        result.notes += [note for note in event["notes"] if note not in result.notes]
    return result
