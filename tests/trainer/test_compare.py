"""The comparison of losses: its table, reuse of finished runs, and errors."""

import dataclasses
import io
import json

import pytest
from report_pages import read_page
from rich.console import Console

from fused_margin.commands.compare import main
from fused_margin.trainer.compare import run as module
from fused_margin.trainer.compare.config import CompareConfig, loss_config
from fused_margin.trainer.compare.run import compare
from fused_margin.trainer.compare.table import RANDOM, clear_best, markdown, table
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.models import ModelConfig
from fused_margin.trainer.train.checkpoint import CheckpointError
from fused_margin.trainer.train.named_losses import SMALL_DATA

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A comparison of two losses and two seeds, with networks that train in a second."""
    defaults = TrainConfig.defaults

    def tiny(*arguments):
        model = ModelConfig(image_size=(8, 8), widths=(4, 4, 8, 8), embedding_size=8)
        evaluation = dataclasses.replace(defaults(*arguments).evaluation, pairs=200)
        return dataclasses.replace(defaults(*arguments), model=model, evaluation=evaluation)

    monkeypatch.setattr(TrainConfig, "defaults", tiny)
    losses = RANDOM, "normface+exclusive"
    return CompareConfig(losses, (3, 4), 1, "digits", output=tmp_path / "out", accelerator="cpu")


@pytest.mark.slow
def test_interrupted_comparison_continues(config, monkeypatch):
    console, real, calls = Console(quiet=True), module.run, []

    def interrupted(training, inner):
        calls.append(training)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(training, inner)

    monkeypatch.setattr(module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config, console)
    report = compare(config, console)
    assert [(c.seed, c.loss.name, c.loss.exclusive_weight) for c in calls] == [
        (3, "normface", 1.0), (4, "normface", 1.0), (4, "normface", 1.0)
    ]  # fmt: skip
    again = compare(config, console)
    assert len(calls) == 3
    for name in config.losses:
        assert again["losses"][name]["seeds"] == report["losses"][name]["seeds"]
    assert report["losses"][RANDOM]["step_ms"] is None and report["losses"]["normface+exclusive"]["step_ms"] > 0
    assert json.loads((config.output / "compare.json").read_text())["losses"].keys() == set(config.losses)

    lines = (config.output / "compare.md").read_text().splitlines()
    assert len(lines) == 6 and lines[2].startswith(f"| {RANDOM} |") and lines[2].endswith("|  |")  # no step time
    assert lines[5] == "TAR at FAR = 0.001 allows no false accept, because there are only 100 impostor pairs."
    for name in config.losses:
        for seed, measured in zip(config.seeds, report["losses"][name]["seeds"], strict=True):
            folder = config.output / f"{name}-{seed}"
            pairs = json.loads((folder / "pairs.json").read_text())
            search = json.loads((folder / "megaface.json").read_text())
            identified = json.loads((folder / "identification.json").read_text())["result"]
            assert measured["dir"] == identified["dir_at_far"]["dir"] and identified["dir_at_far"]["far"] == 0.01
            assert measured["accuracy"] == pairs["result"]["accuracy"]
            assert measured["sep_mean"] == pairs["separability"]["mean"]
            assert measured["rank1"] == search["result"]["rank1"][-1]["rate"]
            assert measured["distractors"] == search["result"]["distractors"]

    page = read_page(config.output / "compare.html")
    assert {f"{name}-{seed}" for name in config.losses for seed in config.seeds} <= set(
        page.text.replace(":", "").split()
    )
    assert len(page.all("a")) == 5 + 2 * 3 + 2 * 4  # sections; three pages of each untrained run, four of each other
    for line in lines[2:4]:  # the same numbers as in the Markdown table
        assert " ".join(line.replace("|", " ").split()) in page.text
    assert f"fused-margin compare --losses {' '.join(config.losses)} --seeds 3 4 --epochs 1" in page.text

    with pytest.raises(CheckpointError, match="other options: --epochs 2"):
        compare(dataclasses.replace(config, epochs=2), console)
    monkeypatch.setattr(module, "load_run", lambda *_: {"config": {"of": "another version"}})
    with pytest.raises(CheckpointError, match=f"cannot continue {config.output / RANDOM}-3: "):
        compare(config, console)


def test_table():
    row = {"accuracy": 0.9, "tar": 0.5, "rank1": 1.0, "dir": 0.75, "sep_mean": 0.25, "sep_std": 0.125}
    other = {"accuracy": 0.92, "tar": 0.5, "rank1": 1.0, "dir": 0.75, "sep_mean": 0.35, "sep_std": 0.125}
    _, lines = table({"a": [row, other], "b": [row], RANDOM: [row]}, {"a": 21.04, "b": 20.0, RANDOM: None})
    assert lines[0] == [
        "a",
        "91.00 ± 1.41",
        "50.00 ± 0.00",
        "100.00 ± 0.00",
        "75.00 ± 0.00",
        "0.300 ± 0.071",
        "0.125 ± 0.000",
        "21.0",
    ]
    assert lines[1] == ["b", "90.00", "50.00", "100.00", "75.00", "0.250", "0.125", "20.0"] and lines[2][-1] == ""
    assert markdown(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | ---: |\n| 1 | 2 |\n"


def test_losses_without_class_weights_have_no_sep(config):
    config = dataclasses.replace(config, losses=("arcface", "triplet"), seeds=(3,))
    report = compare(config, Console(quiet=True))
    assert report["losses"]["triplet"]["seeds"][0]["sep_mean"] is None
    lines = (config.output / "compare.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[3][0] == "triplet" and cells[3][5:7] == ["", ""] and all(cells[2]) and cells[3][7]
    assert "triplet" in read_page(config.output / "compare.html").text
    assert clear_best({name: [*loss["seeds"]] * 2 for name, loss in report["losses"].items()}).get("sep_mean") is None


def test_best_is_marked_beyond_the_spread():
    def seeds(*accuracies, **others):
        return [
            {"accuracy": a, "tar": 0.5, "rank1": 0.5, "dir": 0.5, "sep_mean": 0.3, "sep_std": 0.1, **others}
            for a in accuracies
        ]

    # Means and deviations: 0.9 and 0.028, 0.8 and 0.028, and a higher one of the untrained network.
    rows = {"a": seeds(0.88, 0.92, sep_mean=0.4), "b": seeds(0.78, 0.82), RANDOM: seeds(1.0, 1.0, sep_mean=0.1)}
    assert clear_best(rows) == {"accuracy": "a", "sep_mean": "b"}
    assert "accuracy" not in clear_best({**rows, "b": seeds(0.81, 0.89)})  # 0.85 and 0.057
    assert clear_best({name: runs[:1] for name, runs in rows.items()}) == {}  # one seed has no spread
    assert clear_best({name: rows[name] for name in ("a", RANDOM)}) == {}  # there is nothing to compare with
    assert clear_best({RANDOM: rows[RANDOM]}) == {}


def test_page_marks_the_best(config, monkeypatch):
    values = {"tar": 0.5, "rank1": 0.5, "dir": 0.5, "distractors": 9, "sep_mean": 0.3, "sep_std": 0.1, "impostors": 9}
    accuracy = {"arcface": (0.9, 0.92), "cosface": (0.7, 0.72)}
    config = dataclasses.replace(config, losses=tuple(accuracy))

    def measured(training, *_, **__):
        return {**values, "accuracy": accuracy[training.loss.name][training.seed - 3]}

    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(module, "time_steps", lambda trainings: {"arcface-3": 20.0, "cosface-3": 30.0})
    compare(config, Console(quiet=True))
    page = read_page(config.output / "compare.html")
    assert page.numbers[0] == pytest.approx(91) and "arcface, the best beyond the spread" in page.text
    assert [cell["class"] for cell in page.all("td") if "best" in cell["class"]] == ["number best"]
    assert len(page.all("circle")) == 5 * 2 * 3 + 2  # a mean and two seeds of each loss and measure, and the step times
    compare(dataclasses.replace(config, seeds=(3,)), Console(quiet=True))
    page = read_page(config.output / "compare.html")
    assert "With one seed there is no spread" in page.text and not any("best" in c["class"] for c in page.all("td"))


def test_table_fits_a_narrow_screen(config, monkeypatch):
    name = "elasticface-plus+exclusive=0.125+contrastive"
    row = {"accuracy": 0.9, "tar": 0.5, "rank1": 1.0, "dir": 0.5, "distractors": 9, "sep_mean": 0.25, "sep_std": 0.125}
    monkeypatch.setattr(module, "measure", lambda *arguments, **options: row)
    monkeypatch.setattr(module, "time_steps", lambda trainings: {f"{name}-3": 1234.56})
    console = Console(width=80, record=True, file=io.StringIO())
    compare(dataclasses.replace(config, losses=(RANDOM, name)), console)
    printed = console.export_text()
    lines = printed.splitlines()
    assert max(map(len, lines[lines.index(RANDOM) - 4 : -1])) <= 80
    for loss, time in ((RANDOM, []), (name, ["1234.6"])):
        numbers = lines[lines.index(loss) + 1].split()
        assert numbers == ["90.00±0.00", "50.00±0.00", "100.00±0.00", "50.00±0.00", "0.250±0.000", *time]
    # The headings are wrapped; each line above the first loss has the words of several columns.
    heading = " ".join(lines[lines.index(RANDOM) - 2 : lines.index(RANDOM)]).split()
    expected = "verification accuracy, % TAR at FAR = 1e-3, % rank-1, % DIR at FAR = 1 %, % Sep mean ms per step"
    assert sorted(heading) == sorted(expected.split())
    assert "mean±std over 2 seeds" in printed
    assert "impostors may pass" not in printed  # runs of an older version do not report it


def test_help_names_auxiliary_losses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "subcenter-arcface" in printed and "contrastive=1" in printed and "center=0.003" in printed
    assert "am-softmax, coco, vmf" in printed and "center-invariant=1e-05" in printed


def test_names():
    arcface = loss_config("arcface")
    assert arcface.exclusive_weight == 0 and arcface.margin == SMALL_DATA["arcface"]["margin"]
    assert loss_config("arcface+exclusive=0.5").exclusive_weight == 0.5
    angular = loss_config("arcface+intra+inter+angular-triplet").companions  # a row of ArcFace's tables
    assert angular.weights() == {"intra": 1.0, "inter": 1.0, "angular_triplet": 1.0}
    assert loss_config("softmax+deepid2").companions.deepid2 == 0.05
    both = loss_config("cosface+exclusive+center=0.01")
    assert both.exclusive_weight == 1.0 and both.companions.center == 0.01
    added = loss_config("am-softmax+range=0.5+center-invariant").companions
    assert added.range == 0.5 and added.center_invariant == 1e-5
    assert both.weight_dtype == "float32" and loss_config("cosface+bfloat16").weight_dtype == "bfloat16"
    config = CompareConfig(("arcface+exclusive+bfloat16", "arcface+exclusive+bfloat16-nearest"))
    stochastic, nearest = (config.training(loss, 0) for loss in config.losses)
    assert (
        stochastic.loss
        == nearest.loss
        == dataclasses.replace(loss_config("arcface+exclusive"), weight_dtype="bfloat16")
    )
    assert stochastic.optimizer.stochastic_rounding and not nearest.optimizer.stochastic_rounding


# Losses that compare the samples of a batch, or have a term that does.
BETWEEN_SAMPLES = (
    "triplet", "angular-triplet", "contrastive", "siamese-l1", "arcface+siamese", "softmax+deepid2", "softmax+range",
    "am-softmax+marginal=0.5", "arcface+triplet", "siamese-l1+deepid2", "arcface+groups=4+angular-triplet",
)  # fmt: skip


def test_batches_of_identities(tmp_path):
    """As large as other batches, with four images of an identity, or two beside class weights, if images are compared."""
    other = "arcface", "softmax+center-invariant", "arcface+groups", "cosface+exclusive+intra", RANDOM
    config = CompareConfig((*BETWEEN_SAMPLES, *other))
    alone = "triplet", "angular-triplet", "contrastive", "siamese-l1", "siamese-l1+deepid2"
    for name in config.losses:
        training = config.training(name, 0)
        images = 0 if name in other else 4 if name in alone else 2
        assert (training.images_per_identity, training.batch_size) == (images, 128), name
    options = tmp_path / "options.yaml"
    for number in (0, 2):
        options.write_text(f"images_per_identity: {number}")
        config = CompareConfig(("arcface", *BETWEEN_SAMPLES), config=options)
        assert {config.training(name, 0).images_per_identity for name in config.losses} == {number}


def test_groups(tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("model: {groups: 6, group_aggregation: hard}")
    names = "arcface", "arcface+groups", "arcface+groups=8+exclusive"
    for file, expected in ((None, [0, 32, 8]), (options, [6, 32, 8])):
        config = CompareConfig(names, config=file)
        models = [config.training(name, 0).model for name in names]
        assert [model.groups for model in models] == expected
        assert {model.group_aggregation for model in models} == {"hard" if file else "soft"}
    assert loss_config(names[2]) == loss_config("arcface+exclusive")


TRAINED = (*BETWEEN_SAMPLES, "softmax+center-invariant", "arcface+groups=4")


def test_steps_of_losses_between_samples(config):
    """Each loss takes a step with its own batches, which changes the network."""
    config = dataclasses.replace(config, losses=TRAINED)
    splits = module.read_splits(config.training(TRAINED[0], 3))
    for name in TRAINED:
        trainer = module.Trainer(config.training(name, 3), splits)
        before = {key: value.clone() for key, value in trainer.backbone.named_parameters()}
        batch = splits.train.__getitems__(next(iter(trainer.batches)))
        result = trainer.train_step(batch.images, batch.labels)
        assert len(batch.labels) in (63, 64, 65) and result.loss > 0 and result.gradient_norm.isfinite(), name
        if (parts := result.parts) and "center-invariant" not in name:  # the centers start at 0
            assert all(part > 0 for part in parts.values()), name
        assert all((value != before[key]).any() for key, value in trainer.backbone.named_parameters()), name


@pytest.mark.slow
def test_comparison_of_losses_between_samples(config):
    config = dataclasses.replace(config, losses=TRAINED, seeds=(3,))
    report = compare(config, Console(quiet=True))
    for name in TRAINED:
        values = report["losses"][name]
        measured = values["seeds"][0]
        assert values["step_ms"] > 0 and 0 < measured["rank1"] <= 1
        assert (measured["sep_mean"] is None) == (not loss_config(name).has_class_weights)
        assert (values["groups"] == 4) == ("groups=4" in name)
        assert (values["images_per_identity"] > 0) == (name in BETWEEN_SAMPLES)
    page = read_page(config.output / "compare.html")
    assert "images per identity" in page.text and "groups" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "arkface"], "expected random-weights or one of"),
        (["--losses", "random-weights=3"], "random-weights takes no margin and no terms, got 'random-weights=3'"),
        (["--losses", "random-weights+groups"], "takes no margin and no terms, got 'random-weights+groups'"),
        (["--losses", "arcface+centroid"], "after the +, got 'centroid'"),
        (["--losses", "arcface+center=much"], "expected a number after center="),
        (["--losses", "arcface+bfloat16+bfloat16-nearest"], "expected one of bfloat16, bfloat16-nearest in arcface"),
        (["--losses", "arcface", "arcface"], "expected each once"),
        (["--losses", "arcface+center+center"], "expected center once in arcface+center+center"),
        (["--losses", "arcface+groups=1"], "expected a whole number of at least 2 after groups=, got '1'"),
        (["--losses", "arcface+groups=2.5"], "expected a whole number of at least 2 after groups=, got '2.5'"),
        (["--losses", "arcface+bfloat16=2"], "bfloat16 takes no number, got bfloat16=2"),
        (["--losses", "triplet+inter"], "loss.companions.inter: triplet has no class weights"),
        (["--seeds", "-1"], "seed must not be negative"),
        (["--seeds", "0", str(2**64)], "seed must be at most"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    text = capsys.readouterr()
    assert caught.value.code == 2 and message in " ".join((text.err + text.out).replace("│", " ").split())
