"""Identifies every probe in a gallery, and writes the ranked names as CSV, JSON and a page."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fused_margin as fm
from fused_margin.evaluation import DataError, Gallery, Recognition, enroll, estimate_threshold, recognize
from fused_margin.evaluation.features import READERS
from fused_margin.evaluation.files import SUFFIXES, describe_skipped
from fused_margin.evaluation.plurals import counted, counted_identities

from ..evaluate.progress import Show, show_progress
from ..evaluate.reports import versions
from ..pages.identify import IdentifyContent, write_identify_page
from .config import FAR, IdentifyConfig
from .inputs import IdentifyInput, contents, read_feature_files, read_images

NAME = "identify"  # of the files
MAX_PRINTED = 30  # probes in the table on the screen


class Threshold(NamedTuple):
    """A threshold, and how it was found."""

    value: float
    far: float | None = None  # wanted; None: the user has given the threshold
    measured: float | None = None  # false alarm rate of the images of the gallery
    resolved: bool = True  # whether there are enough of them for `far`

    def describe(self, images: int) -> str:
        """The threshold in words, with the number of `images` in the gallery."""
        if self.far is None:
            return f"threshold {self.value:.3f}, as given"
        text = (
            f"threshold {self.value:.3f}, estimated for FAR {self.far:g} from {counted(images, 'image')} of the gallery"
        )
        if not self.resolved:
            needed = math.ceil(1 / self.far - 1e-9)  # without the rounding error of 1 / 0.01
            text += f"; with fewer than {needed:,} images, it is above all of their scores with other identities"
        return text


def uses_features(config: IdentifyConfig) -> bool:
    """Whether gallery and probes are features.

    Raises:
        DataError: one is features and the other images, or one is neither.
    """
    gallery, probes = (contents(path) for path in (config.gallery, config.probes))
    if gallery != "features" and config.gallery.is_file():
        raise DataError(
            f"{config.gallery} is neither a folder of images, {config.gallery}/identity/image.jpg, nor a file of features "
            f"({', '.join(READERS)})"
        )
    endings = f"{', '.join(SUFFIXES)} (images) or {', '.join(READERS)} (features)"
    if gallery is None:
        where = config.gallery / "identity"
        raise DataError(
            f"no images or features in {config.gallery}: expected {where}/... with files ending in {endings}"
        )
    if probes is None:
        raise DataError(
            f"no images or features in {config.probes}: expected files ending in {endings}"
            if config.probes.is_dir()
            else f"{config.probes} is neither an image nor a file of features: expected a file ending in {endings}"
        )
    if gallery != probes:
        raise DataError(f"{config.gallery} has {gallery}, {config.probes} has {probes}: expected the same in both")
    return gallery == "features"


def run_identify(config: IdentifyConfig, console: Console, checkpoint: Path | None) -> dict[str, Any]:
    """Identify the probes and write the results.

    Args:
        checkpoint: of the network, or its folder; None: gallery and probes are features.

    Raises:
        BackboneError, CheckpointError: the network cannot be used.
        DataError: the images or features do not allow it.
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    use_gpu = config.accelerator != "cpu" and fm.build_info()["cuda"]["available"]
    device = torch.device("cuda" if use_gpu else "cpu")
    with console.status("reading") as status:
        if checkpoint is None:
            inputs = read_feature_files(config)
        else:
            inputs = read_images(config, checkpoint, device, status.update)
        try:
            gallery = enroll(inputs.enrolled, inputs.labels, config.template)
            threshold = find_threshold(config, inputs, gallery, device, status.update)
            found = recognize(
                inputs.probes,
                gallery,
                threshold.value,
                min(config.top, len(gallery.names)),
                device=device,
                progress=show_progress(status.update, "identifying", "probes"),
            )
        except ValueError as error:
            raise DataError(f"cannot identify {config.probes} in {config.gallery}: {error}") from error
    report: dict[str, Any] = {
        "gallery": {
            "path": str(config.gallery),
            "identities": len(gallery.names),
            "images": len(inputs.enrolled),
            "templates": len(gallery.templates),
            "template": config.template,
            "unread_identities": inputs.unread_identities,
        },
        "probes": {
            "path": str(config.probes),
            "number": len(inputs.probes),
            "known": int(np.count_nonzero(found.is_known)),
            "dimensions": inputs.probes.shape[1],
        },
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "flip": inputs.flip,
        "threshold": {**threshold._asdict(), "text": threshold.describe(len(inputs.enrolled))},
        "unreadable": inputs.unreadable,
        "skipped": dict(inputs.skipped),
        "results": _records(inputs.names, found),
        "versions": versions(),
        "device": str(device),
        "seconds": round(time.monotonic() - started, 2),
    }
    output = config.output_folder
    output.mkdir(parents=True, exist_ok=True)
    _write_csv(output / f"{NAME}.csv", report["results"])
    (output / f"{NAME}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    content = IdentifyContent(config, inputs, gallery, found, threshold.value, checkpoint)
    write_identify_page(output / f"{NAME}.html", report, content)
    _print_report(console, report, output)
    return report


def find_threshold(
    config: IdentifyConfig, inputs: IdentifyInput, gallery: Gallery, device: torch.device, show: Show
) -> Threshold:
    """The given threshold, or one that the images of the gallery give.

    Raises:
        DataError: the gallery has one identity, so that none can be estimated.
    """
    if config.threshold is not None:
        return Threshold(config.threshold)
    if len(gallery.names) == 1:
        raise DataError(
            f"{config.gallery} has one identity, and a threshold is estimated from several: choose one with --threshold"
        )
    progress = show_progress(show, "estimating the threshold", "images of the gallery")
    found = estimate_threshold(
        inputs.enrolled, inputs.labels, gallery, config.far or FAR, device=device, progress=progress
    )
    return Threshold(found.threshold, found.fpir, found.measured, found.resolved)


def _records(names: Sequence[str], found: Recognition) -> list[dict[str, Any]]:
    """A record of each probe, with the names from the best on."""
    rows = zip(names, found.is_known.tolist(), found.names.tolist(), found.scores.tolist(), strict=True)
    return [{"probe": probe, "known": known, "names": best, "scores": scores} for probe, known, best, scores in rows]


def _write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    # File names may have any encoding.
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        ranks = range(1, len(records[0]["names"]) + 1)
        writer.writerow(["probe", "known", *(f"{column}{rank}" for rank in ranks for column in ("name", "score"))])
        for record in records:
            ranked = zip(record["names"], record["scores"], strict=True)
            cells = [cell for name, score in ranked for cell in (name, f"{score:.6f}")]
            writer.writerow([record["probe"], int(record["known"]), *cells])


def _print_report(console: Console, report: dict[str, Any], output: Path) -> None:
    gallery, probes, records = report["gallery"], report["probes"], report["results"]
    size = f"{counted_identities(gallery['identities'])}, {counted(gallery['images'], 'image')}"
    console.print(f"gallery {gallery['path']}: {size}", highlight=False, soft_wrap=True)
    console.print(report["threshold"]["text"], highlight=False, soft_wrap=True)
    table = Table(title=f"{probes['known']:,} of {counted(probes['number'], 'probe')} known")
    for heading in ("probe", "identity", "scores, the best first"):
        table.add_column(heading, overflow="fold")
    for record in records[:MAX_PRINTED]:
        ranked = zip(record["names"], record["scores"], strict=True)
        scores = ", ".join(f"{name} {score:.3f}" for name, score in ranked)
        table.add_row(record["probe"], record["names"][0] if record["known"] else "unknown", scores)
    console.print(table)
    if len(records) > MAX_PRINTED:
        console.print(f"{len(records) - MAX_PRINTED:,} more in {NAME}.csv", highlight=False)
    if skipped := report["skipped"]:
        console.print(describe_skipped(skipped), highlight=False, soft_wrap=True)
    if unreadable := report["unreadable"]:
        console.print(f"skipped {counted(len(unreadable), 'unreadable image')}:", highlight=False)
        for line in unreadable[:MAX_PRINTED]:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    if lost := gallery["unread_identities"]:
        console.print(f"not in the gallery, because no image can be read: {', '.join(lost)}", highlight=False)
    console.print(f"files in {output}: {NAME}.csv, {NAME}.json, {NAME}.html", highlight=False, soft_wrap=True)
