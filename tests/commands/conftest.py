"""Fixtures of the tests of commands, which also use those of the trainer's tests."""

import os
from pathlib import Path

import pytest
from trainer_fixtures import face_folder, one_thread, tiny_options  # noqa: F401

from fused_margin import cli


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, with its own runs/."""
    root = str(Path(cli.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
