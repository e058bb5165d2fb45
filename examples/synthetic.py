"""Synthetic identities for the examples: each class is a Gaussian around its own center."""

import torch
from torch import Tensor, nn

CLASSES, INPUTS, EMBEDDING_SIZE = 50, 32, 16


def batches(steps: int, batch_size: int = 64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(inputs (N, INPUTS), labels (N,)) for each step."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(0))
    result = []
    for _ in range(steps):
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, INPUTS, generator=generator)
        result.append((centers[labels] + 0.3 * noise, labels))
    return result


def make_backbone() -> nn.Module:
    """A network from inputs to embeddings."""
    return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, EMBEDDING_SIZE))
