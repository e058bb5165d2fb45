"""The block of this study's README that shows the committed results. `python -m benchmarks.publish` writes it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.files import RESULTS, ROOT
from ..comparison.tables import ABSENT, mebibytes, milliseconds

README = ROOT / "benchmarks" / "head" / "README.md"
BLOCK = "head results"
COMPARISON, MANY = "head", "head, many classes"  # the entry `study` of a file of results
NO_RESULT = "None is committed yet."
WIDTH = 120


def newest(study: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete file of results of `study`."""
    found = []
    for path in sorted(RESULTS.glob("*head*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("study") == study and content["complete"]:
            found.append((content["date"], path, content))
    return max(found, key=lambda each: each[0])[1:] if found else None


def block() -> str:
    parts = []
    if (comparison := newest(COMPARISON)) is not None:
        parts.append(_comparison(*comparison))
    if (many := newest(MANY)) is not None:
        parts.append(_many(*many))
    return "\n\n".join(parts) or NO_RESULT


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _machine(content: dict[str, Any]) -> str:
    hardware = content["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {content['threads']} threads"
    return f"{machine}, torch {content['versions']['torch']}, {content['date'][:10]}"


def _link(path: Path) -> str:
    return f"[{path.name}](../results/{path.name})"


def _targets(content: dict[str, Any]) -> Iterator[str]:
    yield from ("| target | limit | measured | met |", "|---|---|---|---|")
    for target in content["targets"]:
        yield f"| {target['goal']} | {target['target']} | {target['measured']} | {'yes' if target['met'] else 'no'} |"


def _comparison(path: Path, content: dict[str, Any]) -> str:
    figure = path.with_suffix(".png")
    rows = [
        "| N | contestant | step ms | forward | backward | optimizer | ratio | peak MiB above weights and momentum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for problem in content["problems"]:
        for row in problem["contestants"]:
            median = row["median"]
            times = [row["failure"] or ABSENT, *[ABSENT] * 3]
            if median:
                times = [milliseconds(1e3 * median[name]) for name in ("whole", "forward", "backward", "optimizer")]
            value = ABSENT if row["ratio"] is None else f"{row['ratio']:.2f}×"
            cells = [f"{problem['shape']['rows']:,}", row["name"], *times, value, mebibytes(row["peak_bytes"])]
            rows.append(f"| {' | '.join(cells)} |")
    shape = content["problems"][0]["shape"]
    intro = (
        f"{_link(path)}: C = {shape['classes']:,}, D = {shape['dim']:,}, fp32, on {_machine(content)}. "
        "Phases of the round with the median time; ratio: time over ours, step in backward, median over rounds."
    )
    picture = [f"![Time and memory of one step](../results/{figure.name})", ""] if figure.exists() else []
    return "\n".join([_paragraph(intro), "", *picture, *rows, "", *_targets(content)])


def _many(path: Path, content: dict[str, Any]) -> str:
    shape = content["shape"]
    steps = content["steps"]
    text = (
        f"{_link(path)}: {shape['classes']:,} classes, D = {shape['dim']:,}, N = {shape['rows']:,}, class weights and "
        f"momentum in {content['dtype']}, on {_machine(content)}: {content['median_seconds']:.3g} s per step, the loss "
        f"goes from {steps[0]['loss']:.3g} to {steps[-1]['loss']:.3g} in {len(steps)} steps on one batch, the process "
        f"takes {content['peak_process_bytes'] / 1e9:.1f} GB at its peak, of which class weights and momentum are "
        f"{(content['weight_bytes'] + content['momentum_bytes']) / 1e9:.1f} GB. A step takes "
        f"{mebibytes(content['peak_bytes'])} MiB above them. Bytes per class between steps: "
        f"{content['counted_bytes_per_class']:,} counted, {content['measured_bytes_per_class']:,.0f} measured."
    )
    return _paragraph(text)
