"""The page of a comparison of losses, compare.html."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fused_margin.evaluation.plurals import counted

from ..compare.benchmarks import Benchmark
from ..compare.config import CompareConfig
from ..compare.table import RANDOM, STEP_TIME, Measure, Rows, clear_best, mean_std, measured_values, unresolved_note
from ..config import TrainConfig
from ..train.named_losses import described_settings
from .charts import Chart
from .plots import Measurements, rows_chart
from .render import Command, Facts, Number, Result, Table, command_line, version_facts, write_page
from .results import short_path


class RunLinks(NamedTuple):
    """A run and the pages in its folder."""

    name: str
    links: list[tuple[str, str]]  # relative address, and name


def write_comparison_page(
    path: Path, report: Mapping[str, Any], config: CompareConfig, benchmarks: Sequence[Benchmark]
) -> None:
    """Write the page of a comparison; `report` has the values of compare.json."""
    rows = {loss: values["seeds"] for loss, values in report["losses"].items()}
    times = {loss: values["step_ms"] for loss, values in report["losses"].items()}
    step_ms = None if config.benchmarks else times
    measures = [measure for benchmark in benchmarks for measure in benchmark.measures]
    best = clear_best(rows, measures)
    seeds = counted(len(config.seeds), "seed")
    over = "mean ± standard deviation over the seeds" if len(config.seeds) > 1 else "one seed"
    note = unresolved_note(rows, measures)
    evaluated = (
        f"evaluated on {', '.join(benchmark.name for benchmark in benchmarks)}."
        if config.benchmarks
        else "verified on pairs of images of identities not trained on, and searched among them."
    )
    write_page(
        path,
        "compare.html",
        {
            "kind": "comparison",
            "title": f"{counted(len(rows), 'loss', 'losses')} on {short_path(config.images)}",
            "lead": f"Each trained for {counted(report['epochs'], 'epoch')} with {seeds} and the same other options, then "
            f"{evaluated}",
            "results": _results(rows, measures, best),
            "notes": [note] if note else [],
            "table": _table(rows, measures, step_ms, best, over),
            "marked": _marked(len(config.seeds), best),
            "charts": _charts(rows, measures, step_ms),
            "settings": _settings(config),
            "runs": _runs(path.parent, config, benchmarks),
            "settings_title": "How it was measured",
            "facts": [
                Facts("Data", [("images", config.images), *_data_facts(report)]),
                Facts("Training", [("epochs", f"{report['epochs']:,}"), ("seeds", ", ".join(map(str, config.seeds)))]),
                Facts("Machine", [("processor", report["machine"]), ("threads", report["threads"])]),
                Facts("Versions", version_facts(report["versions"])),
            ],
            "commands": _commands(config),
            "json_name": path.with_suffix(".json").name,
        },
    )


def _data_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "benchmarks" in report:
        return [
            (
                name,
                f"{settings['path']} ({', '.join([*settings['protocols'], settings.get('variant', '')]).strip(', ')})",
            )
            for name, settings in report["benchmarks"].items()
        ]
    return [("distractors", ", ".join(f"{n:,} (seed {seed})" for seed, n in report["distractors"].items()))]


def _results(rows: Rows, measures: Sequence[Measure], best: Mapping[str, str]) -> list[Result]:
    """The measures with a clearly best loss, and its value."""
    results = []
    for measure in measures:
        if (loss := best.get(measure.key)) is not None:
            number = _number(measured_values(rows[loss], measure), measure)
            results.append(Result(measure.heading, number, f"{loss}, the best beyond the spread"))
    return results


def _number(values: Sequence[float], measure: Measure, *, best: bool = False) -> Number:
    """Mean and deviation as in the other tables of the comparison."""
    mean, std = mean_std(values)
    note = "" if std is None else f"± {measure.text(std)}"
    return Number(100 * mean if measure.is_percent else mean, measure.text(mean), note, best)


def _table(
    rows: Rows,
    measures: Sequence[Measure],
    step_ms: Mapping[str, float | None] | None,
    best: Mapping[str, str],
    over: str,
) -> Table:
    lines: list[list[str | Number]] = []
    for loss, seeds in rows.items():
        line: list[str | Number] = [loss]
        for measure in measures:
            values = measured_values(seeds, measure)
            line.append(_number(values, measure, best=best.get(measure.key) == loss) if values else "")
        if step_ms is not None:
            milliseconds = step_ms[loss]
            line.append("" if milliseconds is None else Number(milliseconds, f"{milliseconds:.1f}"))
        lines.append(line)
    header = ["loss", *(measure.heading for measure in measures), *([] if step_ms is None else [STEP_TIME])]
    return Table(f"{over[:1].upper()}{over[1:]}.", header, lines)


def _marked(num_seeds: int, best: Mapping[str, str]) -> str:
    if num_seeds == 1:
        return "With one seed there is no spread, so no value is marked as the best."
    rule = "better than every other by more than both standard deviations together"
    if best:
        return f"A marked value is {rule}."
    return f"No value is marked: in no column is one {rule}."


def _charts(rows: Rows, measures: Sequence[Measure], step_ms: Mapping[str, float | None] | None) -> list[Chart]:
    charts = []
    for measure in measures:
        if not measure.title:
            continue
        measured = []
        for loss, seeds in rows.items():
            values = [(100 if measure.is_percent else 1) * value for value in measured_values(seeds, measure)]
            if values:
                measured.append(Measurements(loss, *mean_std(values), values))
        if measured:
            charts.append(rows_chart(measure.title, measure.label, measured, ".2f" if measure.is_percent else ".3f"))
    timed = [Measurements(loss, time, None, [time]) for loss, time in (step_ms or {}).items() if time is not None]
    if timed:
        charts.append(rows_chart("Time of a step", "milliseconds, median, lower is faster", timed, ".1f"))
    return charts


def _settings(config: CompareConfig) -> Table:
    """Settings of the trained losses, with a column for each setting that any of them has."""
    settings = {loss: _described(config.training(loss, config.seeds[0])) for loss in config.losses if loss != RANDOM}
    names = list(dict.fromkeys(name for described in settings.values() for name in described))
    rows = [[loss, *(described.get(name, "") for name in names)] for loss, described in settings.items()]
    return Table("Settings that a loss does not have are empty.", ["loss", *names], rows)


def _described(training: TrainConfig) -> dict[str, str]:
    """The settings of a loss, and those of the training that depend on it."""
    of_loss = {"groups": training.model.groups, "images per identity": training.images_per_identity}
    return dict(described_settings(training.loss)) | {name: str(number) for name, number in of_loss.items() if number}


def _runs(folder: Path, config: CompareConfig, benchmarks: Sequence[Benchmark]) -> list[RunLinks]:
    """The runs that have pages, with addresses relative to the page of the comparison."""
    pages = {"report.html": "training"}
    for benchmark in benchmarks:
        pages |= benchmark.pages
    runs = []
    for loss in config.losses:
        for seed in config.seeds:
            run = config.training(loss, seed).output_folder.name
            links = [(quote(f"{run}/{page}"), name) for page, name in pages.items() if (folder / run / page).is_file()]
            if links:
                runs.append(RunLinks(run, links))
    return runs


def _commands(config: CompareConfig) -> list[Command]:
    program = "fused-margin compare"
    more = dataclasses.replace(config, seeds=(*config.seeds, max(config.seeds) + 1))
    run = config.training(config.losses[-1], config.seeds[0]).output_folder
    evaluate = ["fused-margin", "evaluate", "--checkpoint", str(run), "--data", "FOLDER"]
    return [
        Command("Repeat this comparison; finished runs are kept:", command_line(program, config)),
        Command("Add a seed:", command_line(program, more)),
        Command("Evaluate a run on other images:", shlex.join(evaluate)),
        Command("Compare the curves of all runs:", shlex.join(["tensorboard", "--logdir", str(config.output)])),
    ]
