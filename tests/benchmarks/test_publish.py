"""The tables of docs/results/gpu.md, the model of docs/results/scaling.md and the results in benchmarks/head agree with the committed results."""

import json

import pytest

pytest.importorskip("tyro")

from benchmarks.comparison.report import Entry, Report
from benchmarks.kernels import device_result, names
from benchmarks.kernels.device_result import DeviceResult
from benchmarks.kernels.names import ours
from benchmarks.publish import __main__ as publish
from benchmarks.sharding import model
from fused_margin._ops.backends import select
from fused_margin.benchmark.problems import Shape

LARGE = names.LARGE[0]
H100 = "NVIDIA H100 80GB HBM3"


def content(gpu=H100, date="2026-08-01T10:00:00+00:00", family="sm90"):
    """The result of a complete run in which every contestant is twice as slow in the second of two rounds."""
    report = Report("python -m benchmarks kernels --device cuda", "cpu", 1, complete=True)
    call, split = ours(family, names.CALL), ours(f"{family} {select.SPLIT}")
    mine, normface = ours(family), ours(family, names.NORMFACE)
    for suite, shape, seconds in (
        (names.MACHINE, names.SQUARE_SHAPE, {names.COPY: 0.8e-3, names.SQUARE: 1.5e-3}),
        (names.EXPONENT_SUM, names.STEP, {names.CUBLAS: 90e-6, mine: 100e-6, call: 200e-6}),
        (names.NEAREST, names.CLASSES, {names.CUBLAS: 9e-3, mine: 5e-3}),
        (
            names.HALF_STEP, names.STEP,
            {
                mine: 0.8e-3, split: 2e-3, normface: 0.75e-3, names.FOUR: 0.5e-3, names.TEXTBOOK: 5e-3, names.LEAN: 3.2e-3,
                names.COMPILED: 1.6e-3, names.RECOMPUTING: 1.8e-3, names.CUT: 3e-3,
            },
        ),
        (names.HALF_STEP, LARGE, {mine: 8e-3, names.FOUR: 5e-3, names.TEXTBOOK: 48e-3}),
    ):  # fmt: skip
        section = report.section(suite, shape)
        for name, value in seconds.items():
            section.entries.append(Entry(name, "arcface", mine, seconds=[value, 2 * value]))
    machine, sums, nearest, step, large = report.sections
    machine.find(names.COPY).work = 2 * 2**30
    sums.find(mine).errors, sums.find(call).errors = {"logsumexp": 2.04e-7}, {"loss": 3.1e-6}
    sums.find(call).peak_bytes = 100 << 20
    nearest.find(mine).errors = {"cosine": 4e-7}
    step.find(mine).errors, step.find(mine).peak_bytes = {"loss": 1e-6, "embeddings": 4e-4, "weight": 3e-4}, 256 << 20
    step.find(names.LEAN).errors, step.find(names.LEAN).peak_bytes = {"loss": 1e-3, "weight": 9e-3}, 1900 << 20
    large.entries.append(Entry(names.LEAN, "arcface", mine, failure="does not fit: asked for 3.8 GiB more"))
    return report.summary() | {
        "date": date,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {"gpu": gpu, "gpu_capability": "9.0", "driver": "580.159.04"},
        "versions": {"torch": "2.13.0", "cuda": "13.0"},
    }


def result(**options):
    return DeviceResult(json.loads(json.dumps(content(**options))), "h100.json")


