"""pytorch-metric-learning's own unit tests, with its classes and with ours in their place."""

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

from fused_margin.compat import pytorch_metric_learning as compat

from . import upstream

ROOT = Path(__file__).parents[1]
DEFAULT = "default"  # TEST_DTYPES unset: float16,float32,float64, and a test ends at the first that fails
DTYPES_AS_THEIRS = "ours, dtypes as theirs"
NOT_FOUND = {"outcomes": ["not found"], "failure": "not found: its file cannot be imported"}


@dataclass(frozen=True)
class PytorchMetricLearning:
    """Run the unit tests of pytorch-metric-learning that name one of its classes that ours replace, with both.

    The library they test is the installed one, whatever source the checkout has. Where ours fails, it is tried again
    with what is different on purpose about dtypes undone: if it then passes, nothing else is different.
    """

    checkout: tyro.conf.Positional[Path]
    """Your checkout of github.com/KevinMusgrave/pytorch-metric-learning; `tests` in it is read and run, unchanged."""
    output: Path | None = None
    """JSON file for the result."""
    dtypes: tuple[str, ...] = (DEFAULT, "float16", "float32", "float64")
    """What their TEST_DTYPES is, one run each."""
    device: str = "cpu"
    """What their TEST_DEVICE is."""
    seeds: int = 5
    """Their tests draw numbers and set no seed: each test runs with every seed below this one."""
    patience: float = 30.0
    """Seconds that a test may take to be run with another seed."""
    commits: dict[str, str] = field(default_factory=dict)
    """FILE COMMIT pairs, for the record, where the checkout is not a git repository."""

    def run(self) -> list[str]:
        """Tests that passed with theirs and not with ours, even where ours treats dtypes as theirs does."""
        files, settings = self.test_files(), {}
        checkout = upstream.provenance(self.checkout, [*self.helpers(), *files], self.commits)
        on_purpose, different = [], []
        for dtypes in self.dtypes:
            if settings:  # once is enough for what does not look at TEST_DTYPES
                files = [file for file in files if "TEST_DTYPES" in file.read_text(encoding="utf-8")]
            settings[dtypes] = rows = self.compare(files, dtypes)
            for name, row in rows.items():
                line = f"TEST_DTYPES {dtypes}: {name}"
                print(f"{line}: {', '.join(f'{whose} {told(row[whose])}' for whose in row)}")
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
            upstream.write(self.output, command, content)
        return different

    def compare(self, files: list[Path], dtypes: str) -> dict[str, dict[str, Any]]:
        """Outcomes by test and by whose classes; the third is looked at only where ours did worse than theirs."""
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
        """What :func:`run_tests` found in a process of its own."""
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
                [sys.executable, "-W", "ignore", "-m", "benchmarks.parity_pml", json.dumps(task)],
                cwd=self.checkout,  # first on the path of the process: theirs is what `tests` means there
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return json.loads(result.read_text(encoding="utf-8"))


def told(row: dict[str, Any]) -> str:
    """How often a test passed."""
    return f"{row['outcomes'].count('passed')}/{len(row['outcomes'])}"


def as_good(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether ours did not fail with any seed that theirs passed with."""
    both = zip(ours["outcomes"], theirs["outcomes"], strict=False)  # a slow test may have run with fewer seeds
    return all(mine == his or his == "failed" for mine, his in both)


def run_tests(modules: list[str], seeds: int, patience: float, whose: str) -> dict[str, Any]:
    """Outcomes by test: for every seed, the last line of the first failure, and which classes of ours took part."""
    used: set[str] = set()

    def see(module: torch.nn.Module, *_) -> None:
        if type(module).__module__ == compat.__name__:
            used.add(type(module).__name__)

    hooks.register_module_forward_pre_hook(see)
    hooks.register_module_parameter_registration_hook(see)
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
        except Exception:  # noqa: BLE001 - whatever it is, the file cannot be run
            rows[name] = {"outcomes": ["failed"], "failure": where(traceback.format_exc()), "ours_took_part": []}
    for test in tests:
        used.clear()
        row = rows[test.id()] = {"outcomes": []}
        for seed in range(seeds):
            for sow in (torch.manual_seed, np.random.seed, random.seed):
                sow(seed)
            started = time.monotonic()
            result = unittest.TestResult()
            unittest.TestSuite([test]).run(result)  # a suite, for what their class sets up
            wrong = [text for _, text in (*result.failures, *result.errors)]
            row["outcomes"].append("failed" if wrong else "skipped" if result.skipped else "passed")
            if wrong:
                row.setdefault("failure", where(wrong[0]))
            if time.monotonic() - started > patience:
                break
        row["ours_took_part"] = sorted(used)
    return rows


def treat_dtypes_as_theirs() -> None:
    """Undoes what is different on purpose: W takes over the embeddings' dtype, and so does the loss."""

    def follow(self, embeddings: torch.Tensor) -> None:
        self.W.data = self.W.data.to(embeddings.device, embeddings.dtype)

    def forward(self, embeddings: torch.Tensor, *arguments, **options) -> torch.Tensor:
        return losses.BaseMetricLossFunction.forward(self, embeddings, *arguments, **options).to(embeddings.dtype)

    compat.FusedLoss.follow, compat.FusedLoss.forward = follow, forward


def where(text: str) -> str:
    """Its message, and the last line of their tests in it, but no path of this machine."""
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
