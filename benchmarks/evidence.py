"""Whether a committed device result is enough to switch a family of kernels, or the exact search, on by default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fused_margin._ops.backends import select

from .gpu.outcomes import INCOMPLETE, SEARCH
from .gpu.record import failures_of
from .half import ours

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("python", "torch", "cuda", "fused_margin")
# Skip reasons that do not count against a family: what a device may lack.
ALLOWED_SKIPS = re.compile(r"\bneeds (\d+ GiB of device memory|two devices)$")


def shortcomings(result: Mapping[str, Any], name: str, capability: select.Capability) -> list[str]:
    """What a result lacks to show that the kernels of that name passed on that compute capability; empty: nothing."""
    return [
        *_origin(result, capability),
        *_tests(result.get("tests", {}).get(name), f"of {name}"),
        *_sanitizers(result.get("sanitizers", {}), name),
        *(f"{failure}." for failure in failures_of(result.get("suites", {}), ours(name))),  # of what was timed
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
    """They run in the time that is left: a tool may not have run, but it must have found nothing."""
    for tool, groups in results.items():
        for key in ("failed", "unfinished"):
            if tests := [test for test in groups.get(name, {}).get(key, []) if test != INCOMPLETE]:
                yield f"{key.capitalize()} tests of {name} under {tool}: {', '.join(tests)}."


def switched_on() -> Iterator[tuple[str, select.Capability, str]]:
    """Name, compute capability and result file of everything that select.py has on by default."""
    mappings = {family.name: family.results for family in select.FAMILIES} | {SEARCH: select.SEARCH_RESULTS}
    for name, results in mappings.items():
        for capability, file in results.items():
            yield name, capability, file


def unproven() -> list[str]:
    """What the files named in select.py lack; empty where each of them is enough."""
    found = []
    for name, capability, file in switched_on():
        path = RESULTS / file
        if not path.is_file():
            found.append(f"{file}: There is no such file in benchmarks/results.")
            continue
        found += [f"{file}: {each}" for each in shortcomings(json.loads(path.read_text()), name, capability)]
    return found
