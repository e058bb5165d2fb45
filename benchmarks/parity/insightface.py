"""PartialFC_V2 and margins of InsightFace compared with ours: loss, gradients and sampled classes on the same data."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import Tensor
from torch.nn import functional as F

from fused_margin.benchmark.environment import header
from fused_margin.compat import insightface as ours
from fused_margin.distributed import slice_of

from ..common.files import write_json
from . import upstream

FOLDER, FILES = Path("recognition/arcface_torch"), ("losses.py", "partial_fc_v2.py")
CAP = -math.log(1e-30)  # the largest loss of a sample in InsightFace
MARGINS: dict[str, tuple[str, tuple[float, ...]]] = {
    "ArcFace": ("ArcFace", (64.0, 0.5)),
    "CosFace": ("CosFace", (64.0, 0.4)),
    "combined, m2": ("CombinedMarginLoss", (64.0, 1.0, 0.5, 0.0)),
    "combined, m3": ("CombinedMarginLoss", (64.0, 1.0, 0.0, 0.4)),  # with m2 and m3 together ours differs on purpose
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
BOUNDS = {"float32": 1e-5, "float64": 1e-9}  # of relative errors; a case with a larger one differs
VALUES = ("loss", "embedding_gradient", "weight_gradient")


@dataclass(frozen=True)
class InsightFace:
    """Run PartialFC_V2 of InsightFace's arcface_torch and ours with the same data, weights and seeds, on gloo ranks."""

    checkout: tyro.conf.Positional[Path]
    """Your checkout of github.com/deepinsight/insightface, whose recognition/arcface_torch/{losses,partial_fc_v2}.py
    are imported."""
    output: Path | None = None
    """JSON file to write."""
    classes: int = 2001
    """C, over all ranks."""
    size: int = 128
    """D."""
    samples: int = 64
    """N of each rank."""
    batches: int = 4
    """Batches of every case; its errors are the largest over them."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of processes, with one thread each."""
    sample_rates: tuple[float, ...] = (1.0, 0.3)
    """Shares of the classes that a step samples."""
    commits: dict[str, str] = field(default_factory=dict)
    """FILE COMMIT pairs to record, for a checkout that is not a git repository."""

    def run(self) -> list[str]:
        """Compare all cases; return those that differ by more than the bounds."""
        files = [self.checkout / FOLDER / name for name in FILES]
        source = upstream.provenance(self.checkout, files, self.commits)
        cases = [case for world_size in self.ranks for case in on_ranks(self, world_size)]
        for case in cases:
            print(f"{case['margin']}, {case['ranks']} rank(s), sample_rate {case['sample_rate']}, {case['losses']}:")
            for dtype in DTYPES:
                print(f"  {dtype}: {', '.join(f'{name} {case[dtype][name]:.1e}' for name in VALUES)}")
        different = [text for case in cases for text in differences(case)]
        if self.output is not None:
            settings = {
                name: value for name, value in asdict(self).items() if name not in ("checkout", "output", "commits")
            }
            content = {"checkout": source, "problem": settings, "margins": MARGINS, "bounds": BOUNDS, "cases": cases}
            command = "python -m benchmarks.parity insightface CHECKOUT --output FILE"
            write_json(self.output, header(command) | {**content, "different": different})
        return different


@dataclass(frozen=True)
class Case:
    """One comparison, made by every rank with its samples and classes."""

    margin: str
    sample_rate: float
    opposite: bool  # samples opposite to their classes, so that losses are beyond the cap


def differences(case: dict[str, Any]) -> list[str]:
    """Values of a case beyond the bounds. Losses beyond the cap are not compared, since InsightFace clips them."""
    name = f"{case['margin']}, {case['ranks']} rank(s), sample_rate {case['sample_rate']}, {case['losses']}"
    compared = VALUES[1:] if case["losses"] == "beyond the cap" else VALUES
    found = [
        f"{name}, {dtype}: {value} by {case[dtype][value]:.1e}"
        for dtype, value in product(DTYPES, compared)
        if not case[dtype][value] <= BOUNDS[dtype]
    ]
    return found if case["same_classes_drawn"] else [*found, f"{name}: other classes drawn"]


def on_ranks(config: InsightFace, world_size: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (config, world_size, folder), nprocs=world_size)
        of_ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
    for parts in zip(*of_ranks, strict=True):
        yield {**parts[0]["case"], "ranks": world_size, **combined(parts)}


