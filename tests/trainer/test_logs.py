"""Every step of a run is logged exactly once, for any number of resumptions."""

import csv
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fused_margin.trainer.train.logs import CURVES_NAME, LOG_NAME, RunLog
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.run import run

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(autouse=True)
def one_second_at_a_time(monkeypatch):
    """Advance the clock one second at a time: TensorBoard orders files by their start in seconds."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer.time", SimpleNamespace(time=lambda: next(seconds))
    )


def rows_of(folder):
    with open(folder / LOG_NAME, newline="") as file:
        return list(csv.DictReader(file))


def curve(folder, name):
    events = EventAccumulator(str(folder / CURVES_NAME))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    log = RunLog(tmp_path, 0, ["loss"])
    for step in (2, 4, 6, 8):
        log.write(step, {"loss": step / 2})
    log.close()
    assert [row["loss"] for row in rows_of(tmp_path)] == ["1", "2", "3", "4"]
    with open(tmp_path / LOG_NAME, "a") as file:
        file.write("1")  # a truncated row of step 10 or later

    log = RunLog(tmp_path, 5, ["loss", "accuracy"])  # the step of the checkpoint
    for step in (6, 8):
        log.write(step, {"loss": step / 4})
    log.write(8, {"accuracy": 0.5})  # more of the same step
    log.close()
    assert rows_of(tmp_path) == [
        {"step": "2", "loss": "1", "accuracy": ""},
        {"step": "4", "loss": "2", "accuracy": ""},
        {"step": "6", "loss": "1.5", "accuracy": ""},
        {"step": "8", "loss": "2", "accuracy": "0.5"},
    ]
    assert curve(tmp_path, "loss") == [(2, 1), (4, 2), (6, 1.5), (8, 2)]
    assert curve(tmp_path, "accuracy") == [(8, 0.5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_NAME, CURVES_NAME]


def test_rows_without_a_checkpoint_are_dropped(tmp_path):
    log = RunLog(tmp_path, 0, ["loss/arcface"])
    log.write(3, {"loss/arcface": 1.0})
    log.close()
    RunLog(tmp_path, 0, ["loss"]).close()
    assert (tmp_path / LOG_NAME).read_text().split() == ["step,loss"]


def test_flushed_rows_survive_a_kill(tmp_path):
    log = RunLog(tmp_path, 0, ["loss"])
    log.write(1, {"loss": 1.0})
    log.flush()
    assert [row["step"] for row in rows_of(tmp_path)] == ["1"]
    assert curve(tmp_path, "loss") == [(1, 1)]
    log.close()


def test_rows_are_appended(tmp_path):
    """The file is not replaced, and values of the last step extend its row."""
    log = RunLog(tmp_path, 0, ["loss", "accuracy"])
    file = (tmp_path / LOG_NAME).stat().st_ino
    for step, loss in enumerate((0.123456, 0.25), 1):
        log.write(step, {"loss": loss})
        log.flush()
    for accuracy in (0.123456, 0.5):  # the second value is shorter
        log.write(2, {"accuracy": accuracy})
        log.flush()
        assert (tmp_path / LOG_NAME).read_text().splitlines() == [
            "step,loss,accuracy", "1,0.123456,", f"2,0.25,{accuracy}"
        ]  # fmt: skip
    log.write(3, {"loss": 1.0})
    log.close()
    assert (tmp_path / LOG_NAME).read_text().splitlines()[2:] == ["2,0.25,0.5", "3,1,"]
    assert (tmp_path / LOG_NAME).stat().st_ino == file

    log = RunLog(tmp_path, 3, ["loss", "separability"])  # another version adds columns
    log.write(3, {"separability": 0.75})
    log.close()
    assert (tmp_path / LOG_NAME).read_text().splitlines()[::3] == ["step,loss,accuracy,separability", "3,1,,0.75"]


def test_killed_and_resumed_run_logs_the_same_as_an_uninterrupted_one(tiny_config, tmp_path, monkeypatch):
    console = Console(quiet=True)
    config = dataclasses.replace(
        tiny_config,
        log_every=3,
        checkpoint_every=10,
        loss=dataclasses.replace(
            tiny_config.loss, companions=dataclasses.replace(tiny_config.loss.companions, center=0.1)
        ),
    )
    uninterrupted = dataclasses.replace(config, output=tmp_path / "uninterrupted")
    report = run(uninterrupted, console)

    take_step = Trainer.train_step

    def die_at_27(trainer, images, labels):
        if trainer.step == 27:
            raise MemoryError
        return take_step(trainer, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die_at_27)
        patch.setattr(
            "fused_margin.trainer.train.progress.LINE_SECONDS", 0.0
        )  # so that steps after the checkpoint are logged
        with pytest.raises(MemoryError):
            run(config, console)
    assert [int(row["step"]) for row in rows_of(config.output)] == [1, *range(3, 28, 3)]
    run(dataclasses.replace(config, resume=True), console)
    run(dataclasses.replace(config, resume=True), console)  # a finished run verifies again

    expected, actual = rows_of(uninterrupted.output), rows_of(config.output)
    assert [int(row["step"]) for row in actual] == [1, *range(3, 40, 3), 40]
    for row in (*expected, *actual):
        assert float(row.pop("images_per_second")) > 0
    assert actual == expected
    assert curve(config.output, "loss") == curve(uninterrupted.output, "loss")

    last = actual[-1]
    assert float(last["loss/arcface"]) + float(last["loss/center"]) == pytest.approx(float(last["loss"]), rel=1e-5)
    assert float(actual[1]["lr"]) == pytest.approx(config.optimizer.lr * 3 / 5)  # third of four warm-up steps
    assert float(last["verification/accuracy"]) == pytest.approx(report["verification"]["accuracy"], rel=1e-6)
    assert float(last["separability/mean"]) == pytest.approx(report["separability"]["mean"], rel=1e-6)
    assert all(float(row["gradient_norm"]) > 0 for row in actual)
