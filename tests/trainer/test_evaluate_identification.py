"""`fused-margin evaluate --protocol identification`: numbers, mistakes, galleries, errors."""

from pathlib import Path

import numpy as np
import pytest
from evaluations import clusters, evaluate, fails, own_folder, write  # noqa: F401
from report_pages import read_page

from fused_margin.evaluation import split_gallery
from fused_margin.trainer.evaluate import inputs

pytestmark = pytest.mark.usefixtures("blank_pictures", "own_folder")
PROTOCOL = "--protocol", "identification"


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_scores(features, labels, gallery, probes, template):
    """Scores (P, K) of identities in ascending order, by plain loops."""
    rows, names = unit(features), np.unique(labels[gallery])
    members = [rows[gallery][labels[gallery] == name] for name in names]
    if template == "mean":
        members = [unit(part.mean(axis=0, keepdims=True)) for part in members]
    return names, np.array([[max(part @ rows[probe]) for part in members] for probe in probes])


@pytest.mark.parametrize(("template", "far"), [("mean", 0.05), ("all", 0.2)])
def test_numbers_by_plain_loops(template, far):
    features, _, labels = clusters(identities=40, size=16, noise=0.9).values()
    options = "--unknown", 0.4, "--enrolled", 2, "--template", template, "--far", far
    report = evaluate(*write(features=features, labels=labels), *PROTOCOL, *options)
    gallery, probes, is_unknown = split_gallery(labels, 0.4, 2, 0)
    names, scores = plain_scores(features, labels, gallery, probes, template)
    mate = np.array([list(names).index(labels[row]) if labels[row] in names else -1 for row in probes])
    assert ((mate < 0) == is_unknown).all()
    best, known = scores.max(axis=1), ~is_unknown
    of_mate = scores[np.arange(len(probes)), mate]
    rank = 1 + (scores > of_mate[:, None]).sum(axis=1)

    result = report["result"]
    assert result["gallery"] == {
        "identities": 24,
        "images": 48,
        "templates": 24 if template == "mean" else 48,
        "template": template,
    }
    assert result["probes"] == {"mated": 96, "mated_identities": 24, "non_mated": 96, "non_mated_identities": 16}
    assert result["cmc"] == pytest.approx([np.mean(rank[known] <= number) for number in range(1, 21)])
    assert [row["rank"] for row in result["rank_rates"]] == [1, 5, 10]
    assert [row["rate"] for row in result["rank_rates"]] == [result["cmc"][number - 1] for number in (1, 5, 10)]
    at_far = result["dir_at_far"]
    alarms = np.sort(best[is_unknown])[::-1]
    threshold = alarms[int(far * 96)]
    assert at_far["threshold"] == pytest.approx(threshold) and at_far["far_resolved"]
    assert at_far["fpir"] == pytest.approx(int(far * 96) / 96)
    found = (rank == 1) & (of_mate > threshold)
    assert at_far["dir"] == np.mean(found[known]) and at_far["fnir"] == pytest.approx(1 - at_far["dir"])
    assert 0.1 < at_far["dir"] < result["cmc"][0] < 1

    passes = scores > threshold + 1e-9
    accepted, own_accepted = passes.sum(axis=1), passes[np.arange(len(probes)), mate] & known
    verified = result["by_verification"]
    assert verified["mated_correct"] == np.mean((own_accepted & (accepted == 1))[known])
    assert verified["mated_ambiguous"] == np.mean((own_accepted & (accepted > 1))[known])
    assert verified["mated_wrong"] == np.mean((~own_accepted & (accepted > 0))[known])
    assert verified["mated_none"] == np.mean((accepted == 0)[known])
    assert verified["non_mated_none"] == pytest.approx(1 - at_far["fpir"])
    assert verified["false_match_rate"] == pytest.approx((passes.sum() - own_accepted.sum()) / (scores.size - 96))

    # The page lists the same mistakes.
    text = read_page("out/identification.html").text
    wrong = np.flatnonzero(known & (rank > 1))
    rejected = np.flatnonzero(known & (rank == 1) & (of_mate < threshold))
    assert f"{len(wrong)} of 96 known probes have a higher score with another identity" in text
    assert f"{int(far * 96)} of 96 unknown probes have a score at or above" in text
    assert f"{len(rejected)} of 96 known probes have their own identity as the best match" in text
    assert (len(wrong) + len(rejected)) / 96 == pytest.approx(at_far["fnir"])
    worst = wrong[best[wrong].argmax()]
    nearest = [
        max(gallery[labels[gallery] == name], key=lambda row: unit(features)[row] @ unit(features)[probes[worst]])
        for name in (names[scores[worst].argmax()], labels[probes[worst]])
    ]
    listed = text.partition("its identity ")[2]
    listed = listed[listed.index(f"{best[worst]:.3f}") :].replace(" ,", ",")
    cells = [f"row {row}, label {labels[row]}" for row in (probes[worst], *nearest)]
    assert listed.startswith(f"{best[worst]:.3f} {of_mate[worst]:.3f} {' '.join(cells)}")


