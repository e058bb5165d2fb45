"""The fixtures of the trainer's tests."""

import pytest
from rich.console import Console
from trainer_fixtures import (  # noqa: F401
    characters,
    digits_run,
    face_folder,
    glyph_identities,
    one_thread,
    tiny_config,
    tiny_options,
)

from fused_margin.trainer.data import load_splits


@pytest.fixture
def console():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits", (8, 8), 1, 0.3, seed=0)
