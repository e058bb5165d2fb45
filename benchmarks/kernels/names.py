"""Names of the suites and contestants of this study, and the problems that are published. Programs find results by
these names."""

from __future__ import annotations

from fused_margin.benchmark.problems import Shape

MACHINE = "machine"
EXPONENT_SUM, PROBABILITIES, NEAREST = "exponent sum", "probabilities", "nearest class"
HALF_STEP, LAUNCH_BOUND = "half-precision step", "launch-bound step"
KERNELS = (EXPONENT_SUM, PROBABILITIES, NEAREST)
# Timed without the host's launches, which the launch-bound suite includes.
QUEUED = (MACHINE, *KERNELS, HALF_STEP)
SUITES = (*QUEUED, LAUNCH_BOUND)

STEP = Shape(1024, 512, 100_000)  # also of the exponent sum and of the probabilities
CLASSES = Shape(128, 512, 100_000)  # of the nearest class, which does not use N
LARGE = (Shape(1024, 512, 1_000_000), Shape(1024, 512, 2_000_000))
SMALL = Shape(128, 512, 10_000)
SQUARE_SHAPE = Shape(8192, 8192, 8192)

# The machine, and each kernel
COPY, SQUARE = "device-to-device copy", "square product, fp16"
CUBLAS, CALL = "cuBLAS, fp16", "whole call"

# Steps in half precision
THREE, FOUR = "three products, fp16", "four products, fp16"
TEXTBOOK, LEAN = "eager textbook, fp16 autocast", "eager lean, fp16 autocast"
COMPILED, RECOMPUTING = "compiled lean, fp16 autocast", "compiled lean, recomputing"
CUT, LIGER, LINEAR = "cut-cross-entropy, exact", "Liger", "F.linear_cross_entropy, fp16"
DEFAULT, NOTHING_KEPT, NORMFACE, GRAPH = "", "nothing kept", "NormFace", "CUDA graph"


def ours(backend: str, detail: str = DEFAULT) -> str:
    """Name of our contestant that runs on `backend`."""
    return f"ours, {backend}{detail and ', '}{detail}"
