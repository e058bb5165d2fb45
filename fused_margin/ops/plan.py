"""How one call divides the classes into chunks, and how many chunks' exponentials it keeps, within workspace_mb."""

import math
from dataclasses import dataclass

import torch

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
    kept: int  # leading chunks whose exponentials are kept for the backward

    @property
    def chunks(self) -> int:
        return -(-self.classes // self.chunk)

    @property
    def kept_classes(self) -> int:
        return min(self.kept * self.chunk, self.classes)

    def bounds(self, k: int) -> tuple[int, int]:
        return k * self.chunk, min((k + 1) * self.chunk, self.classes)


def make_plan(
    samples: int, weight: torch.Tensor, compute: torch.dtype, *, nearest: bool, keep: bool, workspace_bytes: int
) -> Plan:
    """samples is 0 where only the nearest classes are wanted. Forward and backward of one call make the same plan."""
    classes, size = weight.shape
    item = 8 if compute == torch.float64 else 4
    device = weight.device.type if weight.device.type in CHUNK_BYTES else "cpu"
    room = workspace_bytes // 2 if nearest else workspace_bytes  # the other half is the tile's
    target = min(CHUNK_BYTES[device], room)
    # what a class of a chunk takes: its products, and a copy of its weights and of their gradient where
    # the caller's own memory cannot hold them in the compute type
    per_class = item * (max(samples, 1) + (0 if weight.dtype == compute and weight.is_contiguous() else 2 * size))
    chunk = target // max(per_class, item * size)
    if nearest:  # chunks are then the sides of tiles
        chunk = min(chunk, math.isqrt(min(TILE_BYTES[device], room) // item))
    chunk = min(max(chunk // SMALLEST_CHUNK * SMALLEST_CHUNK, SMALLEST_CHUNK), max(classes, 1))
    chunks = -(-classes // chunk)
    kept = 0
    if keep and samples:
        copies = chunk * (per_class - item * samples) + (chunk * chunk * item if nearest else 0)
        if samples * classes * item <= workspace_bytes - copies:  # then no chunk needs a buffer of its own
            kept = chunks
        else:
            kept = max(workspace_bytes - max(target, chunk * per_class + copies), 0) // (samples * chunk * item)
    return Plan(classes, chunk, min(kept, chunks))
