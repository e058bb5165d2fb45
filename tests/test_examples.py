"""Every example runs, and its loss falls."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = {
    "pytorch_metric_learning_swap": "pytorch_metric_learning",
    "insightface_swap": "torch",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
}
NOT_RUN = {"synthetic"}  # data


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_each_example_is_run_and_listed():
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == {*PACKAGES, "plain_loop", "torchrun_loop", *NOT_RUN}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in readme for name in files - {"synthetic"})


def test_plain_loop():
    assert importlib.import_module("plain_loop").main() > 0.95


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PACKAGES)
def test_loss_falls(name):
    pytest.importorskip(PACKAGES[name])
    losses = importlib.import_module(name).main(60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def train(group):
    sys.path.insert(0, str(EXAMPLES))
    losses = importlib.import_module("torchrun_loop").train(group, 40)
    gc.collect()  # DistributedDataParallel must not be the last to hold the group
    return losses


def test_divided_classes(ranks):
    first, second = ranks.run(train, [(), ()])
    assert first == second
    assert sum(first[-5:]) < 0.5 * sum(first[:5])
