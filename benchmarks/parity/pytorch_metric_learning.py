"""Unit tests of pytorch-metric-learning, run with its own classes and with ours in their place."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from pytorch_metric_learning import losses, regularizers
from torch.nn.modules import module as hooks

from fused_margin.benchmark.environment import header
from fused_margin.compat import pytorch_metric_learning as compat

from ..common.files import ROOT, write_json
from . import upstream

DEFAULT = "default"  # TEST_DTYPES unset: float16,float32,float64; a test ends at the first failure
DTYPES_AS_THEIRS = "ours, dtypes as theirs"
NOT_FOUND = {"outcomes": ["not found"], "failure": "not found: its file cannot be imported"}


@dataclass(frozen=True)
class PytorchMetricLearning:
    """Run the unit tests of pytorch-metric-learning that name a replaced class, with its classes and with ours.

    They test the installed library, not the sources in the checkout. A test that fails with ours runs again with the
    intended differences of dtypes undone; if it then passes, nothing else differs.
    """

    checkout: tyro.conf.Positional[Path]
    """Your checkout of github.com/KevinMusgrave/pytorch-metric-learning, whose `tests` run unchanged."""
    output: Path | None = None
    """JSON file to write."""
    dtypes: tuple[str, ...] = (DEFAULT, "float16", "float32", "float64")
    """Values of TEST_DTYPES; one run for each."""
    device: str = "cpu"
    """Value of TEST_DEVICE."""
    seeds: int = 5
    """Number of seeds. The tests draw random numbers and set no seed; each test runs with seeds 0, 1, ..."""
    patience: float = 30.0
    """Seconds. A test that takes longer is not run with further seeds."""
    commits: dict[str, str] = field(default_factory=dict)
    """FILE COMMIT pairs to record, for a checkout that is not a git repository."""

    def run(self) -> list[str]:
        """Run and compare; return the tests that pass only with theirs, even with the same treatment of dtypes."""
        files, settings = self.test_files(), {}
        checkout = upstream.provenance(self.checkout, [*self.helpers(), *files], self.commits)
        on_purpose, different = [], []
        for dtypes in self.dtypes:
            if settings:  # files that do not read TEST_DTYPES run once
                files = [file for file in files if "TEST_DTYPES" in file.read_text(encoding="utf-8")]
            settings[dtypes] = rows = self.compare(files, dtypes)
            for name, row in rows.items():
                line = f"TEST_DTYPES {dtypes}: {name}"
                print(f"{line}: {', '.join(f'{whose} {passed_of(row[whose])}' for whose in row)}")
                if not as_good(row["ours"], row["theirs"]):
                    purpose = as_good(row[DTYPES_AS_THEIRS], row["theirs"])
                    (on_purpose if purpose else different).append(f"{line}: {row['ours']['failure']}")
        if self.output is not None:
            content = {
                "checkout": checkout,
                "replaced": list(compat.__all__),
                "device": self.device,
                "seeds": self.seeds,
                "patience": self.patience,
                "passed_with_theirs_and_not_with_ours_but_for_dtypes": on_purpose,
                "passed_with_theirs_and_not_with_ours": different,
                "settings": settings,
            }
            command = "python -m benchmarks.parity pytorch-metric-learning CHECKOUT --output FILE"
            write_json(self.output, header(command) | content)
        return different

    def compare(self, files: list[Path], dtypes: str) -> dict[str, dict[str, Any]]:
        """Outcomes by test and by classes. Tests that ours fails run a third time, with dtypes treated as theirs."""
        theirs, ours = (self.outcomes(files, dtypes, whose) for whose in ("theirs", "ours"))
        rows = {name: {"theirs": theirs[name], "ours": ours.get(name, NOT_FOUND)} for name in theirs}
        worse = {name for name, row in rows.items() if not as_good(row["ours"], row["theirs"])}
        again = [file for file in files if any(f"{name}.".startswith(f"{self.module(file)}.") for name in worse)]
        third = self.outcomes(again, dtypes, DTYPES_AS_THEIRS) if again else {}
        for name in worse:
            rows[name][DTYPES_AS_THEIRS] = third.get(name, NOT_FOUND)
        return rows

    def test_files(self) -> list[Path]:
        names = re.compile(rf"\b({'|'.join(compat.__all__)})\b")
        files = sorted((self.checkout / "tests").rglob("test_*.py"))
        found = [file for file in files if names.search(file.read_text(encoding="utf-8"))]
        if not found:
            raise ValueError(f"checkout: {self.checkout / 'tests'} has no test that names one of our classes")
        return found

    def helpers(self) -> list[Path]:
        """Files that the tests may import."""
        files = sorted((self.checkout / "tests").rglob("*.py"))
        return [
            file for file in files if file.name == "__init__.py" or "utils" in file.stem and file.stem[:5] != "test_"
        ]

    def module(self, file: Path) -> str:
        return ".".join(file.relative_to(self.checkout).with_suffix("").parts)

    def outcomes(self, files: list[Path], dtypes: str, whose: str) -> dict[str, Any]:
        """Outcomes of :func:`run_tests` in a separate process."""
        modules = [self.module(file) for file in files]
        environment = {
            **os.environ,
            "TEST_DEVICE": self.device,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("TEST_DTYPES", None)
        if dtypes != DEFAULT:
            environment["TEST_DTYPES"] = dtypes
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            arguments = {"modules": modules, "seeds": self.seeds, "patience": self.patience, "whose": whose}
            task = {"arguments": arguments, "result": str(result)}
            subprocess.run(
                [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(task)],
                cwd=self.checkout,  # first on the path of the process, so that `tests` is theirs
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return json.loads(result.read_text(encoding="utf-8"))


def passed_of(row: dict[str, Any]) -> str:
    """Number of seeds with which a test passed, of all seeds."""
    return f"{row['outcomes'].count('passed')}/{len(row['outcomes'])}"


def as_good(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether ours passes with every seed with which theirs passes."""
    both = zip(ours["outcomes"], theirs["outcomes"], strict=False)  # a slow test may have run with fewer seeds
    return all(mine == theirs or theirs == "failed" for mine, theirs in both)


