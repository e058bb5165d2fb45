"""Checks that a committed result of a GPU justifies switching on a family of kernels, or the exact search, by default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fused_margin._ops.backends import select

from ..common.files import RESULTS
from ..kernels.names import ours
from .outcomes import INCOMPLETE, SEARCH
from .record import failures_of

VERSIONS = ("python", "torch", "cuda", "fused_margin")
# Skip reasons that are allowed, since a device may be too small or the only one.
ALLOWED_SKIPS = re.compile(r"\bneeds (\d+ GiB of device memory|two devices)$")


def shortcomings(result: Mapping[str, Any], name: str, capability: select.Capability) -> list[str]:
    """Missing evidence that the kernels `name` passed on a compute capability; empty if the result is sufficient."""
    return [
        *_origin(result, capability),
        *_tests(result.get("tests", {}).get(name), f"of {name}"),
        *_sanitizers(result.get("sanitizers", {}), name),
        *(f"{failure}." for failure in failures_of(result.get("suites", {}), ours(name))),  # of the timed contestants
    ]


def _origin(result: Mapping[str, Any], capability: select.Capability) -> Iterator[str]:
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    expected, measured = ".".join(map(str, capability)), hardware.get("gpu_capability")
    if measured != expected:
        yield f"The result is of compute capability {measured or 'unknown'}, not of {expected}."
    if not re.fullmatch(r"[0-9a-f]{40}", result.get("commit") or ""):
        yield "The result names no commit."
    if not hardware.get("driver"):
        yield "The result names no driver."
    if missing := [name for name in VERSIONS if not versions.get(name)]:
        yield f"The result names no version of {', '.join(missing)}."


def _tests(outcome: Mapping[str, Any] | None, which: str) -> Iterator[str]:
    if outcome is None:
        yield f"The result has no tests {which}."
        return
    if not outcome.get("passed"):
        yield f"No test {which} passed."
    for key in ("failed", "unfinished", "skipped"):
        tests = outcome.get(key, [])
        if key == "skipped":
            tests = [test for test in tests if not ALLOWED_SKIPS.search(test)]
        if tests:
            yield f"{key.capitalize()} tests {which}: {', '.join(tests)}."


def _sanitizers(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """Sanitizers run in the remaining time: one may be missing, but none may have found an error."""
    for tool, groups in results.items():
        for key in ("failed", "unfinished"):
            if tests := [test for test in groups.get(name, {}).get(key, []) if test != INCOMPLETE]:
                yield f"{key.capitalize()} tests of {name} under {tool}: {', '.join(tests)}."


def switched_on() -> Iterator[tuple[str, select.Capability, str]]:
    """Name, compute capability and result file of everything that backends/select.py switches on by default."""
    mappings = {family.name: family.results for family in select.FAMILIES} | {SEARCH: select.SEARCH_RESULTS}
    for name, results in mappings.items():
        for capability, file in results.items():
            yield name, capability, file


def unproven() -> list[str]:
    """Shortcomings of the files that backends/select.py names; empty if all are sufficient."""
    found = []
    for name, capability, file in switched_on():
        path = RESULTS / file
        if not path.is_file():
            found.append(f"{file}: There is no such file in benchmarks/results.")
            continue
        found += [f"{file}: {each}" for each in shortcomings(json.loads(path.read_text()), name, capability)]
    return found