def rows(text):
    """The cells of a table's rows, keyed by the first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells[2:]}


def test_committed_text_matches_the_results():
    for path, text in publish.documents(device_result.newest()).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m benchmarks.publish"


def test_no_result_gives_no_numbers():
    assert publish.gpu_results(None) == publish.NO_RESULT
    assert "no result of a GPU is committed yet" in publish.NO_RESULT
    assert "both speeds are assumptions" in model.times(model.speeds_of(None)).replace("\n", " ")


def test_readme_table():
    table = rows(publish.gpu_results(result()))
    dash = "–"
    assert table == {
        "exponent-sum kernel, C = 100,000": [
            "150 µs", "135 to 150 µs, 1×", "0.90× bare product by cuBLAS", dash, "2.0e-07"
        ],
        "nearest-class kernel, C = 100,000": [
            "7.5 ms", "6.5 to 7.5 ms, 2×", "1.80× bare product by cuBLAS", dash, "4.0e-07"
        ],
        "forward call, C = 100,000": [
            "300 µs", "280 to 310 µs", "0.45× bare product by cuBLAS", "100 MiB", "3.1e-06"
        ],
        "step, half-precision operands, C = 100,000": [
            "1.2 ms", "1.2 ms, 0.55×", "0.62× four products", "256 MiB", "4.0e-04"
        ],
        "step, split operands, C = 100,000": ["3 ms", dash, "0.25× four products", dash, dash],
        "eager lean, fp16 autocast, C = 100,000": ["4.8 ms", dash, "4.00×", "1,900 MiB", "9.0e-03"],
        "compiled lean, fp16 autocast, C = 100,000": ["2.4 ms", dash, "2.00×", dash, dash],
        "cut-cross-entropy, exact (NormFace), C = 100,000": ["4.5 ms", dash, "4.00×", dash, dash],
        "step, half-precision operands, C = 1,000,000": ["12 ms", dash, "0.62× four products", dash, dash],
        "eager textbook, fp16 autocast, C = 1,000,000": ["72 ms", dash, "6.00×", dash, dash],
    }  # fmt: skip


def test_readme_names_the_device_of_the_table():
    text = publish.gpu_results(result())
    first = text.partition("\n\n")[0].replace("\n", " ")
    for fact in (
        H100, "driver 580.159.04", "torch 2.13.0", "CUDA 13.0", "2026-08-01", "`sm90`", "`0123456789ab`",
        "N = 1,024, D = 512", "This result switches nothing on.",
    ):  # fmt: skip
        assert fact in first
    assert text.endswith(
        "The times are in `benchmarks/results/h100.json`, written by\n\n    python -m benchmarks kernels --device cuda"
    )
    measured = result()  # run by a larger command
    measured.content.update(command="python -m benchmarks.gpu", benchmark_command="python -m benchmarks kernels")
    assert publish.gpu_results(measured).endswith("written by\n\n    python -m benchmarks kernels")
    assert "interrupted" not in first
    interrupted = result()
    interrupted.content["complete"] = False
    assert "The run was interrupted" in publish.gpu_results(interrupted)


def test_readme_names_the_families_that_a_result_enables(monkeypatch):
    monkeypatch.setattr(select, "SEARCH_RESULTS", {(9, 0): "h100.json", (8, 0): "a100.json"})
    assert "This result switches on `search` for compute capability 9.0." in publish.gpu_results(result()).replace(
        "\n", " "
    )


@pytest.mark.parametrize("options", [{"gpu": "NVIDIA A100-SXM4-80GB"}, {"family": "sm80"}], ids=str)
def test_predictions_apply_only_to_their_device_and_kernels(options):
    table = rows(publish.gpu_results(result(**options)))
    assert table["exponent-sum kernel, C = 100,000"][0] == "150 µs"
    predicted = {cells[1] for cells in table.values() if len(cells) == 5}
    assert predicted == (set() if "gpu" in options else {"–"})


def test_unmeasured_cells_are_dashes_and_failures_are_named():
    partial = result()
    del partial.content["suites"][names.NEAREST]
    (sums,) = partial.content["suites"][names.EXPONENT_SUM]
    sums["contestants"][1] |= {"seconds": [], "failure": "wrong: a | b"}
    sums["contestants"][2]["failure"] = "does not fit"  # it failed only when its memory was measured
    table = rows(publish.gpu_results(partial))
    assert table["forward call, C = 100,000"][0] == "300 µs"
    assert table["forward call, C = 100,000"][3] == "does not fit"
    assert table["nearest-class kernel, C = 100,000"] == ["–", "6.5 to 7.5 ms, 2×", "–", "–", "–"]
    assert table["exponent-sum kernel, C = 100,000"] == ["wrong: a \\| b", "135 to 150 µs, 1×", "–", "–", "–"]
    large = partial.content["suites"][names.HALF_STEP][1]["contestants"]
    large[:] = [each for each in large if each["name"] != names.TEXTBOOK]
    failed = rows(publish.gpu_results(partial))["eager lean, fp16 autocast, C = 1,000,000"]
    assert failed[0] == "does not fit: asked for 3.8 GiB more"


ASSUMED_TABLE = """\
| 1M | 8 | 1.0 | 1.3 | 0.4 | 0.0 | 590,000 |
| 1M | 64 | 0.4 | 1.3 | 0.1 | 0.5 | 4.4M |
| 1M | 1,024 | 1.2 | 1.3 | 0.0 | 8.1 | 14M |
| 10M | 8 | 8.0 | 13 | 4.3 | 0.0 | 59,000 |
| 10M | 64 | 1.3 | 13 | 0.5 | 0.5 | 580,000 |
| 10M | 1,024 | 1.3 | 13 | 0.0 | 8.1 | 6.2M |
| 100M | 8 | 77 | 131 | 43 | 0.0 | 5,900 |
| 100M | 64 | 9.9 | 131 | 5.3 | 0.5 | 60,000 |
| 100M | 1,024 | 1.8 | 131 | 0.3 | 8.1 | 940,000 |"""


def test_model_from_assumed_speeds():
    """The model gives the table that was first computed by hand."""
    assert model.times(model.ASSUMED).endswith(ASSUMED_TABLE)
    assert model.limit(model.ASSUMED).endswith("W ≈ 170 for 1M classes, 1,700 for 10M, 17,000 for 100M.")


def test_model_from_measured_speeds():
    """Four products of 8 · 1024 · 512 · 100,000 operations in 0.75 ms, and 2 GiB through memory in 1.2 ms."""
    speeds = model.speeds_of(result())
    assert speeds.products == pytest.approx(8 * 1024 * 512 * 100_000 / 0.75e-3)
    assert speeds.memory == pytest.approx(2 * 2**30 / 1.2e-3)
    text = model.times(speeds)
    sentence = text.partition("\n\n")[0].replace("\n", " ")
    assert (
        f"On {H100} (`benchmarks/results/h100.json`): products at 559 TFLOP/s, measured as the rate of the four bare "
        "products of a step by cuBLAS (fp16, N=1,024, D=512, C=100,000; our step, with all other work included, runs at 350), memory at "
        "1.8 TB/s, measured as bytes read and written by a copy on the device."
    ) in sentence
    assert "no result of a gpu is committed" not in sentence.lower()
    # 8 · 128 · 512 · 10⁶ operations, 32 · 10⁶ · 512 / 8 bytes, 1024 samples in their sum
    assert "| 1M | 8 | 1.0 | 0.9 | 1.1 | 0.0 | 490,000 |" in text
    assert model.limit(speeds).endswith("W ≈ 120 for 1M classes, 1,200 for 10M, 12,000 for 100M.")


def test_unmeasured_speed_remains_assumed():
    partial = result()
    del partial.content["suites"][names.MACHINE], partial.content["suites"][names.HALF_STEP]
    speeds = model.speeds_of(partial)
    assert (speeds.products, speeds.memory) == (model.ASSUMED_PRODUCTS, model.ASSUMED_MEMORY)
    assert speeds.source.endswith("products at 400 TFLOP/s, assumed, memory at 4.8 TB/s, assumed.")


def test_two_digits():
    values = {995_000.0: "1.0M", 994_000.0: "990,000", 9_960_000.0: "10M", 13_990_000.0: "14M", 5_893.0: "5,900"}
    assert {value: model.two_digits(value) for value in values} == values


def test_newest_result_of_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(device_result, "RESULTS", tmp_path)
    (tmp_path / "cpu.json").write_text(
        json.dumps({"date": "2027", "hardware": {"cpu": "EPYC"}, "suites": {"step": []}})
    )
    (tmp_path / "other.json").write_text(json.dumps([1]))
    (tmp_path / "steps.json").write_text(
        json.dumps({"date": "2027", "hardware": {"gpu": H100}, "suites": {"step": []}})
    )
    assert device_result.newest() is None
    for name, month in (("a", "08"), ("b", "09"), ("c", "07")):
        (tmp_path / f"{name}.json").write_text(json.dumps(content(date=f"2026-{month}-01T10:00:00+00:00")))
    assert device_result.newest().name == "b.json"


def test_command_writes_between_the_markers(monkeypatch, tmp_path, capsys):
    before = {name: getattr(publish, name).read_text() for name in ("GPU", "SCALING", "HEAD")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(publish, name, tmp_path / name)
    monkeypatch.setattr(publish.summary, "PICTURE", tmp_path / "head.png")
    (tmp_path / "h100.json").write_text(json.dumps(content()))
    publish.main([str(tmp_path / "h100.json")])
    assert "benchmarks/results/h100.json" in capsys.readouterr().out
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    for name, text in before.items():
        after = (tmp_path / name).read_text()
        if name == "HEAD":
            assert after == text
            continue
        assert after != text and "h100.json" in after
        assert after[: after.index("<!-- gpu" if name == "GPU" else "<!-- model")] in text
    assert publish.gpu_results(result()) in (tmp_path / "GPU").read_text()
    monkeypatch.setattr(device_result, "RESULTS", tmp_path / "empty")
    publish.main([])
    assert publish.NO_RESULT in (tmp_path / "GPU").read_text()
    (tmp_path / "cpu.json").write_text(json.dumps({"hardware": {"cpu": "EPYC"}, "suites": {}}))
    with pytest.raises(SystemExit, match="not a result of the kernels suite"):
        publish.main([str(tmp_path / "cpu.json")])


@pytest.mark.parametrize(
    "text", ["", "<!-- a -->\n", "<!-- end of a -->\n<!-- a -->\n", "<!-- a -->\n<!-- end of a -->\n" * 2]
)
def test_markers_occur_once(text):
    with pytest.raises(ValueError, match="expected <!-- a --> and <!-- end of a --> once each"):
        publish.replace_block(text, "a", "b")


def test_complete_block_is_replaced():
    text = "x\n<!-- a -->\nold\n\nold\n<!-- end of a -->\ny\n"
    assert publish.replace_block(text, "a", "new") == "x\n<!-- a -->\nnew\n<!-- end of a -->\ny\n"


def test_last_section_of_a_problem_counts():
    twice = result()
    (sums,) = twice.content["suites"][names.EXPONENT_SUM]
    twice.content["suites"][names.EXPONENT_SUM] = [{**sums, "contestants": []}, sums]
    assert twice.section(names.EXPONENT_SUM, names.STEP).entries
    assert not twice.section(names.EXPONENT_SUM, Shape(1, 2, 3)).entries
