"""Time and memory of the exact search beside FAISS's IndexFlatIP, checked in float64. `python -m benchmarks.search`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
import tyro

from fused_margin import functional as F
from fused_margin.benchmark.memory import high_water, mark
from fused_margin.evaluation import enroll, search_gallery

from ..common.studies import write_study

OURS, GALLERY, FAISS = "nearest_class", "search_gallery", "IndexFlatIP"
SELF_SEARCH_K = 1


@dataclass(frozen=True)
class Config:
    """Search galleries of random directions for their k nearest rows, with our search and with FAISS's IndexFlatIP.

    Every search starts from rows in memory: building the index is a part of the time, as is the normalization of probes
    in search_gallery. The three take turns, so that machine noise affects all alike.
    """

    probes: int = 5_000
    """Probes of a search."""
    galleries: tuple[int, ...] = (20_000, 50_000)
    """Numbers of rows that are searched."""
    sizes: tuple[int, ...] = (512, 128)
    """D."""
    numbers: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)
    """k."""
    among: int = 100_000
    """Rows that are searched among themselves, for the nearest other row. 0: none."""
    contestants: tuple[Literal["nearest_class", "search_gallery", "IndexFlatIP"], ...] = (OURS, GALLERY, FAISS)
    """What is timed."""
    repeats: int = 3
    """Repetitions of a search, after one that is not timed. The search among rows themselves is done once."""
    checked: int = 200
    """Probes whose answers are checked in float64."""
    threads: int = 2
    """Threads of all."""
    output: Path | None = None
    """JSON file to write."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.search")
    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    rng = np.random.default_rng(0)
    mark("cpu")
    rows = []
    for size in config.sizes:
        for gallery in config.galleries:
            probes, references = unit_rows(rng, config.probes, size), unit_rows(rng, gallery, size)
            rows += [search(config, probes, references, k) for k in config.numbers]
        if config.among:
            rows.append(search(config, unit_rows(rng, config.among, size), None, SELF_SEARCH_K))
    write_study(
        "benchmarks.search",
        config,
        {
            "faiss": version("faiss-cpu"),
            "compiled": faiss.get_compile_options(),
            "peak_bytes": high_water("cpu"),
            "rows": rows,
        },
    )


def unit_rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    rows = rng.standard_normal((count, size), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def search(config: Config, probes: np.ndarray, references: np.ndarray | None, k: int) -> dict[str, Any]:
    """Times, and the share of probes with the answer of float64. Without references, other probes are searched."""
    query = torch.from_numpy(probes)
    others = None if references is None else torch.from_numpy(references)
    contestants: dict[str, Callable[[], np.ndarray]] = {
        OURS: lambda: F.nearest_class(query, others, k=k).index.view(-1, k).numpy(),
        FAISS: lambda: search_faiss(probes, references, k),
    }
    if references is not None:
        gallery = enroll(references, np.arange(len(references)))
        contestants[GALLERY] = lambda: search_gallery(probes, gallery, k, progress=show_progress).identity
    contestants = {name: run for name, run in contestants.items() if name in config.contestants}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, np.ndarray] = {}
    untimed = 0 if references is None else 1
    for repeat in range(config.repeats + 1 if untimed else 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            answers[name] = run()
            if repeat >= untimed:  # the first starts threads and allocates memory
                seconds[name].append(time.perf_counter() - started)
    exact = search_float64(
        probes[: config.checked], probes if references is None else references, k, references is None
    )
    row: dict[str, Any] = {
        "probes": len(probes), "gallery": None if references is None else len(references), "size": probes.shape[1],
        "k": k,
    }  # fmt: skip
    for name, taken in seconds.items():
        as_exact = float((answers[name][: len(exact)] == exact).all(axis=1).mean())
        row[name] = {"seconds": statistics.median(taken), "least": min(taken), "as_float64": as_exact}
    if FAISS in seconds:
        row["ratio"] = {name: row[FAISS]["seconds"] / row[name]["seconds"] for name in seconds if name != FAISS}
    print(describe(row), flush=True)
    return row


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"{done:,} of {total:,} probes", end="\r", file=sys.stderr)


def search_faiss(probes: np.ndarray, references: np.ndarray | None, k: int) -> np.ndarray:
    index = faiss.IndexFlatIP(probes.shape[1])
    index.add(probes if references is None else references)
    if references is not None:
        return index.search(probes, k)[1]
    found = index.search(probes, k + 1)[1]  # a probe is its own nearest row
    others = found != np.arange(len(probes))[:, None]
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(probes), k)


def search_float64(probes: np.ndarray, references: np.ndarray, k: int, among: bool) -> np.ndarray:
    """Rows (n, k) by brute force; with `among`, the probes are the first references and do not find themselves."""
    cosine = np.concatenate(
        [probes.astype(np.float64) @ part.astype(np.float64).T for part in np.array_split(references, 50)], axis=1
    )
    if among:
        np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


def describe(row: dict[str, Any]) -> str:
    where = "among themselves" if row["gallery"] is None else f"in {row['gallery']:,}"
    times = ", ".join(f"{name} {row[name]['seconds']:.3f} s" for name in (OURS, GALLERY, FAISS) if name in row)
    ratios = ", ".join(f"{ratio:.2f}x" for ratio in row.get("ratio", {}).values())
    return f"{row['probes']:,} {where}, D = {row['size']}, k = {row['k']}: {times}" + (f"; {ratios}" if ratios else "")


if __name__ == "__main__":
    main()
