"""Writes what a device's result says into README.md and docs/scaling.md: `python -m benchmarks.publish [RESULT.json]`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fused_margin._ops.backends import select

from . import evidence, half, kernels, predictions, scaling
from .device_result import DeviceResult, median, newest
from .half import ours
from .problems import Shape
from .results import Section
from .tables import ABSENT, mebibytes
from .timing import duration

ROOT = Path(__file__).parents[1]
README, SCALING = ROOT / "README.md", ROOT / "docs" / "scaling.md"
GPU_RESULTS, MODEL_TIMES, MODEL_LIMIT = "gpu results", "model times", "model limit"
NO_RESULT = (
    "GPU: no result from a device is committed yet, so the families of tensor-core kernels are off.\n"
    "`python -m benchmarks.gpu` builds, checks and times everything where there is a device."
)
HEADER = ["what", "time", "predicted", "ratio to the reference", "peak extra memory", "error"]
PREDICTED = HEADER.index("predicted")
STEPS = (kernels.STEP, kernels.LARGE[0])
# Of each kind of peer the fastest is shown, beside the loss of ours that it computes.
PEERS = (
    ((half.TEXTBOOK, half.LEAN), half.KEPT),
    ((half.COMPILED, half.RECOMPUTING), half.KEPT),
    ((half.CUT,), half.NORMFACE),
    ((half.LIGER,), half.NORMFACE),
)


@dataclass
class Options:
    """Write README's GPU table, and the speeds and times of docs/scaling.md."""

    result: tyro.conf.Positional[Path | None] = None
    """File in benchmarks/results; by default the newest of a device, and if there is none, that there is none."""


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once each, in this order")
    return text[: text.index(begin) + len(begin)] + content.rstrip("\n") + "\n" + text[text.index(end) :]


def _row(section: Section, result: DeviceResult, name: str, what: str, ratio: tuple[str, str], label: str = "") -> str:
    """One row of README's table. ratio: of the time of the first contestant to that of the second."""
    entry = section.find(name)
    predicted = predictions.predicted(result.gpu, section.suite, section.shape, name)
    cells = [what, ABSENT, predicted.text if predicted else ABSENT, ABSENT, ABSENT, ABSENT]
    failure = entry.failure.replace("|", "\\|") if entry and entry.failure else None
    if entry and not entry.seconds:
        cells[1] = failure or ABSENT
    elif entry:
        cells[1] = duration(median(section, name))
        value = section.ratio(*ratio)
        cells[3] = ABSENT if value is None else f"{value:.2f}× {label}".rstrip()
        cells[4] = failure or (ABSENT if entry.peak_bytes is None else f"{mebibytes(entry.peak_bytes)} MiB")
        error = entry.largest_error if section.suite in kernels.KERNELS else entry.gradient_error
        cells[5] = ABSENT if error is None else f"{error:.1e}"
    return _line(result, cells)


def _line(result: DeviceResult, cells: list[str]) -> str:
    """A row of the table, without the column of predictions where they are for another device."""
    shown = cells if predictions.made_for(result.gpu) else cells[:PREDICTED] + cells[PREDICTED + 1 :]
    return f"| {' | '.join(shown)} |"


def _rows(result: DeviceResult) -> Iterator[str]:
    backend = result.backend
    sums, nearest = result.section(kernels.EXPONENT_SUM, kernels.STEP), result.section(kernels.NEAREST, kernels.CLASSES)
    alone = "cuBLAS's product alone"
    for section, name, what in (
        (sums, ours(backend), "exponent-sum kernel"),
        (nearest, ours(backend), "nearest-class kernel"),
        (sums, ours(backend, kernels.CALL), "forward call"),
    ):
        yield _row(section, result, name, f"{what}, {_classes(section.shape)}", (kernels.CUBLAS, name), alone)
    for shape in STEPS:
        section = result.section(kernels.HALF_STEP, shape)
        for name, operands in ((ours(backend), "half-precision"), (ours(f"{backend} {select.SPLIT}"), "split")):
            if shape == kernels.STEP or section.find(name):
                what = f"whole step, {operands} operands, {_classes(shape)}"
                yield _row(section, result, name, what, (half.FOUR, name), "four products")
        for names, detail in PEERS:
            if peer := _best(section, names):
                loss = f" ({detail})" if detail else ""
                yield _row(section, result, peer, f"{peer}{loss}, {_classes(shape)}", (peer, ours(backend, detail)))


def _best(section: Section, names: Sequence[str]) -> str | None:
    """The fastest; where none was timed, one that failed."""
    found = [name for name in names if section.find(name)]
    return min(found, key=lambda name: median(section, name) or float("inf"), default=None)


def _classes(shape: Shape) -> str:
    return f"C = {shape.classes:,}"


def _switched_on(result: DeviceResult) -> str:
    names = [
        f"`{name}` for compute capability {capability[0]}.{capability[1]}"
        for name, capability, file in evidence.switched_on()
        if file == result.name
    ]
    return f"This result switches on {', '.join(names)}." if names else "This result switches nothing on."


def gpu_results(result: DeviceResult | None) -> str:
    """What README says between its markers."""
    if result is None:
        return NO_RESULT
    content, shape = result.content, kernels.STEP
    versions, hardware = content["versions"], content["hardware"]
    predicted = "Predictions were made before the first run. " if predictions.made_for(result.gpu) else ""
    text = (
        f"{result.gpu}, driver {hardware.get('driver', 'unknown')}, torch {versions['torch']}, CUDA {versions['cuda']}, "
        f"{content.get('date', 'undated')[:10]}, commit `{(content.get('commit') or 'unknown')[:12]}`: kernels of `{result.backend}`, N = "
        f"{shape.rows:,}, D = {shape.dim}. The ratio is the time of the reference over ours within the same round; in a "
        f"peer's row the peer is the reference. {predicted}Memory is the peak above embeddings, weights and their gradients. "
        "Errors are against float64: of the logsumexp, of the cosine to the class found, of the loss, and in a step of "
        f"the gradients. {_switched_on(result)}"
    )
    if not content.get("complete"):
        text += " The run was cut short; what it did not reach is missing."
    lines = [
        textwrap.fill(text, scaling.WIDTH, break_on_hyphens=False, break_long_words=False),
        "",
        _line(result, HEADER),
        _line(result, ["---"] * len(HEADER)).replace(" ", ""),
        *_rows(result),
        "",
        f"`{result.file}`, whose times are written by",
        "",
        f"    {content.get('benchmark_command') or content['command']}",
    ]
    return "\n".join(lines)


def documents(result: DeviceResult | None) -> dict[Path, str]:
    """The text of each file as it should be."""
    speeds = scaling.speeds_of(result)
    blocks = {
        README: {GPU_RESULTS: gpu_results(result)},
        SCALING: {MODEL_TIMES: scaling.times(speeds), MODEL_LIMIT: scaling.limit(speeds)},
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
    source = f"from {result.file}" if result else "without a result of a device"
    print(f"Wrote README.md and docs/scaling.md {source}.")


if __name__ == "__main__":
    main()
