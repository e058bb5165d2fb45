"""The path of one call, from ArcFaceLoss.forward to the kernel: the files that CONTRIBUTING.md names, and no more."""

import re
import sys
from pathlib import Path

import torch

import fused_margin as fm
from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.backends import select

PACKAGE = Path(fm.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def functions_before_the_kernel(monkeypatch):
    """Named functions of the package that a call enters before the binding of the exponent sum."""
    loss_fn = fm.ArcFaceLoss(1000, 64)
    embeddings, labels = torch.randn(32, 64, requires_grad=True), torch.randint(1000, (32,))
    loss_fn(embeddings, labels)  # after a first call, which fills caches
    run, entered, reached = select.kernels("cpu", 0), [], []
    binding = run.exponent_sum
    monkeypatch.setattr(run, "exponent_sum", lambda **arguments: (reached.append(1), binding(**arguments)))

    def record(frame, event, _):
        code = frame.f_code
        if event == "call" and not reached and code.co_filename.startswith(str(PACKAGE)):
            entered.append(code)

    sys.setprofile(record)
    try:
        loss_fn(embeddings, labels)
    finally:
        sys.setprofile(None)
    assert reached
    return {code for code in entered if not code.co_name.startswith("<")}  # no comprehensions


def test_path_of_one_call_is_short_and_documented(monkeypatch):
    monkeypatch.setattr(library, "STEPPED", {})  # other tests may have left losses that are stepped in the backward
    functions = functions_before_the_kernel(monkeypatch)
    files = {Path(code.co_filename).relative_to(PACKAGE).as_posix() for code in functions}
    section = CONTRIBUTING.read_text().split("## The path of one call")[1].split("\n## ")[0]
    path = section.split("```")[1]
    assert files == set(re.findall(r"[\w/]+\.py", path))
    assert len(files) <= 8
    assert len(functions) <= 40, sorted(code.co_qualname for code in functions)


def test_each_argument_is_checked_once(monkeypatch):
    checked = []

    def record(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename == _checks.__file__:
            checked.append((code.co_name, frame.f_locals.get("name")))

    loss_fn = fm.ArcFaceLoss(50, 8, exclusive_weight=1.0, class_weight=torch.ones(50))
    embeddings, labels = torch.randn(3, 8), torch.arange(3)
    for call in (
        lambda: loss_fn(embeddings, labels),
        lambda: fm.functional.margin_cross_entropy(embeddings, loss_fn.weight, labels, class_weight=torch.ones(50)),
    ):
        checked.clear()
        sys.setprofile(record)
        try:
            call()
        finally:
            sys.setprofile(None)
        named = [check for check in checked if check[0] != "is_number"]
        assert ("matrix", "embeddings") in named and ("matrix", "weight") in named
        assert len(named) == len(set(named)), named