def run_tests(modules: list[str], seeds: int, patience: float, whose: str) -> dict[str, Any]:
    """For every test: outcome per seed, last line of the first failure, and the classes of ours that were used."""
    used: set[str] = set()

    def note(module: torch.nn.Module, *_) -> None:
        if type(module).__module__ == compat.__name__:
            used.add(type(module).__name__)

    hooks.register_module_forward_pre_hook(note)
    hooks.register_module_parameter_registration_hook(note)
    if whose != "theirs":
        for name in compat.__all__:
            setattr(regularizers if name.endswith("Regularizer") else losses, name, getattr(compat, name))
    if whose == DTYPES_AS_THEIRS:
        treat_dtypes_as_theirs()
    rows: dict[str, Any] = {}
    tests: list[unittest.TestCase] = []
    for name in modules:
        try:
            tests += flat(unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(name)))
        except Exception:  # noqa: BLE001 - after any error the file cannot run
            rows[name] = {
                "outcomes": ["failed"],
                "failure": failure_location(traceback.format_exc()),
                "ours_took_part": [],
            }
    for test in tests:
        used.clear()
        row = rows[test.id()] = {"outcomes": []}
        for seed in range(seeds):
            for set_seed in (torch.manual_seed, np.random.seed, random.seed):
                set_seed(seed)
            started = time.monotonic()
            result = unittest.TestResult()
            unittest.TestSuite([test]).run(result)  # a suite, so that class fixtures run
            wrong = [text for _, text in (*result.failures, *result.errors)]
            row["outcomes"].append("failed" if wrong else "skipped" if result.skipped else "passed")
            if wrong:
                row.setdefault("failure", failure_location(wrong[0]))
            if time.monotonic() - started > patience:
                break
        row["ours_took_part"] = sorted(used)
    return rows


def treat_dtypes_as_theirs() -> None:
    """Undo the intended difference: W and the loss take the dtype of the embeddings, as in the library."""

    get_outliers = compat.SubCenterArcFaceLoss.get_outliers

    def adopt_dtype(self, embeddings: torch.Tensor) -> None:
        self.W.data = self.W.data.to(embeddings.device, embeddings.dtype)

    def forward(self, embeddings: torch.Tensor, *arguments, **options) -> torch.Tensor:
        adopt_dtype(self, embeddings)
        return losses.BaseMetricLossFunction.forward(self, embeddings, *arguments, **options).to(embeddings.dtype)

    def outliers(self, embeddings: torch.Tensor, *arguments, **options) -> torch.Tensor:
        adopt_dtype(self, embeddings)
        return get_outliers(self, embeddings, *arguments, **options)

    compat.FusedLoss.forward, compat.SubCenterArcFaceLoss.get_outliers = forward, outliers


def failure_location(text: str) -> str:
    """The message of a traceback and its last line in their tests, without paths of this machine."""
    lines = text.strip().splitlines()
    message = re.sub(r"(/[\w.-]+)+/", "", lines[-1])
    at = [match for line in lines if (match := re.search(r"(tests/\S+\.py)\", line (\d+)", line))]
    return f"{message} ({at[-1][1]}:{at[-1][2]})" if at else message


def flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    found = run_tests(**task["arguments"])
    Path(task["result"]).write_text(json.dumps(found), encoding="utf-8")
