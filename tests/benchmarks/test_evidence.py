"""Every kernel family that is enabled by default has a committed result with sufficient evidence."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_margin import _checks
from fused_margin._ops.backends import select

pytest.importorskip("tyro")

from benchmarks.gpu import evidence
from benchmarks.gpu.outcomes import INCOMPLETE

HOPPER, AMPERE = (9, 0), (8, 0)
PASSED = {
    "passed": 61,
    "failed": [],
    "skipped": [
        "test_calls.py::test_offsets_beyond_31_bits[sm90]: needs 48 GiB of device memory",
        "test_calls.py::test_the_second_device[sm90]: Skipped: needs two devices",
    ],
    "unfinished": [],
}
SUFFICIENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "hardware": {"gpu": "NVIDIA H100 80GB HBM3", "gpu_capability": "9.0", "driver": "580.159.04"},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": "13.0", "fused_margin": {"version": "0.1.0"}},
    "tests": {"sm90": PASSED, "search": PASSED},
    "sanitizers": {"memcheck": {"sm90": PASSED, "search": PASSED}, "racecheck": {"sm90": PASSED}},
}


def changed(*path_and_value):
    """SUFFICIENT with the value at a path of keys replaced; without a value the last key is removed."""
    *path, last, value = path_and_value
    result = json.loads(json.dumps(SUFFICIENT))
    place = result
    for key in path:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize("name", ["sm90", "search"])
def test_sufficient_result(name):
    assert evidence.shortcomings(SUFFICIENT, name, HOPPER) == []
    cut_short = changed("sanitizers", "memcheck", name, "unfinished", [INCOMPLETE])
    assert evidence.shortcomings(cut_short, name, HOPPER) == []


@pytest.mark.parametrize(
    ("path_and_value", "sentence"),
    [
        (("tests", "sm90", None), "The result has no tests of sm90."),
        (("tests", None), "The result has no tests of sm90."),
        (("tests", "sm90", "passed", 0), "No test of sm90 passed."),
        (("tests", "sm90", "failed", ["a", "b"]), "Failed tests of sm90: a, b."),
        (("tests", "sm90", "unfinished", ["a"]), "Unfinished tests of sm90: a."),
        (("tests", "sm90", "skipped", ["a: sm90 is not compiled"]), "Skipped tests of sm90: a: sm90 is not compiled."),
        (("tests", "sm90", "skipped", ["a[needs two devices]: other"]), "Skipped tests of sm90: a[needs two devices]: other."),
        (("hardware", "gpu_capability", "8.0"), "The result is of compute capability 8.0, not of 9.0."),
        (("hardware", None), "The result is of compute capability unknown, not of 9.0."),
        (("hardware", "driver", None), "The result names no driver."),
        (("commit", None), "The result names no commit."),
        (("commit", "unknown"), "The result names no commit."),
        (("versions", "cuda", None), "The result names no version of cuda."),
        (("versions", None), "The result names no version of python, torch, cuda, fused_margin."),
        (("sanitizers", "memcheck", "sm90", "failed", ["a"]), "Failed tests of sm90 under memcheck: a."),
        (("sanitizers", "memcheck", "sm90", "unfinished", ["a"]), "Unfinished tests of sm90 under memcheck: a."),
        (("suites", {"step": [{"contestants": [{"name": "ours, sm90 split", "failure": "wrong: 1"}]}]}),
         "step: ours, sm90 split: wrong: 1."),
        (("sanitizers", "racecheck", "sm90", "failed", ["a"]), "Failed tests of sm90 under racecheck: a."),
    ],
)  # fmt: skip
def test_insufficient_results(path_and_value, sentence):
    assert sentence in evidence.shortcomings(changed(*path_and_value), "sm90", HOPPER)
    if path_and_value[0] != "hardware":
        assert evidence.shortcomings(changed(*path_and_value), "sm90", HOPPER) == [sentence]


def test_tests_of_another_family_do_not_count():
    result = changed("tests", "sm80", {**PASSED, "failed": ["a"]})
    assert evidence.shortcomings(result, "sm90", HOPPER) == []
    assert "Failed tests of sm80: a." in evidence.shortcomings(result, "sm80", HOPPER)


def switch(monkeypatch, sm90=None, sm80=None, search=None):
    """Set the results that backends/select.py names."""
    results = {"sm90": sm90 or {}, "sm80": sm80 or {}}
    families = [dataclasses.replace(family, results=results[family.name]) for family in select.FAMILIES]
    monkeypatch.setattr(select, "FAMILIES", tuple(families))
    monkeypatch.setattr(select, "SEARCH_RESULTS", search or {})


def test_enabled_families_have_evidence():
    assert evidence.unproven() == []


@pytest.mark.parametrize("name", ["sm90", "search"])
def test_enabled_families_without_evidence_are_reported(monkeypatch, tmp_path, name):
    """The file is missing, has another capability, or has no tests of the family."""
    (tmp_path / "sufficient.json").write_text(json.dumps(SUFFICIENT))
    (tmp_path / "untested.json").write_text(json.dumps(changed("tests", {})))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    switch(monkeypatch, **{name: {HOPPER: "sufficient.json"}})
    assert evidence.unproven() == []
    for file, capability, sentence in (
        ("absent.json", HOPPER, "There is no such file in benchmarks/results."),
        ("sufficient.json", AMPERE, "The result is of compute capability 9.0, not of 8.0."),
        ("untested.json", HOPPER, f"The result has no tests of {name}."),
    ):
        switch(monkeypatch, **{name: {capability: file}})
        assert evidence.unproven() == [f"{file}: {sentence}"]


@pytest.fixture
def device(monkeypatch):
    """A CUDA device of the compute capability that the test sets; all families are compiled. Tensors on it are fake."""
    chosen = SimpleNamespace(capability=HOPPER)
    capability = select.constant_while_compiled(lambda device: chosen.capability)
    monkeypatch.setattr(select, "_capability", capability)
    monkeypatch.setattr(select, "_C", SimpleNamespace(cuda=SimpleNamespace(sm90=None, sm80=None)))
    monkeypatch.setattr(select, "_TORCH_ADDS_TO_FLOAT32", True)
    with FakeTensorMode():
        chosen.weight = torch.empty(20, 40, device="cuda", dtype=torch.float16)
        yield chosen


def test_families_serve_only_devices_with_a_result(device, monkeypatch):
    """A result on Hopper enables the family on Hopper, and not on other GPUs that it runs on."""
    switch(monkeypatch)
    assert select.select_backend(None, device.weight) == select.PORTABLE
    switch(monkeypatch, sm80={HOPPER: "a.json"})
    assert select.select_backend(None, device.weight) == "sm80"
    device.capability = AMPERE
    assert select.select_backend(None, device.weight) == select.PORTABLE
    switch(monkeypatch, sm90={HOPPER: "a.json"}, sm80={HOPPER: "a.json", AMPERE: "b.json"})
    assert select.select_backend(None, device.weight) == "sm80"
    device.capability = HOPPER
    assert select.select_backend(None, device.weight) == "sm90"
    with select.force_backend("sm80"):
        assert select.select_backend(None, device.weight) == "sm80"


def test_search_serves_only_devices_with_a_result(device, monkeypatch):
    switch(monkeypatch, search={HOPPER: "a.json"})
    gpu = device.weight.device
    assert select.supports_exact_search(gpu) and select.supports_exact_search(torch.device("cpu"))
    assert not select.supports_exact_search(torch.device("meta"))
    device.capability = AMPERE
    assert not select.supports_exact_search(gpu)
    with select.force_exact_search():
        assert select.supports_exact_search(gpu)


def test_selection_compiles_into_one_graph(device, monkeypatch):
    switch(monkeypatch, sm90={HOPPER: "a.json"}, search={HOPPER: "a.json"})

    def function(weight):
        return weight + 1, select.select_backend(None, weight), select.supports_exact_search(weight.device)

    for capability, expected in ((HOPPER, ("sm90", True)), (AMPERE, (select.PORTABLE, False))):
        device.capability = capability
        torch._dynamo.reset()
        assert torch.compile(function, fullgraph=True, backend="eager")(device.weight)[1:] == expected


def test_build_info_describes_enabled_families(monkeypatch):
    monkeypatch.setattr(select, "_C", SimpleNamespace(cuda=SimpleNamespace(sm90=None, sm80=None)))
    switch(monkeypatch)
    off = "off: not validated on a device yet"
    assert select.describe()[0] == f"sm90 tensor cores: {off}"
    assert select.describe()[-1] == f"exact search for nearest classes: {off}"
    switch(monkeypatch, sm80={HOPPER: "h100.json", AMPERE: "a100.json"}, search={HOPPER: "h100.json"})
    assert select.describe() == [
        "sm80 tensor cores: on for compute capability 8.0 (a100.json), 9.0 (h100.json)",
        f"sm90 tensor cores: {off}",
        "portable kernels around torch.mm: serve all other calls",
        "exact search for nearest classes: on for compute capability 9.0 (h100.json)",
    ]


def test_disabled_search_is_an_error(device, monkeypatch):
    switch(monkeypatch)
    with pytest.raises(RuntimeError, match="the exact search is off for this compute capability.*got cuda:0"):
        _checks.exact_search_device("query", device.weight)
