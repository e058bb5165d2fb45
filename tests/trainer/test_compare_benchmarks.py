"""`fused-margin compare` on a folder of images and on benchmarks: the columns of the papers' tables, and errors."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
from report_pages import read_page
from rich.console import Console

from fused_margin.commands.compare import main
from fused_margin.trainer.compare import run as module
from fused_margin.trainer.compare.benchmarks import open_benchmarks
from fused_margin.trainer.compare.config import CompareConfig, loss_config
from fused_margin.trainer.compare.run import compare
from fused_margin.trainer.compare.table import RANDOM, table, unresolved_note
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.train.named_losses import LossConfig, make_loss

pytestmark = pytest.mark.usefixtures("blank_pictures")

OPTIONS = """
batch_size: 16
model: {image_size: [8, 8], widths: [4, 4, 8, 8], embedding_size: 8}
evaluation: {pairs: 40, folds: 2}
loss: {name: cosface, margin: 0.1}
seed: 7
"""


@pytest.fixture(scope="module")
def sets(face_folder, tmp_path_factory):
    """Benchmarks made of the images of a folder, by name, as words of --benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    names = [f"person_{number}" for number in range(8)]
    for name in names:
        for kind in ("lfw", f"ytf/{name}/0", f"ytf/{name}/1"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            image = face_folder / name / f"{number}.png"
            photograph = root / "lfw" / name / f"{name}_{number:04d}.png"
            photograph.parent.mkdir(exist_ok=True)
            shutil.copy(image, photograph)
            shutil.copy(image, root / "ytf" / name / str(number % 2))
    others = [*names[1:], names[0]]
    pairs = [line for a, b in zip(names, others, strict=True) for line in (f"{a}\t0\t1", f"{a}\t2\t{b}\t3")]
    (root / "lfw/pairs.txt").write_text("\n".join(["2\t4", *pairs]))
    rows = []
    for number, (a, b) in enumerate(zip(names, others, strict=True)):
        rows += [f"{1 + number // 4}, {a}/0, {a}/1, 1", f"{1 + number // 4}, {a}/0, {b}/1, 0"]
    (root / "ytf/splits.txt").write_text("\n".join(["split, first, second, same", *rows]))
    images = [(face_folder / name / f"{n}.png").read_bytes() for name in names for n in (0, 1)]
    flags = [True] * 8 + [False] * 8
    mixed = [image for n in range(8) for image in (images[2 * n], images[(2 * n + 3) % 16])]
    (root / "agedb_30.bin").write_bytes(pickle.dumps((images + mixed, flags)))
    (root / "lists").mkdir()
    probes = {
        "path": [f"{name}/{n}.png" for name in names[:3] for n in range(3)],
        "id": np.repeat(names[:3], 3).tolist(),
    }
    (root / "lists/facescrub_features_list.json").write_text(json.dumps(probes))
    distractors = {"path": [f"{name}/{n}.png" for name in names[3:] for n in range(4)]}
    (root / "lists/megaface_features_list.json_20_1").write_text(json.dumps(distractors))
    (root / "options.yaml").write_text(OPTIONS)
    shutil.copytree(face_folder, root / "own")
    return {
        "LFW": f"LFW={root}/lfw",
        "YTF": f"YTF={root}/ytf",
        "AgeDB-30": f"AgeDB-30={root}/agedb_30.bin",
        "MegaFace": f"MegaFace={root}/lists,{face_folder},{face_folder}",
        "own": f"own={root}/own",
        "options": root / "options.yaml",
    }


def words(sets, *names):
    return tuple(sets[name] for name in names)


def test_columns_of_the_papers(sets):
    """RegularFace's: LFW, YTF, and MegaFace's rank-1 and verification. ArcFace's: a column per verification set."""
    for names, headings, values in (
        (("LFW", "YTF", "MegaFace"), ["LFW", "YTF", "MegaFace rank-1", "MegaFace verification"], "93.00 95.00 50.00 25.00"),
        (("LFW", "AgeDB-30"), ["LFW", "AgeDB-30"], "93.00 88.50"),
    ):  # fmt: skip
        benchmarks = open_benchmarks(words(sets, *names), "insightface", TrainConfig())
        measures = [measure for benchmark in benchmarks for measure in benchmark.measures]
        results = {
            "LFW/accuracy": 0.93, "YTF/accuracy": 0.95, "AgeDB-30/accuracy": 0.885, "MegaFace/rank1": 0.5,
            "MegaFace/tar": 0.25, "MegaFace/far_resolved": False, "MegaFace/impostors": 180, "sep_mean": 0.1,
        }  # fmt: skip
        header, (line,) = table({"softmax": [results]}, None, measures)
        assert header == ["loss", *(f"{name}, %" for name in headings)] and line == ["softmax", *values.split()]
        note = "The TAR of MegaFace allows no false accept, because there are only 180 impostor pairs."
        assert unresolved_note({"softmax": [results]}, measures) == (note if "MegaFace" in names else "")


@pytest.mark.slow
def test_tables_of_the_papers(face_folder, sets, tmp_path, monkeypatch, capsys):
    calls, real = [], module.run
    monkeypatch.setattr(module, "run", lambda config, console: calls.append(config) or real(config, console))
    arguments = [
        *(
            "--data",
            str(face_folder),
            "--losses",
            "softmax",
            "sphereface=1.35+exclusive",
            "--seeds",
            "0",
            "--epochs",
            "1",
        ),
        *("--config", str(sets["options"]), "--output", str(tmp_path / "out"), "--accelerator", "cpu"),
        *("--variant", "regularface", "--benchmarks"),
    ]
    assert main([*arguments, *words(sets, "LFW", "YTF", "MegaFace")]) == 0
    lines = (tmp_path / "out/compare.md").read_text().splitlines()
    assert lines[0] == "| loss | LFW, % | YTF, % | MegaFace rank-1, % | MegaFace verification, % |"
    report = json.loads((tmp_path / "out/compare.json").read_text())
    assert report["benchmarks"]["LFW"]["variant"] == "regularface" and report["epochs"] == 1
    for line, (loss, values) in zip(lines[2:], report["losses"].items(), strict=False):
        folder, results = tmp_path / "out" / f"{loss}-0" / "benchmarks", values["seeds"][0]
        lfw, ytf, megaface = (
            json.loads((folder / f"{name}.json").read_text())
            for name in ("LFW/lfw-regularface", "YTF/ytf", "MegaFace/megaface")
        )
        rank1, verification = megaface["result"]["rank1"][-1], megaface["scores"]
        assert rank1["distractors"] == 20 and verification["far"] == 1e-6
        rates = lfw["result"]["accuracy"], ytf["result"]["accuracy"], rank1["rate"], verification["tar_at_far"]
        assert line == "| " + " | ".join([loss, *(f"{100 * rate:.2f}" for rate in rates)]) + " |"
        assert results["sep_mean"] == lfw["separability"]["mean"]
    assert lines[-1] == "The TAR of MegaFace allows no false accept, because there are only 180 impostor pairs."

    # All identities are trained on, with the losses' settings for photographs.
    assert [(c.test_fraction, c.batch_size, c.seed, c.loss) for c in calls] == [
        (0.0, 16, 0, LossConfig("softmax")),
        (0.0, 16, 0, LossConfig("sphereface", margin=1.35, exclusive_weight=1.0)),
    ]
    page = read_page(tmp_path / "out/compare.html")
    for text in (*lines[2:4], "evaluated on LFW, YTF, MegaFace.", "--benchmarks LFW="):
        assert " ".join(text.replace("|", " ").split()) in page.text
    assert {a["href"] for a in page.all("a")} >= {
        "softmax-0/report.html", "softmax-0/benchmarks/LFW/lfw-regularface.html", "softmax-0/benchmarks/MegaFace/megaface.html"
    }  # fmt: skip
    assert "ms per step" not in page.text

    # Another table of the same networks: nothing is trained again.
    capsys.readouterr()
    assert main([*arguments, *words(sets, "LFW", "AgeDB-30", "own")]) == 0
    lines = (tmp_path / "out/compare.md").read_text().splitlines()
    assert lines[0].startswith(
        "| loss | LFW, % | AgeDB-30, % | own accuracy, % | own TAR at FAR = 1e-3, % | own rank-1"
    )
    assert len(calls) == 2 and "softmax, seed 0: LFW " in capsys.readouterr().out


@pytest.mark.slow
def test_changed_benchmark_is_evaluated_again(face_folder, sets, tmp_path):
    config = CompareConfig(
        (RANDOM,), (0,), data=str(face_folder), benchmarks=("own=test-identities", sets["LFW"].replace("LFW", "lfw", 1)),
        config=sets["options"], output=tmp_path / "out", accelerator="cpu",
    )  # fmt: skip
    assert config.training(RANDOM, 0).test_fraction == 0.2
    first = compare(config, Console(quiet=True))["losses"][RANDOM]["seeds"][0]
    stored = tmp_path / "out" / f"{RANDOM}-0/benchmarks/lfw/measured.json"
    content = json.loads(stored.read_text())
    content["results"]["lfw/accuracy"] = -1.0
    stored.write_text(json.dumps(content))
    again = compare(config, Console(quiet=True))["losses"][RANDOM]["seeds"][0]
    assert again == {**first, "lfw/accuracy": -1.0}  # kept
    other = dataclasses.replace(config, variant="regularface")
    assert compare(other, Console(quiet=True))["losses"][RANDOM]["seeds"][0]["lfw/accuracy"] >= 0
    assert first["own/distractors"] == 4 and 0 <= first["own/accuracy"] <= 1


def test_wrong_benchmarks_are_errors_before_training(face_folder, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "measure", None)
    monkeypatch.setattr(module.Console, "status", None)
    lists, probes, distractors = sets["MegaFace"].partition("=")[2].split(",")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.bin").write_bytes(b"no pickle")
    for number in (0, 1):
        (tmp_path / f"singles/{number}").mkdir(parents=True)
        shutil.copy(face_folder / f"person_{number}/0.png", tmp_path / f"singles/{number}")
    for word, message in (
        (f"lfw={tmp_path}/nowhere", "no file or folder"),
        (f"lfw={tmp_path}/empty", "no identities in"),
        (f"own={face_folder}", "the networks are trained on these images: name others, or own=test-identities"),
        (f"lfw={tmp_path}/bad.bin", "bad.bin"),
        (f"own={tmp_path}/singles", "verification needs two identities or more, one of them with two images"),
        (f"megaface={lists},{probes}", "expected LISTS,PROBES,DISTRACTORS"),
        (f"megaface={lists},{probes},{tmp_path}/empty", "20 of the 20 distractors listed in"),
        (f"megaface={probes},{probes},{distractors}", "no facescrub_features_list.json in"),
    ):
        arguments = ["--data", str(face_folder), "--losses", "softmax", "--output", str(tmp_path / "out")]
        assert main([*arguments, "--benchmarks", word]) == 1
        printed = " ".join(capsys.readouterr().err.split())
        assert f"benchmarks: {word}: " in printed and message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--benchmarks lfw", "expected NAME=PATH"),
        ("--benchmarks a/b=lfw", "expected NAME=PATH with a name of letters, digits and -_., got 'a/b=lfw'"),
        ("--benchmarks lfw=a lfw=b", "benchmarks: expected each once, got lfw lfw"),
        ("--losses arcface=wide", "expected a number after arcface=, got 'wide'"),
        ("--losses softmax=0.3", "softmax has none, got 0.3"),
        ("--data nowhere", "no folder 'nowhere'"),
        ("--config wrong.yaml", "wrong.yaml: output: not in the file of a comparison"),
        ("--config unknown.yaml", "unknown.yaml: epoch: no such option"),
        ("--config several.yaml", "devices: compare trains in one process, got 2 in several.yaml"),
        ("--config all.yaml", "test_fraction: with 0 there are no test identities"),
        ("--config nowhere.yaml", "cannot read the configuration nowhere.yaml"),
    ],
)
def test_wrong_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("wrong", "output: runs"), ("unknown", "epoch: 3"), ("several", "devices: 2"), ("all", "test_fraction: 0.0")
    ):  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    streams = capsys.readouterr()
    assert caught.value.code == 2 and message in " ".join((streams.err + streams.out).replace("│", " ").split())


