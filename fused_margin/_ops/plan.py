"""How one call divides the classes into chunks, and how many chunks it keeps something of, within workspace_mb."""

import math
from dataclasses import dataclass

import torch

from fused_margin._ops.backends.select import PORTABLE
from fused_margin._ops.inputs import Problem

# Chunks as large as stay in cache between the product that writes them and the kernel that reads them;
# on a GPU as large as keeps the launches few.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
SMALLEST_CHUNK = 64
# A tile of weight @ weight.T is square. The smaller it is, the closer the upper triangle is to half the
# square; this small, its product is as fast as a large one's.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}


@dataclass(frozen=True)
class Plan:
    classes: int
    chunk: int  # classes in every chunk but the last
    kept: int  # leading chunks of which something is kept for the backward

    @property
    def chunks(self) -> int:
        return -(-self.classes // self.chunk)

    @property
    def kept_classes(self) -> int:
        return min(self.kept * self.chunk, self.classes)

    def bounds(self, k: int) -> tuple[int, int]:
        return k * self.chunk, min((k + 1) * self.chunk, self.classes)


def whole_chunk(classes: int, most: int, sub_centers: int = 1) -> int:
    """A chunk of at most `most` classes, a multiple of SMALLEST_CHUNK and at least that, unless there are fewer."""
    smallest = SMALLEST_CHUNK * sub_centers  # the sub-centers of a class stay together
    return min(max(most // smallest * smallest, smallest), max(classes, 1))


def device_type(problem: Problem) -> str:
    return problem.weight.device.type if problem.weight.device.type in CHUNK_BYTES else "cpu"


def nearest_in_chunks(problem: Problem) -> bool:
    """Whether the nearest classes are looked for chunk by chunk, without a search: on a GPU that would wait for answers."""
    return problem.nearest and problem.known_index is None and not is_searched(problem)


def is_searched(problem: Problem) -> bool:
    return problem.weight.device.type == "cpu" and problem.products == PORTABLE


def gradient_in_place(problem: Problem) -> bool:
    """Whether the caller's own weight gradient can hold a chunk's while it is computed."""
    return problem.weight.dtype == problem.compute and problem.weight.is_contiguous()


def portable_plan(problem: Problem, keep: bool) -> Plan:
    """Exponentials are kept. Forward and backward of one call make the same plan."""
    samples, classes, size, workspace = problem.samples, problem.classes, problem.size, problem.workspace_bytes
    item = 8 if problem.compute == torch.float64 else 4
    device = device_type(problem)
    room = workspace // 2 if nearest_in_chunks(problem) else workspace  # the other half is the tile's
    target = min(CHUNK_BYTES[device], room)
    # what a class of a chunk takes: its products, and a copy of its weights and of their gradient where
    # the caller's own memory cannot hold them in the compute type
    copies = 0 if gradient_in_place(problem) else 2
    copies += 2 if nearest_in_chunks(problem) else 0  # unit rows of the two sides of a tile
    per_class = item * (max(samples, 1) + copies * size)
    chunk = target // max(per_class, item * size)
    if nearest_in_chunks(problem):  # chunks are then the sides of tiles
        chunk = min(chunk, math.isqrt(min(TILE_BYTES[device], room) // item))
    chunk = whole_chunk(classes, chunk, problem.sub_centers)
    chunks = -(-classes // chunk)
    kept = 0
    if keep and samples:
        beside = chunk * (per_class - item * samples) + (chunk * chunk * item if nearest_in_chunks(problem) else 0)
        if samples * classes * item <= workspace - beside:  # then no chunk needs a separate buffer
            kept = chunks
        else:
            kept = max(workspace - max(target, chunk * per_class + beside), 0) // (samples * chunk * item)
    return Plan(classes, chunk, min(kept, chunks))


def tensor_plan(problem: Problem, keep: bool, width: int, parts: int) -> Plan:
    """Operands, `parts` halves of `width` a class, are kept: exponentials would be too wide for fp16 before their sum is known."""
    samples, classes, workspace = problem.samples, problem.classes, problem.workspace_bytes
    operand_bytes = 2 * parts * width
    # the chunk's operand, another one to compare it with, exponentials, and a copy of the gradient
    per_class = operand_bytes * (2 if nearest_in_chunks(problem) else 1) + 2 * parts * samples
    per_class += 0 if gradient_in_place(problem) else 4 * problem.size
    chunk = whole_chunk(classes, min(CHUNK_BYTES[device_type(problem)], workspace) // per_class)
    chunks = -(-classes // chunk)
    kept = max(workspace - chunk * per_class, 0) // (chunk * operand_bytes) if keep and samples else 0
    return Plan(classes, chunk, min(kept, chunks))
