"""What a comparison evaluates its networks on: test identities, verification sets, MegaFace, other images."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fused_margin.evaluation import DataError, find_pair_list, make_pairs
from fused_margin.evaluation.protocols import LfwVariant

from ..config import TrainConfig
from ..data import EMBEDDED, load_splits
from ..data.megaface_images import MegafaceImages
from ..evaluate.config import EvaluateConfig, Protocol
from ..evaluate.run import run_evaluation
from .table import DIR_FAR, FAR, MEASURES, Measure

TEST_IDENTITIES = "test-identities"
FOLDER = "benchmarks"  # in the folder of a run
FILE_NAME = "measured.json"
OF_IDENTITIES: tuple[Protocol, ...] = ("megaface", "identification", "pairs")  # protocols
OF_NETWORK = ("sep_mean", "sep_std")  # the same on all benchmarks


@dataclass(frozen=True)
class Benchmark:
    """Images, and the protocols under which networks are evaluated on them.

    Attributes:
        name: empty for the test identities of a comparison without named benchmarks.
        path: as given.
        options: those of `EvaluateConfig` that name the images.
        protocols: if several have a measure, the last one counts.
        variant: of LFW's protocol.
    """

    name: str
    path: str
    options: Mapping[str, Any]
    protocols: tuple[Protocol, ...]
    variant: LfwVariant = "insightface"

    @property
    def settings(self) -> dict[str, Any]:
        """What its results depend on, as JSON values."""
        lfw = {"variant": self.variant} if "lfw" in self.protocols else {}
        return {"path": self.path, "protocols": list(self.protocols), **lfw}

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The columns of its results, as published where they are."""
        if not self.name:
            return MEASURES
        if self.protocols in (("lfw",), ("ytf",)):
            return (self._measure("accuracy", self.name),)
        if self.protocols == ("megaface",):
            return self._measure("rank1", f"{self.name} rank-1"), self._measure("tar", f"{self.name} verification")
        return (
            self._measure("accuracy", f"{self.name} accuracy"),
            self._measure("tar", f"{self.name} TAR at FAR = 1e-3"),
            self._measure("rank1", f"{self.name} rank-1"),
            self._measure("dir", f"{self.name} DIR at FAR = 1 %"),
        )

    def _measure(self, key: str, title: str) -> Measure:
        return Measure(self._key(key), f"{title}, %", title, "%, higher is better")

    def _key(self, key: str) -> str:
        return f"{self.name}/{key}" if self.name and key not in OF_NETWORK else key

    @property
    def pages(self) -> dict[str, str]:
        """Page of each evaluation, relative to the folder of a run, and its name."""
        names = {protocol: f"lfw-{self.variant}" if protocol == "lfw" else protocol for protocol in self.protocols}
        if not self.name:
            return {"pairs.html": "pairs", "megaface.html": "search", "identification.html": "identification"}
        single = len(self.protocols) == 1
        return {
            f"{FOLDER}/{self.name}/{file}.html": self.name if single else f"{self.name} {protocol}"
            for protocol, file in names.items()
        }

    def _far(self, protocol: Protocol) -> float | None:
        """The FAR to report at; None if the benchmark is MegaFace, which has its own."""
        if protocol == "identification":
            return DIR_FAR
        return None if self.protocols == ("megaface",) else FAR

    def folder(self, run: Path) -> Path:
        """The folder of its results in the folder of a run."""
        return run / FOLDER / self.name if self.name else run

    def stored(self, run: Path) -> dict[str, float] | None:
        """Its results for a run, by the keys of `measures`; None if there are none yet."""
        file = self.folder(run) / FILE_NAME
        if not file.exists():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        if not self.name:
            # Earlier versions did not measure all of them.
            return values if all(measure.key in values for measure in self.measures) else None
        return values["results"] if values["settings"] == self.settings else None

    def evaluate(self, training: TrainConfig) -> dict[str, float]:
        """Evaluate a trained network, and write its results; returns them by the keys of `measures`."""
        run = training.output_folder
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        results: dict[str, float] = {}
        for protocol in self.protocols:
            config = EvaluateConfig(
                checkpoint=run,
                backbone=training.backbone,
                protocol=protocol,
                variant=self.variant,
                far=self._far(protocol),
                output=folder,
                accelerator=training.accelerator,
                workers=training.workers,
                **self.options,
            )
            results |= _values(run_evaluation(config, Console(quiet=True)))
        results = {self._key(key): value for key, value in results.items()}
        content = {"settings": self.settings, "results": results} if self.name else results
        temporary = folder / f"{FILE_NAME}.tmp"  # so that a kill leaves a complete file or none
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(temporary, folder / FILE_NAME)
        return results