@pytest.mark.slow
@pytest.mark.parametrize("unknown", [0, 0.5])
def test_figure_is_drawn(pictures, unknown):
    evaluate(*write(**clusters()), *PROTOCOL, "--unknown", unknown, drawn=True)


def test_closed_set(capsys):
    """Probes that are all known, of a split and of a gallery of its own: the rates that need unknown ones are null."""
    features, _, labels = clusters(noise=1.5).values()
    report = evaluate(*write(features=features, labels=labels), *PROTOCOL, "--unknown", 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "rank-1" in printed and not {"DIR", "FPIR", "nan"} & set(printed.split())
    gallery, probes, is_unknown = split_gallery(labels, 0)
    assert not is_unknown.any() and (np.unique(labels[gallery]) == np.unique(labels)).all()
    names, scores = plain_scores(features, labels, gallery, probes, "mean")
    found = names[scores.argmax(axis=1)]
    result = report["result"]
    assert result["cmc"][0] == np.mean(found == labels[probes]) and 0 < result["cmc"][0] < result["cmc"][-1] == 1
    assert result["probes"] == {"mated": 36, "mated_identities": 12, "non_mated": 0, "non_mated_identities": 0}
    assert result["dir_at_far"] is None and result["by_verification"] is None
    page = read_page("out/identification.html")
    assert f"{np.sum(found != labels[probes])} of 36 known probes have a higher score with another" in page.text
    assert "Wrong identities" in page.text and "Accepted unknown probes" not in page.text

    np.savez("people.npz", features=features[gallery], labels=labels[gallery])
    np.savez("probes.npz", features=features[probes], labels=labels[probes])
    assert evaluate("--features", "probes.npz", "--gallery", "people.npz", *PROTOCOL)["result"] == result


def test_unresolved_far_is_said():
    report = evaluate(*write(**clusters()), *PROTOCOL)
    at_far = report["result"]["dir_at_far"]
    assert at_far["far"] == 0.01 and not at_far["far_resolved"]  # of 36 unknown probes
    assert report["result"]["probes"]["non_mated"] == 36
    assert "below the rate of one of 36 unknown probes" in read_page("out/identification.html").text


def test_own_gallery_of_features(capsys):
    """Identities have names, in a file and in folders."""
    features, _, labels = clusters().values()
    features = features.astype(np.float32)  # as read from folders
    names = np.array([f"person {label}" for label in labels])
    first = np.arange(72) % 6 == 0
    known = first & (labels < 8)
    np.savez("people.npz", features=features[known], labels=names[known])
    np.savez("probes.npz", features=features[~first], labels=names[~first])
    report = evaluate("--features", "probes.npz", "--gallery", "people.npz", *PROTOCOL)
    result = report["result"]
    assert result["gallery"]["identities"] == result["gallery"]["images"] == 8
    assert result["probes"] == {"mated": 40, "mated_identities": 8, "non_mated": 20, "non_mated_identities": 4}
    assert len(result["cmc"]) == 8 and [row["rank"] for row in result["rank_rates"]] == [1, 5]
    assert "of the gallery, label person" in " ".join(
        read_page("out/identification.html").text.replace(" ,", ",").split()
    )
    for name in np.unique(names[known]):
        Path("people", name).mkdir(parents=True)
        np.save(Path("people", name, "1.npy"), features[known & (names == name)])
    assert evaluate("--features", "probes.npz", "--gallery", "people", *PROTOCOL)["result"] == result

    arguments = "--features", "probes.npz", *PROTOCOL, "--gallery"
    np.savez("other.npz", features=features[known], labels=labels[known])
    assert "no probe has an identity of the gallery" in fails(capsys, 1, *arguments, "other.npz")
    np.savez("short.npz", features=features[known][:, 1:], labels=names[known])
    assert "features of 8 dimensions, short.npz of 7" in fails(capsys, 1, *arguments, "short.npz")
    np.save("none.npy", features)
    assert "none.npy has no identities of its features" in fails(capsys, 1, *arguments, "none.npy")
    assert "mirrored: expected features of the mirror images" in fails(
        capsys, 1, *arguments, "people.npz", "--flip", "sum"
    )


def test_mirrored_features_of_an_own_gallery():
    features, mirrored, labels = clusters().values()
    first = np.arange(72) % 6 == 0
    np.savez("people.npz", features=features[first], mirrored=mirrored[first], labels=labels[first])
    np.savez("probes.npz", features=features[~first], mirrored=mirrored[~first], labels=labels[~first])
    options = "--features", "probes.npz", "--gallery", "people.npz", *PROTOCOL
    added = evaluate(*options, "--flip", "sum")["result"]["cmc"]
    features += mirrored
    np.savez("people.npz", features=features[first], labels=labels[first])
    np.savez("probes.npz", features=features[~first], labels=labels[~first])
    assert evaluate(*options)["result"]["cmc"] == pytest.approx(added)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--unknown 0.5", "unknown: only for the protocol identification"),
        ("--gallery x --template all --protocol megaface", "gallery, template: only for the protocol identification"),
        ("--protocol identification --gallery . --unknown 0.2", "--gallery has the known identities"),
        ("--protocol identification --gallery nowhere", "gallery: no folder 'nowhere' and no such list"),
        ("--protocol identification --unknown 1", "unknown must be 0 or more and below 1, got 1.0"),
        ("--protocol identification --enrolled 0", "enrolled must be at least 1, got 0"),
        (
            "--protocol identification --metric weighted-l1",
            "metric: identification searches by the cosine; weighted-l1",
        ),
    ],
)
def test_invalid_options(capsys, options, message):
    assert message in fails(capsys, 2, *options.split())