def combined(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """‖difference‖ / ‖theirs‖ of a case over all ranks, the largest over the batches."""
    measured: dict[str, Any] = {"same_classes_drawn": all(part["same_classes_drawn"] for part in parts)}
    for pair in parts[0]["squares"]:
        squares = sum(part["squares"][pair] for part in parts)  # (batches, values, 2)
        errors = (squares[..., 0] / squares[..., 1]).sqrt().amax(dim=0).tolist()
        measured[pair] = dict(zip(VALUES, errors, strict=True))
    return measured


def work(rank: int, config: InsightFace, world_size: int, folder: str) -> None:
    """One rank: runs all cases in the same order as the others."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.Tensor.cuda = lambda self, *_, **__: self  # InsightFace calls .cuda() with every backend
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    theirs = [imported(config.checkout, name) for name in FILES]
    cases = [Case(*values) for values in product(MARGINS, config.sample_rates, (False, True))]
    torch.save([compare(case, config, *theirs) for case in cases], Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def imported(checkout: Path, name: str) -> ModuleType:
    """Import one file of InsightFace, without the files beside it."""
    spec = importlib.util.spec_from_file_location(f"insightface_{Path(name).stem}", checkout / FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(case: Case, config: InsightFace, losses: ModuleType, partial_fc: ModuleType) -> dict[str, Any]:
    """Squared differences and squared values of this rank, per batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    weight, batches, facts = problem(case, config, world_size, losses)
    own = slice_of(config.classes, rank, world_size)
    local = [(x.chunk(world_size)[rank], y.chunk(world_size)[rank]) for x, y in batches]
    name, numbers = MARGINS[case.margin]
    results: dict[tuple[str, str], list[list[Tensor]]] = {}
    drawn: dict[tuple[str, str], list[Tensor]] = {}
    for whose, margins, head in (("theirs", losses, partial_fc), ("ours", ours, ours)):
        for dtype, exact in DTYPES.items():
            # the dtype of tensors that InsightFace creates, and of the random numbers that sample classes
            torch.set_default_dtype(exact)
            try:
                margin = getattr(margins, name)(*numbers)
                fc = head.PartialFC_V2(margin, config.size, config.classes, case.sample_rate).to(exact)
                if (fc.class_start, fc.class_start + fc.num_local) != own:
                    raise RuntimeError(f"{whose}: other classes on rank {rank}")
                with torch.no_grad():
                    fc.weight.copy_(weight[slice(*own)])
                torch.manual_seed(rank)
                results[whose, dtype] = [step(fc, x.to(exact), y) for x, y in local]
                drawn[whose, dtype] = [values[2].any(dim=1) for values in results[whose, dtype]]
            finally:
                torch.set_default_dtype(torch.float32)
    pairs = {dtype: (("ours", dtype), ("theirs", dtype)) for dtype in DTYPES}
    if case.sample_rate == 1:  # otherwise another dtype samples other classes
        exact = ("theirs", "float64")
        pairs |= {
            f"{whose} in float32 against theirs in float64": ((whose, "float32"), exact) for whose in ("ours", "theirs")
        }
    same = all(
        torch.equal(mine, theirs)
        for dtype in DTYPES
        for mine, theirs in zip(drawn["ours", dtype], drawn["theirs", dtype], strict=True)
    )
    squares = {pair: squared(results[mine], results[theirs]) for pair, (mine, theirs) in pairs.items()}
    description = {"margin": case.margin, "sample_rate": case.sample_rate, **facts}
    return {"case": description, "same_classes_drawn": same, "squares": squares}


def problem(
    case: Case, config: InsightFace, world_size: int, losses: ModuleType
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], dict[str, Any]]:
    """Weights (C, D), batches of all ranks, and the range of the losses of the samples in float64."""
    generator = torch.Generator().manual_seed(0)
    count = config.samples * world_size
    weight = torch.randn(config.classes, config.size, generator=generator) * 0.01
    batches, samples, cosines = [], [], []
    for _ in range(config.batches):
        labels = torch.randint(config.classes, (count,), generator=generator)
        spread = 0.5 + 2.5 * torch.rand(count, 1, generator=generator)  # of a class around its center
        noise = torch.randn(count, config.size, generator=generator) * spread / config.size**0.5
        center = F.normalize(weight[labels]) * (-1 if case.opposite else 1)
        length = 1 + 20 * torch.rand(count, 1, generator=generator)
        batches.append(((center + noise) * length, labels))
        cosine = F.normalize(batches[-1][0].double()) @ F.normalize(weight.double()).t()
        cosines.append(cosine.gather(1, labels[:, None]))
        name, numbers = MARGINS[case.margin]
        logits = getattr(losses, name)(*numbers)(cosine, labels[:, None])
        samples.append(F.cross_entropy(logits, labels, reduction="none"))
    largest = torch.cat(samples).max().item()
    facts = {
        "losses": "beyond the cap" if largest > CAP else "below the cap",
        "largest_loss_of_a_sample": largest,
        "cosines_to_own_class": [torch.cat(cosines).min().item(), torch.cat(cosines).max().item()],
    }
    return weight, batches, facts


def step(fc: torch.nn.Module, embeddings: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradients of one batch. InsightFace writes into the labels, so they are cloned."""
    embeddings = embeddings.clone().requires_grad_()
    fc.weight.grad = None
    loss = fc(embeddings, labels.clone())
    loss.backward()
    return [loss.detach(), embeddings.grad, fc.weight.grad]


def squared(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> Tensor:
    """(batches, values, 2): squared norms of the difference and of the value of InsightFace."""
    rows = [
        [[(a.double() - b.double()).square().sum(), b.double().square().sum()] for a, b in zip(*pair, strict=True)]
        for pair in zip(mine, theirs, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)
