"""Writes results into documents: `python -m benchmarks.publish [RESULT.json]`.

It writes the result of a GPU into docs/results/gpu.md and docs/results/scaling.md, the results of the head study into that
study's README, and the picture of README.md.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fused_margin._ops.backends import select
from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.timing import duration

from ..common.files import ROOT
from ..comparison.report import Section
from ..comparison.tables import ABSENT, mebibytes
from ..gpu import evidence
from ..head import documents as head
from ..head import summary
from ..kernels import names, predictions
from ..kernels.device_result import DeviceResult, median, newest
from ..kernels.names import ours
from ..sharding import model

PAGES = ROOT / "docs" / "results"
GPU, SCALING, HEAD = PAGES / "gpu.md", PAGES / "scaling.md", head.README
GPU_RESULTS, MODEL_TIMES, MODEL_LIMIT = "gpu results", "model times", "model limit"
NO_RESULT = (
    "GPU: no result of a GPU is committed yet, so the tensor-core kernels are off.\n"
    "`python -m benchmarks.gpu` builds, checks and times them on a machine with a GPU."
)
HEADER = ["measurement", "time", "predicted", "ratio to the reference", "peak extra memory", "error"]
PREDICTED = HEADER.index("predicted")
STEPS = (names.STEP, names.LARGE[0])
# Names of similar peers, of which the fastest is shown, and the contestant of ours with the same loss.
PEERS = (
    ((names.TEXTBOOK, names.LEAN), names.DEFAULT),
    ((names.COMPILED, names.RECOMPUTING), names.DEFAULT),
    ((names.CUT,), names.NORMFACE),
    ((names.LIGER,), names.NORMFACE),
)


@dataclass
class Options:
    """Write docs/results/gpu.md, the speeds and times of docs/results/scaling.md, and the results in benchmarks/head."""

    result: tyro.conf.Positional[Path | None] = None
    """File in benchmarks/results. Default: the newest result of a GPU; without one, a note that there is none."""


def replace_block(text: str, name: str, content: str) -> str:
    """Replace the text between the markers `name` with `content`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once each, in this order")
    return text[: text.index(begin) + len(begin)] + content.rstrip("\n") + "\n" + text[text.index(end) :]


def _row(
    section: Section, result: DeviceResult, name: str, subject: str, ratio: tuple[str, str], label: str = ""
) -> str:
    """One row of the table. ratio: two contestants, time of the first over time of the second."""
    entry = section.find(name)
    predicted = predictions.predicted(result.gpu, section.suite, section.shape, name)
    cells = [subject, ABSENT, predicted.text if predicted else ABSENT, ABSENT, ABSENT, ABSENT]
    failure = entry.failure.replace("|", "\\|") if entry and entry.failure else None
    if entry and not entry.seconds:
        cells[1] = failure or ABSENT
    elif entry:
        cells[1] = duration(median(section, name))
        value = section.ratio(*ratio)
        cells[3] = ABSENT if value is None else f"{value:.2f}× {label}".rstrip()
        cells[4] = failure or (ABSENT if entry.peak_bytes is None else f"{mebibytes(entry.peak_bytes)} MiB")
        error = entry.largest_error if section.suite in names.KERNELS else entry.gradient_error
        cells[5] = ABSENT if error is None else f"{error:.1e}"
    return _line(result, cells)


def _line(result: DeviceResult, cells: list[str]) -> str:
    """One line of the table, without the column of predictions if they are for another device."""
    shown = cells if predictions.made_for(result.gpu) else cells[:PREDICTED] + cells[PREDICTED + 1 :]
    return f"| {' | '.join(shown)} |"


def _rows(result: DeviceResult) -> Iterator[str]:
    backend = result.backend
    sums, nearest = result.section(names.EXPONENT_SUM, names.STEP), result.section(names.NEAREST, names.CLASSES)
    alone = "bare product by cuBLAS"
    for section, name, subject in (
        (sums, ours(backend), "exponent-sum kernel"),
        (nearest, ours(backend), "nearest-class kernel"),
        (sums, ours(backend, names.CALL), "forward call"),
    ):
        yield _row(section, result, name, f"{subject}, {_classes(section.shape)}", (names.CUBLAS, name), alone)
    for shape in STEPS:
        section = result.section(names.HALF_STEP, shape)
        for name, operands in ((ours(backend), "half-precision"), (ours(f"{backend} {select.SPLIT}"), "split")):
            if shape == names.STEP or section.find(name):
                subject = f"step, {operands} operands, {_classes(shape)}"
                yield _row(section, result, name, subject, (names.FOUR, name), "four products")
        for peers, detail in PEERS:
            if peer := _best(section, peers):
                loss = f" ({detail})" if detail else ""
                yield _row(section, result, peer, f"{peer}{loss}, {_classes(shape)}", (peer, ours(backend, detail)))