def test_features_that_do_not_allow_it(capsys):
    given = clusters()
    for arrays, options, message in (
        ({"features": given["features"]}, "", "needs the array labels"),
        ({**given, "labels": np.arange(72)}, "", "labels: expected an identity with two images or more"),
        ({**given, "labels": given["labels"] * 0}, "", "labels: expected two identities or more"),
        (given, "--folds 5", "folds, num-pairs: the protocol identification has neither"),
        ({**given, "features": given["features"] * np.inf}, "", "features: expected finite values"),
    ):
        assert message in fails(capsys, 1, *write(**arrays), *PROTOCOL, *options.split())
    assert not list(Path().glob("*.json"))


def test_images_of_a_network(digits_run, face_folder, capsys, monkeypatch):
    report = evaluate("--checkpoint", digits_run, *PROTOCOL)
    result = report["result"]
    assert result["gallery"]["identities"] == 2 and result["probes"]["non_mated_identities"] == 1
    assert result["probes"]["mated"] + result["probes"]["non_mated"] + result["gallery"]["images"] == 539
    assert report["separability"] is not None and "Sep" in read_page("out/identification.html").text
    assert "FNIR" in capsys.readouterr().out

    # The ninth identity of the folder has one image, which is enrolled or unknown.
    result = evaluate("--checkpoint", digits_run, "--data", face_folder, *PROTOCOL)["result"]
    assert result["gallery"]["identities"] == 5 and result["probes"]["non_mated_identities"] == 4

    # A gallery of its own: two identities, of which one image cannot be read.
    for name in ("person_0", "person_5"):
        Path("people", name).mkdir(parents=True)
        for number in (0, 1):
            Path("people", name, f"{number}.png").write_bytes((face_folder / name / f"{number}.png").read_bytes())
    Path("people/person_5/broken.png").write_bytes(b"no image")
    shown = []
    with monkeypatch.context() as patched:
        patched.setattr("rich.status.Status.update", lambda status, text: shown.append(text))
        report = evaluate("--checkpoint", digits_run, "--data", face_folder, "--gallery", "people", *PROTOCOL)
    images = report["input"]["rows"]
    assert shown == [
        f"computing features of the probes: {images} of {images} images",
        "computing features of the gallery: 5 of 5 images",
        f"searching the gallery: {images} of {images} probes",
        f"verifying all identities: {images} of {images} probes",
    ]
    assert report["result"]["gallery"] == {"identities": 2, "images": 4, "templates": 2, "template": "mean"}
    assert report["result"]["probes"] == {
        "mated": 8,
        "mated_identities": 2,
        "non_mated": 25,
        "non_mated_identities": 7,
    }
    assert len(report["input"]["unreadable"]) == 1 and report["input"]["description"].endswith("in the gallery people")
    page = read_page("out/identification.html")
    for kind, sides in {"accept": 2, "reject": 2, "miss": 3}.items():
        for card in page.mistakes.get(kind, []):
            assert len(card["captions"]) == sides
            assert card["captions"][1].split("/")[0] in ("person_0", "person_5")
            if kind != "accept":
                assert card["captions"][0].split("/")[0] == card["captions"][-1].split("/")[0]

    # Images that do not allow it are an error before any feature is computed.
    monkeypatch.setattr(inputs, "embed", None)
    arguments = "--checkpoint", digits_run, *PROTOCOL, "--data"
    assert "no probe has an identity of the gallery" in fails(capsys, 1, *arguments, "people", "--gallery", "digits")
    for image in ("person_0/1.png", "person_5/1.png", "person_5/broken.png"):
        Path("people", image).unlink()
    assert "labels: expected an identity with two images or more" in fails(capsys, 1, *arguments, "people")