def test_settings_of_the_trainings(face_folder, sets):
    one = ("arcface",), (0,)
    default = CompareConfig(*one)
    assert default.training("arcface", 0) == dataclasses.replace(
        TrainConfig(), loss=loss_config("arcface"), output=default.output / "arcface-0"
    )
    photographs = CompareConfig(*one, data=str(face_folder)).training("arcface", 0)
    assert photographs.loss == LossConfig("arcface") and photographs.epochs == 30
    assert photographs.evaluation.flip == "concat" and photographs.data == str(face_folder.resolve())
    listed = CompareConfig(*one, config=sets["options"], network="paper").training("cosface", 5)
    assert listed.loss == loss_config("cosface") and listed.seed == 5 and listed.batch_size == 16
    assert listed.network == "paper" and listed.model.image_size == (8, 8) and listed.epochs == 5
    assert CompareConfig(*one, data="digits", epochs=2).training("arcface", 0).epochs == 2
    assert loss_config("arcface=0.45+exclusive").margin == 0.45


@pytest.mark.parametrize("name", ["softmax", "l2-softmax", "l-softmax"])
def test_exclusive_term_of_weights_with_lengths(name):
    """The term is the mean cosine of the weights' directions, also where their lengths count."""
    import torch

    with_term, without = (make_loss(loss_config(text), 6, 5) for text in (f"{name}+exclusive=0.5", name))
    with torch.no_grad():
        with_term.weight.mul_(torch.arange(1.0, 7)[:, None])
    without.load_state_dict(with_term.state_dict(), strict=False)
    embeddings, labels = torch.randn(4, 5), torch.tensor([0, 5, 2, 2])
    weight = with_term.weight.detach().double().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    term = (unit @ unit.T - 2 * np.eye(6)).max(axis=1).mean()
    difference = with_term(embeddings, labels) - without(embeddings, labels)
    assert difference.item() == pytest.approx(0.5 * term, abs=1e-5)
    (gradient,) = torch.autograd.grad(difference, with_term.weight, retain_graph=True, allow_unused=True)
    own, (plain,) = gradient, torch.autograd.grad(without(embeddings, labels), without.weight)
    along = ((own - plain) * with_term.weight).sum(dim=1)
    assert along.abs().max() < 1e-4  # the term turns the weights, and leaves their lengths alone
