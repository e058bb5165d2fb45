"""How the choice of a backend reads torch's settings of float32 precision."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_margin._ops.backends import select

# Not all settings can be undone within a process, so that each pair has its own process.
PAIRS = """
import json, os, sys, warnings
import torch
from fused_margin._ops.backends.select import rounds_float32

warnings.simplefilter("ignore")
CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn
setters = {  # what they set, and on which devices operands may then be rounded
    f"set_float32_matmul_precision {name}": (
        lambda name=name: torch.set_float32_matmul_precision(name), dict.fromkeys(("cuda", "cpu"), name != "highest")
    )
    for name in ("highest", "high", "medium")
}
for allowed in (True, False):
    setters[f"allow_tf32 {allowed}"] = (lambda allowed=allowed: setattr(CUDA, "allow_tf32", allowed), {"cuda": allowed})
for device, matmul, names in (
    ("cuda", CUDA, ("ieee", "tf32")), ("cpu", getattr(CPU, "matmul", None), ("ieee", "tf32", "bf16"))
):
    for name in names if hasattr(CUDA, "fp32_precision") else ():
        setters[f"{device} fp32_precision {name}"] = (
            lambda matmul=matmul, name=name: setattr(matmul, "fp32_precision", name), {device: name != "ieee"}
        )
wrong = []
for first in setters:
    for second in setters:
        process = os.fork()
        if process:
            if os.waitpid(process, 0)[1]:
                wrong.append([first, second])
            continue
        try:
            expected = {"cuda": False, "cpu": False}
            for set_it, rounded in (setters[first], setters[second]):
                set_it()
                expected |= rounded
            actual = {device: rounds_float32(torch.device(device)) for device in expected}
        except BaseException as error:
            actual = error
        if actual != expected:
            print(first, second, actual, expected, file=sys.stderr, flush=True)
        os._exit(actual != expected)
print(json.dumps([len(setters), wrong]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each pair of settings")
def test_all_pairs_of_old_and_new_precision_settings():
    done = subprocess.run([sys.executable, "-c", PAIRS], check=True, capture_output=True, text=True, env=os.environ)
    number, wrong = json.loads(done.stdout)
    assert wrong == [], done.stderr
    assert number == (10 if hasattr(torch.backends.cuda.matmul, "fp32_precision") else 5)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_older_torch_has_only_the_old_setting(monkeypatch, device):
    for name in ("cuda", "mkldnn"):
        monkeypatch.setattr(torch.backends, name, SimpleNamespace(matmul=SimpleNamespace()))
    for precision, rounded in (("highest", False), ("high", True), ("medium", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert select.rounds_float32(torch.device(device)) == rounded
