"""Certified refresh during a training: rows searched, time, and exactness. `python -m benchmarks.certified`.

Every identity is one image of a character in a DejaVu font, with new distortions at every step. If there are more classes
than images, rotated images are further identities. The network is the trainer's. At every step the certified refresh
finds the nearest classes; every `compare_every` steps a full search finds them too, and the answers are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import fused_margin as fm
from fused_margin.losses.exclusive import ExclusiveRegularizer
from fused_margin.trainer.data.augment import augment
from fused_margin.trainer.data.base import on_gray, to_input
from fused_margin.trainer.data.config import AugmentationConfig
from fused_margin.trainer.data.glyphs import render_characters
from fused_margin.trainer.models import ModelConfig, ResNet

from ..common.studies import write_study


@dataclass(frozen=True)
class Config:
    """Train with the exclusive term; find the nearest classes by certified refresh and by full searches."""

    classes: int = 20_000
    """C, at most four times the number of images (about 26,000), which are rotated by quarter turns."""
    size: int = 128
    """D."""
    samples: int = 128
    """N, the batch size."""
    steps: int = 2200
    """Training steps."""
    lr: float = 0.1
    """Learning rate of the network: warm-up over the first twentieth, then linear decay to zero."""
    class_lr: float = 0.1
    """Learning rate of the class weights, with the same schedule."""
    compare_every: int = 1
    """Steps between two full searches."""
    exclusive_weight: float = 1.0
    """Weight of the exclusive term."""
    scale: float = 32.0
    """Scale of the logits."""
    margin: float = 0.2
    """Margin of ArcFace, radians."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Random seed."""
    output: Path | None = None
    """JSON file to write, with the figure beside it as .png."""


@dataclass
class Step:
    """Measurements of one training step."""

    loss: float
    certified: float  # seconds
    full: float | None  # seconds; None if not compared
    searched: int  # number of rows
    different_index: int
    different_cosine: int
    sep: float  # mean cosine to the nearest class


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.certified")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    steps = list(train(config))
    epoch = -(-config.classes // config.samples)
    later = steps[epoch:] or steps
    summary = {
        "steps": len(steps),
        "steps compared": sum(step.full is not None for step in steps),
        "differences of index": sum(step.different_index for step in steps),
        "differences of cosine": sum(step.different_cosine for step in steps),
        "share of rows not searched, after the first epoch": 1
        - statistics.mean(step.searched for step in later) / config.classes,
        "full search over certified, median ratio after the first epoch": ratio(later),
        "the same, in the last tenth of the steps": ratio(steps[-max(1, len(steps) // 10) :]),
    }
    for name, value in summary.items():
        print(f"{name}: {value:.4g}")
    if config.output is not None:
        columns = {
            name: [value if value is None else round(value, 6) for value in (getattr(step, name) for step in steps)]
            for name in Step.__dataclass_fields__
        }
        write_study("benchmarks.certified", config, {"summary": summary, "steps": columns}, indent=None)
        draw(steps, config, config.output.with_suffix(".png"))


def ratio(steps: list[Step]) -> float:
    """Median time of a full search over that of a certified refresh, over the steps that have both."""
    return statistics.median([step.full / step.certified for step in steps if step.full is not None] or [math.nan])


def character_images(classes: int) -> Tensor:
    """(C, 1, H, W) in [-1, 1], all different."""
    images, drawn, _ = render_characters((24, 24))
    distinct = torch.unique(images[drawn].flatten(1), dim=0)
    if len(distinct) < classes:
        turned = [torch.rot90(distinct.view(-1, 24, 24), quarter, (1, 2)).flatten(1) for quarter in range(4)]
        distinct = torch.unique(torch.cat(turned), dim=0)
    if len(distinct) < classes:
        raise SystemExit(f"--classes: expected at most {len(distinct)}, got {classes}")
    return distinct[torch.randperm(len(distinct))[:classes]].view(classes, 1, 24, 24)


def train(config: Config):
    images = on_gray(character_images(config.classes))
    backbone = ResNet(ModelConfig(depth=10, embedding_size=config.size))
    loss_fn = fm.ArcFaceLoss(config.classes, config.size, margin=config.margin, scale=config.scale)
    certified, generator = ExclusiveRegularizer(refresh="certified"), torch.Generator().manual_seed(config.seed)
    optimizer = fm.optim.ProjectedSGD(
        [
            {"params": backbone.parameters(), "lr": config.lr, "weight_decay": 5e-4, "project": False},
            {"params": loss_fn.parameters(), "lr": config.class_lr},
        ],
        lr=config.lr,
    )
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (config.steps - s) / (config.steps - warmup))
    )
    order = torch.empty(0, dtype=torch.int64)
    for number in range(config.steps):
        if len(order) < config.samples:
            order = torch.randperm(config.classes, generator=generator)
        labels, order = order[: config.samples], order[config.samples :]
        weight = loss_fn.weight.detach()
        before = 0 if certified.swept is None else int(certified.swept[0])
        seconds, found = timed(lambda weight=weight: certified.find(weight))
        nearest = fm.functional.NearestClass(*found)
        full_seconds, different_index, different_cosine = None, 0, 0
        if number % config.compare_every == 0:
            full_seconds, full = timed(lambda weight=weight: fm.functional.nearest_class(weight))
            different_index = int((found.index != full.index).sum())
            different_cosine = int((found.cosine.float() != full.cosine).sum())
        embeddings = backbone(augment(to_input(images[labels]), AugmentationConfig(), generator))
        loss = loss_fn(embeddings, labels)
        exclusive = fm.functional.exclusive_regularization(loss_fn.weight, nearest=nearest)
        optimizer.zero_grad()
        (loss + config.exclusive_weight * exclusive).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        step = Step(
            loss.item(),
            seconds,
            full_seconds,
            int(certified.swept[0]) - before,
            different_index,
            different_cosine,
            found.cosine.mean().item(),
        )
        if number % 50 == 0:
            print(
                f"step {number}: loss {step.loss:.3f}, Sep {step.sep:.3f}, searched {step.searched}, certified "
                f"{1e3 * seconds:.0f} ms, full {1e3 * (full_seconds or math.nan):.0f} ms, different "
                f"{different_index} {different_cosine}",
                flush=True,
            )
        yield step


def timed(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def draw(steps: list[Step], config: Config, path: Path) -> None:
    """Rows searched and seconds over the steps. The first step searches all rows and is outside the axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rows, seconds) = pyplot.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    numbers = range(len(steps))
    rows.plot(numbers, [100 * step.searched / config.classes for step in steps], linewidth=0.8, color="C0")
    most = max([100 * step.searched / config.classes for step in steps[1:]] or [100])
    rows.set(
        ylabel="rows searched, %", ylim=(0, 1.05 * most + 1e-3), title=f"C = {config.classes:,}, D = {config.size}"
    )
    compared = [number for number in numbers if steps[number].full is not None]
    seconds.semilogy(
        compared, [1e3 * steps[number].full for number in compared], linewidth=0.8, color="C1", label="full search"
    )
    seconds.semilogy(numbers, [1e3 * step.certified for step in steps], linewidth=0.8, color="C0", label="certified")
    seconds.set(xlabel="step", ylabel="ms")
    seconds.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