def _values(report: Mapping[str, Any]) -> dict[str, Any]:
    """The measures in the report of an evaluation."""
    result, scores = report["result"], report["scores"]
    if "dir_at_far" in result:
        at_far = result["dir_at_far"]
        return {
            "dir": at_far["dir"],
            "dir_resolved": at_far["far_resolved"],
            "unknown_probes": result["probes"]["non_mated"],
        }
    values = {"tar": scores["tar_at_far"], "far_resolved": scores["far_resolved"], "impostors": scores["impostors"]}
    if "rank1" in result:
        last = result["rank1"][-1]
        values |= {"rank1": last["rate"], "distractors": last["distractors"]}
    else:
        values["accuracy"] = result["accuracy"]
    separability = report["separability"] or {}  # some losses have no class weights
    return values | {"sep_mean": separability.get("mean"), "sep_std": separability.get("std")}


def split_word(word: str) -> tuple[str, str]:
    """Name and path of NAME=PATH.

    Raises:
        ValueError: it has another form.
    """
    name, _, path = word.partition("=")
    if not path or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"benchmarks: expected NAME=PATH with a name of letters, digits and -_., got {word!r}")
    return name, path


def open_benchmarks(words: tuple[str, ...], variant: LfwVariant, training: TrainConfig) -> tuple[Benchmark, ...]:
    """The benchmarks of NAME=PATH words, by default the test identities. Their lists and folders are read.

    Args:
        variant: of LFW's protocol.
        training: one of those of the comparison.

    Raises:
        DataError: there is nothing to evaluate at a path.
    """
    if not words:
        return (Benchmark("", TEST_IDENTITIES, {}, OF_IDENTITIES),)
    benchmarks = []
    for word in words:
        name, path = split_word(word)
        try:
            benchmark = _open(name, path, training)
        except (OSError, ValueError) as error:
            raise DataError(f"benchmarks: {word}: {error}") from error
        benchmarks.append(dataclasses.replace(benchmark, variant=variant))
    return tuple(benchmarks)


def _open(name: str, path: str, training: TrainConfig) -> Benchmark:
    if path == TEST_IDENTITIES:
        return Benchmark(name, path, {}, OF_IDENTITIES)
    if not Path(path).exists() and "," in path:
        parts = path.split(",")
        if len(parts) != 3:
            raise DataError("expected LISTS,PROBES,DISTRACTORS: MegaFace's templatelists and two folders of images")
        lists, probes, distractors = map(Path, parts)
        MegafaceImages.read(lists, probes, distractors, "")
        return Benchmark(name, path, {"lists": lists, "data": parts[1], "distractors": distractors}, ("megaface",))
    if path not in EMBEDDED and (reader := find_pair_list(path)):
        return Benchmark(name, path, {"data": path}, ("ytf" if reader().of_videos else "lfw",))
    if path not in EMBEDDED and not Path(path).exists():
        raise DataError(
            f"no file or folder {path!r}; expected one with pairs.txt or splits.txt, such a list, a .bin file, images of "
            "identities, or LISTS,PROBES,DISTRACTORS"
        )
    if training.data == (path if path in EMBEDDED else str(Path(path).resolve())):
        raise DataError(f"the networks are trained on these images: name others, or {name}={TEST_IDENTITIES}")
    images = load_splits(path, (8, 8), 1, test_fraction=0.0, seed=0).train
    folds = training.evaluation.folds
    make_pairs(images.labels.numpy(), 2 * folds, folds, seed=0)  # raises DataError if there are too few images
    return Benchmark(name, path, {"data": path}, OF_IDENTITIES)
