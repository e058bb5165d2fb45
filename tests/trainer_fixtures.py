"""Small data, created once, and a configuration that trains in a second."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning", reason="the trainer's extra is not installed")

from fused_margin import cli
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data import glyphs
from fused_margin.trainer.evaluate import figures


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks run faster on one thread, also on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def characters():
    """Images, mask and names of all characters, with a quarter of the default number of pixels."""
    return glyphs.render_characters((16, 16))


@pytest.fixture(scope="session")
def glyph_identities(characters):
    """Images, labels and names of the identities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "render_characters", lambda size: characters)
        return glyphs.glyph_identities((16, 16))


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory):
    """Eight identities with four noisy images of a pattern each; a ninth identity has one image."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for identity in range(9):
        folder = root / f"person_{identity}"
        folder.mkdir()
        pattern = rng.integers(0, 256, (4, 4, 3))
        for number in range(4 if identity < 8 else 1):
            image = np.kron(pattern, np.ones((5, 5, 1))) + rng.normal(0, 8, (20, 20, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


TINY_OPTIONS = {
    "--data": ["digits"],
    "--epochs": ["2"],
    "--batch-size": ["64"],
    "--model.image-size": ["8", "8"],
    "--model.widths": ["4", "4", "8", "8"],
    "--model.embedding-size": ["8"],
    "--evaluation.pairs": ["200"],
    "--accelerator": ["cpu"],
}


@pytest.fixture
def tiny_options():
    """Command-line options of a run of 40 steps."""
    return [word for option, values in TINY_OPTIONS.items() for word in (option, *values)]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """Folder of a run of 20 steps, in its runs/."""
    root = tmp_path_factory.mktemp("digits")
    options = [word for option, values in TINY_OPTIONS.items() for word in (option, *values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(figures, "_save", lambda figure, path, title: Image.new("L", (1, 1)).save(path, "PNG"))
        assert cli.main(["train", *options, "--epochs", "1", "--output", "runs/digits"]) == 0
    return root / "runs" / "digits"


@pytest.fixture
def tiny_config(tiny_options, tmp_path):
    """The same run as a configuration, with its own output folder."""
    import tyro

    options = [*tiny_options, "--output", str(tmp_path / "run")]
    return tyro.cli(TrainConfig, args=options, default=TrainConfig.defaults("digits"))
