"""The evaluation does not need the trainer or its extras."""

import subprocess
import sys


def test_evaluation_does_not_import_the_trainer():
    code = """
import importlib, pkgutil, sys
import fused_margin.evaluation
extras = ("lightning", "matplotlib", "PIL", "fontTools", "tensorboard", "tyro", "yaml", "pytorch_metric_learning")
for module in pkgutil.iter_modules(fused_margin.evaluation.__path__):
    importlib.import_module(f"fused_margin.evaluation.{module.name}")
print(*[name for name in sys.modules if name.startswith("fused_margin.trainer") or name in extras])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_exist():
    from fused_margin import evaluation

    assert sorted(evaluation.__all__) == evaluation.__all__
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
