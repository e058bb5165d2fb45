"""The page of an identification, identify.html: each probe and its best match, as pictures if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fused_margin.evaluation import Gallery, Recognition
from fused_margin.evaluation.plurals import counted, counted_identities

from ..evaluate.mistakes import nearest_member
from ..identify.config import IdentifyConfig
from ..identify.inputs import IdentifyInput
from .charts import Chart, Mark, bars_path, plot_scales, vertical_path
from .mistakes import Mistake, MistakeGroup, describe_images, picture_note
from .render import Command, Facts, Number, Result, Table, command_line, version_facts, write_page
from .results import duration, short_path, skipped_lines

MAX_PICTURED = 60  # probes of each kind with pictures
MAX_LISTED = 1000  # probes in the table
BINS = 40  # of the histogram of scores


@dataclass(frozen=True)
class IdentifyContent:
    """What the page shows besides the values of the report."""

    config: IdentifyConfig
    inputs: IdentifyInput
    gallery: Gallery
    found: Recognition
    threshold: float
    checkpoint: Path | None


def write_identify_page(path: Path, report: Mapping[str, Any], content: IdentifyContent) -> None:
    """Write the page; `report` has the values of its JSON file."""
    gallery, probes, threshold = report["gallery"], report["probes"], report["threshold"]
    known, number = probes["known"], probes["number"]
    size = f"{counted(gallery['images'], 'image')} of {counted_identities(gallery['identities'])}"
    write_page(
        path,
        "identify.html",
        {
            "kind": "identification",
            "title": f"{short_path(probes['path'])} in {short_path(gallery['path'])}",
            "lead": f"{counted(number, 'probe')}, searched in a gallery of {size}. A probe is known if the cosine to the "
            "best identity is at or above the threshold.",
            "results": [
                Result("Known", Number(known, f"{known:,}"), f"of {counted(number, 'probe')}"),
                Result("Unknown", Number(number - known, f"{number - known:,}"), "below the threshold"),
                Result("Threshold", Number(threshold["value"], f"{threshold['value']:.3f}"), _source(threshold)),
                Result(
                    "Gallery",
                    Number(gallery["identities"], f"{gallery['identities']:,}"),
                    f"identities, {counted(gallery['images'], 'image')}",
                ),
            ],
            "notes": [] if threshold["resolved"] else [f"{threshold['text'][:1].upper()}{threshold['text'][1:]}."],
            "charts": [score_chart(content)],
            "groups": _groups(content),
            "pictures": picture_note(content.inputs.shown_probes),
            "table": _table(report["results"]),
            "unreadable": report["unreadable"],
            "skipped": skipped_lines(report["skipped"]),
            "settings_title": "What was identified",
            "facts": [
                Facts("Gallery", _gallery_facts(report)),
                Facts("Probes", [("path", probes["path"]), ("number", f"{number:,}")]),
                Facts(
                    "Run",
                    [
                        ("checkpoint", report["checkpoint"] or "none, of features"),
                        ("mirror image", report["flip"]),
                        ("device", report["device"]),
                        ("time", duration(report["seconds"])),
                        *version_facts(report["versions"]),
                    ],
                ),
            ],
            "commands": _commands(content),
            "json_name": path.with_suffix(".json").name,
        },
    )


def _source(threshold: Mapping[str, Any]) -> str:
    return "cosine, as given" if threshold["far"] is None else f"cosine, estimated for FAR = {threshold['far']:g}"


def score_chart(content: IdentifyContent) -> Chart:
    """Histogram of the best scores of the probes, with the threshold."""
    best = content.found.scores[:, 0]
    low, high = min(best.min(), content.threshold), max(best.max(), content.threshold)
    counts, edges = np.histogram(best, BINS, (low, high if high > low else low + 0.1))
    share = counts / len(best)
    to_x, to_y = plot_scales((edges[0], edges[-1]), (0, 1.08 * share.max()))
    marks = [
        Mark("area", "first", bars_path(to_x(edges), to_y(share), float(to_y(0))), label=counted(len(best), "probe")),
        Mark("dashes", "third", vertical_path(float(to_x(content.threshold))), label="threshold"),
    ]
    known = np.count_nonzero(content.found.is_known)
    return Chart(
        "Scores",
        f"Histogram of the best scores of {counted(len(best), 'probe')}: {known:,} at or above the threshold "
        f"{content.threshold:.3f}.",
        "cosine to the best identity",
        "share of the probes",
        to_x.ticks,
        to_y.ticks,
        marks,
    )


def _groups(content: IdentifyContent) -> list[MistakeGroup]:
    """Pictures of known and of unknown probes, each with an image of the best identity."""
    inputs, gallery, found = content.inputs, content.gallery, content.found
    if inputs.shown_probes is None or inputs.shown_enrolled is None:
        return []
    probe, enrolled = describe_images(inputs.shown_probes), describe_images(inputs.shown_enrolled)
    identity = gallery.index_of(inputs.labels)
    best = gallery.index_of(found.names[:, 0])

    def pictured(rows: np.ndarray) -> list[Mistake]:
        return [
            Mistake(
                [
                    probe(row)._replace(identity=""),
                    enrolled(nearest_member(inputs.probes[row], inputs.enrolled, identity, int(best[row])))._replace(
                        identity=str(found.names[row, 0])
                    ),
                ],
                dict(zip(found.names[row].tolist(), found.scores[row].tolist(), strict=True)),
            )
            for row in rows[:MAX_PICTURED].tolist()
        ]

    known, unknown = np.flatnonzero(found.is_known), np.flatnonzero(~found.is_known)
    columns = "probe", "match"
    return [
        MistakeGroup(
            "known", "Known", f"{_first(len(known))} with the names of the best identities.", columns, pictured(known)
        ),
        MistakeGroup(
            "unknown",
            "Unknown",
            f"{_first(len(unknown))} with the best identity, whose score is below the threshold.",
            columns,
            pictured(unknown),
        ),
    ]


def _first(number: int) -> str:
    if number > MAX_PICTURED:
        return f"The first {MAX_PICTURED} of {number:,} probes,"
    return f"{counted(number, 'probe')},"


def _table(records: list[dict[str, Any]]) -> Table:
    """The names and scores of the first probes."""
    ranks = range(1, len(records[0]["names"]) + 1)
    header = ["probe", "decision", *(f"{cell} {rank}" for rank in ranks for cell in ("name", "cosine"))]
    rows: list[list[str | Number]] = []
    for record in records[:MAX_LISTED]:
        row: list[str | Number] = [record["probe"], "known" if record["known"] else "unknown"]
        for name, score in zip(record["names"], record["scores"], strict=True):
            row += [name, Number(score, f"{score:.3f}")]
        rows.append(row)
    more = len(records) - MAX_LISTED
    note = f" {more:,} more are in identify.csv." if more > 0 else ""
    return Table(f"The identities with the highest scores, the best first.{note}", header, rows)


def _gallery_facts(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    gallery = report["gallery"]
    facts = [
        ("path", gallery["path"]),
        ("identities", f"{gallery['identities']:,}"),
        ("images", f"{gallery['images']:,}"),
        ("templates", f"{gallery['templates']:,} ({gallery['template']})"),
    ]
    if lost := gallery["unread_identities"]:
        facts.append(("without a readable image", ", ".join(lost)))
    return facts


def _commands(content: IdentifyContent) -> list[Command]:
    config = replace(content.config, checkpoint=content.checkpoint)
    stricter = replace(config, threshold=min(1.0, round(content.threshold + 0.05, 2)), far=None)
    texts = {"Repeat this identification:": config, "With a threshold of your own, here a stricter one:": stricter}
    return [Command(text, command_line("fused-margin identify", options)) for text, options in texts.items()]
