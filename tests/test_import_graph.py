"""The imports between the files of the package: no circles, and the direction in which they point."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import fused_margin

PACKAGE = Path(fused_margin.__file__).parent


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(name):
    """Modules of the package that a module imports, anywhere in its text: those of which it takes names."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                imported = f"{base}.{alias.name}"
                if imported in FILES:
                    yield imported
                elif base in FILES:
                    yield base


GRAPH = {name: set(imported_by(name)) - {name, "fused_margin"} for name in FILES}


def test_there_are_no_circles():
    assert len(GRAPH) > 80 and len(GRAPH["fused_margin.functional"]) > 3
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the modules


def importers(prefix):
    """Modules outside a package that import it."""

    def within(name):
        return name == prefix or name.startswith(f"{prefix}.")

    return {name for name, imports in GRAPH.items() if not within(name) and any(map(within, imports))}


def test_directions():
    assert importers("fused_margin.commands") == set()  # cli.py loads a command by its name
    assert importers("fused_margin.reference") == set()
    assert not {name for name in importers("fused_margin.trainer") if not name.startswith("fused_margin.commands")}
    assert not {name for name in importers("fused_margin._ops") if ".trainer" in name or ".evaluation" in name}


def test_the_package_loads_neither_its_oracle_nor_its_extras():
    code = """
import sys, torch
sys.modules.update(dict.fromkeys(["tyro", "pydantic", "pytorch_lightning", "sklearn", "yaml"]))  # importing one fails
import fused_margin
from fused_margin.trainer.models import ModelConfig, ResNet
ResNet(ModelConfig(depth=4))
loss_fn = fused_margin.CurricularFaceLoss(10, 4)
loss_fn(torch.randn(3, 4), torch.arange(3)).backward()
assert "fused_margin.reference" not in sys.modules
assert fused_margin.reference.psi and "reference" in dir(fused_margin)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
