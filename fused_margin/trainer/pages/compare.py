"""The page of a comparison of losses, compare.html."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fused_margin.evaluation.plurals import counted

from ..compare.config import RANDOM, CompareConfig
from ..compare.table import MEASURES, PERCENT, STEP_TIME, clear_best, mean_std, unresolved_note
from ..train.named_losses import described_settings
from .charts import Chart
from .plots import Measurements, rows_chart
from .render import Command, Facts, Number, Result, Table, command_line, version_facts, write_page

CHARTS = {
    "accuracy": ("Verification accuracy", "%, higher is better"),
    "tar": ("TAR at FAR = 1e-3", "%, higher is better"),
    "rank1": ("Rank-1 rate", "%, higher is better"),
    "sep_mean": ("Sep mean", "cosine to the nearest other class, lower is further apart"),
}  # Title and label of a measure's chart
PAGES = {"report.html": "training", "pairs.html": "pairs", "megaface.html": "search"}  # of a run, with their names


class RunLinks(NamedTuple):
    """A run and the pages in its folder."""

    name: str
    links: list[tuple[str, str]]  # relative address, and name


def write_comparison_page(path: Path, report: Mapping[str, Any], config: CompareConfig) -> None:
    """Write the page of a comparison; `report` has the values of compare.json."""
    rows = {loss: values["seeds"] for loss, values in report["losses"].items()}
    step_ms = {loss: values["step_ms"] for loss, values in report["losses"].items()}
    best = clear_best(rows)
    seeds = counted(len(config.seeds), "seed")
    over = "mean ± standard deviation over the seeds" if len(config.seeds) > 1 else "one seed"
    note = unresolved_note(rows)
    write_page(
        path,
        "compare.html",
        {
            "kind": "comparison",
            "title": f"{counted(len(rows), 'loss', 'losses')} on {config.data}",
            "lead": f"Each trained for {counted(config.epochs, 'epoch')} with {seeds} and the same other options, then verified "
            "on pairs of images of identities not trained on, and searched among them.",
            "results": _results(rows, best),
            "notes": [note] if note else [],
            "table": _table(rows, step_ms, best, over),
            "marked": _marked(len(config.seeds), best),
            "charts": _charts(rows, step_ms),
            "settings": _settings(config),
            "runs": _runs(path.parent, config),
            "settings_title": "How it was measured",
            "facts": [
                Facts(
                    "Data",
                    [
                        ("images", config.data),
                        ("distractors", ", ".join(f"{n:,} (seed {seed})" for seed, n in report["distractors"].items())),
                    ],
                ),
                Facts("Training", [("epochs", f"{config.epochs:,}"), ("seeds", ", ".join(map(str, config.seeds)))]),
                Facts("Machine", [("processor", report["machine"]), ("threads", report["threads"])]),
                Facts("Versions", version_facts(report["versions"])),
            ],
            "commands": _commands(config),
            "json_name": path.with_suffix(".json").name,
        },
    )


def _results(rows: Mapping[str, Sequence[Mapping[str, float]]], best: Mapping[str, str]) -> list[Result]:
    """The measures with a clearly best loss, and its value."""
    results = []
    for measure, loss in best.items():
        number = _number([measured[measure] for measured in rows[loss]], measure)
        results.append(Result(MEASURES[measure], number, f"{loss}, the best beyond the spread"))
    return results


def _number(values: Sequence[float], measure: str, *, best: bool = False) -> Number:
    """Mean and deviation as in the other tables of the comparison."""
    factor, digits = (100, 2) if measure in PERCENT else (1, 3)
    mean, std = mean_std([factor * value for value in values])
    return Number(mean, f"{mean:.{digits}f}", "" if std is None else f"± {std:.{digits}f}", best)


def _table(
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    step_ms: Mapping[str, float | None],
    best: Mapping[str, str],
    over: str,
) -> Table:
    lines: list[list[str | Number]] = []
    for loss, seeds in rows.items():
        numbers = [
            _number([measured[measure] for measured in seeds], measure, best=best.get(measure) == loss)
            for measure in MEASURES
        ]
        milliseconds = step_ms[loss]
        time = "" if milliseconds is None else Number(milliseconds, f"{milliseconds:.1f}")
        lines.append([loss, *numbers, time])
    return Table(f"{over[:1].upper()}{over[1:]}.", ["loss", *MEASURES.values(), STEP_TIME], lines)


def _marked(num_seeds: int, best: Mapping[str, str]) -> str:
    if num_seeds == 1:
        return "With one seed there is no spread, so no value is marked as the best."
    rule = "better than every other by more than both standard deviations together"
    if best:
        return f"A marked value is {rule}."
    return f"No value is marked: in no column is one {rule}."


def _charts(rows: Mapping[str, Sequence[Mapping[str, float]]], step_ms: Mapping[str, float | None]) -> list[Chart]:
    charts = []
    for measure, (title, label) in CHARTS.items():
        factor, digits = (100, 2) if measure in PERCENT else (1, 3)
        measured = []
        for loss, seeds in rows.items():
            values = [factor * seed[measure] for seed in seeds]
            measured.append(Measurements(loss, *mean_std(values), values))
        charts.append(rows_chart(title, label, measured, f".{digits}f"))
    timed = [Measurements(loss, time, None, [time]) for loss, time in step_ms.items() if time is not None]
    if timed:
        charts.append(rows_chart("Time of a step", "milliseconds, median, lower is faster", timed, ".1f"))
    return charts


def _settings(config: CompareConfig) -> Table:
    """Settings of the trained losses, with a column for each setting that any of them has."""
    settings = {
        loss: dict(described_settings(config.training(loss, config.seeds[0]).loss))
        for loss in config.losses
        if loss != RANDOM
    }
    names = list(dict.fromkeys(name for described in settings.values() for name in described))
    rows = [[loss, *(described.get(name, "") for name in names)] for loss, described in settings.items()]
    return Table("Settings that a loss does not have are empty.", ["loss", *names], rows)


def _runs(folder: Path, config: CompareConfig) -> list[RunLinks]:
    """The runs that have pages, with addresses relative to the page of the comparison."""
    runs = []
    for loss in config.losses:
        for seed in config.seeds:
            run = config.training(loss, seed).output_folder.name
            links = [(quote(f"{run}/{page}"), name) for page, name in PAGES.items() if (folder / run / page).is_file()]
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