def _best(section: Section, contestants: Sequence[str]) -> str | None:
    """The fastest of the contestants, or one that failed if none was timed."""
    found = [name for name in contestants if section.find(name)]
    return min(found, key=lambda name: median(section, name) or float("inf"), default=None)


def _classes(shape: Shape) -> str:
    return f"C = {shape.classes:,}"


def _switched_on(result: DeviceResult) -> str:
    def kernels(of_this_result: bool) -> str:
        return ", ".join(
            f"`{name}` for compute capability {capability[0]}.{capability[1]}"
            + ("" if of_this_result else f" (`{file}`)")
            for name, capability, file in evidence.switched_on()
            if (file == result.name) == of_this_result
        )

    if own := kernels(True):
        return f"This result switches on {own}."
    others = kernels(False)
    return "This result switches nothing on." + (f" Other results switch on {others}." if others else "")


def gpu_results(result: DeviceResult | None) -> str:
    """The block `gpu results` of docs/results/gpu.md."""
    if result is None:
        return NO_RESULT
    content, shape = result.content, names.STEP
    versions, hardware = content["versions"], content["hardware"]
    predicted = "Predictions were made before the first run. " if predictions.made_for(result.gpu) else ""
    text = (
        f"{result.gpu}, driver {hardware.get('driver', 'unknown')}, torch {versions['torch']}, CUDA {versions['cuda']}, "
        f"{content.get('date', 'undated')[:10]}, commit `{(content.get('commit') or 'unknown')[:12]}`: kernels of `{result.backend}`, N = "
        f"{shape.rows:,}, D = {shape.dim}. The ratio is the time of the reference over our time, median over rounds; in the "
        f"row of a peer, the peer is the reference. {predicted}Memory is the peak above embeddings, weights and their "
        "gradients. Errors are relative to float64: of the logsumexp, of the cosine to the class found, of the loss, and "
        f"for steps, of the gradients. {_switched_on(result)}"
    )
    if not content.get("complete"):
        text += " The run was interrupted, so some measurements are missing."
    lines = [
        textwrap.fill(text, model.WIDTH, break_on_hyphens=False, break_long_words=False),
        "",
        _line(result, HEADER),
        _line(result, ["---"] * len(HEADER)).replace(" ", ""),
        *_rows(result),
        "",
        f"The times are in `{result.file}`, written by",
        "",
        f"    {content.get('benchmark_command') or content['command']}",
    ]
    return "\n".join(lines)


def documents(result: DeviceResult | None) -> dict[Path, str]:
    """The new text of each file."""
    speeds = model.speeds_of(result)
    blocks = {
        GPU: {GPU_RESULTS: gpu_results(result)},
        SCALING: {MODEL_TIMES: model.times(speeds), MODEL_LIMIT: model.limit(speeds)},
        HEAD: {head.BLOCK: head.block()},
    }
    texts = {}
    for path, contents in blocks.items():
        texts[path] = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            texts[path] = replace_block(texts[path], name, content)
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.publish", args=arguments)
    result = newest() if options.result is None else DeviceResult.read(options.result)
    if result is not None and not result.is_of_kernels:
        sys.exit(f"{options.result} is not a result of the kernels suite on a GPU")
    for path, text in documents(result).items():
        path.write_text(text, encoding="utf-8")
    if (study := head.newest(head.COMPARISON)) is not None:
        summary.draw(study[1], summary.PICTURE)
    source = f"from {result.file}" if result else "without a result of a GPU"
    print(
        f"Wrote docs/results/gpu.md and docs/results/scaling.md {source}, benchmarks/head/README.md and docs/images/head.png."
    )


if __name__ == "__main__":
    main()
